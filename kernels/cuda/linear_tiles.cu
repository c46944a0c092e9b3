// Linear for many tokens, on tensor cores: tiles of the result, their operands in a ring of stages that cp.async fills
// ahead. mma.sync, sm_80 and later.
//
// Its bits are those of linear.cu, by the same instructions on the same numbers in the same order. So a stage holds two
// chunks of one part and not what comes next in K; a part is summed through the whole of K before the next begins, and
// parts are added in a second set of registers. And lanes load 16 bytes of a row, as there: their 8 neighbours of K
// stand where the instruction wants pairs that lie apart.
#include "kernels/cuda/architectures.h"
#include "kernels/cuda/backend.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/linear.h"
#include "kernels/cuda/linear_plan.h"

namespace altiplano::cuda {

namespace {

constexpr int kChunks = kTileDepth / 8;  // of 16 bytes, in a row of a stage

// Two rows lie in the halves of all banks: lanes read 64 bytes of each of two rows at a time.
PTX_FUNCTION int ChunkAt(int row, int chunk) {
  return row * kChunks + (chunk ^ (row & 1) * (kChunks / 2));
}

template <int kRowWarps, int kTokenWarps>
struct Tile {
  static constexpr LinearTile kShape = {kRowWarps, kTokenWarps};
  static constexpr int kRows = kShape.rows(), kTokens = kShape.tokens(), kThreads = kShape.threads();
  static constexpr int kStage = (kRows + kTokens) * kChunks;  // weights, then tokens
  static constexpr int kPadded = kRows + 4;                   // so that the lanes of a store differ in their banks
};

// The step's two chunks of all rows; zeros beyond K, N and T.
template <typename T>
PTX_FUNCTION void CopyStage(const LinearOperands& args, int64_t first_k, uint4* stage) {
  const int thread = static_cast<int>(threadIdx.x), chunk = thread % kChunks;
  const int64_t k = first_k + chunk / 4 * int64_t{kLinearChunk} * args.parts + chunk % 4 * 8;
  const int64_t first_group = int64_t{blockIdx.y} * (T::kRows / 16), first_token = int64_t{blockIdx.x} * T::kTokens;
  constexpr int kRowsAtOnce = T::kThreads / kChunks;
  PTX_KEEP_LOOP
  for (int i = 0; i < T::kRows / kRowsAtOnce; ++i) {
    const int row = thread / kChunks + i * kRowsAtOnce;
    const int64_t group = first_group + row / 16;
    const bool inside = k < args.k && ColumnOf(args, group, row % 16) < args.n;
    const auto* from = static_cast<const BF16*>(args.weight.data);
    if (inside) from += WeightRowOf(args, group, row % 16) * args.weight.stride + k;
    ptx::CpAsync16(&stage[ChunkAt(row, chunk)], from, inside);
  }
  PTX_KEEP_LOOP
  for (int i = 0; i < T::kTokens / kRowsAtOnce; ++i) {
    const int row = thread / kChunks + i * kRowsAtOnce;
    const bool inside = k < args.k && first_token + row < args.tokens;
    const auto* from = static_cast<const BF16*>(args.x.data);
    if (inside) from += (first_token + row) * args.x.stride + k;
    ptx::CpAsync16(&stage[T::kRows * kChunks + ChunkAt(row, chunk)], from, inside);
  }
}

template <typename T>
PTX_FUNCTION void MultiplyStage(const uint4* stage, int warp_row, int warp_token, float (&d)[4][4][4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32, row = lane / 4, part = lane % 4;
  const uint4* tokens = stage + T::kRows * kChunks;
  PTX_UNROLL
  for (int half = 0; half < 2; ++half) {
    uint4 b[4];
    PTX_UNROLL
    for (int n = 0; n < 4; ++n) b[n] = ptx::LdShared(&tokens[ChunkAt(warp_token + n * 8 + row, half * 4 + part)]);
    PTX_UNROLL
    for (int m = 0; m < 4; ++m) {
      const uint4 low = ptx::LdShared(&stage[ChunkAt(warp_row + m * 16 + row, half * 4 + part)]);
      const uint4 high = ptx::LdShared(&stage[ChunkAt(warp_row + m * 16 + row + 8, half * 4 + part)]);
      PTX_UNROLL
      for (int n = 0; n < 4; ++n) {
        ptx::Mma16816(d[m][n], {low.x, high.x, low.y, high.y}, {b[n].x, b[n].y});
        ptx::Mma16816(d[m][n], {low.z, high.z, low.w, high.w}, {b[n].z, b[n].w});
      }
    }
  }
}

template <int kRowWarps, int kTokenWarps>
__global__ void __launch_bounds__(Tile<kRowWarps, kTokenWarps>::kThreads)
    TiledLinearKernel(LinearOperands args, bool out_packed) {
  using T = Tile<kRowWarps, kTokenWarps>;
  auto* ring = static_cast<uint4*>(ptx::DynamicShared());  // [kTileStages, kStage]
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int warp_row = warp % kRowWarps * 64, warp_token = warp / kRowWarps * 32;

  const int64_t chunks = (args.k + kLinearChunk - 1) / kLinearChunk;
  const int steps_of_part = static_cast<int>(((chunks + args.parts - 1) / args.parts + 1) / 2);
  const int steps = args.parts * steps_of_part;
  int copy_part = 0, copy_step = 0, copied = 0;
  const auto copy_next = [&] {
    if (copied < steps) {
      const int64_t first_k = (copy_part + int64_t{2} * copy_step * args.parts) * kLinearChunk;
      CopyStage<T>(args, first_k, ring + copied % kTileStages * T::kStage);
      ++copied;
      if (++copy_step == steps_of_part) copy_step = 0, ++copy_part;
    }
    ptx::CpAsyncCommit();
  };
  PTX_UNROLL
  for (int i = 0; i < kTileStages - 1; ++i) copy_next();

  float sums[4][4][4] = {}, d[4][4][4] = {};
  int step_of_part = 0;
  for (int step = 0; step < steps; ++step) {
    ptx::CpAsyncWait<kTileStages - 2>();
    __syncthreads();  // all have their copies of this stage, and none is still at work on the one before
    copy_next();
    MultiplyStage<T>(ring + step % kTileStages * T::kStage, warp_row, warp_token, d);
    if (++step_of_part == steps_of_part) {
      step_of_part = 0;
      PTX_UNROLL
      for (int i = 0; i < 64; ++i) {
        sums[i / 16][i / 4 % 4][i % 4] += d[i / 16][i / 4 % 4][i % 4];
        d[i / 16][i / 4 % 4][i % 4] = 0;
      }
    }
  }

  // Through shared memory, so that rows of out are written as such. Some warps may still be at the last step, whose
  // stage is the ring's last: there are 4, 8 or 16 parts.
  static_assert(kTileStages == 4 && T::kTokens * T::kPadded * 4 <= (kTileStages - 1) * T::kStage * 16);
  auto* tile = reinterpret_cast<float*>(ring);  // [kTokens, kPadded]
  PTX_UNROLL
  for (int m = 0; m < 4; ++m) {
    PTX_UNROLL
    for (int n = 0; n < 4; ++n) {
      PTX_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int token = warp_token + n * 8 + lane % 4 * 2 + i % 2, row = warp_row + m * 16 + lane / 4 + i / 2 * 8;
        ptx::StShared(&tile[token * T::kPadded + row], sums[m][n][i]);
      }
    }
  }
  __syncthreads();
  const int columns = args.gated ? T::kRows / 2 : T::kRows, packs = columns / 4;
  const int64_t first_column = int64_t{blockIdx.y} * columns, first_token = int64_t{blockIdx.x} * T::kTokens;
  constexpr int kTogether = 4;
  for (int first = thread; first < T::kTokens * packs; first += kTogether * T::kThreads) {
    FourColumns out[kTogether];
    bool inside[kTogether];
    PTX_UNROLL
    for (int j = 0; j < kTogether; ++j) {
      const int i = first + j * T::kThreads;
      out[j] = {.token = first_token + i / packs, .column = first_column + i % packs * 4, .before = {}};
      inside[j] = i < T::kTokens * packs && out[j].token < args.tokens && out[j].column < args.n;
    }
    FourColumns::Load(args, out_packed, inside, out);
    PTX_UNROLL
    for (int j = 0; j < kTogether; ++j) {
      if (!inside[j]) continue;
      const int token = static_cast<int>(out[j].token - first_token),
                at = static_cast<int>(out[j].column - first_column);
      const float* from = &tile[token * T::kPadded + (args.gated ? at / 8 * 16 + at % 8 : at)];
      out[j].Store(args, out_packed, from, from + 8);
    }
  }
}

}  // namespace

void LaunchTiledLinear(Stream& stream, const LinearOperands& args, bool out_packed) {
  const int64_t rows = WeightRows(args);
  if (IsLargeTile(args.tokens, rows, PropertiesOf(stream).architecture->shared_bytes)) {
    Launch(stream, "Linear", TiledLinearPlan(kLargeTile, args.tokens, rows),
           TiledLinearKernel<kLargeTile.row_warps, kLargeTile.token_warps>, args, out_packed);
  } else {
    Launch(stream, "Linear", TiledLinearPlan(kSmallTile, args.tokens, rows),
           TiledLinearKernel<kSmallTile.row_warps, kSmallTile.token_warps>, args, out_packed);
  }
}

}  // namespace altiplano::cuda
