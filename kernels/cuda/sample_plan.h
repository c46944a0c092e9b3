// Launch geometry and scratch of Sample and Score.
#pragma once

#include <algorithm>
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

// A row is up to 16 blocks' work, of at least an element for each thread. No result depends on the number.
inline constexpr int64_t kMostSampleBlocks = 16;
constexpr int64_t SampleSlice(int64_t vocab) {
  const int64_t threads = kSampleThreads, slice = (vocab + kMostSampleBlocks - 1) / kMostSampleBlocks;
  return (slice + threads - 1) / threads * threads;
}
inline constexpr int64_t kSampleBins = 2048;
// Elements of a slice, whose weights a block sums up in words of 32 bits.
inline constexpr int64_t kMostSampleSlice = 1 << 18;
static_assert(SampleSlice(kMostVocabulary) <= kMostSampleSlice);

// Scratch: [R] results, what the blocks of each row of a launch tell each other, then [R, V] adjusted logits.
inline constexpr size_t kSampleRowBytes = 17 * 1024;
constexpr size_t SampleRowsBytes(int64_t rows) {
  return static_cast<size_t>(std::min(rows, kSampleRowsPerLaunch)) * kSampleRowBytes;
}
constexpr size_t SampleResultBytes(int64_t rows) {
  return (static_cast<size_t>(rows) * sizeof(SampleResult) + 255) / 256 * 256;
}
constexpr size_t SampleScratchBytes(int64_t rows, int64_t vocab) {
  return SampleResultBytes(rows) + SampleRowsBytes(rows) + static_cast<size_t>(rows * vocab) * sizeof(float);
}

constexpr LaunchShape SamplePlan(int64_t rows, int64_t vocab) {
  const int64_t slice = SampleSlice(vocab);
  return {.grid_x = static_cast<uint32_t>((vocab + slice - 1) / slice),
          .grid_y = static_cast<uint32_t>(rows),
          .threads = kSampleThreads};
}
constexpr LaunchShape AdjustPlan(int64_t rows, int64_t vocab) {
  return {.grid_x = static_cast<uint32_t>((vocab + kAdjustThreads - 1) / kAdjustThreads),
          .grid_y = static_cast<uint32_t>(rows),
          .threads = kAdjustThreads};
}

}  // namespace altiplano::cuda
