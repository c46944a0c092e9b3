// Linear of some tokens on sm_90a, where reading the weights once is what counts and there are too many tokens to load
// with them into registers: TMA, mbarriers and wgmma. bf16.
//
// The weights are wgmma's operand of 64 rows, the tokens that of 16, 32 or 64 columns. One thread, the producer, has
// TMA copy 64 elements of K after the other of both into a ring that takes nearly all shared memory; a warpgroup
// multiplies them from there. So a multiprocessor has 200 KB on their way and issues next to nothing. Before it waits
// for the kernels before, the producer has asked for a ring full of weights.
//
// A block stays for its units, one after the other: a *tile* of 64 or 128 rows of the weights, or a split of one, which
// is a part of K. The sums of splits are added by the block that is the last to have its own, in the order of K, so
// that bits do not depend on who is. Of gate and up a tile has as many rows of the one as of the other.
#include "kernels/cuda/backend.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/linear.h"
#include "kernels/cuda/linear_plan.h"
#include "kernels/cuda/ptx_hopper.h"

namespace altiplano::cuda {

namespace {

constexpr int kWarps = kHopperConsumers / 32;  // that consume
constexpr int kProducer = kWarps;              // the warp behind them
constexpr int kRows = 64;                      // of a wgmma
constexpr uint32_t kAtomBytes = 1024, kLeadingUnused = 16;
constexpr int kBarrier = 1;  // of the consumers

template <int kColumns, int kBlockRows>
struct Shared {
  static constexpr int kStages = HopperStages(kColumns, kBlockRows);
  unsigned char weights[kStages][kBlockRows * 128];
  unsigned char tokens[kStages][kColumns * 128];
  float sums[kColumns][HopperPadded(kBlockRows)];
  uint64_t full[kStages], empty[kStages];
  uint32_t last;  // whether all splits of the tile are done
};

struct Operands {
  LinearOperands linear;
  HopperLinear plan;
  bool out_packed;
  uint4* sums;         // [units, quads of a thread, consumers], of splits
  uint32_t* finished;  // [tiles]: splits that are done
};

// Of all K the stages of a unit, which may be a split.
struct Stages {
  int begin, end;
  PTX_FUNCTION Stages(const HopperLinear& plan, int unit) : begin(unit % plan.splits * plan.depth) {
    end = begin + plan.depth < plan.stages ? begin + plan.depth : plan.stages;
  }
};

// The stages of a block, unit after unit.
class Turns {
 public:
  PTX_FUNCTION explicit Turns(const HopperLinear& plan)
      : plan_(plan), unit_(static_cast<int>(blockIdx.x)), stages_(plan, unit_) {}
  PTX_FUNCTION bool more() const { return unit_ < plan_.units(); }
  PTX_FUNCTION int tile() const { return unit_ / plan_.splits; }
  PTX_FUNCTION int k() const { return stages_.begin * kHopperDepth; }
  PTX_FUNCTION void Next() {
    if (++stages_.begin < stages_.end) return;
    unit_ += static_cast<int>(gridDim.x);
    stages_ = Stages(plan_, unit_);
  }

