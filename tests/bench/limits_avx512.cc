// GCC 12 takes its own _mm512_undefined_*() for a mistake of the caller's (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>

#include "tests/bench/limits.h"
#include "tests/bench/limits_loops.h"

namespace altiplano::bench {
namespace {

struct Bits512 {
  using Bits = __m512i;
  static constexpr size_t kBytes = 64;
  static __m512i Load(const char* p) { return _mm512_load_si512(p); }
  static __m512i Or(__m512i a, __m512i b) { return _mm512_or_si512(a, b); }
  static void Stream(char* p, __m512i v) { _mm512_stream_si512(reinterpret_cast<__m512i*>(p), v); }
  static void Store(char* p, __m512i v) { _mm512_store_si512(p, v); }
  static float Fold(__m512i v) { return static_cast<float>(_mm_cvtsi128_si32(_mm512_castsi512_si128(v))); }
};

struct MultiplyF32 {
  using Acc = __m512;
  using X = __m512;
  static constexpr int kChains = 24;
  static __m512 Operand(int64_t n) { return _mm512_set1_ps(1.0f / static_cast<float>(n + 2)); }
  static __m512 Zero() { return _mm512_setzero_ps(); }
  static __m512 MultiplyAdd(__m512 acc, __m512 a, __m512 b) { return _mm512_fmadd_ps(a, b, acc); }
  static float First(__m512 v) { return _mm512_cvtss_f32(v); }
};

constexpr ReadKernel kReadAvx512List[] = {{"avx512", ReadLoop<Bits512, 1, 0>},
                                          {"avx512, 4 runs", ReadLoop<Bits512, 4, 0>},
                                          {"avx512, prefetching", ReadLoop<Bits512, 1, 2048>},
                                          {"avx512, 4 runs, prefetching", ReadLoop<Bits512, 4, 1024>}};
constexpr CopyKernel kCopyAvx512List[] = {{"avx512", CopyLoop<Bits512, false>},
                                          {"avx512, streaming stores", CopyLoop<Bits512, true>}};
constexpr MultiplyKernel kMultiplyAvx512List[] = {{"avx512 fma", false, 24 * 16 * 2.0, MultiplyLoop<MultiplyF32>}};

}  // namespace

constinit const std::span<const ReadKernel> kReadAvx512 = kReadAvx512List;
constinit const std::span<const CopyKernel> kCopyAvx512 = kCopyAvx512List;
constinit const std::span<const MultiplyKernel> kMultiplyAvx512 = kMultiplyAvx512List;

}  // namespace altiplano::bench
