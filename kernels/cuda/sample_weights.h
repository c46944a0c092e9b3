// e^x and weights to the same bits as kernels/cpu/math_vec.h and sample_kernels.h have them.
#pragma once

#include <cstdint>

#include "kernels/cuda/ptx.h"

namespace altiplano::cuda {

inline constexpr float kInf = __builtin_huge_valf();

PTX_FUNCTION float Exp(float x) {
  constexpr float kMagic = 0x1.8p23f, kLow = -87.0f, kHigh = 88.0f;
  if (x < kLow) return 0;
  if (x > kHigh) return kInf;
  const float t = fmaf(x, 0x1.715476p+0f, kMagic);
  const float n = ptx::Add(t, -kMagic);
  float r = fmaf(-n, 0x1.62e43p-1f, x);
  r = fmaf(n, 0x1.05c61p-29f, r);
  float q = fmaf(0x1.6d10fep-10f, r, 0x1.120b64p-7f);
  q = fmaf(q, r, 0x1.55551ap-5f);
  q = fmaf(q, r, 0x1.5554dep-3f);
  q = fmaf(q, r, 0.5f);
  const float p = ptx::Add(fmaf(q, ptx::Multiply(r, r), r), 1.0f);
  return ptx::FloatOfBits(ptx::BitsOfFloat(p) + (ptx::BitsOfFloat(t) << 23));
}

PTX_FUNCTION uint64_t WeightOf(float e) {
  return ptx::RoundToInteger(static_cast<double>(e) * 0x1p40);
}

}  // namespace altiplano::cuda
