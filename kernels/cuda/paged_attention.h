// What the kernels of paged attention share: which rows a block works on, and the state of a row.
#pragma once

#include <cstdint>

#include "kernels/cuda/elements.h"
#include "kernels/cuda/paged_attention_plan.h"
#include "kernels/cuda/ptx.h"
#include "kernels/device.h"

namespace altiplano::cuda {

inline constexpr int kAnyRows = 0x7FFFFFFF;

struct AttentionArgs {
  Elements out, q, k_pages, v_pages;
  const int32_t* q_begin = nullptr;
  const int32_t* context_lengths = nullptr;
  const int32_t* block_tables = nullptr;
  int64_t table_stride = 0;
  int sequences = 0, q_heads = 0, kv_heads = 0, group = 0, dim = 0, page_size = 0;
  float scale = 0;  // times log2 e: weights are powers of two
  // Of splits: [T, Hq, splits, dim] sums, then [T, Hq, splits] maxima, then as many sums of weights. Null: not split.
  float* scratch = nullptr;
  int64_t splits = 1;
  int64_t parts = 0;  // T * Hq * splits
  // Sequences with more rows than this are the prefill kernel's.
  int most_rows = kAnyRows;
};

// Rows of one sequence: row r of n * group is head r % group of the KV head's group, of query r / group.
struct AttentionTile {
  int sequence = -1;  // -1: the tile does not exist
  int first_row = 0, rows = 0;
  int first_token = 0;  // of the sequence
  int before = 0;       // keys that the first query sees beside its own
};

// The index-th tile of `tile_rows` rows in the step, of the sequences that have `fewest` to `most` rows; the same in
// each lane. 32 sequences at a time, their tiles summed by shuffles. The last tiles of a sequence, whose rows see most
// keys, come first, so that the GPU does not end on them.
PTX_FUNCTION AttentionTile FindTile(const AttentionArgs& args, int index, int tile_rows, int fewest, int most) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int first = 0; first < args.sequences; first += 32) {
    const int b = first + lane;
    int begin = 0, rows = 0;
    if (b < args.sequences) {
      begin = ptx::LdGlobal(args.q_begin + b);
      rows = (ptx::LdGlobal(args.q_begin + b + 1) - begin) * args.group;
    }
    const int tiles = rows < fewest || rows > most ? 0 : (rows + tile_rows - 1) / tile_rows;
    int through = tiles;  // of the lanes up to this one
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      const int below = __shfl_sync(0xFFFFFFFF, through, lane - lanes);
      if (lane >= lanes) through += below;
    }
    int owner = index >= through - tiles && index < through ? lane : -1;
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      const int other = __shfl_xor_sync(0xFFFFFFFF, owner, lanes);
      owner = other > owner ? other : owner;
    }
    if (owner >= 0) {
      AttentionTile tile;
      tile.sequence = first + owner;
      tile.first_row = (__shfl_sync(0xFFFFFFFF, through, owner) - 1 - index) * tile_rows;
      tile.first_token = __shfl_sync(0xFFFFFFFF, begin, owner);
      const int all_rows = __shfl_sync(0xFFFFFFFF, rows, owner);
      tile.rows = all_rows - tile.first_row < tile_rows ? all_rows - tile.first_row : tile_rows;
      tile.before = ptx::LdGlobal(args.context_lengths + tile.sequence) - all_rows / args.group;
      return tile;
    }
    index -= __shfl_sync(0xFFFFFFFF, through, 31);
  }
  return AttentionTile();
}

// How many keys row `r` of the tile sees; 0 where there is no row.
PTX_FUNCTION int KeysSeen(const AttentionArgs& args, const AttentionTile& tile, int r) {
  return r < tile.rows ? tile.before + (tile.first_row + r) / args.group + 1 : 0;
}

