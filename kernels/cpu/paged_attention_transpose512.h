// Included by *_avx512*.cc only, each of which gets its own copy: the namespace is anonymous on purpose.
#pragma once

#include "kernels/cpu/vec_avx512.h"

namespace altiplano::cpu {
namespace {

// 16 x 16: element j of x[i] becomes element i of x[j].
inline void TransposeSquare(__m512 (&x)[16]) {
  __m512 part[4][4];  // part[g][m]: in lane l, rows 4g to 4g + 3 of column 4l + m
#pragma GCC unroll 4
  for (int g = 0; g < 4; ++g) {
    const __m512 a = x[4 * g], b = x[4 * g + 1], c = x[4 * g + 2], d = x[4 * g + 3];
    const __m512d ab_low = _mm512_castps_pd(_mm512_unpacklo_ps(a, b));
    const __m512d ab_high = _mm512_castps_pd(_mm512_unpackhi_ps(a, b));
    const __m512d cd_low = _mm512_castps_pd(_mm512_unpacklo_ps(c, d));
    const __m512d cd_high = _mm512_castps_pd(_mm512_unpackhi_ps(c, d));
    part[g][0] = _mm512_castpd_ps(_mm512_unpacklo_pd(ab_low, cd_low));
    part[g][1] = _mm512_castpd_ps(_mm512_unpackhi_pd(ab_low, cd_low));
    part[g][2] = _mm512_castpd_ps(_mm512_unpacklo_pd(ab_high, cd_high));
    part[g][3] = _mm512_castpd_ps(_mm512_unpackhi_pd(ab_high, cd_high));
  }
#pragma GCC unroll 4
  for (int m = 0; m < 4; ++m) {
    const __m512 low01 = _mm512_shuffle_f32x4(part[0][m], part[1][m], 0x44);
    const __m512 low23 = _mm512_shuffle_f32x4(part[2][m], part[3][m], 0x44);
    const __m512 high01 = _mm512_shuffle_f32x4(part[0][m], part[1][m], 0xEE);
    const __m512 high23 = _mm512_shuffle_f32x4(part[2][m], part[3][m], 0xEE);
    x[m] = _mm512_shuffle_f32x4(low01, low23, 0x88);
    x[4 + m] = _mm512_shuffle_f32x4(low01, low23, 0xDD);
    x[8 + m] = _mm512_shuffle_f32x4(high01, high23, 0x88);
    x[12 + m] = _mm512_shuffle_f32x4(high01, high23, 0xDD);
  }
}

}  // namespace
}  // namespace altiplano::cpu
