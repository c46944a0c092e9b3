// What the attention kernels have in common, over Vec and over a Tile that multiplies. Included after vec_avx2.h or
// vec_avx512.h, by files of one instruction set only.
#pragma once

#include "kernels/cpu/math_vec.h"
#include "kernels/cpu/paged_attention_kernel.h"

namespace altiplano::cpu {
namespace {

constexpr int kTileVecs = static_cast<int>(kKeyTile) / Vec::kWidth;

template <typename T>
inline void ConvertPadded(T* to, const float* from, int64_t dim, int64_t padded) {
  for (int64_t i = 0; i < padded; i += Vec::kWidth) Vec::Store(to + i, Vec::LoadN(from + i, dim > i ? dim - i : 0));
}
template <typename T>
inline void ConvertPadded(T* to, const uint16_t* from, int64_t dim, int64_t padded) {
  for (int64_t i = 0; i < padded; i += Vec::kWidth) Vec::Store(to + i, Vec::LoadN(from + i, dim > i ? dim - i : 0));
}

inline Vec::F Iota() {
  alignas(64) static constexpr float kIota[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return Vec::Load(kIota);
}

// One row of scores [kKeyTile]: scaled, those of keys that it does not see made -inf. Returns their maximum.
inline float ScaleAndMask(float* s, float scale, int64_t visible) {
  const Vec::F minus_inf = Vec::Set1(-__builtin_inff());
  Vec::F max = minus_inf;
#pragma GCC unroll 8
  for (int v = 0; v < kTileVecs; ++v) {
    Vec::F x = Vec::Mul(Vec::Load(s + v * Vec::kWidth), Vec::Set1(scale));
    if (visible < (v + 1) * Vec::kWidth) {
      x = Vec::SelectLess(Iota(), Vec::Set1(static_cast<float>(visible - v * Vec::kWidth)), x, minus_inf);
    }
    Vec::Store(s + v * Vec::kWidth, x);
    max = Vec::Max(max, x);
  }
  return Vec::MaxOf(max);
}

// p = e^(s - max), in the type that multiplies V. Returns the sum of what was stored.
template <typename P>
inline float Exponentials(const float* s, float max, P* p) {
  Vec::F sum = Vec::Zero();
#pragma GCC unroll 8
  for (int v = 0; v < kTileVecs; ++v) {
    Vec::Store(p + v * Vec::kWidth, Exp(Vec::Sub(Vec::Load(s + v * Vec::kWidth), Vec::Set1(max))));
    sum = Vec::Add(sum, Vec::Load(p + v * Vec::kWidth));
  }
  return Vec::Sum(sum);
}

// Bytes [begin, end) of key j and of its value.
inline void PrefetchRow(const KeyRows& rows, int64_t j, int64_t begin, int64_t end) {
  for (int64_t byte = begin; byte < end; byte += 64) {
    __builtin_prefetch(static_cast<const char*>(rows.k[j]) + byte, 0, 2);
    __builtin_prefetch(static_cast<const char*>(rows.v[j]) + byte, 0, 2);
  }
}

// The online softmax over one tile (Milakov and Gimelshein, 2018): the maximum may grow, and then what was summed up
// before shrinks by alpha. For a row that sees nothing of the tile this is exactly nothing: alpha is 1 and p is 0.
template <typename Tile, int kRows>
void AttendRows(const AttentionPanel& a) {
  using P = typename Tile::P;
  alignas(64) float s[kRows * kKeyTile];
  alignas(64) P p[kRows * kKeyTile];
  alignas(64) float max[Vec::kWidth], alpha[Vec::kWidth];
  Tile::template Scores<kRows>(static_cast<const typename Tile::Element*>(a.q),
                               static_cast<const typename Tile::Keys*>(a.k), a.padded, s);
  for (int r = 0; r < kRows; ++r) {
    max[r] = a.state.max[r];
    if (a.visible[r] <= 0) continue;
    const float tile_max = ScaleAndMask(s + r * kKeyTile, a.scale, a.visible[r]);
    max[r] = tile_max > max[r] ? tile_max : max[r];
  }
  Vec::StoreN(alpha, Exp(Vec::Sub(Vec::LoadN(a.state.max, kRows), Vec::LoadN(max, kRows))), kRows);
  for (int r = 0; r < kRows; ++r) {
    P* row = p + r * kKeyTile;
    if (a.visible[r] <= 0) {
      alpha[r] = 1;
      for (int v = 0; v < kTileVecs; ++v) Vec::Store(row + v * Vec::kWidth, Vec::Zero());
      continue;
    }
    a.state.sum[r] = a.state.sum[r] * alpha[r] + Exponentials(s + r * kKeyTile, max[r], row);
    a.state.max[r] = max[r];
  }
  Tile::template Values<kRows>(p, static_cast<const typename Tile::Keys*>(a.v), a.padded, a.keys, alpha, a.state.acc);
}

template <typename Tile>
void Attend(const AttentionPanel& panel) {
  switch (panel.rows) {
    case 1:
      return AttendRows<Tile, 1>(panel);
    case 2:
      return AttendRows<Tile, 2>(panel);
    case 3:
      return AttendRows<Tile, 3>(panel);
    case 4:
      return AttendRows<Tile, 4>(panel);
    case 5:
      return AttendRows<Tile, 5>(panel);
    default:
      return AttendRows<Tile, 6>(panel);
  }
}

void Fold(AttentionState total, AttentionState part, int64_t rows, int64_t padded) {
  for (int64_t r = 0; r < rows; ++r) {
    const float max = part.max[r] > total.max[r] ? part.max[r] : total.max[r];
    const Vec::F shrink_total = Exp(Vec::Set1(total.max[r] - max)), shrink_part = Exp(Vec::Set1(part.max[r] - max));
    alignas(64) float sum[Vec::kWidth];
    Vec::Store(sum, Vec::Fma(Vec::Set1(total.sum[r]), shrink_total, Vec::Mul(Vec::Set1(part.sum[r]), shrink_part)));
    total.sum[r] = sum[0];
    total.max[r] = max;
    float* to = total.acc + r * padded;
    const float* from = part.acc + r * padded;
    for (int64_t i = 0; i < padded; i += Vec::kWidth) {
      Vec::Store(to + i, Vec::Fma(Vec::Load(to + i), shrink_total, Vec::Mul(Vec::Load(from + i), shrink_part)));
    }
  }
}

void Finish(RowPtr out, const float* acc, float sum, int64_t dim) {
  for (int64_t i = 0; i < dim; i += Vec::kWidth) {
    // Adding 0 makes -0 a 0: the sign of a zero would tell whether tiles out of a row's sight were added.
    const Vec::F x = Vec::Add(Vec::Div(Vec::LoadN(acc + i, dim - i), Vec::Set1(sum)), Vec::Zero());
    if (out.bf16) {
      Vec::StoreN(static_cast<uint16_t*>(out.data) + i, x, dim - i);
    } else {
      Vec::StoreN(static_cast<float*>(out.data) + i, x, dim - i);
    }
  }
}

}  // namespace
}  // namespace altiplano::cpu
