// What the kernels of paged attention share: the list of work as they read it, and the state of a row.
#pragma once

#include <cstdint>

#include "kernels/cuda/elements.h"
#include "kernels/cuda/paged_attention_plan.h"
#include "kernels/cuda/ptx.h"
#include "kernels/cuda/rows_plan.h"
#include "kernels/device.h"

namespace altiplano::cuda {

inline constexpr int kKeysAtOnce = 16;  // that a warp of paged_attention_mma.cu works on

struct AttentionArgs {
  Elements out, q, k_pages, v_pages;
  const int32_t* block_tables = nullptr;
  int64_t table_stride = 0;
  int q_heads = 0, kv_heads = 0, group = 0, dim = 0, page_size = 0;
  Divisor by_group, by_kv_heads, by_page_size;
  bool keys_in_one_page = false;  // always kKeysAtOnce of them
  bool q_chunks = false;          // q is bf16, in whole chunks of 16 bytes
  float scale = 0;                // times log2 e: weights are powers of two
  const int32_t* list = nullptr;  // see paged_attention_plan.h
  // Of rows whose tile was cut: [states, dim] sums, then [states] of the other two.
  float* scratch = nullptr;
  int64_t states = 0;
};

// A record of the list: a word of it in each lane, which may still be on its way, and the same record in all. Row r of
// n * group of a sequence is head r % group of the KV head's group, of query r / group.
PTX_FUNCTION int LoadRecordWord(const AttentionArgs& args, int index) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  return lane < kRecordWords ? ptx::LdGlobal(args.list + index * kRecordWords + lane) : 0;
}
template <typename Record>
PTX_FUNCTION Record RecordOf(int word) {
  struct {
    int words[kRecordWords];
  } record;
  PTX_UNROLL
  for (int i = 0; i < kRecordWords; ++i) record.words[i] = __shfl_sync(0xFFFFFFFF, word, i);
  return __builtin_bit_cast(Record, record);
}
template <typename Record>
PTX_FUNCTION Record LoadRecord(const AttentionArgs& args, int index) {
  return RecordOf<Record>(LoadRecordWord(args, index));
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
  return r < tile.rows ? tile.before + args.by_group.Quotient(tile.first_row + r) + 1 : 0;
}

// Where row `r` of a tile, or of a part of one that was cut, lies: its token, and its head among all.
struct RowPlace {
  int64_t token;
  int head;
};
template <typename Tile>
PTX_FUNCTION RowPlace PlaceOf(const AttentionArgs& args, const Tile& tile, int kv_head, int r) {
  const int row = tile.first_row + r, query = args.by_group.Quotient(row);
  return {int64_t{tile.first_token} + query, (kv_head - query) * args.group + row};
}

// Of a key or value: its row in the pool [P, Hkv, S, D].
PTX_FUNCTION int64_t PoolRow(const AttentionArgs& args, const AttentionItem& tile, int kv_head, int position) {
  const int nth = args.by_page_size.Quotient(position);
  const int page = ptx::LdGlobal(args.block_tables + tile.sequence * args.table_stride + nth);
  return (int64_t{page} * args.kv_heads + kv_head - nth) * args.page_size + position;
}

// ---- rows of kDim elements in shared memory, in chunks of 16 bytes. The chunk's index is XORed with the row's:
// ldmatrix reads one chunk of eight rows, which then lie in different banks.
template <int kDim>
PTX_FUNCTION int ChunkAt(int row, int chunk) {
  return row * (kDim / 8) + (chunk ^ (row & 7));
}
// Rows first, first + step, ... of the tile, where they lie in q or out: from one to the next without a product.
class RowWalk {
 public:
  PTX_FUNCTION RowWalk(const AttentionArgs& args, const AttentionItem& tile, int kv_head, int first, int step,
                       int64_t stride, int dim)
      : group_(args.group) {
    const RowPlace place = PlaceOf(args, tile, kv_head, first);
    at_ = place.token * stride + place.head * dim;
    head_ = place.head - kv_head * group_;
    const int queries = args.by_group.Quotient(step);
    step_heads_ = step - queries * group_;
    step_ = queries * stride + step_heads_ * dim;
    wrap_ = stride - group_ * dim;
  }
  PTX_FUNCTION int64_t at() const { return at_; }  // the row's first element
  PTX_FUNCTION void Next() {
    at_ += step_;
    head_ += step_heads_;
    if (head_ >= group_) {
      head_ -= group_;
      at_ += wrap_;
    }
  }

