// Linear with AVX-512 F: f32, and bf16 widened to f32 in registers.
#include "kernels/cpu/linear_tile.h"
#include "kernels/cpu/linear_vectors512.h"

namespace altiplano::cpu {
namespace {

struct F32 : Vectors512 {
  using Weight = float;
  using Element = float;
  using X = __m512;
  static constexpr int64_t kStep = 16;
  static constexpr int kHalves = 1;
  static constexpr int64_t kMaxBlock = 768;

  static __m512 LoadWeight(const float* p, int) { return _mm512_loadu_ps(p); }
  static __m512 LoadWeightTail(const float* p, int, int count) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1 << count) - 1), p);
  }
  static __m512 LoadX(const float* p, int) { return _mm512_load_ps(p); }
  static __m512 Dot(__m512 acc, __m512 weight, __m512 x) { return _mm512_fmadd_ps(weight, x, acc); }
  static void PackStep(const float* from, int64_t count, float* to) {
    _mm512_store_ps(to, count >= kStep ? _mm512_loadu_ps(from) : LoadWeightTail(from, 0, static_cast<int>(count)));
  }
};

// A vector of 32 bf16 is 16 pairs: its even elements are the pairs shifted up, its odd ones the pairs' upper halves.
// Packed x is f32 in the same order: 16 even elements, then 16 odd ones.
inline __m512 Half(__m512i pairs, int half) {
  return _mm512_castsi512_ps(half == 0 ? _mm512_slli_epi32(pairs, 16)
                                       : _mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xFFFF0000))));
}

struct WidenedBf16 : Vectors512 {
  using Weight = uint16_t;
  using Element = float;
  using X = __m512;
  static constexpr int64_t kStep = 32;
  static constexpr int kHalves = 2;
  static constexpr int64_t kMaxBlock = 768;

  static __m512 LoadWeight(const uint16_t* p, int half) { return Half(_mm512_loadu_si512(p), half); }
  static __m512 LoadWeightTail(const uint16_t* p, int half, int count) {
    return Half(_mm512_maskz_loadu_epi16((1u << count) - 1, p), half);
  }
  static __m512 LoadX(const float* p, int half) { return _mm512_load_ps(p + 16 * half); }
  static __m512 Dot(__m512 acc, __m512 weight, __m512 x) { return _mm512_fmadd_ps(weight, x, acc); }
  static void PackStep(const uint16_t* from, int64_t count, float* to) {
    const __m512i pairs =
        count >= kStep ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16((1u << static_cast<int>(count)) - 1, from);
    _mm512_store_ps(to, Half(pairs, 0));
    _mm512_store_ps(to + 16, Half(pairs, 1));
  }
};

}  // namespace

constinit const LinearKernel kLinearF32Avx512 = LinearTile<F32>::Kernel("avx512");
constinit const LinearKernel kLinearBf16Avx512 = LinearTile<WidenedBf16>::Kernel("avx512");

}  // namespace altiplano::cpu
