// Paged attention without matrix instructions, for f32 and for every head size; and the combination of splits.
//
// A block takes one tile of rows and the KV head that they share, so that keys and values are read once for the whole
// group. It goes through the context split by split: each thread scores whole keys against all rows, the warps turn
// each row's scores into weights, each thread sums columns of values, and the split is folded into the rows' state.
#include "kernels/cuda/backend.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/paged_attention.h"
#include "kernels/cuda/rows_plan.h"

namespace altiplano::cuda {

namespace {

constexpr int kRows = kAttentionRows;
constexpr int kSplit = static_cast<int>(kAttentionSplit);
constexpr int kThreads = static_cast<int>(kAttentionThreads);
constexpr int64_t kMostPoolRows = 0x7FFFFFFF;  // that TMA's coordinates reach

template <int kPack>
struct alignas(4 * kPack) Floats {
  float x[kPack];
};

// A 1 in launch bounds, here and elsewhere: ptxas then takes the registers that it needs, where it else might spill.
template <int kPack>
__global__ void __launch_bounds__(kAttentionThreads, 1) PlainAttentionKernel(AttentionArgs args) {
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int kv_head = static_cast<int>(blockIdx.y), dim = args.dim;
  const int width = (dim + 3) / 4 * 4;
  auto* q = static_cast<float*>(ptx::DynamicShared());  // [kRows, width]
  float* state = q + kRows * width;                     // [kRows, width]
  float* scores = state + kRows * width;                // [kRows, kSplit]
  PTX_SHARED(float, largest, kRows);
  PTX_SHARED(float, total, kRows);
  PTX_SHARED(float, old_weight, kRows);
  PTX_SHARED(float, new_weight, kRows);

  const AttentionTile tile = FindTile(args, static_cast<int>(blockIdx.x), kRows, 1, args.most_rows);
  if (tile.sequence < 0) return;
  const int end = KeysSeen(args, tile, tile.rows - 1);
  const int first_split = args.scratch != nullptr ? static_cast<int>(blockIdx.z) : 0;
  if (first_split * kSplit >= end) return;
  const int last_split = args.scratch != nullptr ? first_split : (end - 1) / kSplit;

  for (int i = thread; i < kRows * width; i += kThreads) {
    const int r = i / width, column = i % width;
    float x[1] = {0};
    if (r < tile.rows && column < dim) {
      const RowPlace place = PlaceOf(args, tile, kv_head, r);
      Load(args.q, place.token * args.q.stride + int64_t{place.head} * dim + column, x);
    }
    ptx::StShared(q + i, x[0]);
    ptx::StShared(state + i, 0.0f);
  }
  if (thread < kRows) {
    ptx::StShared(largest + thread, kNoScore);
    ptx::StShared(total + thread, 0.0f);
  }
  __syncthreads();

  for (int split = first_split; split <= last_split; ++split) {
    const int begin = split * kSplit;
    const int keys = end - begin < kSplit ? end - begin : kSplit;
    for (int key = thread; key < keys; key += kThreads) {
      const int64_t at = PoolRow(args, tile, kv_head, begin + key) * dim;
      float sums[kRows] = {};
      for (int column = 0; column < dim; column += kPack) {
        float k[kPack];
        Load(args.k_pages, at + column, k);
        PTX_UNROLL
        for (int r = 0; r < kRows; ++r) {
          const auto x = ptx::LdShared(reinterpret_cast<const Floats<kPack>*>(q + r * width + column));
          PTX_UNROLL
          for (int i = 0; i < kPack; ++i) sums[r] = fmaf(x.x[i], k[i], sums[r]);
        }
      }
      PTX_UNROLL
      for (int r = 0; r < kRows; ++r) ptx::StShared(scores + r * kSplit + key, sums[r] * args.scale);
    }
    __syncthreads();

    for (int r = warp; r < tile.rows; r += kThreads / 32) {
      const int seen = KeysSeen(args, tile, r) - begin < keys ? KeysSeen(args, tile, r) - begin : keys;
      float most = kNoScore;
      for (int key = lane; key < seen; key += 32) most = Larger(most, ptx::LdShared(scores + r * kSplit + key));
      for (int lanes = 16; lanes > 0; lanes /= 2) most = Larger(most, __shfl_xor_sync(0xFFFFFFFF, most, lanes));
      const float before = ptx::LdShared(largest + r);
      float sum = 0;
      for (int key = lane; key < seen; key += 32) {
        const float weight = Weight(ptx::LdShared(scores + r * kSplit + key), most);
        ptx::StShared(scores + r * kSplit + key, weight);
        sum += weight;
      }
      sum = WarpSum(sum);
      __syncwarp();  // all lanes have read `largest`
      if (lane == 0) {
        const float now = Larger(before, most);
        const float old_part = Weight(before, now), new_part = Weight(most, now);
        ptx::StShared(total + r, Fold(ptx::LdShared(total + r), old_part, sum, new_part));
        ptx::StShared(largest + r, now);
        ptx::StShared(old_weight + r, old_part);
        ptx::StShared(new_weight + r, new_part);
      }
    }
    __syncthreads();

    for (int column = thread; column < dim; column += kThreads) {
      float sums[kRows] = {};
      for (int key = 0; key < keys; ++key) {
        float v[1];
        Load(args.v_pages, PoolRow(args, tile, kv_head, begin + key) * dim + column, v);
        PTX_UNROLL
        for (int r = 0; r < kRows; ++r) {
          if (begin + key < KeysSeen(args, tile, r)) {
            sums[r] = fmaf(ptx::LdShared(scores + r * kSplit + key), v[0], sums[r]);
          }
        }
      }
      PTX_UNROLL
      for (int r = 0; r < kRows; ++r) {
        if (r >= tile.rows) continue;
        float* own = state + r * width + column;
        ptx::StShared(own,
                      Fold(ptx::LdShared(own), ptx::LdShared(old_weight + r), sums[r], ptx::LdShared(new_weight + r)));
      }
    }
    __syncthreads();
  }

  for (int i = thread; i < tile.rows * dim; i += kThreads) {
    const int r = i / dim, column = i % dim;
    const RowPlace place = PlaceOf(args, tile, kv_head, r);
    const float sum = ptx::LdShared(state + r * width + column);
    StoreState(args, place, static_cast<int>(blockIdx.z), column, sum, ptx::LdShared(largest + r),
               ptx::LdShared(total + r));
  }
}

// One block for one row: folds its splits in order, each thread some columns.
__global__ void __launch_bounds__(kAttentionThreads) CombineSplitsKernel(AttentionArgs args) {
  const int64_t token = blockIdx.x;
  const int head = static_cast<int>(blockIdx.y);
  // The last sequence that begins at or before the token; those without queries begin where the next one does.
  int sequence = 0, beyond = args.sequences;
  while (beyond - sequence > 1) {
    const int middle = (sequence + beyond) / 2;
    (ptx::LdGlobal(args.q_begin + middle) <= token ? sequence : beyond) = middle;
  }
  const int64_t end = ptx::LdGlobal(args.q_begin + sequence + 1);
  if (token >= end || (end - ptx::LdGlobal(args.q_begin + sequence)) * args.group > args.most_rows) return;
  const int64_t seen = ptx::LdGlobal(args.context_lengths + sequence) - (end - token) + 1;
  const int64_t first_part = (token * args.q_heads + head) * args.splits;
  for (int column = static_cast<int>(threadIdx.x); column < args.dim; column += kThreads) {
    float state = 0, largest = kNoScore, total = 0;
    for (int64_t split = 0; split * kSplit < seen; ++split) {
      const int64_t part = first_part + split;
      const float most = ptx::LdGlobal(args.scratch + args.parts * args.dim + part);
      const float sum = ptx::LdGlobal(args.scratch + args.parts * (args.dim + 1) + part);
      const float now = Larger(largest, most);
      const float old_weight = Weight(largest, now), new_weight = Weight(most, now);
      state = Fold(state, old_weight, ptx::LdGlobal(args.scratch + part * args.dim + column), new_weight);
      total = Fold(total, old_weight, sum, new_weight);
      largest = now;
    }
    const float x[1] = {ptx::Divide(state, total)};
    Store(args.out, token * args.out.stride + int64_t{head} * args.dim + column, x);
  }
}

}  // namespace

void PagedAttention(Stream& stream, const PagedAttentionArgs& args) {
  const int64_t dim = args.k_pages.dim(3), kv_heads = args.k_pages.dim(1), page_size = args.k_pages.dim(2);
  const int64_t pool_rows = args.k_pages.dim(0) * kv_heads * page_size;
  const bool packed = IsPacked(args.k_pages, kRowPack) && IsPacked(args.v_pages, kRowPack);
  const bool mma = args.k_pages.dtype == DType::kBF16 && (dim == 64 || dim == 128) && IsPacked(args.k_pages, 8) &&
                   IsPacked(args.v_pages, 8) && IsPacked(args.q, kRowPack);
  const AttentionSizes sizes = {.tokens = args.q.dim(0),
                                .sequences = args.context_lengths.dim(0),
                                .q_heads = args.q.dim(1) / dim,
                                .kv_heads = kv_heads,
                                .dim = dim,
                                .most_context = args.block_tables.dim(1) * page_size,
                                .may_prefill = mma && !args.batch_invariant && page_size % kPrefillKeys == 0 &&
                                               IsPacked(args.out, 8) && pool_rows <= kMostPoolRows && MayPrefill()};
  if (sizes.q_heads == 0) return;
  const AttentionPlan plan = PlanPagedAttention(
      sizes, mma ? MmaAttentionSharedBytes(dim) : PlainAttentionSharedBytes(dim), args.scratch_bytes);
  AttentionArgs a;
  a.out = Elements(args.out);
  a.q = Elements(args.q);
  a.k_pages = Elements(args.k_pages);
  a.v_pages = Elements(args.v_pages);
  a.q_begin = args.q_begin.as<int32_t>();
  a.context_lengths = args.context_lengths.as<int32_t>();
  a.block_tables = args.block_tables.as<int32_t>();
  a.table_stride = args.block_tables.stride0;
  a.sequences = static_cast<int>(sizes.sequences);
  a.q_heads = static_cast<int>(sizes.q_heads);
  a.kv_heads = static_cast<int>(kv_heads);
  a.group = static_cast<int>(sizes.q_heads / kv_heads);
  a.dim = static_cast<int>(dim);
  a.page_size = static_cast<int>(page_size);
  a.scale = args.scale * kLog2E;
  a.splits = plan.splits;
  a.parts = sizes.tokens * sizes.q_heads * plan.splits;
  a.scratch = plan.split ? static_cast<float*>(args.scratch) : nullptr;
  if (plan.prefill) {
    LaunchPrefillAttention(stream, plan.prefill_attend, a, pool_rows);
    a.most_rows = kFewestPrefillRows - 1;
  }
  if (mma) {
    LaunchMmaAttention(stream, plan.attend, a);
  } else {
    Launch(stream, "PagedAttention", plan.attend, packed ? PlainAttentionKernel<kRowPack> : PlainAttentionKernel<1>, a);
  }
  if (plan.split) Launch(stream, "CombineSplits", plan.combine, CombineSplitsKernel, a);
}

}  // namespace altiplano::cuda
