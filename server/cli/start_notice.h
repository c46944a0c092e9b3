// What the log says of a signal that comes while a server starts: what goes on then may not be left in the middle, and
// takes its time.
#pragma once

#include <mutex>
#include <string>

namespace altiplano::cli {

// Any thread.
class StartNotice {
 public:
  void Begin(const std::string& what);  // "the warm-up": what goes on from now on
  void End();                           // it has started, or will not: others answer signals
  // The count-th one, "SIGTERM". True: the program is to end soon, whatever hangs. That is at the second signal, and
  // at the first while nothing has begun: a configuration is read, perhaps from where nothing comes.
  bool OnSignal(int count, const std::string& signal);

 private:
  std::mutex mutex_;  // guards what follows
  std::string what_;  // empty: nothing has begun
  bool ended_ = false;
};

}  // namespace altiplano::cli
