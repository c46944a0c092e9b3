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
constexpr int kThreads = static_cast<int>(kAttentionThreads), kWarps = kThreads / 32;
constexpr int kKeys = kKeysAtOnce;  // of a warp's step
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
struct alignas(16) Four {
  float x[4];
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
  constexpr int kChunks = kDim / 8, kAtOnce = 32 / kChunks;  // keys
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int first = lane / kChunks, chunk = lane % kChunks;
  const BF16* const k_pages = static_cast<const BF16*>(args.k_pages.data) + chunk * 8;
  const BF16* const v_pages = static_cast<const BF16*>(args.v_pages.data) + chunk * 8;
  // Their places in the pool are one after the other where pages hold whole runs of them.
  int64_t row_of_lane = 0;
  const int key_of_lane = args.keys_in_one_page ? first_key : first_key + lane % kKeys;
  if (key_of_lane < end) row_of_lane = PoolRow(args, tile, kv_head, key_of_lane);
  const auto copy = [&](int key, int64_t row) {
    const bool inside = first_key + key < end;
    const int to = ChunkAt<kDim>(key, chunk);
    ptx::CpAsync16(&stage[0][to], k_pages + row * kDim, inside);
    ptx::CpAsync16(&stage[1][to], v_pages + row * kDim, inside);
  };
  if (args.keys_in_one_page) {
    row_of_lane += first;
    PTX_UNROLL
    for (int key = 0; key < kKeys; key += kAtOnce) copy(key + first, row_of_lane + key);
  } else {
    PTX_UNROLL
    for (int key = first; key < kKeys; key += kAtOnce) copy(key, __shfl_sync(0xFFFFFFFF, row_of_lane, key));
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
  }
  if (most[0] != own.largest[0] || most[1] != own.largest[1]) {  // late keys are seldom a row's largest
    PTX_UNROLL
    for (int row = 0; row < 2; ++row) {
      const float kept = Weight(own.largest[row], most[row]);
      own.largest[row] = most[row];
      own.total[row] *= kept;
      PTX_UNROLL
      for (int n = 0; n < kDim / 8; ++n) {
        own.sums[n][2 * row] *= kept;
        own.sums[n][2 * row + 1] *= kept;
      }
    }
  }
  __syncwarp();         // products are all lanes' together
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

// The split's state of a row, warp after warp, and of four of the columns that are together.
template <int kDim>
PTX_FUNCTION WarpState MergeWarps(const Shared<kDim>& shared, int r, int column, Four& sums) {
  WarpState merged = {kNoScore, 0};
  PTX_UNROLL
  for (int warp = 0; warp < kWarps; ++warp) {
    merged.largest = Larger(merged.largest, ptx::LdShared(&shared.warps[warp][r]).largest);
  }
  sums = {};
  PTX_UNROLL
  for (int warp = 0; warp < kWarps; ++warp) {
    const WarpState state = ptx::LdShared(&shared.warps[warp][r]);
    const float weight = Weight(state.largest, merged.largest);
    merged.total = fmaf(state.total, weight, merged.total);
    const auto own =
        ptx::LdShared(reinterpret_cast<const Four*>(&shared.sums[warp][r * Shared<kDim>::kPadded + column]));
    PTX_UNROLL
    for (int i = 0; i < 4; ++i) sums.x[i] = fmaf(own.x[i], weight, sums.x[i]);
  }
  return merged;
}

template <int kDim>
PTX_FUNCTION void Attend(const AttentionArgs& args, const AttentionItem& tile, int kv_head, Shared<kDim>& shared) {
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  constexpr int kSplit = static_cast<int>(kAttentionSplit);
  const int end = SmallerOf(KeysSeen(args, tile, tile.rows - 1), tile.end_split * kSplit);
  const bool apart = tile.first_split > 0;  // each split leaves its own state

  const Queries<kDim, kRows, kThreads> queries(args, tile, kv_head, thread);
  // The warp's keys: 16 from `key`, then 64 further on, through all splits.
  int key = tile.first_split * kSplit + warp * kKeys, stage = 0;
  if (key < end) CopyKeys<kDim>(args, tile, kv_head, key, end, shared.ring[warp][0]);
  ptx::CpAsyncCommit();
  queries.StoreTo(shared.q, args, tile, kv_head, thread);
  for (int i = thread; i < tile.rows * kDim / 4; i += kThreads) {
    ptx::StShared(reinterpret_cast<uint4*>(shared.state) + i, uint4{0, 0, 0, 0});
  }
  if (thread < kRows) ptx::StShared(&shared.rows[thread], WarpState{kNoScore, 0});
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
      for (int i = thread * 4; i < tile.rows * kMergedColumns; i += kThreads * 4) {
        const int r = i / kMergedColumns, column = i % kMergedColumns;
        Four sums;
        const WarpState merged = MergeWarps(shared, r, column, sums);
        if (apart) {
          StoreState(args, tile, kv_head, split - tile.first_split, r, first_column + column, sums.x, merged.largest,
                     merged.total);
          continue;
        }
        const float before = ptx::LdShared(&shared.rows[r]).largest, now = Larger(before, merged.largest);
        const float old_weight = Weight(before, now), new_weight = Weight(merged.largest, now);
        auto* state = reinterpret_cast<Four*>(&shared.state[r * kDim + first_column + column]);
        Four folded = ptx::LdShared(state);
        PTX_UNROLL
        for (int j = 0; j < 4; ++j) folded.x[j] = Fold(folded.x[j], old_weight, sums.x[j], new_weight);
        ptx::StShared(state, folded);
      }
    }
    WarpState folded = {};
    if (thread < kRows && !apart) {
      Four unused;
      const WarpState merged = MergeWarps(shared, thread, 0, unused), before = ptx::LdShared(&shared.rows[thread]);
      folded.largest = Larger(before.largest, merged.largest);
      folded.total = Fold(before.total, Weight(before.largest, folded.largest), merged.total,
                          Weight(merged.largest, folded.largest));
    }
    __syncthreads();
    if (thread < kRows && !apart) ptx::StShared(&shared.rows[thread], folded);
  }
  __syncthreads();

  if (apart) return;
  constexpr int kPacks = kDim / 4, kStep = kThreads / kPacks;
  const int column = thread % kPacks * 4;
  RowWalk walk(args, tile, kv_head, thread / kPacks, kStep, args.out.stride, kDim);
  for (int r = thread / kPacks; r < tile.rows; r += kStep, walk.Next()) {
    auto [x] = ptx::LdShared(reinterpret_cast<const Four*>(&shared.state[r * kDim + column]));
    const WarpState row = ptx::LdShared(&shared.rows[r]);
    if (tile.first_state >= 0) {
      StoreState(args, tile, kv_head, 0, r, column, x, row.largest, row.total);
      continue;
    }
    PTX_UNROLL
    for (int i = 0; i < 4; ++i) x[i] = ptx::Divide(x[i], row.total);
    Store(args.out, walk.at() + column, x);
  }
}

template <int kDim>
__global__ void __launch_bounds__(kAttentionThreads) MmaAttentionKernel(AttentionArgs args) {
  ptx::WaitForKernelsBefore();
  auto& shared = *static_cast<Shared<kDim>*>(ptx::DynamicShared());
  const ItemRange items = ItemsOfWorker(args);
  int word = items.begin < items.end ? LoadRecordWord(args, items.begin) : 0;
  for (int i = items.begin; i < items.end; ++i) {
    if (i > items.begin) __syncthreads();  // before shared memory is used again
    const auto tile = RecordOf<AttentionItem>(word);
    if (i + 1 < items.end) word = LoadRecordWord(args, i + 1);  // on its way meanwhile
    Attend(args, tile, static_cast<int>(blockIdx.y), shared);
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
