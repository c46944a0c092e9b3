// Linear for the few tokens of a decode step, where reading the weights once is all that counts; right for any number.
//
// On tensor cores the weights are the operand of 16 rows and the tokens that of 8 columns, so that 1 to 8 tokens cost
// one instruction. Both are loaded straight into registers, 16 bytes of a row to a lane: the sum over k may run in any
// order as long as both operands agree on it, so a lane's 8 neighbours stand where the instruction wants pairs that lie
// apart. A warp then reads 64 bytes of each row at a time, and no shared memory or barrier delays the stream.
#include "kernels/cuda/backend.h"
#include "kernels/cuda/cublaslt.h"
#include "kernels/cuda/elements.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/linear.h"

namespace altiplano::cuda {

namespace {

// Of the weights, the two rows of a lane: lane / 4 of its group, and 8 further.
struct LaneRows {
  const BF16* at[2];
  bool inside[2];

  PTX_FUNCTION LaneRows(const LinearOperands& args, int64_t group, int row) {
    PTX_UNROLL
    for (int half = 0; half < 2; ++half) {
      inside[half] = ColumnOf(args, group, row + 8 * half) < args.n;
      at[half] =
          static_cast<const BF16*>(args.weight.data) + WeightRowOf(args, group, row + 8 * half) * args.weight.stride;
    }
  }
  // kLinearUnroll chunks of them that lie `stride` apart, the lane's part from k on.
  PTX_FUNCTION void Load(int k, int stride, int k_end, uint4 (&a)[kLinearUnroll][2]) const {
    PTX_UNROLL
    for (int u = 0; u < kLinearUnroll; ++u, k += stride) {
      PTX_UNROLL
      for (int half = 0; half < 2; ++half) {
        a[u][half] = {};
        if (k < k_end && inside[half]) a[u][half] = ptx::LdGlobalOnce(reinterpret_cast<const uint4*>(at[half] + k));
      }
    }
  }
};

// Its warps share out the rows of the block's weights: the instruction takes one after the other.
PTX_FUNCTION void PrefetchRows(const LinearOperands& args, int64_t group, int warp) {
  if (group >= args.prefetch.blocks || args.prefetch.bytes == 0) return;
  for (int row = warp; row < kMmaLinearColumns; row += args.parts) {
    if (ColumnOf(args, group, row) >= args.n) continue;
    const BF16* weights =
        static_cast<const BF16*>(args.weight.data) + WeightRowOf(args, group, row) * args.weight.stride;
    ptx::PrefetchL2(reinterpret_cast<const char*>(weights) + args.prefetch.begin,
                    static_cast<uint32_t>(args.prefetch.bytes));
  }
}

template <int kTokenTiles>
__global__ void __launch_bounds__(kMostLinearThreads) MmaLinearKernel(LinearOperands args) {
  constexpr int kTokens = 8 * kTokenTiles;
  auto* sums = static_cast<float*>(ptx::DynamicShared());  // [parts, kTokens, kMmaLinearPadded]
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int row = lane / 4, part = lane % 4;
  const int64_t group = blockIdx.x, first_token = int64_t{blockIdx.y} * kTokens;
  const auto* x = static_cast<const BF16*>(args.x.data);

  // While the kernels before still make x the first weights are on their way, more of them to L2 and some to registers:
  // ends of kernels, sums over ranks and launches cost no bandwidth.
  if (ptx::kKernelsOverlap && lane == 0) PrefetchRows(args, group, warp);

  // K may end within a chunk, N within the block's columns and T within its tokens: zeros stand for what is beyond.
  float d[kTokenTiles][4] = {};
  const int stride = kLinearChunk * args.parts, k_end = static_cast<int>(args.k);
  const LaneRows rows(args, group, row);
  uint4 a[kLinearUnroll][2];
  constexpr bool kAhead = ptx::kKernelsOverlap && kTokenTiles <= kMostTokenTilesAhead;
  const int begin = warp * kLinearChunk;
  if (kAhead) rows.Load(begin + part * 8, stride, k_end, a);
  ptx::WaitForKernelsBefore();
  ptx::LetNextKernelStart();
  for (int first = begin; first < k_end; first += kLinearUnroll * stride) {
    if (!kAhead || first != begin) rows.Load(first + part * 8, stride, k_end, a);
    PTX_UNROLL
    for (int u = 0; u < kLinearUnroll; ++u) {
      const int k = first + u * stride + part * 8;
      PTX_UNROLL
      for (int tile = 0; tile < kTokenTiles; ++tile) {
        const int64_t token = first_token + 8 * tile + row;
        uint4 b = {};
        if (k < k_end && token < args.tokens) {
          b = ptx::LdGlobal(reinterpret_cast<const uint4*>(x + token * args.x.stride + k));
        }
        ptx::Mma16816(d[tile], {a[u][0].x, a[u][1].x, a[u][0].y, a[u][1].y}, {b.x, b.y});
        ptx::Mma16816(d[tile], {a[u][0].z, a[u][1].z, a[u][0].w, a[u][1].w}, {b.z, b.w});
      }
    }
  }

  PTX_UNROLL
  for (int tile = 0; tile < kTokenTiles; ++tile) {
    PTX_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int token = 8 * tile + 2 * part + i % 2, column = row + 8 * (i / 2);
      ptx::StShared(&sums[(warp * kTokens + token) * kMmaLinearPadded + column], d[tile][i]);
    }
  }
  __syncthreads();
  const auto sum_of = [&](int token, int row_of_group) {
    float sum = 0;
    for (int w = 0; w < args.parts; ++w) {
      sum += ptx::LdShared(&sums[(w * kTokens + token) * kMmaLinearPadded + row_of_group]);
    }
    return sum;
  };
  const int columns = args.gated ? 8 : static_cast<int>(kMmaLinearColumns);
  for (int i = thread; i < kTokens * columns; i += 32 * args.parts) {
    const int token = i / columns, at = i % columns;
    const int64_t column = ColumnOf(args, group, at);
    if (first_token + token >= args.tokens || column >= args.n) continue;
    float result[1] = {sum_of(token, at)};
    if (args.gated) result[0] = Gated(args, result[0], sum_of(token, at + 8));
    StoreSums(args, first_token + token, column, result);
  }
}

template <int kPack>
__global__ void __launch_bounds__(32 * kPlainLinearWarps) PlainLinearKernel(LinearOperands args) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int64_t column = int64_t{blockIdx.x} * kPlainLinearWarps + threadIdx.x / 32;
  const int64_t first_token = int64_t{blockIdx.y} * kPlainLinearTokens;
  if (column >= args.n) return;
  float sums[kPlainLinearTokens] = {};
  for (int64_t k = int64_t{lane} * kPack; k < args.k; k += 32 * kPack) {
    float w[kPack];
    Load(args.weight, column * args.weight.stride + k, w);
    PTX_UNROLL
    for (int t = 0; t < kPlainLinearTokens; ++t) {
      if (first_token + t >= args.tokens) continue;
      float x[kPack];
      Load(args.x, (first_token + t) * args.x.stride + k, x);
      PTX_UNROLL
      for (int i = 0; i < kPack; ++i) sums[t] = fmaf(x[i], w[i], sums[t]);
    }
  }
  PTX_UNROLL
  for (int t = 0; t < kPlainLinearTokens; ++t) {
    float x[1] = {WarpSum(sums[t])};
    if (lane == 0 && first_token + t < args.tokens) StoreSums(args, first_token + t, column, x);
  }
}