 private:
  int64_t at_ = 0, step_ = 0, wrap_ = 0;
  int group_, head_ = 0, step_heads_ = 0;
};

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

// A tile's queries on their way into shared memory, in bf16: what thread `thread` of kThreads has of kRows. Where they
// are bf16 already, whole chunks are loaded, all of them before the first is waited for.
template <int kDim, int kRows, int kThreads>
class Queries {
 public:
  PTX_FUNCTION Queries(const AttentionArgs& args, const AttentionItem& tile, int kv_head, int thread) {
    if (!args.q_chunks) return;
    const int row = thread / kChunks;
    const BF16* q = static_cast<const BF16*>(args.q.data) + thread % kChunks * 8;
    RowWalk walk(args, tile, kv_head, row, kStep, args.q.stride, kDim);
    PTX_UNROLL
    for (int i = 0; i < kLoads; ++i) {
      if (row + i * kStep < tile.rows) chunks_[i] = ptx::LdGlobal(reinterpret_cast<const uint4*>(q + walk.at()));
      walk.Next();
    }
  }
  PTX_FUNCTION void StoreTo(uint4* rows, const AttentionArgs& args, const AttentionItem& tile, int kv_head,
                            int thread) const {
    if (args.q_chunks) {
      PTX_UNROLL
      for (int i = 0; i < kLoads; ++i) {
        ptx::StShared(&rows[ChunkAt<kDim>(thread / kChunks + i * kStep, thread % kChunks)], chunks_[i]);
      }
      return;
    }
    for (int i = thread; i < kRows * kDim / 4; i += kThreads) {
      const int r = i / (kDim / 4), pack = i % (kDim / 4);
      StoreQuery<kDim>(args, tile, kv_head, r, pack, &rows[ChunkAt<kDim>(r, pack / 2)]);
    }
  }

 private:
  static constexpr int kChunks = kDim / 8, kStep = kThreads / kChunks, kLoads = kRows / kStep;
  uint4 chunks_[kLoads] = {};  // zeros where there is no row
};

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

// Likewise, one column of row `r`.
template <typename Tile>
PTX_FUNCTION void StoreResult(const AttentionArgs& args, const Tile& tile, int kv_head, int r, int column, float sum,
                              float total) {
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
// Likewise, for CombineSplits: of the nth state of an item of a tile that was cut, one column or four.
template <int kColumns>
PTX_FUNCTION void StoreState(const AttentionArgs& args, const AttentionItem& tile, int kv_head, int n, int r,
                             int column, const float (&sums)[kColumns], float largest, float total) {
  static_assert(kColumns == 1 || kColumns == 4);
  const int64_t at = StateAt(args, kv_head, tile.first_state + n * tile.rows + r);
  float* to = args.scratch + at * args.dim + column;
  if constexpr (kColumns == 4) {
    ptx::StGlobal(reinterpret_cast<uint4*>(to), uint4{ptx::BitsOfFloat(sums[0]), ptx::BitsOfFloat(sums[1]),
                                                      ptx::BitsOfFloat(sums[2]), ptx::BitsOfFloat(sums[3])});
  } else {
    ptx::StGlobal(to, sums[0]);
  }
  if (column == 0) ptx::StGlobal(ScaleAt(args, at), ScaleOfState{largest, total});
}

// ---- paged_attention_mma.cu: bf16 keys and values, dim 64 or 128, rows of q and out aligned to 4 elements.
void LaunchMmaAttention(Stream& stream, const LaunchShape& shape, const AttentionArgs& args);

// ---- paged_attention_hopper.cu. items: of all KV heads; pool_rows: P * Hkv * S.
void LaunchPrefillAttention(Stream& stream, const LaunchShape& shape, const AttentionArgs& args, int items,
                            int64_t pool_rows);

}  // namespace altiplano::cuda
