// Streams of the simulated GPU, and the graphs that they record. Private to the simulator.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace altiplano::sim {

// One op, with all that it needs by value but the stream that it runs on.
using Operation = std::function<void(void* stream)>;

void* CreateStream();
void DestroyStream(void* stream);
// Which GPU it is a stream of: equal for those of one.
const void* GpuOfStream(const void* stream);
// Runs it, or records it while the stream is captured. Whatever runs on a stream comes through here.
void Issue(void* stream, Operation operation);

// As cudaStreamBeginCapture in the mode of one thread, and cudaStreamEndCapture: empty or an error, a graph or null
// with *error.
std::string BeginCapture(void* stream);
void* EndCapture(void* stream, size_t* operations, std::string* error);
// Which of all captures of all streams the stream is in, from 1; 0: in none.
uint64_t CaptureOf(const void* stream);
void LaunchGraph(void* graph, void* stream);
void DestroyGraph(void* graph);

// True where the calling thread captures a stream, in which a call like `call` is forbidden: the capture is then void.
bool ForbiddenInCapture(const char* call);

}  // namespace altiplano::sim
