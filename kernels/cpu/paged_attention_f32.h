// Attention in f32, whatever the pages hold. Included after vec_avx2.h or vec_avx512.h and a TransposeSquare for it, by
// files of one instruction set only.
//
// Packed K is [padded, kKeyTile], so that a vector holds one dimension of many keys; packed V is [kKeyTile, padded].
// Each product keeps kRows x kVecs sums in registers.
#pragma once

#include "kernels/cpu/paged_attention_body.h"

namespace altiplano::cpu {
namespace {

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

  // acc = acc * alpha + p * v, a block of kCount vectors wide.
  template <int kRows, int kCount>
  static void ValueBlock(const float* p, const float* v, int64_t padded, int64_t keys, const float* alpha, float* acc) {
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
      for (int i = 0; i < kCount; ++i) values[i] = Vec::Load(v + j * padded + i * Vec::kWidth);
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

  template <int kRows>
  static void Values(const float* p, const float* v, int64_t padded, int64_t keys, const float* alpha, float* acc) {
    int64_t d = 0;
    for (; d + kVecs * Vec::kWidth <= padded; d += kVecs * Vec::kWidth) {
      ValueBlock<kRows, kVecs>(p, v + d, padded, keys, alpha, acc + d);
    }
    for (; d < padded; d += Vec::kWidth) ValueBlock<kRows, 1>(p, v + d, padded, keys, alpha, acc + d);
  }
};

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
  return {name, 16, sizeof(float), PackQF32, PackKvF32<T>, Attend<TileF32>, nullptr, Fold, Finish};
}

}  // namespace
}  // namespace altiplano::cpu
