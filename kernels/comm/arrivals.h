// For links between GPUs: whether tensors that a stream waits for come, or have been waited for too long.
#pragma once

#include <chrono>
#include <cstdint>

namespace altiplano {

// Of one link, in order. Not synchronised.
class Arrivals {
 public:
  // One more has been issued to be received.
  void Expect() {
    if (come_ == expected_) since_ = Clock::now();
    ++expected_;
  }
  // has_come(n): the n-th, from 0 on, is there.
  template <typename HasCome>
  void Look(HasCome has_come) {
    for (; come_ < expected_ && has_come(come_); ++come_) since_ = Clock::now();
  }
  // As of the last Look: the next one has been waited for that long, since it was issued or since the one before came.
  bool Late(std::chrono::milliseconds patience) const { return come_ < expected_ && Clock::now() - since_ > patience; }

 private:
  using Clock = std::chrono::steady_clock;
  uint64_t expected_ = 0, come_ = 0;
  Clock::time_point since_;
};

}  // namespace altiplano
