// Attention on bf16 pages with vdpbf16ps, which multiplies pairs. Packed K is [padded / 2, kKeyTile] pairs of
// dimensions, packed V is [kKeyTile / 2, padded] pairs of keys; e^(score - max) is rounded to bf16, and the sum that
// divides is of the rounded ones.
#include "kernels/cpu/paged_attention_transpose512.h"

// Needs Vec.
#include "kernels/cpu/paged_attention_body.h"

namespace altiplano::cpu {
namespace {

inline __m512 DotPairs(__m512 sum, __m512i x, __m512i y) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(y));
}
inline __m512i BroadcastPair(const uint16_t* p) {
  int pair;
  __builtin_memcpy(&pair, p, sizeof(pair));
  return _mm512_set1_epi32(pair);
}

struct TileBf16 {
  using Element = uint16_t;
  using Keys = uint16_t;
  using P = uint16_t;
  static constexpr int kVecs = 4;

  template <int kRows>
  static void Scores(const uint16_t* q, const uint16_t* k, int64_t padded, float* s) {
    __m512 sum[kRows][kVecs];
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) sum[r][v] = _mm512_setzero_ps();
    }
    for (int64_t d = 0; d < padded; d += 2) {
      __m512i keys[kVecs];
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) keys[v] = _mm512_load_si512(k + d * kKeyTile + v * 32);
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) {
        const __m512i x = BroadcastPair(q + r * padded + d);
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) sum[r][v] = DotPairs(sum[r][v], x, keys[v]);
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) _mm512_store_ps(s + r * kKeyTile + v * 16, sum[r][v]);
    }
  }

  // acc = acc * alpha + p * v, a block of kCount vectors wide.
  template <int kRows, int kCount>
  static void ValueBlock(const uint16_t* p, const uint16_t* v, int64_t padded, int64_t keys, const float* alpha,
                         float* acc) {
    __m512 sum[kRows][kCount];
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int i = 0; i < kCount; ++i) {
        sum[r][i] = _mm512_mul_ps(_mm512_loadu_ps(acc + r * padded + i * 16), _mm512_set1_ps(alpha[r]));
      }
    }
    for (int64_t j = 0; j < keys; j += 2) {
      __m512i values[kCount];
#pragma GCC unroll 4
      for (int i = 0; i < kCount; ++i) values[i] = _mm512_load_si512(v + j * padded + i * 32);
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) {
        const __m512i x = BroadcastPair(p + r * kKeyTile + j);
#pragma GCC unroll 4
        for (int i = 0; i < kCount; ++i) sum[r][i] = DotPairs(sum[r][i], x, values[i]);
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int i = 0; i < kCount; ++i) _mm512_storeu_ps(acc + r * padded + i * 16, sum[r][i]);
    }
  }

  template <int kRows>
  static void Values(const uint16_t* p, const uint16_t* v, int64_t padded, int64_t keys, const float* alpha,
                     float* acc) {
    int64_t d = 0;
    for (; d + 64 <= padded; d += 64) ValueBlock<kRows, 4>(p, v + 2 * d, padded, keys, alpha, acc + d);
    for (; d < padded; d += 32) ValueBlock<kRows, 2>(p, v + 2 * d, padded, keys, alpha, acc + d);
  }
};

inline __m512i LoadRow(const void* row, int64_t d, int64_t dim) {
  const int64_t left = dim - d;
  return _mm512_maskz_loadu_epi16(left >= 32 ? 0xFFFFFFFF : (1u << left) - 1, static_cast<const uint16_t*>(row) + d);
}

void PackQ(void* packed, RowPtr q, int64_t dim, int64_t padded) {
  for (int64_t d = 0; d < padded; d += 32)
    _mm512_storeu_si512(static_cast<uint16_t*>(packed) + d, LoadRow(q.data, d, dim));
}

// Where the pairs of two rows of 32 lie in both together: 0 32 1 33 ...
struct Pairs {
  constexpr Pairs() {
    for (uint16_t i = 0; i < 64; ++i) index[i] = static_cast<uint16_t>(i / 2 + i % 2 * 32);
  }
  alignas(64) uint16_t index[64] = {};
};
constexpr Pairs kPairs;

// kWhole: the tile has all its keys and no padding.
template <bool kWhole>
void PackTile(const KeyRows& rows, const KeyRows& next, int64_t keys, int64_t dim, int64_t padded, uint16_t* packed_k,
              uint16_t* packed_v) {
  auto load = [&](const void* const* from, int64_t j, int64_t d) {
    if constexpr (kWhole) return _mm512_loadu_si512(static_cast<const uint16_t*>(from[j]) + d);
    return j < keys ? LoadRow(from[j], d, dim) : _mm512_setzero_si512();
  };
  for (int64_t j = 0; j < kKeyTile; j += 16) {
    for (int64_t d = 0; d < padded; d += 32) {
      __m512 block[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        block[i] = _mm512_castsi512_ps(load(rows.k, j + i, d));
        PrefetchRow(next, j + i, 2 * d, 2 * d + 64);
      }
      TransposeSquare(block);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        _mm512_store_si512(packed_k + ((d / 2 + i) * kKeyTile + j) * 2, _mm512_castps_si512(block[i]));
      }
    }
  }
  const __m512i low = _mm512_load_si512(kPairs.index), high = _mm512_load_si512(kPairs.index + 32);
  for (int64_t j = 0; j < keys; j += 2) {
    for (int64_t d = 0; d < padded; d += 32) {
      const __m512i even = load(rows.v, j, d), odd = load(rows.v, j + 1, d);
      uint16_t* to = packed_v + j * padded + 2 * d;
      _mm512_store_si512(to, _mm512_permutex2var_epi16(even, low, odd));
      _mm512_store_si512(to + 32, _mm512_permutex2var_epi16(even, high, odd));
    }
  }
}

