// What the kernels of Linear share: their operands, which rows of the weights lie together, and what becomes of a sum.
#pragma once

#include <cstdint>

#include "kernels/cuda/elements.h"
#include "kernels/cuda/linear_plan.h"
#include "kernels/cuda/ptx.h"
#include "kernels/cuda/silu.h"
#include "kernels/device.h"

namespace altiplano::cuda {

struct LinearOperands {
  Elements out, x, weight;
  int64_t tokens = 0, n = 0, k = 0;  // n: columns of out
  int parts = 1;                     // LinearParts
  bool accumulate = false;
  bool gated = false;            // out = silu(gate) * up; the weights are n rows of gate, then n of up
  LinearPrefetch prefetch = {};  // of few tokens
};

constexpr int64_t WeightRows(const LinearOperands& args) {
  return args.gated ? 2 * args.n : args.n;
}

// Weights are taken 16 rows at a time. Of gate and up these are 8 rows of each, so that the two sums of a column of out
// lie in the same lane.
PTX_FUNCTION int64_t ColumnOf(const LinearOperands& args, int64_t group, int row) {
  return args.gated ? group * 8 + row % 8 : group * 16 + row;
}
PTX_FUNCTION int64_t WeightRowOf(const LinearOperands& args, int64_t group, int row) {
  return ColumnOf(args, group, row) + (args.gated && row >= 8 ? args.n : 0);
}

// As the two ops would, one after the other: gate and up are rounded to what gate_up is stored in.
PTX_FUNCTION float Gated(const LinearOperands& args, float gate, float up) {
  return Silu(Rounded(gate, args.x.bf16)) * Rounded(up, args.x.bf16);
}

// What kPack neighbours of a row of out hold, where that is added to. Apart from StoreSums, so that what a thread has
// to store is not waited for one after the other.
template <int kPack>
PTX_FUNCTION void LoadBefore(const LinearOperands& args, int64_t token, int64_t column, uint32_t (&before)[kPack]) {
  if (args.accumulate) LoadRaw(args.out, token * args.out.stride + column, before);
}
template <int kPack>
PTX_FUNCTION void StoreSums(const LinearOperands& args, int64_t token, int64_t column, float (&sums)[kPack],
                            const uint32_t (&before)[kPack]) {
  if (args.accumulate) {
    float x[kPack];
    Widen(before, args.out.bf16, x);
    PTX_UNROLL
    for (int i = 0; i < kPack; ++i) sums[i] += x[i];
  }
  Store(args.out, token * args.out.stride + column, sums);
}

// Four columns of out, the last of which may lie beyond N where rows are not aligned to four.
struct FourColumns {
  int64_t token, column;
  uint32_t before[4];

  // Of all that are `inside` what they are added to. Whether rows are packed is asked once: ptxas would wait for the
  // loads of one where its ways meet again, before those of the next.
  template <int kCount>
  static PTX_FUNCTION void Load(const LinearOperands& args, bool packed, const bool (&inside)[kCount],
                                FourColumns (&all)[kCount]) {
    if (packed) {
      PTX_UNROLL
      for (int j = 0; j < kCount; ++j) {
        if (inside[j]) LoadBefore(args, all[j].token, all[j].column, all[j].before);
      }
      return;
    }
    PTX_UNROLL
    for (int j = 0; j < kCount; ++j) {
      PTX_UNROLL
      for (int i = 0; i < 4; ++i) {
        uint32_t one[1] = {};
        if (inside[j] && all[j].column + i < args.n) LoadBefore(args, all[j].token, all[j].column + i, one);
        all[j].before[i] = one[0];
      }
    }
  }
  // Their sums lie in shared memory at `from`, at `up` those of up where out is gated.
  PTX_FUNCTION void Store(const LinearOperands& args, bool packed, const float* from, const float* up) const {
    float x[4];
    LoadShared(from, x);
    if (args.gated) {
      float of_up[4];
      LoadShared(up, of_up);
      PTX_UNROLL
      for (int i = 0; i < 4; ++i) x[i] = Gated(args, x[i], of_up[i]);
    }
    if (packed) {
      StoreSums(args, token, column, x, before);
      return;
    }
    PTX_UNROLL
    for (int i = 0; i < 4; ++i) {
      float one[1] = {x[i]};
      const uint32_t one_before[1] = {before[i]};
      if (column + i < args.n) StoreSums(args, token, column + i, one, one_before);
    }
  }

 private:
  static PTX_FUNCTION void LoadShared(const float* from, float (&x)[4]) {
    const uint4 words = ptx::LdShared(reinterpret_cast<const uint4*>(from));
    x[0] = ptx::FloatOfBits(words.x);
    x[1] = ptx::FloatOfBits(words.y);
    x[2] = ptx::FloatOfBits(words.z);
    x[3] = ptx::FloatOfBits(words.w);
  }
};

// linear_tiles.cu
void LaunchTiledLinear(Stream& stream, const LinearOperands& args, bool out_packed);
// linear_hopper.cu. scratch: of PrepareHopperLinear, or null where HopperSplits is 1.
void PrepareHopperLinear(Stream& stream, void* scratch);
void LaunchHopperLinear(Stream& stream, const LinearOperands& args, bool out_packed, void* scratch);

}  // namespace altiplano::cuda
