// What the AVX-512 kernels of Linear have in common: folding lanes, and rows of up to 8 results.
// Included by *_avx512*.cc only, each of which gets its own copy: the namespace is anonymous on purpose.
#pragma once

// GCC 12 takes its own _mm512_undefined_ps() for a mistake of the caller's (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>

#include <cstdint>

namespace altiplano::cpu {
namespace {

// In each 128-bit lane: the sum of a's four elements there, b's, c's and d's.
inline __m512 FoldLanes(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512d ab2 = _mm512_castps_pd(ab), cd2 = _mm512_castps_pd(cd);
  return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab2, cd2)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab2, cd2)));
}

// The sum of p's four 128-bit lanes, then q's, r's and s's.
inline __m512 FoldQuarters(__m512 p, __m512 q, __m512 r, __m512 s) {
  const __m512 pq = _mm512_add_ps(_mm512_shuffle_f32x4(p, q, 0x44), _mm512_shuffle_f32x4(p, q, 0xEE));
  const __m512 rs = _mm512_add_ps(_mm512_shuffle_f32x4(r, s, 0x44), _mm512_shuffle_f32x4(r, s, 0xEE));
  return _mm512_add_ps(_mm512_shuffle_f32x4(pq, rs, 0x88), _mm512_shuffle_f32x4(pq, rs, 0xDD));
}

struct Vectors512 {
  using Acc = __m512;
  using Sum = __m256;
  static constexpr int kPanel = 6;
  static constexpr int kRuns = 4;
  static constexpr int kGroup = 4;  // 24 accumulators, 4 of x and 1 of weights: 29 of 32 registers

  static Acc Zero() { return _mm512_setzero_ps(); }

  template <int kCount>
  [[gnu::always_inline]] static void Reduce(const __m512* acc, float* flat) {
    const __m512 zero = _mm512_setzero_ps();
#pragma GCC unroll 8
    for (int base = 0; base < kCount; base += 16) {
      __m512 quarter[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const int j = base + 4 * i;
        quarter[i] = j >= kCount ? zero
                                 : FoldLanes(acc[j], j + 1 < kCount ? acc[j + 1] : zero,
                                             j + 2 < kCount ? acc[j + 2] : zero, j + 3 < kCount ? acc[j + 3] : zero);
      }
      _mm512_store_ps(flat + base, FoldQuarters(quarter[0], quarter[1], quarter[2], quarter[3]));
    }
  }

  template <int kCount>
  static constexpr __mmask8 kMask = (1 << kCount) - 1;

  template <int kCount>
  static __m256 LoadSum(const float* p) {
    return _mm256_maskz_loadu_ps(kMask<kCount>, p);
  }
  template <int kCount>
  static void StoreSum(float* p, __m256 sum) {
    _mm256_mask_storeu_ps(p, kMask<kCount>, sum);
  }
  static __m256 AddSum(__m256 a, __m256 b) {
    return _mm256_add_ps(a, b);
  }

  // bf16 results.
  template <int kCount>
  static __m256 LoadSum(const uint16_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_maskz_loadu_epi16(kMask<kCount>, p)), 16));
  }
  // Rounds to nearest even in integers, as ToBF16 does: vcvtneps2bf16 would flush denormals.
  template <int kCount>
  static void StoreSum(uint16_t* p, __m256 sum) {
    const __m256i bits = _mm256_castps_si256(sum);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __mmask8 nan = _mm256_cmp_ps_mask(sum, sum, _CMP_UNORD_Q);
    const __m256i result = _mm256_srli_epi32(_mm256_mask_blend_epi32(nan, rounded, quiet), 16);
    _mm_mask_storeu_epi16(p, kMask<kCount>, _mm256_cvtepi32_epi16(result));
  }
};

}  // namespace
}  // namespace altiplano::cpu
