// Time as everything below main sees it: a monotonic clock that tests can hold and turn.
#pragma once

#include <atomic>
#include <chrono>

namespace altiplano {

using Duration = std::chrono::nanoseconds;
using TimePoint = std::chrono::time_point<std::chrono::steady_clock, Duration>;

inline constexpr TimePoint kNever = TimePoint::max();

class Clock {
 public:
  virtual ~Clock() = default;
  virtual TimePoint Now() const = 0;  // any thread
  static const Clock& Real();
};

// Stands still until told otherwise. Any thread.
class FakeClock : public Clock {
 public:
  TimePoint Now() const override { return TimePoint(Duration(now_.load(std::memory_order_relaxed))); }
  void Advance(Duration by) { now_.fetch_add(by.count(), std::memory_order_relaxed); }

 private:
  std::atomic<Duration::rep> now_{0};
};

inline double Seconds(Duration d) {
  return std::chrono::duration<double>(d).count();
}

inline double Milliseconds(Duration d) {
  return Seconds(d) * 1e3;
}

}  // namespace altiplano
