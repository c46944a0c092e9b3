// Linear on the AMX tiles of the processor. NOT YET RUN on a processor that has them: linear_amx.h is tested on tiles
// of plain arrays, and linear.cc compares this kernel with AVX-512 once before it trusts it. Instructions: Intel
// Architecture Instruction Set Extensions Programming Reference, chapter 3 (AMX).
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 on its own _mm512_undefined_ps(), GCC bug 105593
#include "kernels/cpu/linear_amx.h"

#include <immintrin.h>

namespace altiplano::cpu {
namespace {

// The operand of ldtilecfg, palette 1.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);

struct AmxTiles {
  static void Begin() {
    static constexpr TileConfig kConfig;
    _tile_loadconfig(&kConfig);
  }
  static void End() { _tile_release(); }

  // The intrinsics paste the tile's number into the assembler text, so it must be a literal.
  template <int kTile>
  static void Zero() {
    static_assert(kTile >= 0 && kTile < 4);
    if constexpr (kTile == 0) _tile_zero(0);
    if constexpr (kTile == 1) _tile_zero(1);
    if constexpr (kTile == 2) _tile_zero(2);
    if constexpr (kTile == 3) _tile_zero(3);
  }
  template <int kTile>
  static void Load(const void* p, int64_t stride) {
    asm volatile("" ::: "memory");  // GCC 12's intrinsic does not say that it reads memory
    if constexpr (kTile == 0) _tile_loadd(0, p, stride);
    if constexpr (kTile == 1) _tile_loadd(1, p, stride);
    if constexpr (kTile == 2) _tile_loadd(2, p, stride);
    if constexpr (kTile == 3) _tile_loadd(3, p, stride);
    if constexpr (kTile == 4) _tile_loadd(4, p, stride);
    if constexpr (kTile == 5) _tile_loadd(5, p, stride);
    if constexpr (kTile == 6) _tile_loadd(6, p, stride);
    if constexpr (kTile == 7) _tile_loadd(7, p, stride);
  }
  template <int kTile>
  static void Store(float* p, int64_t stride) {
    static_assert(kTile >= 0 && kTile < 4);
    if constexpr (kTile == 0) _tile_stored(0, p, stride);
    if constexpr (kTile == 1) _tile_stored(1, p, stride);
    if constexpr (kTile == 2) _tile_stored(2, p, stride);
    if constexpr (kTile == 3) _tile_stored(3, p, stride);
    asm volatile("" ::: "memory");
  }
  template <int kC, int kA, int kB>
  static void Dot() {
    static_assert(kC == 2 * (kA - 4) + (kB - 6));
    if constexpr (kC == 0) _tile_dpbf16ps(0, 4, 6);
    if constexpr (kC == 1) _tile_dpbf16ps(1, 4, 7);
    if constexpr (kC == 2) _tile_dpbf16ps(2, 5, 6);
    if constexpr (kC == 3) _tile_dpbf16ps(3, 5, 7);
  }

  // In four rounds: within pairs of rows, within fours, then 128-bit lanes among fours and sixteens.
  static void Transpose(const float* from, float* to) {
    __m512 a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) a[i] = _mm512_load_ps(from + 16 * i);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
      b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
      b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
      const auto lo = [](__m512 x, __m512 y) {
        return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
      };
      const auto hi = [](__m512 x, __m512 y) {
        return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
      };
      a[i] = lo(b[i], b[i + 2]);  // lane l: column 4l of rows i..i+3
      a[i + 1] = hi(b[i], b[i + 2]);
      a[i + 2] = lo(b[i + 1], b[i + 3]);
      a[i + 3] = hi(b[i + 1], b[i + 3]);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {  // columns c, c + 4, c + 8, c + 12
      const __m512 p = _mm512_shuffle_f32x4(a[c], a[c + 4], 0x88), q = _mm512_shuffle_f32x4(a[c + 8], a[c + 12], 0x88);
      const __m512 r = _mm512_shuffle_f32x4(a[c], a[c + 4], 0xDD), s = _mm512_shuffle_f32x4(a[c + 8], a[c + 12], 0xDD);
      _mm512_store_ps(to + 16 * c, _mm512_shuffle_f32x4(p, q, 0x88));
      _mm512_store_ps(to + 16 * (c + 4), _mm512_shuffle_f32x4(r, s, 0x88));
      _mm512_store_ps(to + 16 * (c + 8), _mm512_shuffle_f32x4(p, q, 0xDD));
      _mm512_store_ps(to + 16 * (c + 12), _mm512_shuffle_f32x4(r, s, 0xDD));
    }
  }
};

}  // namespace

constinit const LinearKernel kLinearBf16Amx = LinearAmx<AmxTiles>::Kernel("amx_bf16");

}  // namespace altiplano::cpu