 private:
  const HopperLinear& plan_;
  int unit_;
  Stages stages_;  // that are left of the unit
};

// ---- the producer

template <int kColumns, int kBlockRows>
PTX_FUNCTION void Produce(const Operands& args, Shared<kColumns, kBlockRows>& shared, const ptx::TensorMap& weights,
                          const ptx::TensorMap& x) {
  using Block = Shared<kColumns, kBlockRows>;
  const auto copy_weights = [&](const Turns& turn, int slot) {
    ptx::MbarrierArriveExpecting(&shared.full[slot], sizeof(shared.weights[0]) + sizeof(shared.tokens[0]));
    if (args.linear.gated) {  // the map's boxes have half a block's rows
      const int column = turn.tile() * (kBlockRows / 2);
      ptx::CopyBoxOnce(shared.weights[slot], weights, turn.k(), column, &shared.full[slot]);
      ptx::CopyBoxOnce(shared.weights[slot] + sizeof(shared.weights[0]) / 2, weights, turn.k(),
                       static_cast<int>(args.linear.n) + column, &shared.full[slot]);
    } else {
      ptx::CopyBoxOnce(shared.weights[slot], weights, turn.k(), turn.tile() * kBlockRows, &shared.full[slot]);
    }
  };
  Turns ahead(args.plan), turn(args.plan);
  int filled = 0;
  for (; filled < Block::kStages && ahead.more(); ++filled, ahead.Next()) copy_weights(ahead, filled);
  ptx::WaitForKernelsBefore();
  ptx::LetNextKernelStart();
  uint32_t parity = 1;
  for (int slot = 0; turn.more(); turn.Next()) {
    if (filled == 0) {
      ptx::MbarrierWait(&shared.empty[slot], parity);
      copy_weights(turn, slot);
    } else {
      --filled;
    }
    ptx::CopyBox(shared.tokens[slot], x, turn.k(), 0, &shared.full[slot]);
    if (++slot == Block::kStages) slot = 0, parity ^= 1;
  }
}

// ---- the consumers

// Begins sums (+)= weights x of a stage, behind those of the stage before, which may be under way: between them nothing
// may touch the sums, not even a fence, or ptxas would have each product waited for (C7514). 16 of K are 32 bytes of
// rows, and 64 rows of the weights eight atoms.
template <int kColumns, int kBlockRows>
PTX_FUNCTION void Multiply(const Shared<kColumns, kBlockRows>& shared, int slot, bool first,
                           float (&sums)[kBlockRows / kRows][kColumns / 2]) {
  const uint64_t weights = ptx::MatrixDescriptor(shared.weights[slot], kLeadingUnused, kAtomBytes);
  const uint64_t tokens = ptx::MatrixDescriptor(shared.tokens[slot], kLeadingUnused, kAtomBytes);
  ptx::WgmmaFence();
  PTX_UNROLL
  for (int step = 0; step < kHopperDepth / 16; ++step) {
    PTX_UNROLL
    for (int i = 0; i < kBlockRows / kRows; ++i) {
      ptx::Wgmma(sums[i], ptx::FurtherOn(weights, static_cast<uint32_t>(i * kRows * 128 + step * 32)),
                 ptx::FurtherOn(tokens, static_cast<uint32_t>(step * 32)), !first || step > 0);
    }
  }
  ptx::WgmmaCommit();
}

// Leaves the sums of this unit for the last split of the tile. True: that is this one, and the sums are now those of
// all. Each thread has the same elements of all units.
template <int kColumns, int kBlockRows>
PTX_FUNCTION bool AddSplits(const Operands& args, Shared<kColumns, kBlockRows>& shared, int unit,
                            float (&sums)[kBlockRows / kRows][kColumns / 2]) {
  constexpr int kOfRow = kColumns / 8, kQuads = kBlockRows / kRows * kOfRow;
  const int thread = static_cast<int>(threadIdx.x), splits = args.plan.splits, tile = unit / splits;
  uint4* own = args.sums + (unit * kQuads) * kHopperConsumers + thread;
  PTX_UNROLL
  for (int q = 0; q < kQuads; ++q) {
    const float* quad = &sums[q / kOfRow][q % kOfRow * 4];
    ptx::StGlobal(own + q * kHopperConsumers, uint4{ptx::BitsOfFloat(quad[0]), ptx::BitsOfFloat(quad[1]),
                                                    ptx::BitsOfFloat(quad[2]), ptx::BitsOfFloat(quad[3])});
  }
  ptx::NamedBarrierSync(kBarrier, kHopperConsumers);
  if (thread == 0) {
    const bool last = ptx::AddGlobal(&args.finished[tile], 1u) == static_cast<uint32_t>(splits - 1);
    if (last) ptx::StGlobal(&args.finished[tile], 0u);  // as the next product wants it
    ptx::StShared(&shared.last, last ? 1u : 0u);
  }
  ptx::NamedBarrierSync(kBarrier, kHopperConsumers);
  if (ptx::LdShared(&shared.last) == 0) return false;
  const uint4* from = args.sums + (tile * splits * kQuads) * kHopperConsumers + thread;
  for (int split = 0; split < splits; ++split, from += kQuads * kHopperConsumers) {
    uint4 quads[kQuads];  // on their way together
    PTX_UNROLL
    for (int q = 0; q < kQuads; ++q) quads[q] = ptx::LdGlobal(from + q * kHopperConsumers);
    PTX_UNROLL
    for (int q = 0; q < kQuads; ++q) {
      const uint32_t parts[4] = {quads[q].x, quads[q].y, quads[q].z, quads[q].w};
      PTX_UNROLL
      for (int i = 0; i < 4; ++i) {
        float& sum = sums[q / kOfRow][q % kOfRow * 4 + i];
        sum = split == 0 ? ptx::FloatOfBits(parts[i]) : sum + ptx::FloatOfBits(parts[i]);
      }
    }
  }
  return true;
}

// Through shared memory, so that rows of out are written as such.
template <int kColumns, int kBlockRows>
PTX_FUNCTION void StoreTile(const Operands& args, Shared<kColumns, kBlockRows>& shared, int tile,
                            const float (&sums)[kBlockRows / kRows][kColumns / 2]) {
  const LinearOperands& linear = args.linear;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  PTX_UNROLL
  for (int i = 0; i < kBlockRows / kRows; ++i) {
    PTX_UNROLL
    for (int j = 0; j < kColumns / 2; ++j) {
      const int row = i * kRows + warp * 16 + lane / 4 + j / 2 % 2 * 8, token = j / 4 * 8 + lane % 4 * 2 + j % 2;
      ptx::StShared(&shared.sums[token][row], sums[i][j]);
    }
  }
  ptx::NamedBarrierSync(kBarrier, kHopperConsumers);
  // Four columns a thread, in turn; how many a row has is a power of two.
  const int columns = linear.gated ? kBlockRows / 2 : kBlockRows,
            bits = (kBlockRows == 128 ? 5 : 4) - (linear.gated ? 1 : 0);
  constexpr int kAll = kColumns * kBlockRows / 4 / kHopperConsumers, kTogether = kAll < 8 ? kAll : 8;
  const int count = static_cast<int>(linear.tokens) << bits;
  for (int first = thread; first < count; first += kTogether * kHopperConsumers) {
    FourColumns out[kTogether];
    bool inside[kTogether];
    const float* from[kTogether];
    PTX_UNROLL
    for (int j = 0; j < kTogether; ++j) {
      const int i = first + j * kHopperConsumers, token = i >> bits, at = (i & ((1 << bits) - 1)) * 4;
      out[j] = {.token = token, .column = int64_t{tile} * columns + at, .before = {}};
      from[j] = *shared.sums + token * HopperPadded(kBlockRows) + at;
      inside[j] = i < count && out[j].column < linear.n;
    }
    FourColumns::Load(linear, args.out_packed, inside, out);
    PTX_UNROLL
    for (int j = 0; j < kTogether; ++j) {
      if (inside[j]) out[j].Store(linear, args.out_packed, from[j], from[j] + columns);
    }
  }
  ptx::NamedBarrierSync(kBarrier, kHopperConsumers);  // before the next tile's sums take their place
}

template <int kColumns, int kBlockRows>
PTX_FUNCTION void Consume(const Operands& args, Shared<kColumns, kBlockRows>& shared) {
  using Block = Shared<kColumns, kBlockRows>;
  const HopperLinear& plan = args.plan;
  const auto release = [&](int slot) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::MbarrierArrive(&shared.empty[slot]);
  };
  int slot = 0;
  uint32_t parity = 0;
  for (int unit = static_cast<int>(blockIdx.x); unit < plan.units(); unit += static_cast<int>(gridDim.x)) {
    const Stages stages(plan, unit);
    int before = slot;
    float sums[kBlockRows / kRows][kColumns / 2];
    ptx::WgmmaFence(sums);  // the tile before has left its registers
    for (int stage = stages.begin; stage < stages.end; ++stage) {
      ptx::MbarrierWait(&shared.full[slot], parity);
      Multiply<kColumns, kBlockRows>(shared, slot, stage == stages.begin, sums);
      // Of the stage before, so that the tensor cores have this one to go on with.
      ptx::WgmmaWait<1>();
      if (stage > stages.begin) release(before);
      before = slot;
      if (++slot == Block::kStages) slot = 0, parity ^= 1;
    }
    ptx::WgmmaWait<0>(sums);
    release(before);
    if (plan.splits > 1 && !AddSplits<kColumns, kBlockRows>(args, shared, unit, sums)) continue;
    StoreTile<kColumns, kBlockRows>(args, shared, unit / plan.splits, sums);
  }
}

template <int kColumns, int kBlockRows>
__global__ void __launch_bounds__(kHopperThreads, 1)
    HopperLinearKernel(Operands args, const PTX_GRID_CONSTANT ptx::TensorMap weights,
                       const PTX_GRID_CONSTANT ptx::TensorMap x) {
  auto& shared = *static_cast<Shared<kColumns, kBlockRows>*>(ptx::DynamicShared());
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < Shared<kColumns, kBlockRows>::kStages; ++slot) {
      ptx::MbarrierInit(&shared.full[slot], 1);
      ptx::MbarrierInit(&shared.empty[slot], kWarps);
    }
    ptx::FenceProxyAsync();
  }
  __syncthreads();
  // The same in all lanes, which ptxas knows of a shuffle: slots and descriptors then stand where wgmma takes them
  // from.
  const int warp = __shfl_sync(0xFFFFFFFF, static_cast<int>(threadIdx.x / 32), 0);
  if (warp < kProducer) {
    ptx::WaitForKernelsBefore();
    ptx::LetNextKernelStart();
    Consume<kColumns, kBlockRows>(args, shared);
  } else if (threadIdx.x % 32 == 0) {
    Produce<kColumns, kBlockRows>(args, shared, weights, x);
  } else {
    ptx::WaitForKernelsBefore();
  }
}

