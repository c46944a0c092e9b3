// Linear for the few tokens of a decode step, where reading the weights once is all that counts; right for any number.
//
// On tensor cores the weights are the operand of 16 rows and the tokens that of 8 columns, so that 1 to 8 tokens cost
// one instruction. Both are loaded straight into registers, 16 bytes of a row to a lane: the sum over k may run in any
// order as long as both operands agree on it, so a lane's 8 neighbours stand where the instruction wants pairs that lie
// apart. A warp then reads 64 bytes of each row at a time, and no shared memory or barrier delays the stream.
#include "kernels/cuda/backend.h"
#include "kernels/cuda/elements.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/linear_plan.h"

namespace altiplano::cuda {

namespace {

struct LinearOperands {
  Elements out, x, weight;
  int64_t tokens = 0, n = 0, k = 0;
  bool accumulate = false;
};

constexpr int kChunk = 32;  // of K, for one warp at a time: 16 bytes for each of the four lanes of a row
constexpr int kUnroll = 4;  // chunks whose weights are in flight together

PTX_FUNCTION void StoreSum(const LinearOperands& args, int64_t token, int64_t column, float sum) {
  const int64_t at = token * args.out.stride + column;
  if (args.accumulate) {
    float before[1];
    Load(args.out, at, before);
    sum += before[0];
  }
  const float x[1] = {sum};
  Store(args.out, at, x);
}

template <int kTokenTiles>
__global__ void __launch_bounds__(kLinearThreads) MmaLinearKernel(LinearOperands args) {
  constexpr int kTokens = 8 * kTokenTiles;
  auto* sums = static_cast<float*>(ptx::DynamicShared());  // [kLinearWarps, kTokens, kMmaLinearPadded]
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int row = lane / 4, part = lane % 4;
  const int64_t first_column = int64_t{blockIdx.x} * kMmaLinearColumns, first_token = int64_t{blockIdx.y} * kTokens;
  const auto* weight = static_cast<const BF16*>(args.weight.data);
  const auto* x = static_cast<const BF16*>(args.x.data);

  // K may end within a chunk, N within the block's columns and T within its tokens: zeros stand for what is beyond.
  float d[kTokenTiles][4] = {};
  for (int64_t first = int64_t{warp} * kChunk; first < args.k; first += kChunk * kLinearWarps * kUnroll) {
    uint4 a[kUnroll][2] = {};
    PTX_UNROLL
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t k = first + u * kChunk * kLinearWarps + part * 8;
      PTX_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int64_t column = first_column + row + 8 * half;
        if (k < args.k && column < args.n) {
          a[u][half] = ptx::LdGlobalOnce(reinterpret_cast<const uint4*>(weight + column * args.weight.stride + k));
        }
      }
    }
    PTX_UNROLL
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t k = first + u * kChunk * kLinearWarps + part * 8;
      PTX_UNROLL
      for (int tile = 0; tile < kTokenTiles; ++tile) {
        const int64_t token = first_token + 8 * tile + row;
        uint4 b = {};
        if (k < args.k && token < args.tokens) {
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
  constexpr int kColumns = static_cast<int>(kMmaLinearColumns);
  for (int i = thread; i < kTokens * kColumns; i += static_cast<int>(kLinearThreads)) {
    const int token = i / kColumns, column = i % kColumns;
    if (first_token + token >= args.tokens || first_column + column >= args.n) continue;
    float sum = 0;
    for (int w = 0; w < kLinearWarps; ++w) {
      sum += ptx::LdShared(&sums[(w * kTokens + token) * kMmaLinearPadded + column]);
    }
    StoreSum(args, first_token + token, first_column + column, sum);
  }
}

template <int kPack>
__global__ void __launch_bounds__(kLinearThreads) PlainLinearKernel(LinearOperands args) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int64_t column = int64_t{blockIdx.x} * kLinearWarps + threadIdx.x / 32;
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
    const float sum = WarpSum(sums[t]);
    if (lane == 0 && first_token + t < args.tokens) StoreSum(args, first_token + t, column, sum);
  }
}

}  // namespace

void Linear(Stream& stream, const LinearArgs& args) {
  const LinearOperands operands = {.out = Elements(args.out),
                                   .x = Elements(args.x),
                                   .weight = Elements(args.weight),
                                   .tokens = args.x.dim(0),
                                   .n = args.weight.dim(0),
                                   .k = args.x.dim(1),
                                   .accumulate = args.accumulate};
  if (args.weight.dtype == DType::kBF16 && IsPacked(args.weight, 8) && IsPacked(args.x, 8)) {
    const int tiles = MmaLinearTokenTiles(operands.tokens);
    Launch(stream, "Linear", MmaLinearPlan(operands.tokens, operands.n),
           tiles == 1   ? MmaLinearKernel<1>
           : tiles == 2 ? MmaLinearKernel<2>
                        : MmaLinearKernel<8>,
           operands);
    return;
  }
  const bool packed = IsPacked(args.weight, 4) && IsPacked(args.x, 4);
  Launch(stream, "Linear", PlainLinearPlan(operands.tokens, operands.n),
         packed ? PlainLinearKernel<4> : PlainLinearKernel<1>, operands);
}

}  // namespace altiplano::cuda