// Where row `r` of the tile lies: its token, and its head among all.
struct RowPlace {
  int64_t token;
  int head;
};
PTX_FUNCTION RowPlace PlaceOf(const AttentionArgs& args, const AttentionTile& tile, int kv_head, int r) {
  const int row = tile.first_row + r;
  return {int64_t{tile.first_token} + row / args.group, kv_head * args.group + row % args.group};
}

// Of a key or value: its row in the pool [P, Hkv, S, D].
PTX_FUNCTION int64_t PoolRow(const AttentionArgs& args, const AttentionTile& tile, int kv_head, int position) {
  const int page = ptx::LdGlobal(args.block_tables + tile.sequence * args.table_stride + position / args.page_size);
  return (int64_t{page} * args.kv_heads + kv_head) * args.page_size + position % args.page_size;
}

// ---- rows of kDim elements in shared memory, in chunks of 16 bytes. The chunk's index is XORed with the row's:
// ldmatrix reads one chunk of eight rows, which then lie in different banks.
template <int kDim>
PTX_FUNCTION int ChunkAt(int row, int chunk) {
  return row * (kDim / 8) + (chunk ^ (row & 7));
}
// Four elements of the query of row `r` of the tile, in bf16, into their half of a chunk; zeros where there is no row.
template <int kDim>
PTX_FUNCTION void StoreQuery(const AttentionArgs& args, const AttentionTile& tile, int kv_head, int r, int pack,
                             uint4* to) {
  float x[4] = {};
  if (r < tile.rows) {
    const RowPlace place = PlaceOf(args, tile, kv_head, r);
    Load(args.q, place.token * args.q.stride + int64_t{place.head} * kDim + pack * 4, x);
  }
  ptx::StShared(reinterpret_cast<uint2*>(to) + pack % 2, uint2{ptx::PackBF16(x[0], x[1]), ptx::PackBF16(x[2], x[3])});
}

// ---- the state of a row: the largest score, the sum of weights 2^(score - largest), the weighted sum of values.
inline constexpr float kNoScore = -__builtin_huge_valf();

PTX_FUNCTION float Larger(float x, float y) {
  return x > y ? x : y;
}
// 2^(score - largest), 0 for what was never seen, also while nothing was.
PTX_FUNCTION float Weight(float score, float largest) {
  return score == kNoScore ? 0.0f : ptx::Exp2(score - largest);
}
// Old and new parts of a sum, each times its weight. Written with fma so that all kernels round alike.
PTX_FUNCTION float Fold(float old_part, float old_weight, float new_part, float new_weight) {
  return fmaf(old_part, old_weight, new_part * new_weight);
}

// A column of a row whose splits are done: the result, or the state of one split for CombineSplits.
PTX_FUNCTION void StoreState(const AttentionArgs& args, const RowPlace& place, int split, int column, float sum,
                             float largest, float total) {
  if (args.scratch == nullptr) {
    const float x[1] = {ptx::Divide(sum, total)};
    Store(args.out, place.token * args.out.stride + int64_t{place.head} * args.dim + column, x);
    return;
  }
  const int64_t part = (place.token * args.q_heads + place.head) * args.splits + split;
  ptx::StGlobal(args.scratch + part * args.dim + column, sum);
  if (column == 0) {
    ptx::StGlobal(args.scratch + args.parts * args.dim + part, largest);
    ptx::StGlobal(args.scratch + args.parts * (args.dim + 1) + part, total);
  }
}

// ---- paged_attention_mma.cu: bf16 keys and values, dim 64 or 128, rows of q aligned to 4 elements.
void LaunchMmaAttention(Stream& stream, const LaunchShape& shape, const AttentionArgs& args);

// ---- paged_attention_hopper.cu: the sequences of at least kFewestPrefillRows rows. `pool_rows`: P * Hkv * S.
bool MayPrefill();  // whether this GPU has what it takes
void LaunchPrefillAttention(Stream& stream, const LaunchShape& shape, const AttentionArgs& args, int64_t pool_rows);

}  // namespace altiplano::cuda
