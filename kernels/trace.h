// Ranges of the calling thread that a profiler shows beside what GPUs do: NVTX's in programs built with CUDA, where
// they cost a few nanoseconds while no profiler listens; nothing in others.
#pragma once

#include <cstdint>

namespace altiplano {

namespace cuda {
void BeginTraceRange(const char* name, uint64_t number);
void EndTraceRange();
}  // namespace cuda

// As long as it lives. `name` lives for ever; `number` tells ranges of the same name apart.
class TraceRange {
 public:
  TraceRange(const char* name, uint64_t number) { cuda::BeginTraceRange(name, number); }
  ~TraceRange() { cuda::EndTraceRange(); }
  TraceRange(const TraceRange&) = delete;
  TraceRange& operator=(const TraceRange&) = delete;
};

}  // namespace altiplano
