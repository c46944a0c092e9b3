// Launch geometry of Linear. Which kernel runs and how K is cut depend on dtype, N and K alone, so that a row of the
// result does not depend on how many there are; how many tokens share a pass over the weights does not show in a bit.
#pragma once

#include <cstdint>

#include "kernels/cuda/launch_shape.h"

namespace altiplano::cuda {

inline constexpr uint32_t kLinearThreads = 128;
inline constexpr int kLinearWarps = kLinearThreads / 32;

// ---- tensor cores: a block makes 16 columns of out for up to 8 tiles of 8 tokens, its warps sharing out K.
inline constexpr int64_t kMmaLinearColumns = 16;
inline constexpr int kMmaLinearPadded =
    20;  // of 16 columns in shared memory: the lanes of a store differ in their banks

// Tiles of 8 tokens that one pass over the weights serves: 1 and 2 while decoding, 8 beyond.
constexpr int MmaLinearTokenTiles(int64_t tokens) {
  return tokens <= 8 ? 1 : tokens <= 16 ? 2 : 8;
}

constexpr LaunchShape MmaLinearPlan(int64_t tokens, int64_t n) {
  const int64_t block_tokens = 8 * MmaLinearTokenTiles(tokens);
  return {.grid_x = static_cast<uint32_t>((n + kMmaLinearColumns - 1) / kMmaLinearColumns),
          .grid_y = static_cast<uint32_t>((tokens + block_tokens - 1) / block_tokens),
          .threads = kLinearThreads,
          .shared_bytes = static_cast<uint32_t>(kLinearWarps * block_tokens * kMmaLinearPadded * 4)};
}

// ---- plain: each warp makes one column of out for up to 8 tokens.
inline constexpr int kPlainLinearTokens = 8;
constexpr LaunchShape PlainLinearPlan(int64_t tokens, int64_t n) {
  return {.grid_x = static_cast<uint32_t>((n + kLinearWarps - 1) / kLinearWarps),
          .grid_y = static_cast<uint32_t>((tokens + kPlainLinearTokens - 1) / kPlainLinearTokens),
          .threads = kLinearThreads};
}

}  // namespace altiplano::cuda