template <int kColumns, int kBlockRows>
void LaunchFor(Stream& stream, const Operands& args) {
  static_assert(sizeof(Shared<kColumns, kBlockRows>) == HopperSharedBytes(kColumns, kBlockRows));
  const LinearOperands& linear = args.linear;
  const int64_t rows = WeightRows(linear);
  const auto map = [&](const Elements& matrix, int64_t matrix_rows, int box_rows) {
    return ptx::MakeTensorMap(static_cast<const BF16*>(matrix.data), matrix_rows, linear.k, matrix.stride,
                              static_cast<uint32_t>(box_rows));
  };
  LaunchOverlapping(stream, "Linear", HopperLinearShape(args.plan, PropertiesOf(stream).multiprocessors),
                    HopperLinearKernel<kColumns, kBlockRows>, args,
                    map(linear.weight, rows, linear.gated ? kBlockRows / 2 : kBlockRows),
                    map(linear.x, linear.tokens, kColumns));
}

}  // namespace

void PrepareHopperLinear(Stream& stream, void* scratch) {
  static_assert(kHopperScratchBytes <= kLinearScratchBytes);
  Zero(stream.cuda_stream(), static_cast<char*>(scratch) + kHopperSumsBytes,
       static_cast<size_t>(kHopperScratchBytes - kHopperSumsBytes));
}

void LaunchHopperLinear(Stream& stream, const LinearOperands& linear, bool out_packed, void* scratch) {
  Operands args = {.linear = linear,
                   .plan = PlanHopperLinear(linear.tokens, WeightRows(linear), linear.k),
                   .out_packed = out_packed,
                   .sums = static_cast<uint4*>(scratch),
                   .finished = nullptr};
  if (scratch != nullptr) {
    args.finished = reinterpret_cast<uint32_t*>(static_cast<char*>(scratch) + kHopperSumsBytes);
  }
  const bool tall = args.plan.block_rows == 128;
  const auto launch = args.plan.columns == 16   ? tall ? LaunchFor<16, 128> : LaunchFor<16, 64>
                        : args.plan.columns == 32 ? tall ? LaunchFor<32, 128> : LaunchFor<32, 64>
                        : tall ? LaunchFor<64, 128>
                                                : LaunchFor<64, 64>;
  launch(stream, args);
}

}  // namespace altiplano::cuda
