// Paged attention on tensor cores (mma.sync, sm_80 and later): bf16 keys and values, heads of 64 or 128.
//
// A worker takes tiles of 16 rows, which are the M of the products, and the KV head that they share. Each of its four
// warps works through every fourth run of 16 keys with a cp.async ring of its own, so that the loop needs no barrier of
// the block: scores by one product, weights in registers, where they already lie as the next product's operand, values
// by a second product. At the end of a split the warps' states are merged in order and folded into the rows' state.
#include "kernels/cuda/backend.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/paged_attention.h"

namespace altiplano::cuda {

namespace {

constexpr int kRows = kAttentionRows;
constexpr int kWarps = static_cast<int>(kAttentionThreads) / 32;
constexpr int kKeys = 16;  // of a warp's step
constexpr int kStages = 2;
constexpr int kMergedColumns = 64;  // of the warps' sums, together in shared memory: all do not fit into sm_89's
constexpr int kStepsPerSplit = static_cast<int>(kAttentionSplit) / (kKeys * kWarps);

// Of each warp for a row: the largest score and the sum of weights.
struct alignas(8) WarpState {
  float largest, total;
};
struct alignas(8) Two {
  float x[2];
};

template <int kDim>
struct Shared {
  static constexpr int kPadded =
      kMergedColumns + 8;  // so that the eight rows that a warp writes at once differ in banks
  uint4 q[kRows * kDim / 8];
  uint4 ring[kWarps][kStages][2][kKeys * kDim / 8];  // keys, values
  float sums[kWarps][kRows * kPadded];
  WarpState warps[kWarps][kRows];
  float state[kRows * kDim];
  WarpState rows[kRows];
};

// Keys first_key + 0..15 and their values, zeros from `end` on.
template <int kDim>
PTX_FUNCTION void CopyKeys(const AttentionArgs& args, const AttentionItem& tile, int kv_head, int first_key, int end,
                           uint4 (*stage)[kKeys * kDim / 8]) {
  constexpr int kChunks = kDim / 8;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int key_of_lane = first_key + lane % kKeys;
  int64_t row_of_lane = 0;
  if (key_of_lane < end) row_of_lane = PoolRow(args, tile, kv_head, key_of_lane);
  PTX_UNROLL
  for (int i = 0; i < kKeys * kChunks / 32; ++i) {
    const int key = (i * 32 + lane) / kChunks, chunk = (i * 32 + lane) % kChunks;
    const int64_t at = __shfl_sync(0xFFFFFFFF, row_of_lane, key) * kDim + chunk * 8;
    const bool inside = first_key + key < end;
    const int to = ChunkAt<kDim>(key, chunk);
    ptx::CpAsync16(&stage[0][to], static_cast<const BF16*>(args.k_pages.data) + at, inside);
    ptx::CpAsync16(&stage[1][to], static_cast<const BF16*>(args.v_pages.data) + at, inside);
  }
}

// The state of rows g and g + 8 in the lanes of a quad, g being lane / 4.
template <int kDim>
struct Fragment {
  float sums[kDim / 8][4] = {};
  float largest[2] = {kNoScore, kNoScore};
  float total[2] = {};  // of this lane's keys
};

// Adds 16 keys to the state. seen: how many of them each of the two rows sees.
template <int kDim>
PTX_FUNCTION void AddKeys(Fragment<kDim>& own, const uint4* q, const uint4 (*stage)[kKeys * kDim / 8],
                          const int (&seen)[2], float scale) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  float scores[2][4] = {};  // keys 0 to 7 and 8 to 15
  PTX_UNROLL
  for (int step = 0; step < kDim / 16; ++step) {
    uint32_t a[4], b[4];
    ptx::LdMatrixX4(a, &q[ChunkAt<kDim>(lane % 16, step * 2 + lane / 16)]);
    ptx::LdMatrixX4(b, &stage[0][ChunkAt<kDim>(lane / 16 * 8 + lane % 8, step * 2 + lane / 8 % 2)]);
    ptx::Mma16816(scores[0], a, {b[0], b[1]});
    ptx::Mma16816(scores[1], a, {b[2], b[3]});
  }
  float most[2] = {own.largest[0], own.largest[1]};
  PTX_UNROLL
  for (int i = 0; i < 8; ++i) {
    float& score = scores[i / 4][i % 4];
    const int row = i / 2 % 2, key = i / 4 * 8 + lane % 4 * 2 + i % 2;
    score = key < seen[row] ? score * scale : kNoScore;
    most[row] = Larger(most[row], score);
  }
  PTX_UNROLL
  for (int row = 0; row < 2; ++row) {
    most[row] = Larger(most[row], __shfl_xor_sync(0xFFFFFFFF, most[row], 1));
    most[row] = Larger(most[row], __shfl_xor_sync(0xFFFFFFFF, most[row], 2));
    const float kept = Weight(own.largest[row], most[row]);
    own.largest[row] = most[row];
    own.total[row] *= kept;
    PTX_UNROLL
    for (int n = 0; n < kDim / 8; ++n) {
      own.sums[n][2 * row] *= kept;
      own.sums[n][2 * row + 1] *= kept;
    }
  }
  uint32_t weights[4];  // as the operand a: rows g and g + 8 of keys 0 to 7, then of keys 8 to 15
  PTX_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int row = i % 2;
    const float* pair = &scores[i / 2][2 * row];
    weights[i] = ptx::PackBF16(Weight(pair[0], most[row]), Weight(pair[1], most[row]));
    // The sum is of the rounded weights: then they still add up to one.
    own.total[row] += ptx::FloatOfBits(weights[i] << 16) + ptx::FloatOfBits(weights[i] & 0xFFFF0000);
  }
  PTX_UNROLL
  for (int n = 0; n < kDim / 16; ++n) {
    uint32_t b[4];
    ptx::LdMatrixX4Transposed(b, &stage[1][ChunkAt<kDim>(lane % 16, n * 2 + lane / 16)]);
    ptx::Mma16816(own.sums[2 * n], weights, {b[0], b[1]});
    ptx::Mma16816(own.sums[2 * n + 1], weights, {b[2], b[3]});
  }
}

