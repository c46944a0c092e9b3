// How much scratch attention has a use for, over all the steps that a model may be given.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "kernels/cuda/paged_attention_plan.h"

namespace altiplano::cuda {

// With more, only the contexts of many long sequences at one time would be split that now are not.
inline constexpr size_t kMostAttentionScratch = size_t{64} << 20;

// `largest`: of all steps.
constexpr size_t AttentionScratchBytes(const AttentionSizes& largest) {
  AttentionSizes s = largest;
  // With more rows than these in the tiles of each KV head there are enough blocks without splitting.
  const int64_t rows = kAttentionRows * (kEnoughAttentionBlocks / s.kv_heads + 1);
  s.tokens = std::min(s.tokens, std::max<int64_t>(1, rows * s.kv_heads / s.q_heads));
  const AttentionPlan plan = PlanPagedAttention(s, 0, 0);
  return plan.splits == 1 ? 0 : std::min(plan.scratch_bytes, kMostAttentionScratch);
}

}  // namespace altiplano::cuda
