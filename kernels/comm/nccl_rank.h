// One rank's NCCL communicator. It does not block: a call may be under way, and Abort, of any thread, ends it.
#pragma once

#include <chrono>
#include <cstddef>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "kernels/comm/nccl_api.h"
#include "kernels/device.h"
#include "kernels/tensor.h"

namespace altiplano {

// Where strings are returned: empty, or why it failed.
class NcclRank {
 public:
  // Of which communicator a rank is, and where.
  struct Place {
    int gpu = 0;
    NcclUniqueId id;
    int rank = 0, ranks = 1;
  };
  // All of this process at once, in the order of `places`. The other ranks of their communicators come meanwhile.
  static std::string Form(const NcclApi& api, const std::vector<Place>& places, std::chrono::milliseconds patience,
                          std::vector<std::unique_ptr<NcclRank>>* ranks);

  explicit NcclRank(const NcclApi& api) : api_(api) {}
  ~NcclRank() { Abort(); }

  // Each returns when it has been issued on the stream, or when that takes longer than patience.
  std::string AllReduce(Stream& stream, const TensorView& x, std::chrono::milliseconds patience);
  std::string Send(Stream& stream, const void* data, size_t bytes, int to, std::chrono::milliseconds patience);
  std::string Receive(Stream& stream, void* data, size_t bytes, int from, std::chrono::milliseconds patience);
  // Tells NCCL of memory that is sent from or received into again and again, where the library can be told. For as
  // long as this lives; before any call.
  void Register(const Buffer& memory);

  // What went wrong on the device or with another rank since. *under_way: an earlier call still is.
  std::string Error(bool* under_way);
  // Kernels that wait for other ranks end.
  void Abort();

 private:
  template <typename Call>
  std::string Issue(std::chrono::milliseconds patience, Call call);
  std::string Settle(std::chrono::milliseconds patience);  // until no call is under way
  std::string Sentence(NcclResult result) const;

  const NcclApi& api_;
  std::mutex mutex_;  // guards what follows
  NcclComm* comm_ = nullptr;
  std::vector<void*> registered_;  // handles
};

}  // namespace altiplano
