// Links between GPUs of different nodes, by NCCL.
#pragma once

#include <chrono>
#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "kernels/comm/link.h"
#include "kernels/comm/nccl_api.h"

namespace altiplano {

// One end; it sends, or it receives.
struct NcclLinkEnd {
  std::shared_ptr<Link> wire;  // between the same ends, with CPU memory: introduces them, and ends when either does
  bool sends = false;
  int gpu = 0;            // ordinal
  size_t most_bytes = 0;  // of a tensor; of an end that sends
  std::string peer;       // for errors: what the other end is called
};

// All ends of this process at once, while the other processes make theirs. Calls return when they are issued; true then
// means that nothing was wrong yet: ask error(), while the stream is on its way to the call and when it has come. A
// tensor that has not come after `patience` ends the link. Empty with *error: a peer that does not come, no memory,
// what NCCL says.
std::vector<std::shared_ptr<Link>> MakeNcclLinks(const NcclApi& api, const std::vector<NcclLinkEnd>& ends,
                                                 std::chrono::milliseconds patience, std::string* error);

}  // namespace altiplano
