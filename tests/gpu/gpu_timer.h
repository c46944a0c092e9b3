// Times of work on a GPU, by its own events.
#pragma once

#include <functional>
#include <string>

#include "kernels/device.h"

namespace altiplano::gpu {

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
