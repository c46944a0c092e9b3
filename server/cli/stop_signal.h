// SIGTERM, SIGINT and SIGHUP (but under nohup) as something to wait for. Blocked from construction on, in this thread
// and all that it starts, so that a signal at any moment is seen exactly once and none kills the process.
#pragma once

#include <condition_variable>
#include <functional>
#include <mutex>
#include <string>
#include <thread>

#include "server/base/clock.h"

namespace altiplano::cli {

class StopSignal {
 public:
  // on_signal(n, name) runs on a thread of its own for the n-th signal ("SIGTERM"), after count() shows it.
  using OnSignal = std::function<void(int n, const std::string& name)>;
  explicit StopSignal(OnSignal on_signal = {});
  ~StopSignal();  // they stay blocked: the process is about to end

  int count();
  std::string first();  // its name; "" while count() is 0
  void WaitForCount(int count);
  // False: `deadline` came first.
  bool WaitForCount(int count, TimePoint deadline);
  // False: `otherwise` became true first. It is asked again after each Wake().
  bool WaitForCount(int count, const std::function<bool()>& otherwise);
  void Wake();  // any thread

 private:
  void Loop();

  const OnSignal on_signal_;
  std::mutex mutex_;
  std::condition_variable changed_;
  int count_ = 0;
  std::string first_;
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace altiplano::cli
