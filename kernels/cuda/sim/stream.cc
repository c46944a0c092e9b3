// What is issued on a stream runs at once, or goes into the graph that is being recorded. A recorded op keeps its
// arguments by value, as a node of a CUDA graph does: what should have changed before the graph is launched again, and
// was such an argument, shows in the results.
#include "kernels/cuda/sim/stream.h"

#include <atomic>
#include <memory>
#include <utility>
#include <vector>

#include "kernels/cuda/sim/sim.h"

namespace altiplano::sim {

namespace {

struct Graph {
  std::vector<Operation> operations;
};

struct SimulatedStream {
  std::unique_ptr<Graph> recording;  // null: not captured
  uint64_t capture = 0;              // the number of it
  std::string broken;                // by what the capture was
};

SimulatedStream& Of(void* stream) {
  return *static_cast<SimulatedStream*>(stream);
}

std::atomic<uint64_t> graph_launches{0}, captures{0};
thread_local SimulatedStream* captured = nullptr;  // by this thread

}  // namespace

void* CreateStream() {
  return new SimulatedStream();
}

void DestroyStream(void* stream) {
  delete static_cast<SimulatedStream*>(stream);
}

void Issue(void* stream, Operation operation) {
  SimulatedStream& to = Of(stream);
  if (to.recording != nullptr) {
    to.recording->operations.push_back(std::move(operation));
  } else {
    operation(stream);
  }
}

void Launch(void* stream, const Kernel& kernel) {
  Issue(stream, [kernel](void*) {
    if (StuckError().empty()) Stick(RunGrid(kernel.grid, kernel.body));
  });
}

std::string BeginCapture(void* stream) {
  if (captured != nullptr) return "the thread captures a stream already";
  captured = &Of(stream);
  captured->recording = std::make_unique<Graph>();
  captured->capture = ++captures;
  captured->broken.clear();
  return "";
}

void* EndCapture(void* stream, size_t* operations, std::string* error) {
  SimulatedStream& of = Of(stream);
  std::unique_ptr<Graph> graph = std::exchange(of.recording, nullptr);
  captured = nullptr;
  *error = of.broken;
  if (!error->empty()) return nullptr;
  *operations = graph->operations.size();
  return graph.release();
}

uint64_t CaptureOf(const void* stream) {
  const auto& of = *static_cast<const SimulatedStream*>(stream);
  return of.recording == nullptr ? 0 : of.capture;
}

void LaunchGraph(void* graph, void* stream) {
  if (ForbiddenInCapture("a launch of a graph")) return;
  ++graph_launches;
  for (const Operation& operation : static_cast<Graph*>(graph)->operations) Issue(stream, operation);
}

uint64_t GraphLaunches() {
  return graph_launches;
}

void DestroyGraph(void* graph) {
  delete static_cast<Graph*>(graph);
}

bool ForbiddenInCapture(const char* call) {
  if (captured == nullptr) return false;
  if (captured->broken.empty()) captured->broken = std::string(call) + " while a stream is captured";
  return true;
}

}  // namespace altiplano::sim