template <int kDim>
PTX_FUNCTION void LoadQueries(const AttentionArgs& args, const AttentionItem& tile, int kv_head, uint4* q) {
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kDim / 4; i += static_cast<int>(kAttentionThreads)) {
    const int r = i / (kDim / 4), pack = i % (kDim / 4);
    StoreQuery<kDim>(args, tile, kv_head, r, pack, &q[ChunkAt<kDim>(r, pack / 2)]);
  }
}

// The state of the warp's rows, and kMergedColumns of their sums.
template <int kDim>
PTX_FUNCTION void StoreFragment(const Fragment<kDim>& own, int first_column, float* sums, WarpState* rows) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  PTX_UNROLL
  for (int row = 0; row < 2; ++row) {
    const int r = lane / 4 + 8 * row;
    float total = own.total[row];
    total += __shfl_xor_sync(0xFFFFFFFF, total, 1);
    total += __shfl_xor_sync(0xFFFFFFFF, total, 2);
    if (lane % 4 == 0) ptx::StShared(&rows[r], WarpState{own.largest[row], total});
    PTX_UNROLL
    for (int n = 0; n < kMergedColumns / 8; ++n) {
      const float* of_row = &own.sums[first_column / 8 + n][2 * row];
      const Two pair = {{of_row[0], of_row[1]}};
      ptx::StShared(reinterpret_cast<Two*>(&sums[r * Shared<kDim>::kPadded + n * 8 + lane % 4 * 2]), pair);
    }
  }
}

// The split's state of a row, warp after warp, and of one of the columns that are together.
template <int kDim>
PTX_FUNCTION WarpState MergeWarps(const Shared<kDim>& shared, int r, int column, float* sum) {
  WarpState merged = {kNoScore, 0};
  PTX_UNROLL
  for (int warp = 0; warp < kWarps; ++warp) {
    merged.largest = Larger(merged.largest, ptx::LdShared(&shared.warps[warp][r]).largest);
  }
  *sum = 0;
  PTX_UNROLL
  for (int warp = 0; warp < kWarps; ++warp) {
    const WarpState state = ptx::LdShared(&shared.warps[warp][r]);
    const float weight = Weight(state.largest, merged.largest);
    merged.total = fmaf(state.total, weight, merged.total);
    *sum = fmaf(ptx::LdShared(&shared.sums[warp][r * Shared<kDim>::kPadded + column]), weight, *sum);
  }
  return merged;
}

