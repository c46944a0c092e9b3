// Linear with AVX2 and FMA: f32, and bf16 widened to f32 in registers. The least that every machine has.
#include <immintrin.h>

#include "kernels/cpu/linear_tile.h"

namespace altiplano::cpu {
namespace {

// The first `count` of 8 elements, for vmaskmov.
inline __m256i FirstLanes(int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

// In each 128-bit lane: the sum of a's four elements there, b's, c's and d's.
inline __m256 FoldLanes(__m256 a, __m256 b, __m256 c, __m256 d) {
  const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
  const __m256d ab2 = _mm256_castps_pd(ab), cd2 = _mm256_castps_pd(cd);
  return _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(ab2, cd2)), _mm256_castpd_ps(_mm256_unpackhi_pd(ab2, cd2)));
}

struct Vectors256 {
  using Acc = __m256;
  using Sum = __m256;
  using X = __m256;
  using Element = float;
  static constexpr int kPanel = 6;
  static constexpr int kRuns = 2;
  static constexpr int kGroup = 2;  // 12 accumulators, 2 of x and 1 of weights: 15 of 16 registers

  static Acc Zero() { return _mm256_setzero_ps(); }
  static __m256 Dot(__m256 acc, __m256 weight, __m256 x) { return _mm256_fmadd_ps(weight, x, acc); }

  template <int kCount>
  [[gnu::always_inline]] static void Reduce(const __m256* acc, float* flat) {
    const __m256 zero = _mm256_setzero_ps();
#pragma GCC unroll 8
    for (int j = 0; j < kCount; j += 4) {
      const __m256 sums = FoldLanes(acc[j], j + 1 < kCount ? acc[j + 1] : zero, j + 2 < kCount ? acc[j + 2] : zero,
                                    j + 3 < kCount ? acc[j + 3] : zero);
      _mm_store_ps(flat + j, _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
    }
  }

  template <int kCount>
  static __m256 LoadSum(const float* p) {
    return _mm256_maskload_ps(p, FirstLanes(kCount));
  }
  template <int kCount>
  static void StoreSum(float* p, __m256 sum) {
    _mm256_maskstore_ps(p, FirstLanes(kCount), sum);
  }
  static __m256 AddSum(__m256 a, __m256 b) {
    return _mm256_add_ps(a, b);
  }

  // bf16 results.
  template <int kCount>
  static __m256 LoadSum(const uint16_t* p) {
    alignas(16) uint16_t eight[8] = {};
    for (int i = 0; i < kCount; ++i) eight[i] = p[i];
    const __m128i bits = _mm_load_si128(reinterpret_cast<const __m128i*>(eight));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  // Rounds to nearest even in integers, as ToBF16 does.
  template <int kCount>
  static void StoreSum(uint16_t* p, __m256 sum) {
    const __m256i bits = _mm256_castps_si256(sum);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(sum, sum, _CMP_UNORD_Q));
    const __m256i result = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    alignas(16) uint16_t eight[8];
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(result), _mm256_extracti128_si256(result, 1));
    _mm_store_si128(reinterpret_cast<__m128i*>(eight), packed);
    for (int i = 0; i < kCount; ++i) p[i] = eight[i];
  }
};

struct F32 : Vectors256 {
  using Weight = float;
  static constexpr int64_t kStep = 8;
  static constexpr int kHalves = 1;
  static constexpr int64_t kMaxBlock = 768;

  static __m256 LoadWeight(const float* p, int) { return _mm256_loadu_ps(p); }
  static __m256 LoadWeightTail(const float* p, int, int count) { return _mm256_maskload_ps(p, FirstLanes(count)); }
  static __m256 LoadX(const float* p, int) { return _mm256_load_ps(p); }
  static void PackStep(const float* from, int64_t count, float* to) {
    _mm256_store_ps(to, LoadWeightTail(from, 0, static_cast<int>(count)));
  }
};

// As in linear_avx512.cc: a vector of 16 bf16 is 8 pairs, split into even and odd elements; packed x alike.
inline __m256 Half(__m256i pairs, int half) {
  return _mm256_castsi256_ps(half == 0 ? _mm256_slli_epi32(pairs, 16)
                                       : _mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xFFFF0000))));
}

struct WidenedBf16 : Vectors256 {
  using Weight = uint16_t;
  static constexpr int64_t kStep = 16;
  static constexpr int kHalves = 2;
  static constexpr int64_t kMaxBlock = 768;

  static __m256i Load(const uint16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static __m256i LoadTail(const uint16_t* p, int count) {
    alignas(32) uint16_t padded[kStep] = {};
    for (int i = 0; i < count; ++i) padded[i] = p[i];
    return Load(padded);
  }
  static __m256 LoadWeight(const uint16_t* p, int half) { return Half(Load(p), half); }
  static __m256 LoadWeightTail(const uint16_t* p, int half, int count) { return Half(LoadTail(p, count), half); }
  static __m256 LoadX(const float* p, int half) { return _mm256_load_ps(p + 8 * half); }
  static void PackStep(const uint16_t* from, int64_t count, float* to) {
    const __m256i pairs = count >= kStep ? Load(from) : LoadTail(from, static_cast<int>(count));
    _mm256_store_ps(to, Half(pairs, 0));
    _mm256_store_ps(to + 8, Half(pairs, 1));
  }
};

}  // namespace

constinit const LinearKernel kLinearF32Avx2 = LinearTile<F32>::Kernel("avx2");
constinit const LinearKernel kLinearBf16Avx2 = LinearTile<WidenedBf16>::Kernel("avx2");

}  // namespace altiplano::cpu
