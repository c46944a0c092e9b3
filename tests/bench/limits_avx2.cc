#include <immintrin.h>

#include "tests/bench/limits.h"
#include "tests/bench/limits_loops.h"

namespace altiplano::bench {
namespace {

struct Bits256 {
  using Bits = __m256i;
  static constexpr size_t kBytes = 32;
  static __m256i Load(const char* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }
  static __m256i Or(__m256i a, __m256i b) { return _mm256_or_si256(a, b); }
  static void Stream(char* p, __m256i v) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), v); }
  static void Store(char* p, __m256i v) { _mm256_store_si256(reinterpret_cast<__m256i*>(p), v); }
  static float Fold(__m256i v) { return static_cast<float>(_mm256_extract_epi32(v, 0)); }
};

struct MultiplyF32 {
  using Acc = __m256;
  using X = __m256;
  static constexpr int kChains = 12;
  static __m256 Operand(int64_t n) { return _mm256_set1_ps(1.0f / static_cast<float>(n + 2)); }
  static __m256 Zero() { return _mm256_setzero_ps(); }
  static __m256 MultiplyAdd(__m256 acc, __m256 a, __m256 b) { return _mm256_fmadd_ps(a, b, acc); }
  static float First(__m256 v) { return _mm256_cvtss_f32(v); }
};

constexpr ReadKernel kReadAvx2List[] = {{"avx2", ReadLoop<Bits256, 1, 0>},
                                        {"avx2, 4 runs", ReadLoop<Bits256, 4, 0>},
                                        {"avx2, prefetching", ReadLoop<Bits256, 1, 2048>}};
constexpr CopyKernel kCopyAvx2List[] = {{"avx2", CopyLoop<Bits256, false>},
                                        {"avx2, streaming stores", CopyLoop<Bits256, true>}};
constexpr MultiplyKernel kMultiplyAvx2List[] = {{"avx2 fma", false, 12 * 8 * 2.0, MultiplyLoop<MultiplyF32>}};

}  // namespace

constinit const std::span<const ReadKernel> kReadAvx2 = kReadAvx2List;
constinit const std::span<const CopyKernel> kCopyAvx2 = kCopyAvx2List;
constinit const std::span<const MultiplyKernel> kMultiplyAvx2 = kMultiplyAvx2List;

}  // namespace altiplano::bench
