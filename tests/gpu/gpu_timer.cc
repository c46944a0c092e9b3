#include "tests/gpu/gpu_timer.h"

#include <algorithm>
#include <chrono>
#include <memory>
#include <vector>

namespace altiplano::gpu {

namespace {

class Timer {
 public:
  explicit Timer(Stream& stream) : stream_(stream) {}

  // lead: the same work goes before it, so that the GPU is busy until it begins. Neither what the host does to launch
  // the first op is in it then, nor a clock that had gone down.
  double Seconds(const std::function<void()>& work, bool lead) {
    if (lead) work();
    begin_->Record(stream_);
    work();
    end_->Record(stream_);
    end_->Wait();  // Measure asks the stream for its error
    return std::chrono::duration<double>(end_->Since(*begin_)).count();
  }

 private:
  Stream& stream_;
  const std::unique_ptr<StreamEvent> begin_ = StreamEvent::Create(stream_, /*timed=*/true);
  const std::unique_ptr<StreamEvent> end_ = StreamEvent::Create(stream_, /*timed=*/true);
};

}  // namespace

Time Measure(Stream& stream, bool captured, const std::function<void(Stream&, int turn)>& call) {
  Time time;
  call(stream, 0);  // loads the kernel
  if (time.error = stream.Synchronize(); !time.error.empty()) return time;
  Timer timer(stream);
  const double once = timer.Seconds([&] { call(stream, 1); }, /*lead=*/false);
  constexpr Effort kEffort;
  time.calls = std::clamp(static_cast<int>(kEffort.run_seconds / std::max(once, 1e-7)), 3, kEffort.most_calls);
  const auto all = [&] {
    for (int turn = 0; turn < time.calls; ++turn) call(stream, turn);
  };
  std::function<void()> run = all;
  std::unique_ptr<StepGraph> graph;
  if (captured) {
    graph = StepGraph::Capture(
        stream, [&] { return all(), true; }, &time.error);
    if (graph == nullptr) return time;
    run = [&] { graph->Launch(stream); };
  }
  std::vector<double> seconds;
  for (int i = 0; i < kEffort.runs; ++i) seconds.push_back(timer.Seconds(run, /*lead=*/true) / time.calls);
  time.error = stream.Synchronize();
  std::sort(seconds.begin(), seconds.end());
  time.least = seconds.front();
  time.median = seconds[seconds.size() / 2];
  return time;
}

}  // namespace altiplano::gpu
