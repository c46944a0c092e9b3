// One rank's NCCL communicator. It does not block: a call may be under way, and Abort, of any thread, ends it.
//
// Calls may be captured in a StepGraph. NCCL gives a communicator up only when no graph holds a call of it: graphs are
// destroyed before the ranks of their communicator.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
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

  NcclRank(const NcclApi& api, int gpu) : api_(api), gpu_(gpu) {}
  ~NcclRank();

  // Each returns when it has been issued on the stream, or when that takes longer than patience, which aborts.
  std::string AllReduce(Stream& stream, const TensorView& x, std::chrono::milliseconds patience);
  std::string Send(Stream& stream, const void* data, size_t bytes, int to, std::chrono::milliseconds patience);
  std::string Receive(Stream& stream, void* data, size_t bytes, int from, std::chrono::milliseconds patience);
  // Memory of the rank's GPU for what is summed or sent again and again: NCCL's own, of which it knows, where the
  // library has that. All ranks ask for the same, before any call. For as long as this lives.
  std::string Allocate(size_t bytes, void** memory);

  // What went wrong on the device or with another rank since. *under_way: an earlier call still is.
  std::string Error(bool* under_way);
  // Kernels that wait for other ranks end. Never waits.
  void Abort();
  // Aborts and waits for the end, the communicator's where this is its last rank here: that all have been aborted, and
  // that no graph is left. Of several ranks all end before the first is destroyed, with what it allocated.
  void End();

 private:
  template <typename Call>
  std::string Issue(std::chrono::milliseconds patience, Call call);
  std::string Settle(std::chrono::milliseconds patience);  // until no call is under way
  void LetEnd(const std::string& error);
  std::string Sentence(NcclResult result) const;

  const NcclApi& api_;
  const int gpu_;
  // Of whoever calls Allocate, and the destructor.
  std::vector<Buffer> buffers_;
  std::vector<void*> allocated_;  // NCCL's
  std::mutex mutex_;              // guards what follows
  NcclComm* comm_ = nullptr;
  std::string aborted_ = "aborted";  // why, where comm_ is null
  std::thread ending_;               // in NCCL's abort
  bool ended_ = false;               // that is over
  std::condition_variable changed_;
};

}  // namespace altiplano
