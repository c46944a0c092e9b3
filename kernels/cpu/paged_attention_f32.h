// Attention in f32, whatever the pages hold. Included after vec_avx2.h or vec_avx512.h and a TransposeSquare for it, by
// files of one instruction set only.
//
// Packed K is [padded, kKeyTile], so that a vector holds one dimension of many keys; packed V is [kKeyTile, padded].
// Each product keeps kRows x kVecs sums in registers. For a tile that serves one panel, K is turned in registers
// instead.
#pragma once

#include "kernels/cpu/paged_attention_body.h"

namespace altiplano::cpu {
namespace {

// acc = acc * alpha + p * v, a block of kCount vectors wide, of which load(j, i) is vector i of key j.
template <int kRows, int kCount, typename Load>
inline void AddValues(const float* p, Load load, int64_t padded, int64_t keys, const float* alpha, float* acc) {
  Vec::F sum[kRows][kCount];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) {
      sum[r][i] = Vec::Mul(Vec::Load(acc + r * padded + i * Vec::kWidth), Vec::Set1(alpha[r]));
    }
  }
  for (int64_t j = 0; j < keys; ++j) {
    Vec::F values[kCount];
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) values[i] = load(j, i);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const Vec::F x = Vec::Set1(p[r * kKeyTile + j]);
#pragma GCC unroll 4
      for (int i = 0; i < kCount; ++i) sum[r][i] = Vec::Fma(x, values[i], sum[r][i]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) Vec::Store(acc + r * padded + i * Vec::kWidth, sum[r][i]);
  }
}

struct TileF32 {
  using Element = float;
  using Keys = float;
  using P = float;
  static constexpr int kVecs = Vec::kWidth == 16 ? 4 : 2;  // of 32 or 16 registers

  template <int kRows>
  static void Scores(const float* q, const float* k, int64_t padded, float* s) {
    for (int64_t base = 0; base < kKeyTile; base += kVecs * Vec::kWidth) {
      Vec::F sum[kRows][kVecs];
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) sum[r][v] = Vec::Zero();
      }
      for (int64_t d = 0; d < padded; ++d) {
        Vec::F keys[kVecs];
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) keys[v] = Vec::Load(k + d * kKeyTile + base + v * Vec::kWidth);
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r) {
          const Vec::F x = Vec::Set1(q[r * padded + d]);
#pragma GCC unroll 4
          for (int v = 0; v < kVecs; ++v) sum[r][v] = Vec::Fma(x, keys[v], sum[r][v]);
        }
      }
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) Vec::Store(s + r * kKeyTile + base + v * Vec::kWidth, sum[r][v]);
      }
    }
  }

  template <int kRows>
  static void Values(const float* p, const float* v, int64_t padded, int64_t keys, const float* alpha, float* acc) {
    const auto load = [v, padded](int64_t d) {
      return [v, padded, d](int64_t j, int i) { return Vec::Load(v + j * padded + d + i * Vec::kWidth); };
    };
    int64_t d = 0;
    for (; d + kVecs * Vec::kWidth <= padded; d += kVecs * Vec::kWidth) {
      AddValues<kRows, kVecs>(p, load(d), padded, keys, alpha, acc + d);
    }
    for (; d < padded; d += Vec::kWidth) AddValues<kRows, 1>(p, load(d), padded, keys, alpha, acc + d);
  }
};

// The arithmetic of TileF32, in its order, on rows of T as they lie in the pages. Each load asks for the same place of
// the next tile: asked for all at once, its lines would wait for each other and the arithmetic for them. kWhole: rows
// have no padding.
template <typename T, bool kWhole>
struct UnpackedF32 {
  using Element = float;
  using Keys = UnpackedTile;
  using P = float;

  static Vec::F Load(const void* row, const void* next, int64_t d, int64_t dim) {
    const T* from = static_cast<const T*>(row) + d;
    if (d * static_cast<int64_t>(sizeof(T)) % 64 == 0) __builtin_prefetch(static_cast<const T*>(next) + d, 0, 2);
    if constexpr (kWhole) return Vec::Load(from);
    return Vec::LoadN(from, dim > d ? dim - d : 0);
  }

