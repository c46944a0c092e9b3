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

// kPack neighbours of a row of out.
template <int kPack>
PTX_FUNCTION void StoreSums(const LinearOperands& args, int64_t token, int64_t column, float (&sums)[kPack]) {
  const int64_t at = token * args.out.stride + column;
  if (args.accumulate) {
    float before[kPack];
    Load(args.out, at, before);
    PTX_UNROLL
    for (int i = 0; i < kPack; ++i) sums[i] += before[i];
  }
  Store(args.out, at, sums);
}

// linear_tiles.cu
void LaunchTiledLinear(Stream& stream, const LinearOperands& args, bool out_packed);

}  // namespace altiplano::cuda
