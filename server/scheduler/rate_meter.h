// RateMeter: how many of something come in a second, over the last whole seconds. One thread at a time.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "server/base/clock.h"

namespace altiplano {

class RateMeter {
 public:
  void Add(TimePoint now, uint64_t count) {
    const int64_t second = Second(now);
    Bucket& bucket = buckets_[static_cast<size_t>(second) % kBuckets];
    if (bucket.second != second) bucket = {second, 0};
    bucket.count += count;
  }
  double PerSecond(TimePoint now) const {
    const int64_t second = Second(now);
    uint64_t sum = 0;
    for (const Bucket& bucket : buckets_) {
      if (bucket.second < second && bucket.second >= second - kWindow) sum += bucket.count;
    }
    return static_cast<double>(sum) / kWindow;
  }

 private:
  static constexpr size_t kBuckets = 8;
  static constexpr int64_t kWindow = 5;
  struct Bucket {
    int64_t second = -1000;
    uint64_t count = 0;
  };
  static int64_t Second(TimePoint t) { return t.time_since_epoch() / std::chrono::seconds(1); }
  std::array<Bucket, kBuckets> buckets_;
};

}  // namespace altiplano
