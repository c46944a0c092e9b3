// Linear for the few tokens of a decode step, where reading the weights once is all that counts; right for any number.
//
// On tensor cores the weights are the operand of 16 rows and the tokens that of 8 columns, so that 1 to 8 tokens cost
// one instruction. Both are loaded straight into registers, 16 bytes of a row to a lane: the sum over k may run in any
// order as long as both operands agree on it, so a lane's 8 neighbours stand where the instruction wants pairs that lie
// apart. A warp then reads 64 bytes of each row at a time, and no shared memory or barrier delays the stream. What it
// loads of the tokens serves one or two groups of 16 rows, each with sums of its own (LinearRowGroups).
#include "kernels/cuda/backend.h"
#include "kernels/cuda/cublaslt.h"
#include "kernels/cuda/elements.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/linear.h"
#include "kernels/cuda/linear_plan.h"

namespace altiplano::cuda {

namespace {

// Of the weights, the two rows of a lane in each group: lane / 4 of the group, and 8 further.
template <int kRowGroups>
struct LaneRows {
  static constexpr int kRows = 2 * kRowGroups;
  const BF16* at[kRows];
  bool inside[kRows];

  PTX_FUNCTION LaneRows(const LinearOperands& args, int64_t first_group, int row) {
    PTX_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const int64_t group = first_group + i / 2;
      inside[i] = ColumnOf(args, group, row + i % 2 * 8) < args.n;
      at[i] =
          static_cast<const BF16*>(args.weight.data) + WeightRowOf(args, group, row + i % 2 * 8) * args.weight.stride;
    }
  }
  // kUnroll chunks of them that lie `stride` apart, the lane's part from k on.
  template <int kUnroll>
  PTX_FUNCTION void Load(int k, int stride, int k_end, uint4 (&a)[kUnroll][kRows]) const {
    PTX_UNROLL
    for (int u = 0; u < kUnroll; ++u, k += stride) {
      PTX_UNROLL
      for (int i = 0; i < kRows; ++i) {
        a[u][i] = {};
        if (k < k_end && inside[i]) a[u][i] = ptx::LdGlobalOnce(reinterpret_cast<const uint4*>(at[i] + k));
      }
    }
  }
};

// Its warps share out the rows of the block's weights: the instruction takes one after the other.
template <int kRowGroups>
PTX_FUNCTION void PrefetchRows(const LinearOperands& args, int64_t first_group, int warp) {
  if (static_cast<int>(blockIdx.x) >= args.prefetch.blocks || args.prefetch.bytes == 0) return;
  for (int i = warp; i < kRowGroups * kLinearGroupRows; i += args.parts) {
    const int64_t group = first_group + i / kLinearGroupRows;
    const int row = i % kLinearGroupRows;
    if (ColumnOf(args, group, row) >= args.n) continue;
    const BF16* weights =
        static_cast<const BF16*>(args.weight.data) + WeightRowOf(args, group, row) * args.weight.stride;
    ptx::PrefetchL2(reinterpret_cast<const char*>(weights) + args.prefetch.begin,
                    static_cast<uint32_t>(args.prefetch.bytes));
  }
}

template <int kTokenTiles, int kRowGroups, int kUnroll = kLinearUnroll>
__global__ void __launch_bounds__(LinearMostThreads(kTokenTiles, kUnroll), LinearBlocksToFit(kTokenTiles, kRowGroups))
    MmaLinearKernel(LinearOperands args) {
  constexpr int kTokens = 8 * kTokenTiles, kPadded = MmaLinearPadded(kRowGroups);
  auto* sums = static_cast<float*>(ptx::DynamicShared());  // [parts, kTokens, kPadded]
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int row = lane / 4, part = lane % 4;
  const int64_t first_group = int64_t{blockIdx.x} * kRowGroups, first_token = int64_t{blockIdx.y} * kTokens;
  const auto* x = static_cast<const BF16*>(args.x.data);

  // While the kernels before still make x the first weights are on their way, more of them to L2 and some to registers:
  // ends of kernels, sums over ranks and launches cost no bandwidth.
  if (ptx::kKernelsOverlap && lane == 0) PrefetchRows<kRowGroups>(args, first_group, warp);

  // K may end within a chunk, N within or before a group and T within the tokens: zeros stand for what is beyond.
  float d[kRowGroups][kTokenTiles][4] = {};
  const int stride = kLinearChunk * args.parts, k_end = static_cast<int>(args.k);
  const LaneRows<kRowGroups> rows(args, first_group, row);
  uint4 a[kUnroll][2 * kRowGroups];
  constexpr LinearLoadsOfX kTogether = LinearXTogether(kTokenTiles, kRowGroups);
  // Before sm_90 registers for it are too few but with two tiles or groups, and no plan has two of both.
  constexpr bool kHolds = kTokenTiles < 8 && (ptx::kKernelsOverlap || kTokenTiles * kRowGroups == 2);
  constexpr bool kAhead = ptx::kKernelsOverlap && kTokenTiles <= kMostTokenTilesAhead;
  const int begin = warp * kLinearChunk;
  if (kAhead) rows.Load(begin + part * 8, stride, k_end, a);
  ptx::WaitForKernelsBefore();
  ptx::LetNextKernelStart();
  for (int first = begin; first < k_end; first += kUnroll * stride) {
    if (!kAhead || first != begin) rows.Load(first + part * 8, stride, k_end, a);
    if (kTokenTiles == 8) __syncwarp();  // as below, of the weights
    PTX_UNROLL
    for (int chunk = 0; chunk < kUnroll; chunk += kTogether.chunks) {
      PTX_UNROLL
      for (int first_tile = 0; first_tile < kTokenTiles; first_tile += kTogether.tiles) {
        uint4 b[kTogether.chunks][kTogether.tiles];
        PTX_UNROLL
        for (int u = 0; u < kTogether.chunks; ++u) {
          const int k = first + (chunk + u) * stride + part * 8;
          PTX_UNROLL
          for (int t = 0; t < kTogether.tiles; ++t) {
            const int64_t token = first_token + 8 * (first_tile + t) + row;
            b[u][t] = {};
            if (k < k_end && token < args.tokens) {
              b[u][t] = ptx::LdGlobal(reinterpret_cast<const uint4*>(x + token * args.x.stride + k));
            }
          }
        }
        if (kHolds) __syncwarp();  // or ptxas moves each load to where it is waited for
        PTX_UNROLL
        for (int u = 0; u < kTogether.chunks; ++u) {
          PTX_UNROLL
          for (int t = 0; t < kTogether.tiles; ++t) {
            PTX_UNROLL
            for (int g = 0; g < kRowGroups; ++g) {
              const uint4 &low = a[chunk + u][2 * g], &high = a[chunk + u][2 * g + 1], &tokens = b[u][t];
              float(&sums_of)[4] = d[g][first_tile + t];
              ptx::Mma16816(sums_of, {low.x, high.x, low.y, high.y}, {tokens.x, tokens.y});
              ptx::Mma16816(sums_of, {low.z, high.z, low.w, high.w}, {tokens.z, tokens.w});
            }
          }
        }
      }
    }
  }

  // The thread's elements of out: most where a block has fewest threads, those of 4 parts.
  constexpr int kMostResults = kTokens * kRowGroups * kLinearGroupRows / (32 * 4);
  const int of_group = args.gated ? 3 : 4, of_token = of_group + kRowGroups - 1;  // bits of an element's number
  const auto element = [&](int n) { return thread + n * 32 * args.parts; };
  const auto token_of = [&](int i) { return i >> of_token; };
  const auto group_of = [&](int i) { return (i & ((1 << of_token) - 1)) >> of_group; };
  const auto row_of = [&](int i) { return i & ((1 << of_group) - 1); };
  const auto column_of = [&](int i) { return ColumnOf(args, first_group + group_of(i), row_of(i)); };

  PTX_UNROLL
  for (int g = 0; g < kRowGroups; ++g) {
    PTX_UNROLL
    for (int tile = 0; tile < kTokenTiles; ++tile) {
      PTX_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int token = 8 * tile + 2 * part + i % 2, row_of_block = kLinearGroupRows * g + row + 8 * (i / 2);
        ptx::StShared(&sums[(warp * kTokens + token) * kPadded + row_of_block], d[g][tile][i]);
      }
    }
  }
  // What they are added to is on its way while the parts meet. Asked for behind the stores, which leave registers free:
  // in front of them ptxas would spill before sm_90.
  bool mine[kMostResults];
  uint32_t before[kMostResults][1] = {};
  PTX_UNROLL
  for (int n = 0; n < kMostResults; ++n) {
    const int i = element(n), token = token_of(i);
    mine[n] = token < kTokens && first_token + token < args.tokens && column_of(i) < args.n;
    if (mine[n]) LoadBefore(args, first_token + token, column_of(i), before[n]);
  }
  __syncthreads();
  const auto sum_of = [&](int token, int row_of_block) {
    float sum = 0;
    for (int w = 0; w < args.parts; ++w) {
      sum += ptx::LdShared(&sums[(w * kTokens + token) * kPadded + row_of_block]);
    }
    return sum;
  };
  PTX_UNROLL
  for (int n = 0; n < kMostResults; ++n) {
    if (!mine[n]) continue;
    const int i = element(n), token = token_of(i), row_of_block = kLinearGroupRows * group_of(i) + row_of(i);
    float result[1] = {sum_of(token, row_of_block)};
    if (args.gated) result[0] = Gated(args, result[0], sum_of(token, row_of_block + 8));
    StoreSums(args, first_token + token, column_of(i), result, before[n]);
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
    if (lane != 0 || first_token + t >= args.tokens) continue;
    uint32_t before[1] = {};
    LoadBefore(args, first_token + t, column, before);
    StoreSums(args, first_token + t, column, x, before);
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
  const int64_t rows = WeightRows(args);
  if (UsesTiles(args.tokens, rows)) {
    LaunchTiledLinear(stream, args, out_packed);
    return;
  }
  const bool from_sm90 = PropertiesOf(stream).architecture->capability >= 90;
  if (kernels_overlap && from_sm90) args.prefetch = PlanLinearPrefetch(args.tokens, rows, args.k, args.parts);
  const int tiles = MmaLinearTokenTiles(args.tokens);
  const bool two_groups = LinearRowGroups(args.tokens, rows, from_sm90) == 2;
  LaunchOverlapping(stream, "Linear", MmaLinearPlan(args.tokens, rows, args.parts, from_sm90),
                    tiles == 1   ? two_groups ? MmaLinearKernel<1, 2> : MmaLinearKernel<1, 1>
                      : tiles == 2 ? two_groups ? MmaLinearKernel<2, 2> : MmaLinearKernel<2, 1>
                    : LinearUnroll(tiles, args.parts) == kLinearUnroll ? MmaLinearKernel<8, 1>
                                                                       : MmaLinearKernel<8, 1, kLeastLinearUnroll>,
                    args);
}

// Some tokens, by what only Hopper has; not if their bits must be those of fewer.
bool ByHopper(Stream& stream, const LinearOperands& args, bool batch_invariant, void* scratch) {
  const int64_t rows = WeightRows(args);
  return !batch_invariant && PropertiesOf(stream).architecture->capability == kHopper.capability &&
         UsesHopper(args.tokens, rows, args.k) && (scratch != nullptr || HopperSplits(rows, args.k) == 1);
}

// On tensor cores by our own kernels.
void LaunchLinear(Stream& stream, const LinearOperands& operands, const TensorView& out, bool batch_invariant,
                  void* scratch) {
  if (ByHopper(stream, operands, batch_invariant, scratch)) {
    LaunchHopperLinear(stream, operands, IsPacked(out, 4), scratch);
  } else {
    LaunchMmaLinear(stream, operands, IsPacked(out, 4));
  }
}

}  // namespace

void PrepareLinear(Stream& stream, void* scratch) {
  PrepareCublasLt(stream);
  if (scratch != nullptr) PrepareHopperLinear(stream, scratch);
}

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
    LaunchLinear(stream, operands, args.out, args.batch_invariant, args.scratch);
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
  LaunchLinear(stream, operands, args.out, args.batch_invariant, args.scratch);
}

}  // namespace altiplano::cuda