bool OnTensorCores(const TensorView& x, const TensorView& weight) {
  return weight.dtype == DType::kBF16 && IsPacked(weight, 8) && IsPacked(x, 8);
}

// Many tokens, unless their bits must be those of few.
bool ByLibrary(Stream& stream, const LinearArgs& args) {
  return args.x.dim(0) > kMostTokensOfOurs && !args.batch_invariant && OnTensorCores(args.x, args.weight) &&
         IsPacked(args.out, 16 / static_cast<int64_t>(SizeOf(args.out.dtype))) && CublasLtLinear(stream, args);
}

void LaunchMmaLinear(Stream& stream, LinearOperands args, bool out_packed) {
  const int64_t rows = args.gated ? 2 * args.n : args.n;
  if (UsesTiles(args.tokens, rows)) {
    LaunchTiledLinear(stream, args, out_packed);
    return;
  }
  if (kernels_overlap) args.prefetch = PlanLinearPrefetch(args.tokens, rows, args.k, args.parts);
  const int tiles = MmaLinearTokenTiles(args.tokens);
  LaunchOverlapping(stream, "Linear", MmaLinearPlan(args.tokens, rows, args.parts),
                    tiles == 1   ? MmaLinearKernel<1>
                    : tiles == 2 ? MmaLinearKernel<2>
                                 : MmaLinearKernel<8>,
                    args);
}

}  // namespace

void Linear(Stream& stream, const LinearArgs& args) {
  if (ByLibrary(stream, args)) return;
  const LinearOperands operands = {.out = Elements(args.out),
                                   .x = Elements(args.x),
                                   .weight = Elements(args.weight),
                                   .tokens = args.x.dim(0),
                                   .n = args.weight.dim(0),
                                   .k = args.x.dim(1),
                                   .parts = LinearParts(args.weight.dim(0), args.x.dim(1)),
                                   .accumulate = args.accumulate};
  if (OnTensorCores(args.x, args.weight)) {
    LaunchMmaLinear(stream, operands, IsPacked(args.out, 4));
    return;
  }
  const bool packed = IsPacked(args.weight, 4) && IsPacked(args.x, 4);
  Launch(stream, "Linear", PlainLinearPlan(operands.tokens, operands.n),
         packed ? PlainLinearKernel<4> : PlainLinearKernel<1>, operands);
}

void LinearSiluMul(Stream& stream, const LinearSiluMulArgs& args) {
  const LinearArgs product = {
      .out = args.gate_up, .x = args.x, .weight = args.weight, .batch_invariant = args.batch_invariant};
  const bool done = ByLibrary(stream, product);
  if (done || !OnTensorCores(args.x, args.weight)) {
    if (!done) cuda::Linear(stream, product);
    cuda::SiluMul(stream, {.out = args.out, .gate_up = args.gate_up});
    return;
  }
  const LinearOperands operands = {.out = Elements(args.out),
                                   .x = Elements(args.x),
                                   .weight = Elements(args.weight),
                                   .tokens = args.x.dim(0),
                                   .n = args.out.dim(1),
                                   .k = args.x.dim(1),
                                   .parts = LinearParts(args.weight.dim(0), args.x.dim(1)),
                                   .gated = true};
  LaunchMmaLinear(stream, operands, IsPacked(args.out, 4));
}

}  // namespace altiplano::cuda
