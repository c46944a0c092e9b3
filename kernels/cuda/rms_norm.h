// The half of a norm that comes after a row's elements are known: their sum of squares, and scaling. Shared by the
// plain norms and the one fused with an all-reduce, which must give the same bits.
#pragma once

#include "kernels/cuda/elements.h"
#include "kernels/cuda/rows_plan.h"

namespace altiplano::cuda {

// The same sum in every thread.
PTX_FUNCTION float BlockSum(float x) {
  PTX_SHARED(float, sums, kMostNormThreads / 32);
  x = WarpSum(x);
  if (threadIdx.x % 32 == 0) ptx::StShared(&sums[threadIdx.x / 32], x);
  __syncthreads();
  float total = 0;
  if (blockDim.x == kMostNormThreads) {  // as in most rows: wide loads and no loop
    PTX_UNROLL
    for (unsigned warp = 0; warp < kMostNormThreads / 32; ++warp) total += ptx::LdShared(&sums[warp]);
  } else {
    PTX_KEEP_LOOP
    for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) total += ptx::LdShared(&sums[warp]);
  }
  return total;
}

template <int kPack>
struct alignas(4 * kPack) Waiting {
  float x[kPack];
};

// Scales the row that waits in shared memory into `out`, a row, each pack by the thread that put it there. `squares`:
// of its own packs.
template <int kPack>
PTX_FUNCTION void ScaleRow(const Elements& out, const Elements& weight, const Waiting<kPack>* row, float squares,
                           float eps, int width) {
  const int packs = width / kPack, stride = static_cast<int>(blockDim.x);
  uint32_t weights[kPacksAtOnce][kPack] = {};
  const auto load_weights = [&](int first) {
    PTX_UNROLL
    for (int n = 0; n < kPacksAtOnce; ++n) {
      const int pack = first + n * stride;
      if (pack < packs) LoadRaw(weight, pack * kPack, weights[n]);
    }
  };
  int first = static_cast<int>(threadIdx.x);
  load_weights(first);  // on their way while the block adds up
  const float mean = ptx::Divide(BlockSum(squares), static_cast<float>(width));
  const float scale = ptx::Divide(1.0f, sqrtf(mean + eps));
  while (first < packs) {
    PTX_UNROLL
    for (int n = 0; n < kPacksAtOnce; ++n) {
      const int pack = first + n * stride;
      if (pack >= packs) break;
      Waiting<kPack> waiting = ptx::LdShared(&row[pack]);
      float w[kPack];
      Widen(weights[n], weight.bf16, w);
      PTX_UNROLL
      for (int i = 0; i < kPack; ++i) waiting.x[i] = waiting.x[i] * scale * w[i];
      Store(out, pack * kPack, waiting.x);
    }
    first += kPacksAtOnce * stride;
    if (first >= packs) break;
    load_weights(first);
  }
}

}  // namespace altiplano::cuda
