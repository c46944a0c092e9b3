// What the kernels of paged attention share: the list of work as they read it, and the state of a row.
#pragma once

#include <cstdint>

#include "kernels/cuda/elements.h"
#include "kernels/cuda/paged_attention_plan.h"
#include "kernels/cuda/ptx.h"
#include "kernels/device.h"

namespace altiplano::cuda {

struct AttentionArgs {
  Elements out, q, k_pages, v_pages;
  const int32_t* block_tables = nullptr;
  int64_t table_stride = 0;
  int q_heads = 0, kv_heads = 0, group = 0, dim = 0, page_size = 0;
  float scale = 0;                // times log2 e: weights are powers of two
  const int32_t* list = nullptr;  // see paged_attention_plan.h
  // Of rows whose tile was cut: [states, dim] sums, then [states] of the other two.
  float* scratch = nullptr;
  int64_t states = 0;
};

// A record of the list, the same in each lane. Row r of n * group of a sequence is head r % group of the KV head's
// group, of query r / group.
template <typename Record>
PTX_FUNCTION Record LoadRecord(const AttentionArgs& args, int index) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  int word = 0;
  if (lane < kRecordWords) word = ptx::LdGlobal(args.list + index * kRecordWords + lane);
  struct {
    int words[kRecordWords];
  } record;
  PTX_UNROLL
  for (int i = 0; i < kRecordWords; ++i) record.words[i] = __shfl_sync(0xFFFFFFFF, word, i);
  return __builtin_bit_cast(Record, record);
}
// The items of worker blockIdx.x.
struct ItemRange {
  int begin, end;
};
PTX_FUNCTION ItemRange ItemsOfWorker(const AttentionArgs& args) {
  const int32_t* begins = args.list + kRecordWords + blockIdx.x;
  return {ptx::LdGlobal(begins), ptx::LdGlobal(begins + 1)};
}
PTX_FUNCTION int SmallerOf(int a, int b) {
  return a < b ? a : b;
}

// How many keys row `r` of the tile sees; 0 where there is no row.
PTX_FUNCTION int KeysSeen(const AttentionArgs& args, const AttentionItem& tile, int r) {
  return r < tile.rows ? tile.before + (tile.first_row + r) / args.group + 1 : 0;
}

// Where row `r` of the tile lies: its token, and its head among all.
struct RowPlace {
  int64_t token;
  int head;
};
PTX_FUNCTION RowPlace PlaceOf(const AttentionArgs& args, const AttentionItem& tile, int kv_head, int r) {
  const int row = tile.first_row + r;
  return {int64_t{tile.first_token} + row / args.group, kv_head * args.group + row % args.group};
}

// Of a key or value: its row in the pool [P, Hkv, S, D].
PTX_FUNCTION int64_t PoolRow(const AttentionArgs& args, const AttentionItem& tile, int kv_head, int position) {
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
PTX_FUNCTION void StoreQuery(const AttentionArgs& args, const AttentionItem& tile, int kv_head, int r, int pack,
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

// Row `r` of the tile, one column of it.
PTX_FUNCTION void StoreResult(const AttentionArgs& args, const AttentionItem& tile, int kv_head, int r, int column,
                              float sum, float total) {
  const RowPlace place = PlaceOf(args, tile, kv_head, r);
  const float x[1] = {ptx::Divide(sum, total)};
  Store(args.out, place.token * args.out.stride + int64_t{place.head} * args.dim + column, x);
}

struct alignas(8) ScaleOfState {
  float largest, total;
};
PTX_FUNCTION int64_t StateAt(const AttentionArgs& args, int kv_head, int64_t state) {
  return state * args.kv_heads + kv_head;
}
PTX_FUNCTION ScaleOfState* ScaleAt(const AttentionArgs& args, int64_t at) {
  return reinterpret_cast<ScaleOfState*>(args.scratch + args.states * args.dim) + at;
}
// Likewise, for CombineSplits: the nth state of an item of a tile that was cut.
PTX_FUNCTION void StoreState(const AttentionArgs& args, const AttentionItem& tile, int kv_head, int n, int r,
                             int column, float sum, float largest, float total) {
  const int64_t at = StateAt(args, kv_head, tile.first_state + n * tile.rows + r);
  ptx::StGlobal(args.scratch + at * args.dim + column, sum);
  if (column == 0) ptx::StGlobal(ScaleAt(args, at), ScaleOfState{largest, total});
}

// ---- paged_attention_mma.cu: bf16 keys and values, dim 64 or 128, rows of q aligned to 4 elements.
void LaunchMmaAttention(Stream& stream, const LaunchShape& shape, const AttentionArgs& args);

// ---- paged_attention_hopper.cu: `pool_rows`: P * Hkv * S.
void LaunchPrefillAttention(Stream& stream, const LaunchShape& shape, const AttentionArgs& args, int64_t pool_rows);

}  // namespace altiplano::cuda
