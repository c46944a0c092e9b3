// Paged attention without matrix instructions, for f32 and for every head size; and the combination of splits.
//
// A worker takes tiles of rows and the KV head that they share, so that keys and values are read once for the whole
// group. It goes through the context split by split: each thread scores whole keys against all rows, the warps turn
// each row's scores into weights, each thread sums columns of values, and the split is folded into the rows' state.
#include <cstdio>
#include <cstdlib>

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

template <int kPack>
PTX_FUNCTION void AttendPlainly(const AttentionArgs& args, const AttentionItem& tile, int kv_head) {
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32, dim = args.dim;
  const int width = (dim + 3) / 4 * 4;
  auto* q = static_cast<float*>(ptx::DynamicShared());  // [kRows, width]
  float* state = q + kRows * width;                     // [kRows, width]
  float* scores = state + kRows * width;                // [kRows, kSplit]
  PTX_SHARED(float, largest, kRows);
  PTX_SHARED(float, total, kRows);
  PTX_SHARED(float, old_weight, kRows);
  PTX_SHARED(float, new_weight, kRows);
  const int end = KeysSeen(args, tile, tile.rows - 1);

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

  for (int split = tile.first_split; split < tile.end_split; ++split) {
    const int begin = split * kSplit, keys = SmallerOf(end - begin, kSplit);
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
      const int seen = SmallerOf(KeysSeen(args, tile, r) - begin, keys);
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
    if (tile.first_state < 0 || (tile.first_split == 0 && split + 1 < tile.end_split)) continue;
    // The state of the first piece, or of one split, after which the next begins with none.
    for (int i = thread; i < tile.rows * dim; i += kThreads) {
      const int r = i / dim, column = i % dim;
      float* own = state + r * width + column;
      StoreState(args, tile, kv_head, tile.first_split == 0 ? 0 : split - tile.first_split, r, column,
                 {ptx::LdShared(own)}, ptx::LdShared(largest + r), ptx::LdShared(total + r));
      ptx::StShared(own, 0.0f);
    }
    __syncthreads();
    if (thread < kRows) {
      ptx::StShared(largest + thread, kNoScore);
      ptx::StShared(total + thread, 0.0f);
    }
    __syncthreads();
  }

  if (tile.first_state < 0) {
    for (int i = thread; i < tile.rows * dim; i += kThreads) {
      const int r = i / dim, column = i % dim;
      StoreResult(args, tile, kv_head, r, column, ptx::LdShared(state + r * width + column), ptx::LdShared(total + r));
    }
  }
}

// Three blocks of a multiprocessor: without a number ptxas takes 56 registers and spills.
template <int kPack>
__global__ void __launch_bounds__(kAttentionThreads, 3) PlainAttentionKernel(AttentionArgs args) {
  ptx::WaitForKernelsBefore();
  const ItemRange items = ItemsOfWorker(args);
  for (int i = items.begin; i < items.end; ++i) {
    if (i > items.begin) __syncthreads();  // before shared memory is used again
    AttendPlainly<kPack>(args, LoadRecord<AttentionItem>(args, i), static_cast<int>(blockIdx.y));
  }
}

// One block for some rows of a tile that was cut: folds their states in order, each thread some columns.
__global__ void __launch_bounds__(kCombineThreads) CombineSplitsKernel(AttentionArgs args) {
  constexpr int kAtOnce = 8;  // under way: folding waits for what is read
  ptx::WaitForKernelsBefore();
  ptx::LetNextKernelStart();
  const auto header = LoadRecord<AttentionHeader>(args, 0);
  if (static_cast<int>(blockIdx.x) >= header.cuts) return;
  const auto cut = LoadRecord<AttentionCut>(args, header.first_cut + static_cast<int>(blockIdx.x));
  const int kv_head = static_cast<int>(blockIdx.y);
  for (int i = static_cast<int>(threadIdx.x); i < cut.rows * args.dim; i += static_cast<int>(kCombineThreads)) {
    const int r = i / args.dim, column = i % args.dim;
    float state = 0, largest = kNoScore, total = 0;
    for (int first = 0; first < cut.states; first += kAtOnce) {
      float sums[kAtOnce];
      ScaleOfState scales[kAtOnce];
      PTX_UNROLL
      for (int n = 0; n < kAtOnce; ++n) {
        if (first + n >= cut.states) break;
        const int64_t at = StateAt(args, kv_head, cut.first_state + (first + n) * cut.stride + r);
        sums[n] = ptx::LdGlobal(args.scratch + at * args.dim + column);
        scales[n] = ptx::LdGlobal(ScaleAt(args, at));
      }
      PTX_UNROLL
      for (int n = 0; n < kAtOnce; ++n) {
        if (first + n >= cut.states) break;
        const float now = Larger(largest, scales[n].largest);
        const float old_weight = Weight(largest, now), new_weight = Weight(scales[n].largest, now);
        state = Fold(state, old_weight, sums[n], new_weight);
        total = Fold(total, old_weight, scales[n].total, new_weight);
        largest = now;
      }
    }
    StoreResult(args, cut, kv_head, r, column, state, total);
  }
}

}  // namespace