  template <int kRows>
  static void Scores(const float* q, const UnpackedTile* tile, int64_t padded, float* s) {
    for (int64_t j = 0; j < kKeyTile; j += Vec::kWidth) {
      Vec::F sum[kRows];
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) sum[r] = Vec::Zero();
      for (int64_t d = 0; j < tile->keys && d < padded; d += Vec::kWidth) {
        Vec::F block[Vec::kWidth];
#pragma GCC unroll 16
        for (int i = 0; i < Vec::kWidth; ++i) {
          block[i] = Load(tile->rows->k[j + i], tile->next->k[j + i], d, tile->dim);
        }
        TransposeSquare(block);
#pragma GCC unroll 16
        for (int i = 0; i < Vec::kWidth; ++i) {
#pragma GCC unroll 6
          for (int r = 0; r < kRows; ++r) sum[r] = Vec::Fma(Vec::Set1(q[r * padded + d + i]), block[i], sum[r]);
        }
      }
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) Vec::Store(s + r * kKeyTile + j, sum[r]);
    }
  }

  template <int kRows>
  static void Values(const float* p, const UnpackedTile* tile, int64_t padded, int64_t keys, const float* alpha,
                     float* acc) {
    constexpr int kVecs = TileF32::kVecs;
    const auto load = [tile](int64_t d) {
      return [tile, d](int64_t j, int i) {
        return Load(tile->rows->v[j], tile->next->v[j], d + i * Vec::kWidth, tile->dim);
      };
    };
    int64_t d = 0;
    for (; d + kVecs * Vec::kWidth <= padded; d += kVecs * Vec::kWidth) {
      AddValues<kRows, kVecs>(p, load(d), padded, keys, alpha, acc + d);
    }
    for (; d < padded; d += Vec::kWidth) AddValues<kRows, 1>(p, load(d), padded, keys, alpha, acc + d);
  }
};

template <typename T>
void AttendUnpackedF32(const AttentionPanel& panel) {
  const bool whole = static_cast<const UnpackedTile*>(panel.k)->dim == panel.padded;
  whole ? Attend<UnpackedF32<T, true>>(panel) : Attend<UnpackedF32<T, false>>(panel);
}

void PackQF32(void* packed, RowPtr q, int64_t dim, int64_t padded) {
  float* to = static_cast<float*>(packed);
  q.bf16 ? ConvertPadded(to, static_cast<const uint16_t*>(q.data), dim, padded)
         : ConvertPadded(to, static_cast<const float*>(q.data), dim, padded);
}

template <typename T>
void PackKvF32(const KeyRows& rows, const KeyRows& next, int64_t keys, int64_t dim, int64_t padded, void* k, void* v) {
  for (int64_t j = 0; j < kKeyTile; ++j) PrefetchRow(next, j, 0, dim * static_cast<int64_t>(sizeof(T)));
  float* packed_k = static_cast<float*>(k);
  for (int64_t j = 0; j < kKeyTile; j += Vec::kWidth) {
    for (int64_t d = 0; d < padded; d += Vec::kWidth) {
      Vec::F block[Vec::kWidth];
#pragma GCC unroll 16
      for (int i = 0; i < Vec::kWidth; ++i) {
        block[i] =
            j + i < keys && d < dim ? Vec::LoadN(static_cast<const T*>(rows.k[j + i]) + d, dim - d) : Vec::Zero();
      }
      TransposeSquare(block);
#pragma GCC unroll 16
      for (int i = 0; i < Vec::kWidth; ++i) Vec::Store(packed_k + (d + i) * kKeyTile + j, block[i]);
    }
  }
  float* packed_v = static_cast<float*>(v);
  for (int64_t j = 0; j < keys; ++j)
    ConvertPadded(packed_v + j * padded, static_cast<const T*>(rows.v[j]), dim, padded);
}

template <typename T>
constexpr AttentionKernel KernelF32(const char* name) {
  return {name, 16, sizeof(float), PackQF32, PackKvF32<T>, Attend<TileF32>, AttendUnpackedF32<T>, Fold, Finish};
}

}  // namespace
}  // namespace altiplano::cpu
