// Vec: 8 floats in a register, for the op bodies that are written once for every instruction set. What each function
// means is told in vec_avx512.h.
// Included by *_avx2.cc only, each of which gets its own copy: the namespace is anonymous on purpose.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace altiplano::cpu {
namespace {

struct Vec {
  using F = __m256;   // 8 floats
  using D = __m256d;  // 4 doubles
  using U = __m256i;
  static constexpr int kWidth = 8;
  static constexpr int kDoubles = 4;

  static __m256i First(int64_t n) {
    const int count = static_cast<int>(n >= kWidth ? kWidth : n);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }

  static F Zero() { return _mm256_setzero_ps(); }
  static F Set1(float x) { return _mm256_set1_ps(x); }
  static F Load(const float* p) { return _mm256_loadu_ps(p); }
  static F Load(const uint16_t* p) { return Widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static F LoadN(const float* p, int64_t n) { return _mm256_maskload_ps(p, First(n)); }
  static F LoadN(const uint16_t* p, int64_t n) {
    if (n >= kWidth) return Load(p);
    alignas(16) uint16_t part[kWidth] = {};
    for (int64_t i = 0; i < n; ++i) part[i] = p[i];
    return Load(part);
  }
  static void Store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static void Store(uint16_t* p, F x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), Narrow(x)); }
  static void StoreN(float* p, F x, int64_t n) { _mm256_maskstore_ps(p, First(n), x); }
  static void StoreN(uint16_t* p, F x, int64_t n) {
    if (n >= kWidth) return Store(p, x);
    alignas(16) uint16_t part[kWidth];
    Store(part, x);
    for (int64_t i = 0; i < n; ++i) p[i] = part[i];
  }

  static F Add(F a, F b) { return _mm256_add_ps(a, b); }
  static F Sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F Mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F Div(F a, F b) { return _mm256_div_ps(a, b); }
  static F Fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F Fnma(F a, F b, F c) { return _mm256_fnmadd_ps(a, b, c); }
  static F Max(F a, F b) { return _mm256_max_ps(a, b); }
  static F Min(F a, F b) { return _mm256_min_ps(a, b); }
  static float Sum(F x) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
  }
  static float MaxOf(F x) {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
  }

  static F WhereGe(F a, F b, F x) { return _mm256_and_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ), x); }
  static F SelectLess(F a, F b, F yes, F no) { return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
  static F KeepNan(F x, F y) { return _mm256_or_ps(y, _mm256_cmp_ps(x, x, _CMP_UNORD_Q)); }
  static uint32_t MaskGe(F a, F b) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ)));
  }
  static uint32_t MaskLess(F a, F b) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_LT_OQ)));
  }

  static F ScaleByMagic(F x, F magic) {
    return _mm256_castsi256_ps(
        _mm256_add_epi32(_mm256_castps_si256(x), _mm256_slli_epi32(_mm256_castps_si256(magic), 23)));
  }

  // A double of at least 2^12 and less than 2^13 has a last bit of 2^-40: adding 1.5 * 2^12 rounds e there, and the
  // encodings, as integers, add up. The surplus, the encoding of 1.5 * 2^12 for each element, is taken off at the end.
  static constexpr double kWeightMagic = 6144;
  static U ZeroWeights() { return _mm256_setzero_si256(); }
  static U AddWeights(U sum, F e) {
    const D magic = _mm256_set1_pd(kWeightMagic);
    const D low = _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(e)), magic);
    const D high = _mm256_add_pd(_mm256_cvtps_pd(_mm256_extractf128_ps(e, 1)), magic);
    return _mm256_add_epi64(sum, _mm256_add_epi64(_mm256_castpd_si256(low), _mm256_castpd_si256(high)));
  }
  static uint64_t TotalWeight(U sum, uint64_t added) {
    alignas(32) uint64_t lanes[4];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), sum);
    return lanes[0] + lanes[1] + lanes[2] + lanes[3] - added * kWidth * __builtin_bit_cast(uint64_t, kWeightMagic);
  }

  static D Set1D(double x) { return _mm256_set1_pd(x); }
  static D LoadND(const float* p, int64_t n) {
    return _mm256_cvtps_pd(_mm_maskload_ps(p, _mm256_castsi256_si128(First(n < kDoubles ? n : kDoubles))));
  }
  static void StoreD(float* p, D x) { _mm_storeu_ps(p, _mm256_cvtpd_ps(x)); }
  static D AddD(D a, D b) { return _mm256_add_pd(a, b); }
  static D SubD(D a, D b) { return _mm256_sub_pd(a, b); }
  static D MulD(D a, D b) { return _mm256_mul_pd(a, b); }
  static D FmaD(D a, D b, D c) { return _mm256_fmadd_pd(a, b, c); }
  static D FnmaD(D a, D b, D c) { return _mm256_fnmadd_pd(a, b, c); }
  template <int kBit>
  static __m256i BitToSign(D x) {
    return _mm256_slli_epi64(_mm256_castpd_si256(x), 63 - kBit);
  }
  template <int kBit>
  static D SelectBit(D x, D set, D clear) {
    return _mm256_blendv_pd(clear, set, _mm256_castsi256_pd(BitToSign<kBit>(x)));
  }
  template <int kBit>
  static D FlipSignByBit(D x, D y) {
    const D sign = _mm256_and_pd(_mm256_castsi256_pd(BitToSign<kBit>(x)), _mm256_set1_pd(-0.0));
    return _mm256_xor_pd(y, sign);
  }

 private:
  static F Widen(__m128i bits) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16)); }
  static __m128i Narrow(F x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    const __m256 quiet = _mm256_castsi256_ps(_mm256_or_si256(bits, _mm256_set1_epi32(0x400000)));
    const __m256 nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
    const __m256i result =
        _mm256_srli_epi32(_mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(rounded), quiet, nan)), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(result, result), 0x08);
    return _mm256_castsi256_si128(packed);
  }
};

}  // namespace
}  // namespace altiplano::cpu