template <int kDim>
PTX_FUNCTION void Attend(const AttentionArgs& args, const AttentionItem& tile, int kv_head, Shared<kDim>& shared) {
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  constexpr int kSplit = static_cast<int>(kAttentionSplit);
  const int end = SmallerOf(KeysSeen(args, tile, tile.rows - 1), tile.end_split * kSplit);
  const bool apart = tile.first_split > 0;  // each split leaves its own state

  LoadQueries<kDim>(args, tile, kv_head, shared.q);
  for (int i = thread; i < kRows * kDim; i += static_cast<int>(kAttentionThreads)) {
    ptx::StShared(&shared.state[i], 0.0f);
  }
  if (thread < kRows) ptx::StShared(&shared.rows[thread], WarpState{kNoScore, 0});

  // The warp's keys: 16 from `key`, then 64 further on, through all splits.
  int key = tile.first_split * kSplit + warp * kKeys, stage = 0;
  if (key < end) CopyKeys<kDim>(args, tile, kv_head, key, end, shared.ring[warp][0]);
  ptx::CpAsyncCommit();
  __syncthreads();

  const int rows_seen[2] = {KeysSeen(args, tile, lane / 4), KeysSeen(args, tile, lane / 4 + 8)};
  for (int split = tile.first_split; split < tile.end_split; ++split) {
    Fragment<kDim> own;
    for (int step = 0; step < kStepsPerSplit && key < end; ++step) {
      const int next = key + kKeys * kWarps;
      if (next < end) CopyKeys<kDim>(args, tile, kv_head, next, end, shared.ring[warp][stage ^ 1]);
      ptx::CpAsyncCommit();
      ptx::CpAsyncWait<1>();
      __syncwarp();
      AddKeys<kDim>(own, shared.q, shared.ring[warp][stage], {rows_seen[0] - key, rows_seen[1] - key}, args.scale);
      __syncwarp();  // before the stage is filled again
      stage ^= 1;
      key = next;
    }
    PTX_UNROLL
    for (int first_column = 0; first_column < kDim; first_column += kMergedColumns) {
      if (first_column > 0) __syncthreads();  // before other columns take their place
      StoreFragment(own, first_column, shared.sums[warp], shared.warps[warp]);
      __syncthreads();
      for (int i = thread; i < kRows * kMergedColumns; i += static_cast<int>(kAttentionThreads)) {
        const int r = i / kMergedColumns, column = i % kMergedColumns;
        float sum;
        const WarpState merged = MergeWarps(shared, r, column, &sum);
        if (apart) {
          if (r >= tile.rows) break;
          StoreState(args, tile, kv_head, split - tile.first_split, r, first_column + column, sum, merged.largest,
                     merged.total);
          continue;
        }
        const float before = ptx::LdShared(&shared.rows[r]).largest, now = Larger(before, merged.largest);
        float* state = &shared.state[r * kDim + first_column + column];
        ptx::StShared(state, Fold(ptx::LdShared(state), Weight(before, now), sum, Weight(merged.largest, now)));
      }
    }
    WarpState folded = {};
    if (thread < kRows && !apart) {
      float sum;
      const WarpState merged = MergeWarps(shared, thread, 0, &sum), before = ptx::LdShared(&shared.rows[thread]);
      folded.largest = Larger(before.largest, merged.largest);
      folded.total = Fold(before.total, Weight(before.largest, folded.largest), merged.total,
                          Weight(merged.largest, folded.largest));
    }
    __syncthreads();
    if (thread < kRows && !apart) ptx::StShared(&shared.rows[thread], folded);
  }
  __syncthreads();

  if (apart) return;
  for (int i = thread; i < tile.rows * kDim; i += static_cast<int>(kAttentionThreads)) {
    const int r = i / kDim, column = i % kDim;
    const WarpState row = ptx::LdShared(&shared.rows[r]);
    const float sum = ptx::LdShared(&shared.state[i]);
    if (tile.first_state < 0) {
      StoreResult(args, tile, kv_head, r, column, sum, row.total);
    } else {
      StoreState(args, tile, kv_head, 0, r, column, sum, row.largest, row.total);
    }
  }
}

template <int kDim>
__global__ void __launch_bounds__(kAttentionThreads) MmaAttentionKernel(AttentionArgs args) {
  ptx::WaitForKernelsBefore();
  auto& shared = *static_cast<Shared<kDim>*>(ptx::DynamicShared());
  const ItemRange items = ItemsOfWorker(args);
  for (int i = items.begin; i < items.end; ++i) {
    if (i > items.begin) __syncthreads();  // before shared memory is used again
    Attend(args, LoadRecord<AttentionItem>(args, i), static_cast<int>(blockIdx.y), shared);
  }
}

}  // namespace

void LaunchMmaAttention(Stream& stream, const LaunchShape& shape, const AttentionArgs& args) {
  static_assert(sizeof(Shared<64>) == MmaAttentionSharedBytes(64) &&
                sizeof(Shared<128>) == MmaAttentionSharedBytes(128));
  LaunchOverlapping(stream, "PagedAttention", shape, args.dim == 64 ? MmaAttentionKernel<64> : MmaAttentionKernel<128>,
                    args);
}

}  // namespace altiplano::cuda
