#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>

#include "tests/bench/limits.h"
#include "tests/bench/limits_loops.h"

namespace altiplano::bench {
namespace {

struct MultiplyBf16 {
  using Acc = __m512;
  using X = __m512bh;
  static constexpr int kChains = 24;
  static __m512bh Operand(int64_t n) {
    const __m512 x = _mm512_set1_ps(1.0f / static_cast<float>(n + 2));
    return _mm512_cvtne2ps_pbh(x, x);
  }
  static __m512 Zero() { return _mm512_setzero_ps(); }
  static __m512 MultiplyAdd(__m512 acc, __m512bh a, __m512bh b) { return _mm512_dpbf16_ps(acc, a, b); }
  static float First(__m512 v) { return _mm512_cvtss_f32(v); }
};

constexpr MultiplyKernel kMultiplyAvx512Bf16List[] = {{"vdpbf16ps", true, 24 * 32 * 2.0, MultiplyLoop<MultiplyBf16>}};

}  // namespace

constinit const std::span<const MultiplyKernel> kMultiplyAvx512Bf16 = kMultiplyAvx512Bf16List;

}  // namespace altiplano::bench
