#include "tests/gpu/gpu_timer.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <memory>
#include <vector>

namespace altiplano::gpu {

namespace {

constexpr int kRuns = 9;
constexpr double kRunSeconds = 0.004;  // far above the grain of events and the gap before the first kernel
constexpr int kMostCalls = 2000;

class Timer {
 public:
  explicit Timer(Stream& stream) : stream_(static_cast<cudaStream_t>(stream.cuda_stream())) {
    cudaEventCreate(&begin_);
    cudaEventCreate(&end_);
  }
  ~Timer() {
    cudaEventDestroy(begin_);
    cudaEventDestroy(end_);
  }
  Timer(const Timer&) = delete;
  Timer& operator=(const Timer&) = delete;

  double Seconds(const std::function<void()>& work) {
    cudaEventRecord(begin_, stream_);
    work();
    cudaEventRecord(end_, stream_);
    cudaEventSynchronize(end_);
    float milliseconds = 0;
    cudaEventElapsedTime(&milliseconds, begin_, end_);
    return static_cast<double>(milliseconds) * 1e-3;
  }

 private:
  const cudaStream_t stream_;
  cudaEvent_t begin_ = nullptr, end_ = nullptr;
};

}  // namespace

Time Measure(Stream& stream, bool captured, const std::function<void(Stream&, int turn)>& call) {
  Time time;
  call(stream, 0);  // loads the kernel
  if (time.error = stream.Synchronize(); !time.error.empty()) return time;
  Timer timer(stream);
  const double once = timer.Seconds([&] { call(stream, 1); });
  time.calls = std::clamp(static_cast<int>(kRunSeconds / std::max(once, 1e-7)), 3, kMostCalls);
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
  run();
  std::vector<double> seconds;
  for (int i = 0; i < kRuns; ++i) seconds.push_back(timer.Seconds(run) / time.calls);
  time.error = stream.Synchronize();
  std::sort(seconds.begin(), seconds.end());
  time.least = seconds.front();
  time.median = seconds[kRuns / 2];
  return time;
}

}  // namespace altiplano::gpu
