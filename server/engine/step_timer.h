// StepTimer: what a step costs the host, and how long its device worked on it and stood idle before.
#pragma once

#include <array>
#include <cstdint>
#include <memory>

#include "kernels/device.h"
#include "server/base/clock.h"

namespace altiplano {

struct StepTimes {
  int32_t sequences = 0;
  bool decodes = false;     // one token of each sequence, and nothing else
  bool from_graph = false;  // see RankWorker::CaptureDecodeGraphs
  Duration issue{};         // the host's, to enqueue the step; on the CPU that is to compute it
  Duration idle{};          // the device's, from the end of the step before to the begin of this one; 0 for the first
  Duration device{};        // from there to its end
};

// Begin, End: one thread, around each step's work on the stream. Take: another one, after End of the oldest step that
// it has not taken, which has ended. At most two steps are between Begin and Take.
class StepTimer {
 public:
  // Null when the device has no more events.
  static std::unique_ptr<StepTimer> Create(const Stream& stream);

  void Begin(Stream& stream) { marks_[begun_ % marks_.size()].begin->Record(stream); }
  // times: what the host knows but for `issue`, which is from `issued_since` until End has recorded the step's end.
  void End(Stream& stream, const StepTimes& times, TimePoint issued_since);
  StepTimes Take();

 private:
  struct Mark {
    std::unique_ptr<StreamEvent> begin, end;
    StepTimes times;
  };
  StepTimer() = default;

  std::array<Mark, 3> marks_;  // of those two, and of the one before them for its end
  uint64_t begun_ = 0;         // the first thread's
  uint64_t taken_ = 0;         // the other's
};

}  // namespace altiplano