void PackKv(const KeyRows& rows, const KeyRows& next, int64_t keys, int64_t dim, int64_t padded, void* k, void* v) {
  const auto pack = keys == kKeyTile && dim == padded ? PackTile<true> : PackTile<false>;
  pack(rows, next, keys, dim, padded, static_cast<uint16_t*>(k), static_cast<uint16_t*>(v));
}

// The arithmetic of TileBf16, in its order, on rows as they lie in the pages. kWhole: rows have no padding.
template <bool kWhole>
struct UnpackedBf16 {
  using Element = uint16_t;
  using Keys = UnpackedTile;
  using P = uint16_t;

  static __m512i Load(const void* row, int64_t d, int64_t dim) {
    if constexpr (kWhole) return _mm512_loadu_si512(static_cast<const uint16_t*>(row) + d);
    return LoadRow(row, d, dim);
  }
  static void Prefetch(const void* row, int64_t d) { __builtin_prefetch(static_cast<const uint16_t*>(row) + d, 0, 2); }

  template <int kRows>
  static void Scores(const uint16_t* q, const UnpackedTile* tile, int64_t padded, float* s) {
    for (int64_t j = 0; j < kKeyTile; j += 16) {
      __m512 sum[kRows];
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) sum[r] = _mm512_setzero_ps();
      for (int64_t d = 0; j < tile->keys && d < padded; d += 32) {
        __m512 block[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
          block[i] = _mm512_castsi512_ps(Load(tile->rows->k[j + i], d, tile->dim));
          Prefetch(tile->next->k[j + i], d);
          Prefetch(tile->next->v[j + i], d);
        }
        TransposeSquare(block);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
#pragma GCC unroll 6
          for (int r = 0; r < kRows; ++r) {
            sum[r] = DotPairs(sum[r], BroadcastPair(q + r * padded + d + 2 * i), _mm512_castps_si512(block[i]));
          }
        }
      }
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) _mm512_store_ps(s + r * kKeyTile + j, sum[r]);
    }
  }

  // kCount blocks of 32 dimensions.
  template <int kRows, int kCount>
  static void ValueBlock(const uint16_t* p, const UnpackedTile& tile, int64_t d, int64_t padded, const float* alpha,
                         float* acc) {
    const __m512i low = _mm512_load_si512(kPairs.index), high = _mm512_load_si512(kPairs.index + 32);
    __m512 sum[kRows][2 * kCount];
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int i = 0; i < 2 * kCount; ++i) {
        sum[r][i] = _mm512_mul_ps(_mm512_loadu_ps(acc + r * padded + d + i * 16), _mm512_set1_ps(alpha[r]));
      }
    }
    for (int64_t j = 0; j < tile.keys; j += 2) {
      __m512i values[2 * kCount];
#pragma GCC unroll 2
      for (int i = 0; i < kCount; ++i) {
        const int64_t at = d + 32 * i;
        const __m512i even = Load(tile.rows->v[j], at, tile.dim);
        const __m512i odd = j + 1 < tile.keys ? Load(tile.rows->v[j + 1], at, tile.dim) : _mm512_setzero_si512();
        values[2 * i] = _mm512_permutex2var_epi16(even, low, odd);
        values[2 * i + 1] = _mm512_permutex2var_epi16(even, high, odd);
      }
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) {
        const __m512i x = BroadcastPair(p + r * kKeyTile + j);
#pragma GCC unroll 4
        for (int i = 0; i < 2 * kCount; ++i) sum[r][i] = DotPairs(sum[r][i], x, values[i]);
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int i = 0; i < 2 * kCount; ++i) _mm512_storeu_ps(acc + r * padded + d + i * 16, sum[r][i]);
    }
  }

  template <int kRows>
  static void Values(const uint16_t* p, const UnpackedTile* tile, int64_t padded, int64_t, const float* alpha,
                     float* acc) {
    int64_t d = 0;
    for (; d + 64 <= padded; d += 64) ValueBlock<kRows, 2>(p, *tile, d, padded, alpha, acc);
    for (; d < padded; d += 32) ValueBlock<kRows, 1>(p, *tile, d, padded, alpha, acc);
  }
};

void AttendUnpacked(const AttentionPanel& panel) {
  const bool whole = static_cast<const UnpackedTile*>(panel.k)->dim == panel.padded;
  whole ? Attend<UnpackedBf16<true>>(panel) : Attend<UnpackedBf16<false>>(panel);
}

}  // namespace

constinit const AttentionKernel kAttentionBf16Avx512Bf16 = {
    "bf16 in avx512_bf16", 32, sizeof(uint16_t), PackQ, PackKv, Attend<TileBf16>, AttendUnpacked, Fold, Finish};

}  // namespace altiplano::cpu
