// Times of work on a GPU, by its own events.
#pragma once

#include <functional>
#include <string>

#include "kernels/device.h"

namespace altiplano::gpu {

// How much measuring a case is worth. The least is enough to see that it can be measured.
struct Effort {
  int runs = 9;
  double run_seconds = 0.004;  // far above the grain of events and the gap before the first kernel
  int most_calls = 2000;
  bool small = false;  // sizes may be less than the case says
};

struct Time {
  std::string error;  // empty, or what the device said
  double median = 0;  // seconds of one call
  double least = 0;
  int calls = 0;  // in each of the measured runs
};

// call(stream, turn) is made once for each turn of a run that takes milliseconds; the median is that of several runs.
// captured: a run is a CUDA graph, in which the host's time for a launch does not show.
Time Measure(Stream& stream, bool captured, const std::function<void(Stream&, int turn)>& call);

// Reads `bytes` once, 16 at a time, and keeps nothing.
void ReadMemory(Stream& stream, const void* data, size_t bytes);

}  // namespace altiplano::gpu
