// Who does what in paged attention: one list for a step, made on the host from the step's lengths and read by all of
// its layers. Pure: no GPU is asked.
//
// A row's context is always cut into the same splits, each worked on alone and folded into the row's state in order.
// Where the list cuts a tile between blocks, the first block leaves the state that it has folded, the others leave one
// for each of their splits, and `combine` folds them in the same order: no bit of a result depends on the list, but for
// the choice of the kernel, which depends on the sequence's own rows.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "kernels/cuda/architectures.h"
#include "kernels/cuda/launch_shape.h"
#include "kernels/ops.h"

namespace altiplano::cuda {

// The queries of a sequence and the heads that share a KV head are rows, i-th query times group plus head, in tiles.
inline constexpr int kAttentionRows = 16;
inline constexpr int64_t kAttentionSplit = 512;  // keys
inline constexpr uint32_t kAttentionThreads = 128;
inline constexpr uint32_t kCombineThreads = 512;

// The prefill kernel: tiles of 128 rows for sequences that fill at least one, keys 64 at a time.
inline constexpr int kPrefillRows = 128;
inline constexpr int kPrefillKeys = 64;
inline constexpr int64_t kPrefillSplit = 2048;  // keys
inline constexpr int kFewestPrefillRows = kPrefillRows;
inline constexpr int kPrefillSlots = 8;      // of keys or of values, in the ring
inline constexpr int kPrefillConsumers = 8;  // warps of 16 rows
// Two warpgroups that consume, and one for the producer and the queries' copiers: registers are given back by whole
// warpgroups.
inline constexpr uint32_t kPrefillThreads = 32 * (kPrefillConsumers + 4);

// The ring, the tile's queries in bf16 and its rows' state in f32, the mbarriers and what fills their 16 bytes up.
constexpr uint32_t PrefillSharedBytes(int64_t dim) {
  return static_cast<uint32_t>(kPrefillSlots * kPrefillKeys * dim * 2 + kPrefillRows * dim * (2 + 4) +
                               (2 * kPrefillSlots + 6) * 8);
}
// Of the kernel on tensor cores: q, the state, each warp's ring, and the sums and states that the warps merge.
constexpr uint32_t MmaAttentionSharedBytes(int64_t dim) {
  const int64_t ring = 2 * 2 * 16 * dim * 2, merged = kAttentionRows * (64 + 8) * 4 + kAttentionRows * 8;
  return static_cast<uint32_t>(kAttentionRows * (dim * 2 + dim * 4 + 8) + kAttentionThreads / 32 * (ring + merged));
}
// Of the kernel that works without matrix instructions: q, the scores of a split, the state.
constexpr uint32_t PlainAttentionSharedBytes(int64_t dim) {
  return static_cast<uint32_t>(4 * (2 * kAttentionRows * ((dim + 3) / 4 * 4) + kAttentionRows * kAttentionSplit));
}

// Of an H100 SXM and an H200; and more than any GPU of kArchitectures has.
inline constexpr int64_t kMultiprocessors = 132, kMostMultiprocessors = 160;

// What is the same in all steps of a rank.
struct AttentionSizes {
  int64_t q_heads = 0, kv_heads = 0, dim = 0;
  bool may_prefill = false;                    // see TakesPrefill
  size_t scratch_bytes = 0;                    // of PagedAttentionArgs
  int64_t multiprocessors = kMultiprocessors;  // of the GPU: see PropertiesOf
};

// Whether the prefill kernel takes pools like these. It sums in another order: a token's bits then depend on whether
// its part of the prompt was long enough for it.
constexpr bool TakesPrefill(const Architecture& architecture, DType act, int64_t dim, int64_t page_size) {
  return architecture.capability == kHopper.capability && act == DType::kBF16 && (dim == 64 || dim == 128) &&
         page_size % kPrefillKeys == 0;
}

// ---- the list: a header, where each worker's items begin, the prefill kernel's items, the workers' items, cuts. The
// items and cuts are the same for all KV heads.

// A tile, or some splits of one.
struct AttentionItem {
  int32_t sequence;
  int32_t first_token;  // of the sequence, in the step
  int32_t first_row, rows;
  int32_t before;                  // keys that the sequence's first query sees beside its own
  int32_t first_split, end_split;  // [first, end)
  int32_t first_state;             // where states go in scratch; -1: the item is a whole tile
};
// At most 16 rows of a tile that was cut: row r's states are first_state + r, and so on every `stride`.
struct AttentionCut {
  int32_t first_token, first_row, rows;
  int32_t first_state, stride, states;
  int32_t unused[2];
};
struct AttentionHeader {
  int32_t first_cut, cuts;  // the index of a record
  int32_t unused[6];
};
inline constexpr int64_t kRecordWords = 8;  // of the list
static_assert(sizeof(AttentionItem) == 4 * kRecordWords && sizeof(AttentionCut) == 4 * kRecordWords &&
              sizeof(AttentionHeader) == 4 * kRecordWords);

// Blocks that attend, for all KV heads together: two for each multiprocessor, which shared memory has room for.
inline constexpr int64_t kMostAttentionBlocks = 2 * kMostMultiprocessors;
// For each KV head.
constexpr int64_t MostAttentionWorkers(const AttentionSizes& s) {
  return std::max<int64_t>(1, std::min(2 * s.multiprocessors, kMostAttentionBlocks) / s.kv_heads);
}
inline constexpr int64_t kFirstItem = 1 + (kMostAttentionBlocks + 1 + kRecordWords - 1) / kRecordWords;

// Of f32 in scratch for a row's state: dim sums, then behind all sums the largest score and the sum of weights.
constexpr int64_t AttentionStates(int64_t dim, size_t scratch_bytes) {
  return static_cast<int64_t>(scratch_bytes) / (4 * (dim + 2)) / 2 * 2;
}

constexpr int64_t AttentionTiles(int64_t rows, int64_t sequences, int64_t tile_rows) {
  return std::min(rows, rows / tile_rows + sequences);
}

// ---- launch geometry, from the numbers of AttentionWork
constexpr LaunchShape PrefillAttentionShape(int64_t dim, int64_t blocks) {
  return {.grid_x = static_cast<uint32_t>(blocks), .threads = kPrefillThreads, .shared_bytes = PrefillSharedBytes(dim)};
}
// The item, among those of all KV heads from the heaviest on, that a block has in a round. The next round goes back:
// who had a heavier one then has a lighter one.
constexpr int PrefillItemOf(int round, int block, int blocks) {
  return round * blocks + (round % 2 == 0 ? block : blocks - 1 - block);
}
constexpr LaunchShape AttentionShape(int64_t kv_heads, int64_t workers, uint32_t shared_bytes) {
  return {.grid_x = static_cast<uint32_t>(workers),
          .grid_y = static_cast<uint32_t>(kv_heads),
          .threads = kAttentionThreads,
          .shared_bytes = shared_bytes};
}
constexpr LaunchShape CombineSplitsShape(int64_t kv_heads, int64_t cuts) {
  return {.grid_x = static_cast<uint32_t>(cuts), .grid_y = static_cast<uint32_t>(kv_heads), .threads = kCombineThreads};
}

inline constexpr int64_t kMostPrefillPieces = 16;  // of a tile
// Room enough for the list of any step of these sizes, in i32.
constexpr int64_t AttentionListWords(const AttentionSizes& s, int64_t tokens, int64_t sequences) {
  const int64_t rows = tokens * (s.q_heads / s.kv_heads), workers = MostAttentionWorkers(s);
  // A worker's end cuts at most one tile.
  int64_t records = kFirstItem + AttentionTiles(rows, sequences, kAttentionRows) + 2 * workers;
  if (s.may_prefill && rows >= kFewestPrefillRows) {
    records += AttentionTiles(rows, sequences, kPrefillRows) * (kMostPrefillPieces + kPrefillRows / kAttentionRows);
  }
  return records * kRecordWords;
}

// What a launch must have that is captured once, for all steps of at most so many sequences that have one token each
// and contexts of at most so many.
constexpr AttentionWork MostDecodeWork(const AttentionSizes& s, int64_t sequences, int64_t context,
                                       const TensorView& list) {
  const int64_t splits = (context + kAttentionSplit - 1) / kAttentionSplit;
  const int64_t tiles = sequences * ((s.q_heads / s.kv_heads + kAttentionRows - 1) / kAttentionRows);
  const int64_t workers = std::min(tiles * splits, MostAttentionWorkers(s));
  return {.list = list,
          .prefill_items = 0,
          .prefill_blocks = 0,
          .workers = static_cast<int32_t>(workers),
          .cuts = static_cast<int32_t>(splits > 1 ? std::min(tiles, workers) : 0)};
}

// Writes the list of a step to `list`, which is aligned to 16 bytes and has room for AttentionListWords. The result's
// view is of what was written there. q_begin [sequences + 1], lengths [sequences]: as in PagedAttentionArgs, but on the
// host.
//
// Sequences of at least kFewestPrefillRows rows are the prefill kernel's where it takes them: an item a block, those
// with most keys first, whichever sequence's they are. The tiles of all others are dealt to as many workers as two
// blocks for each multiprocessor are, in order and by their keys, each worker's in one go. Where whole tiles would
// leave some with much more than their share, tiles are cut at splits, as far as scratch goes.
AttentionWork PlanAttention(const AttentionSizes& sizes, const int32_t* q_begin, const int32_t* lengths,
                            int64_t sequences, int64_t tokens, int32_t* list);

}  // namespace altiplano::cuda
