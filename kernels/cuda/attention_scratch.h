// How much scratch attention has a use for, over all the steps that a model may be given.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "kernels/cuda/paged_attention_plan.h"
#include "kernels/cuda/rows_plan.h"

namespace altiplano::cuda {

// With more, only many long tiles at one time would be cut that now are not.
inline constexpr size_t kMostAttentionScratch = size_t{64} << 20;

// Of a rank whose steps have at most so many tokens, and sequences so many in the cache.
constexpr size_t AttentionScratchBytes(const AttentionSizes& sizes, int64_t most_tokens, int64_t most_context) {
  const int64_t rows = most_tokens * (sizes.q_heads / sizes.kv_heads);
  const auto states = [&](int64_t tiles, int64_t tile_rows, int64_t split) {
    const int64_t splits = (most_context + split - 1) / split;
    return splits > 1 ? std::min(rows, tiles * tile_rows) * splits : 0;
  };
  // A worker's end cuts a tile; the prefill kernel's are cut only where they are fewer than multiprocessors.
  const int64_t most = states(MostAttentionWorkers(sizes), kAttentionRows, kAttentionSplit) +
                       states(CeilDivide(sizes.multiprocessors, sizes.kv_heads), kPrefillRows, kPrefillSplit);
  return std::min(static_cast<size_t>(most * sizes.kv_heads * (sizes.dim + 2) * 4), kMostAttentionScratch);
}

}  // namespace altiplano::cuda
