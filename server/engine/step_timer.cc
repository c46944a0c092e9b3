#include "server/engine/step_timer.h"

namespace altiplano {

std::unique_ptr<StepTimer> StepTimer::Create(const Stream& stream) {
  std::unique_ptr<StepTimer> timer(new StepTimer);
  for (Mark& mark : timer->marks_) {
    mark.begin = StreamEvent::Create(stream, /*timed=*/true);
    mark.end = StreamEvent::Create(stream, /*timed=*/true);
    if (mark.begin == nullptr || mark.end == nullptr) return nullptr;
  }
  return timer;
}

void StepTimer::End(Stream& stream, const StepTimes& times, TimePoint issued_since) {
  Mark& mark = marks_[begun_++ % marks_.size()];
  mark.end->Record(stream);
  mark.times = times;
  mark.times.issue = std::chrono::steady_clock::now() - issued_since;
}

StepTimes StepTimer::Take() {
  const Mark& mark = marks_[taken_ % marks_.size()];
  StepTimes times = mark.times;
  times.device = mark.end->Since(*mark.begin);
  if (taken_ > 0) times.idle = mark.begin->Since(*marks_[(taken_ - 1) % marks_.size()].end);
  ++taken_;
  return times;
}

}  // namespace altiplano
