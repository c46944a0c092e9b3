#include "kernels/cpu/vec_avx2.h"

namespace altiplano::cpu {
namespace {

// 8 x 8: element j of x[i] becomes element i of x[j].
inline void TransposeSquare(__m256 (&x)[8]) {
  __m256 part[2][4];  // part[g][m]: in lane l, rows 4g to 4g + 3 of column 4l + m
#pragma GCC unroll 2
  for (int g = 0; g < 2; ++g) {
    const __m256 a = x[4 * g], b = x[4 * g + 1], c = x[4 * g + 2], d = x[4 * g + 3];
    const __m256d ab_low = _mm256_castps_pd(_mm256_unpacklo_ps(a, b));
    const __m256d ab_high = _mm256_castps_pd(_mm256_unpackhi_ps(a, b));
    const __m256d cd_low = _mm256_castps_pd(_mm256_unpacklo_ps(c, d));
    const __m256d cd_high = _mm256_castps_pd(_mm256_unpackhi_ps(c, d));
    part[g][0] = _mm256_castpd_ps(_mm256_unpacklo_pd(ab_low, cd_low));
    part[g][1] = _mm256_castpd_ps(_mm256_unpackhi_pd(ab_low, cd_low));
    part[g][2] = _mm256_castpd_ps(_mm256_unpacklo_pd(ab_high, cd_high));
    part[g][3] = _mm256_castpd_ps(_mm256_unpackhi_pd(ab_high, cd_high));
  }
#pragma GCC unroll 4
  for (int m = 0; m < 4; ++m) {
    x[m] = _mm256_permute2f128_ps(part[0][m], part[1][m], 0x20);
    x[4 + m] = _mm256_permute2f128_ps(part[0][m], part[1][m], 0x31);
  }
}

}  // namespace
}  // namespace altiplano::cpu

#include "kernels/cpu/paged_attention_f32.h"

namespace altiplano::cpu {

constinit const AttentionKernel kAttentionF32Avx2 = KernelF32<float>("f32 in avx2");
constinit const AttentionKernel kAttentionBf16Avx2 = KernelF32<uint16_t>("bf16 in avx2");

}  // namespace altiplano::cpu
