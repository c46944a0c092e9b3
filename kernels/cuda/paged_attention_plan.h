// Launch geometry of paged attention. It may depend on the step: a row's context is always cut into the same splits,
// each worked on alone and folded into the row's state in order, so that splitting changes no bit of a result. The one
// choice that does is whether a sequence is the prefill kernel's; it depends on the sequence's own rows and on the
// step's size.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/cuda/launch_shape.h"

namespace altiplano::cuda {

// The queries of a sequence and the heads that share a KV head are rows, i-th query times group plus head, in tiles.
inline constexpr int kAttentionRows = 16;
inline constexpr int64_t kAttentionSplit = 512;  // keys
inline constexpr uint32_t kAttentionThreads = 128;
// Fewer blocks than this leave a GPU of 132 multiprocessors idle, and contexts are then split over blocks.
inline constexpr int64_t kEnoughAttentionBlocks = 528;

// The prefill kernel: tiles of 128 rows for sequences that fill at least one, keys 64 at a time.
inline constexpr int kPrefillRows = 128;
inline constexpr int kPrefillKeys = 64;
inline constexpr int kFewestPrefillRows = kPrefillRows;
inline constexpr int kPrefillSlots = 8;      // of keys or of values, in the ring
inline constexpr int kPrefillConsumers = 8;  // warps of 16 rows
// Two warpgroups that consume, and one for the producer: registers are given back by whole warpgroups.
inline constexpr uint32_t kPrefillThreads = 32 * (kPrefillConsumers + 4);

// The ring, the tile's queries, the mbarriers and what fills their 16 bytes up.
constexpr uint32_t PrefillSharedBytes(int64_t dim) {
  return static_cast<uint32_t>((kPrefillSlots * kPrefillKeys + kPrefillRows) * dim * 2 + (2 * kPrefillSlots + 2) * 8);
}

struct AttentionSizes {
  int64_t tokens = 0, sequences = 0, q_heads = 0, kv_heads = 0, dim = 0;
  int64_t most_context = 0;  // that a block table has room for
  bool may_prefill = false;  // whether the prefill kernel takes operands like these
};

struct AttentionPlan {
  bool prefill = false;  // sequences of at least kFewestPrefillRows rows are the prefill kernel's
  LaunchShape prefill_attend;
  LaunchShape attend;
  bool split = false;  // each block takes one split of a tile and leaves its state in scratch for `combine`
  int64_t splits = 1;  // of the longest context
  size_t scratch_bytes = 0;
  LaunchShape combine;
};

// Of the kernel on tensor cores: q, the state, each warp's ring, and the sums and states that the warps merge.
constexpr uint32_t MmaAttentionSharedBytes(int64_t dim) {
  const int64_t ring = 2 * 2 * 16 * dim * 2, merged = kAttentionRows * (64 + 8) * 4 + kAttentionRows * 8;
  return static_cast<uint32_t>(kAttentionRows * (dim * 2 + dim * 4 + 8) + kAttentionThreads / 32 * (ring + merged));
}

// Of the kernel that works without matrix instructions: q, the scores of a split, the state.
constexpr uint32_t PlainAttentionSharedBytes(int64_t dim) {
  return static_cast<uint32_t>(4 * (2 * kAttentionRows * ((dim + 3) / 4 * 4) + kAttentionRows * kAttentionSplit));
}

// The lengths are known to the GPU alone: grids are as large as any lengths with these sizes need, and blocks without a
// tile return.
constexpr AttentionPlan PlanPagedAttention(const AttentionSizes& s, uint32_t shared_bytes, size_t scratch_bytes) {
  AttentionPlan plan;
  const int64_t group = s.q_heads / s.kv_heads;
  int64_t rows = s.tokens * group;
  // A step of decodes has as many tokens as sequences and must not pay for a kernel that finds nothing.
  plan.prefill = s.may_prefill && (s.tokens - s.sequences + 1) * group >= kFewestPrefillRows;
  if (plan.prefill) {
    const int64_t full = rows / kPrefillRows;
    plan.prefill_attend = {.grid_x = static_cast<uint32_t>(s.kv_heads),
                           .grid_y = static_cast<uint32_t>(full + std::min(full, s.sequences)),
                           .threads = kPrefillThreads,
                           .shared_bytes = PrefillSharedBytes(s.dim)};
    rows = std::min(rows, s.sequences * (kFewestPrefillRows - 1));
  }
  // No tile is shared by sequences, and each may have one that is not full.
  const int64_t tiles = std::min(rows, rows / kAttentionRows + s.sequences);
  plan.splits = std::max<int64_t>(1, (s.most_context + kAttentionSplit - 1) / kAttentionSplit);
  // Of each row and split: dim sums, the maximum and the sum of weights.
  plan.scratch_bytes = static_cast<size_t>(s.tokens * s.q_heads * plan.splits * (s.dim + 2) * 4);
  plan.split = plan.splits > 1 && tiles * s.kv_heads < kEnoughAttentionBlocks && plan.scratch_bytes <= scratch_bytes;
  plan.attend = {.grid_x = static_cast<uint32_t>(tiles),
                 .grid_y = static_cast<uint32_t>(s.kv_heads),
                 .grid_z = static_cast<uint32_t>(plan.split ? plan.splits : 1),
                 .threads = kAttentionThreads,
                 .shared_bytes = shared_bytes};
  plan.combine = {.grid_x = static_cast<uint32_t>(s.tokens),
                  .grid_y = static_cast<uint32_t>(s.q_heads),
                  .threads = kAttentionThreads};
  return plan;
}

}  // namespace altiplano::cuda
