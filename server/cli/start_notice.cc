#include "server/cli/start_notice.h"

#include "server/base/log.h"

namespace altiplano::cli {

void StartNotice::Begin(const std::string& what) {
  std::lock_guard lock(mutex_);
  what_ = what;
}

void StartNotice::End() {
  std::lock_guard lock(mutex_);
  ended_ = true;
}

bool StartNotice::OnSignal(int count, const std::string& signal) {
  std::lock_guard lock(mutex_);
  if (ended_) return count == 2;
  if (what_.empty()) return count == 1;
  if (count == 1) {
    log::Info("a signal: the start ends as soon as it can",
              {{"signal", signal}, {"waits_for", what_}, {"a_second_signal", "ends the program within 5 s"}});
  } else if (count == 2) {
    log::Warn("a second signal: the program ends within 5 s", {{"signal", signal}, {"waits_for", what_}});
  }
  return count == 2;
}

}  // namespace altiplano::cli