void PagedAttention(Stream& stream, const PagedAttentionArgs& args) {
  const int64_t dim = args.k_pages.dim(3), kv_heads = args.k_pages.dim(1), page_size = args.k_pages.dim(2);
  const int64_t q_heads = args.q.dim(1) / dim;
  if (q_heads == 0) return;
  const bool packed = IsPacked(args.k_pages, kRowPack) && IsPacked(args.v_pages, kRowPack);
  const bool mma = args.k_pages.dtype == DType::kBF16 && (dim == 64 || dim == 128) && IsPacked(args.k_pages, 8) &&
                   IsPacked(args.v_pages, 8) && IsPacked(args.q, kRowPack) && IsPacked(args.out, kRowPack);
  AttentionArgs a;
  a.out = Elements(args.out);
  a.q = Elements(args.q);
  a.k_pages = Elements(args.k_pages);
  a.v_pages = Elements(args.v_pages);
  a.block_tables = args.block_tables.as<int32_t>();
  a.table_stride = args.block_tables.stride0;
  a.q_heads = static_cast<int>(q_heads);
  a.kv_heads = static_cast<int>(kv_heads);
  a.group = static_cast<int>(q_heads / kv_heads);
  a.dim = static_cast<int>(dim);
  a.page_size = static_cast<int>(page_size);
  a.keys_in_one_page = page_size % kKeysAtOnce == 0;
  a.q_chunks = args.q.dtype == DType::kBF16 && IsPacked(args.q, 8);
  a.by_group = Divisor(a.group);
  a.by_kv_heads = Divisor(kv_heads);
  a.by_page_size = Divisor(page_size);
  a.scale = args.scale * kLog2E;
  a.list = args.work.list.as<int32_t>();
  a.scratch = static_cast<float*>(args.scratch);
  a.states = AttentionStates(dim, args.scratch_bytes);
  if (args.work.prefill_items > 0) {
    const int64_t pool_rows = args.k_pages.dim(0) * kv_heads * page_size;
    if (!mma || !IsPacked(args.out, 8) || page_size % kPrefillKeys != 0 || pool_rows > kMostPoolRows) {
      std::fputs("PagedAttention: the work list has tiles for a kernel that does not take these operands\n", stderr);
      std::abort();
    }
    LaunchPrefillAttention(stream, PrefillAttentionShape(dim, args.work.prefill_blocks), a,
                           args.work.prefill_items * static_cast<int>(kv_heads), pool_rows);
  }
  if (args.work.workers > 0) {
    const LaunchShape shape = AttentionShape(kv_heads, args.work.workers,
                                             mma ? MmaAttentionSharedBytes(dim) : PlainAttentionSharedBytes(dim));
    if (mma) {
      LaunchMmaAttention(stream, shape, a);
    } else {
      LaunchOverlapping(stream, "PagedAttention", shape,
                        packed ? PlainAttentionKernel<kRowPack> : PlainAttentionKernel<1>, a);
    }
  }
  if (args.work.cuts > 0) {
    LaunchOverlapping(stream, "CombineSplits", CombineSplitsShape(kv_heads, args.work.cuts), CombineSplitsKernel, a);
  }
}

}  // namespace altiplano::cuda
