// Vec: 16 floats in a register, for the op bodies that are written once for every instruction set.
// Included by *_avx512*.cc only, each of which gets its own copy: the namespace is anonymous on purpose.
#pragma once

// GCC 12 takes its own _mm512_undefined_ps() for a mistake of the caller's (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>

#include <cstdint>

namespace altiplano::cpu {
namespace {

struct Vec {
  using F = __m512;   // 16 floats
  using D = __m512d;  // 8 doubles
  using U = __m512i;  // integer accumulators
  static constexpr int kWidth = 16;
  static constexpr int kDoubles = 8;

  static __mmask16 First(int64_t n) { return static_cast<__mmask16>(n >= kWidth ? 0xFFFF : (1u << n) - 1); }

  static F Zero() { return _mm512_setzero_ps(); }
  static F Set1(float x) { return _mm512_set1_ps(x); }
  static F Load(const float* p) { return _mm512_loadu_ps(p); }
  static F Load(const uint16_t* p) { return Widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  // The first n of p (n >= 0; all if n >= kWidth), zeros after. Memory beyond is not touched.
  static F LoadN(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(First(n), p); }
  static F LoadN(const uint16_t* p, int64_t n) { return Widen(_mm256_maskz_loadu_epi16(First(n), p)); }
  static void Store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static void Store(uint16_t* p, F x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), Narrow(x)); }
  static void StoreN(float* p, F x, int64_t n) { _mm512_mask_storeu_ps(p, First(n), x); }
  static void StoreN(uint16_t* p, F x, int64_t n) { _mm256_mask_storeu_epi16(p, First(n), Narrow(x)); }

  static F Add(F a, F b) { return _mm512_add_ps(a, b); }
  static F Sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F Mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F Div(F a, F b) { return _mm512_div_ps(a, b); }
  static F Fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }    // a * b + c
  static F Fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a * b
  // The second operand when either is NaN.
  static F Max(F a, F b) { return _mm512_max_ps(a, b); }
  static F Min(F a, F b) { return _mm512_min_ps(a, b); }
  static float Sum(F x) { return _mm512_reduce_add_ps(x); }
  static float MaxOf(F x) { return _mm512_reduce_max_ps(x); }

  // x where a >= b, 0 elsewhere and where either is NaN.
  static F WhereGe(F a, F b, F x) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_GE_OQ), x); }
  // yes where a < b, else no; no where either is NaN.
  static F SelectLess(F a, F b, F yes, F no) {
    return _mm512_mask_mov_ps(no, _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), yes);
  }
  // A NaN where x is NaN, y elsewhere.
  static F KeepNan(F x, F y) { return _mm512_mask_mov_ps(y, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), x); }
  // One bit per element.
  static uint32_t MaskGe(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
  static uint32_t MaskLess(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }

  // x * 2^n for magic = 1.5 * 2^23 + n, the result being normal.
  static F ScaleByMagic(F x, F magic) {
    return _mm512_castsi512_ps(
        _mm512_add_epi32(_mm512_castps_si512(x), _mm512_slli_epi32(_mm512_castps_si512(magic), 23)));
  }

  // Fixed-point sums: each element rounded to a multiple of 2^-40 (to nearest, ties to even), as integers.
  static U ZeroWeights() { return _mm512_setzero_si512(); }
  static U AddWeights(U sum, F e) {  // e in [0, 1]
    const F scaled = _mm512_mul_ps(e, _mm512_set1_ps(0x1p40f));
    const U low = _mm512_cvtps_epi64(_mm512_castps512_ps256(scaled));
    const U high = _mm512_cvtps_epi64(_mm512_extractf32x8_ps(scaled, 1));
    return _mm512_add_epi64(sum, _mm512_add_epi64(low, high));
  }
  // `added`: how many AddWeights went into sum.
  static uint64_t TotalWeight(U sum, uint64_t /*added*/) { return static_cast<uint64_t>(_mm512_reduce_add_epi64(sum)); }

  static D Set1D(double x) { return _mm512_set1_pd(x); }
  static D LoadND(const float* p, int64_t n) {
    return _mm512_cvtps_pd(_mm512_castps512_ps256(_mm512_maskz_loadu_ps(First(n < kDoubles ? n : kDoubles), p)));
  }
  static void StoreD(float* p, D x) { _mm256_storeu_ps(p, _mm512_cvtpd_ps(x)); }
  static D AddD(D a, D b) { return _mm512_add_pd(a, b); }
  static D SubD(D a, D b) { return _mm512_sub_pd(a, b); }
  static D MulD(D a, D b) { return _mm512_mul_pd(a, b); }
  static D FmaD(D a, D b, D c) { return _mm512_fmadd_pd(a, b, c); }
  static D FnmaD(D a, D b, D c) { return _mm512_fnmadd_pd(a, b, c); }
  // Bit kBit of x's encoding: whether set, moved to the sign.
  template <int kBit>
  static __m512i BitToSign(D x) {
    return _mm512_slli_epi64(_mm512_castpd_si512(x), 63 - kBit);
  }
  template <int kBit>
  static D SelectBit(D x, D set, D clear) {
    return _mm512_mask_mov_pd(clear, _mm512_movepi64_mask(BitToSign<kBit>(x)), set);
  }
  // y with its sign flipped where the bit is set.
  template <int kBit>
  static D FlipSignByBit(D x, D y) {
    const __m512i sign = _mm512_and_si512(BitToSign<kBit>(x), _mm512_set1_epi64(INT64_MIN));
    return _mm512_castsi512_pd(_mm512_xor_si512(_mm512_castpd_si512(y), sign));
  }

 private:
  static F Widen(__m256i bits) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)); }
  // Rounds to nearest even in integers, as ToBF16 does: vcvtneps2bf16 would flush denormals.
  static __m256i Narrow(F x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
  }
};

}  // namespace
}  // namespace altiplano::cpu
