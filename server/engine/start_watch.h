// StartWatch: whether a process that starts gets on, until its ranks serve. What hangs then (a read from a file system
// that is gone, a driver's call, a rank in its warm-up) cannot be ended, nor waited for without end: a thread looks,
// and tells whoever can end the process.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "server/base/clock.h"
#include "server/base/status.h"

namespace altiplano {

// One part of a start, and since when nobody has got on in it. It has no clock and no lock.
class StartPhase {
 public:
  // How far a rank has come, as a number that changes as it gets on; nullopt: it has done its part.
  using Progress = std::function<std::optional<uint64_t>(size_t index)>;

  // what: "the warm-up". ranks: how they are called, by index ("3", "3 (GPU 1)"); none: nothing is seen of what goes
  // on.
  StartPhase(std::string what, std::vector<std::string> ranks, Progress progress, TimePoint now);

  // Some rank has failed for good: the others are not waited for longer than they need to notice.
  void GiveUp(const Status& why);
  // DEADLINE_EXCEEDED, naming the phase and who has not done its part, when no rank has got on for `patience`.
  Status Look(TimePoint now, std::chrono::milliseconds patience);

 private:
  std::vector<std::optional<uint64_t>> Progresses() const;

  const std::string what_;
  const std::vector<std::string> ranks_;
  const Progress progress_;
  std::vector<std::optional<uint64_t>> seen_;
  TimePoint since_;
  Status failure_;
};

class StartWatch {
 public:
  // hung: gets what StartPhase::Look says, once, on the watch's thread. Null, or no patience: nobody looks.
  // began: null, or told what begins, on the thread that calls Begin.
  StartWatch(std::chrono::milliseconds patience, std::function<void(const Status&)> hung,
             std::function<void(const std::string& what)> began = {});
  ~StartWatch();

  // From here on, until End or the next Begin; `progress` is called on the watch's thread.
  void Begin(std::string what, std::vector<std::string> ranks = {}, StartPhase::Progress progress = {});
  void GiveUp(const Status& why);  // see StartPhase. Any thread
  void End();                      // what follows has a deadline of its own

 private:
  void Loop();

  const std::chrono::milliseconds patience_;
  const std::function<void(const Status&)> hung_;
  const std::function<void(const std::string&)> began_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::optional<StartPhase> phase_;  // guarded by mutex_
  bool stop_ = false;                // guarded by mutex_
  std::thread thread_;
};

}  // namespace altiplano
