// Linear in bf16 with vdpbf16ps, which multiplies and adds 32 pairs in f32 and widens nothing.
// Both operands of a step are a plain load of 32 consecutive elements.
#include "kernels/cpu/linear_tile.h"
#include "kernels/cpu/linear_vectors512.h"

namespace altiplano::cpu {
namespace {

struct DotBf16 : Vectors512 {
  using Weight = uint16_t;
  using Element = uint16_t;
  using X = __m512i;
  static constexpr int64_t kStep = 32;
  static constexpr int kHalves = 1;
  static constexpr int64_t kMaxBlock = 1536;

  static __m512i LoadWeight(const uint16_t* p, int) { return _mm512_loadu_si512(p); }
  static __m512i LoadWeightTail(const uint16_t* p, int, int count) {
    return _mm512_maskz_loadu_epi16((1u << count) - 1, p);
  }
  static __m512i LoadX(const uint16_t* p, int) { return _mm512_load_si512(p); }
  static __m512 Dot(__m512 acc, __m512i weight, __m512i x) {
    return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(weight), reinterpret_cast<__m512bh>(x));
  }
  static void PackStep(const uint16_t* from, int64_t count, uint16_t* to) {
    _mm512_store_si512(to,
                       count >= kStep ? _mm512_loadu_si512(from) : LoadWeightTail(from, 0, static_cast<int>(count)));
  }
};

}  // namespace

constinit const LinearKernel kLinearBf16Avx512Bf16 = LinearTile<DotBf16>::Kernel("avx512_bf16");

}  // namespace altiplano::cpu
