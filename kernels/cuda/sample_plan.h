// Launch geometry and scratch of Sample and Score.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/launch_shape.h"
#include "kernels/ops.h"

namespace altiplano::cuda {

inline constexpr uint32_t kSampleThreads = 512;
inline constexpr int kSampleWarps = kSampleThreads / 32;
inline constexpr int64_t kSampleRowsPerLaunch =
    32;                                     // their parameters travel as the kernel's own, which are at most 4 KB
inline constexpr int kBiasPerLaunch = 256;  // likewise
inline constexpr uint32_t kAdjustThreads = 256;

// Scratch: [R] results, then [R, V] adjusted logits, then [R, V] weights.
constexpr size_t SampleResultBytes(int64_t rows) {
  return (static_cast<size_t>(rows) * sizeof(SampleResult) + 255) / 256 * 256;
}
constexpr size_t SampleScratchBytes(int64_t rows, int64_t vocab) {
  return SampleResultBytes(rows) + static_cast<size_t>(rows * vocab) * 2 * sizeof(float);
}

constexpr LaunchShape SamplePlan(int64_t rows) {
  return {.grid_x = static_cast<uint32_t>(rows), .threads = kSampleThreads};
}
constexpr LaunchShape AdjustPlan(int64_t rows, int64_t vocab) {
  return {.grid_x = static_cast<uint32_t>((vocab + kAdjustThreads - 1) / kAdjustThreads),
          .grid_y = static_cast<uint32_t>(rows),
          .threads = kAdjustThreads};
}

}  // namespace altiplano::cuda
