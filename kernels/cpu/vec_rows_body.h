// The bodies of RowKernels over Vec. Included after vec_avx2.h or vec_avx512.h, by files of one instruction set only.
#pragma once

#include "kernels/cpu/math_vec.h"
#include "kernels/cpu/vec_rows.h"

namespace altiplano::cpu {
namespace {

template <typename T>
T* As(RowPtr row) {
  return static_cast<T*>(row.data);
}

// fn(begin, count) over n elements, a register at a time.
template <typename Fn>
inline void ForEach(int64_t n, Fn fn) {
  int64_t i = 0;
  for (; i + Vec::kWidth <= n; i += Vec::kWidth) fn(i, static_cast<int64_t>(Vec::kWidth));
  if (i < n) fn(i, n - i);
}

template <typename T>
inline Vec::F Get(const T* p, int64_t count) {
  return count == Vec::kWidth ? Vec::Load(p) : Vec::LoadN(p, count);
}
template <typename T>
inline void Put(T* p, Vec::F x, int64_t count) {
  count == Vec::kWidth ? Vec::Store(p, x) : Vec::StoreN(p, x, count);
}

template <typename Out, typename X>
void ConvertRow(RowPtr out, RowPtr x, int64_t n) {
  ForEach(n, [&](int64_t i, int64_t count) { Put(As<Out>(out) + i, Get(As<X>(x) + i, count), count); });
}

void Convert(RowPtr out, RowPtr x, int64_t n) {
  if (out.bf16) {
    x.bf16 ? ConvertRow<uint16_t, uint16_t>(out, x, n) : ConvertRow<uint16_t, float>(out, x, n);
  } else {
    x.bf16 ? ConvertRow<float, uint16_t>(out, x, n) : ConvertRow<float, float>(out, x, n);
  }
}

// residual += x, rounded to its dtype.
template <typename Residual, typename X>
void AddRow(RowPtr residual, RowPtr x, int64_t n) {
  ForEach(n, [&](int64_t i, int64_t count) {
    Residual* r = As<Residual>(residual) + i;
    Put(r, Vec::Add(Get(r, count), Get(As<X>(x) + i, count)), count);
  });
}

template <typename X>
float SumOfSquares(RowPtr x, int64_t n) {
  const X* p = As<X>(x);
  Vec::F sum[4] = {Vec::Zero(), Vec::Zero(), Vec::Zero(), Vec::Zero()};
  int64_t i = 0;
  for (; i + 4 * Vec::kWidth <= n; i += 4 * Vec::kWidth) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const Vec::F v = Vec::Load(p + i + j * Vec::kWidth);
      sum[j] = Vec::Fma(v, v, sum[j]);
    }
  }
  for (int j = 0; i < n; i += Vec::kWidth, ++j) {
    const Vec::F v = Get(p + i, n - i < Vec::kWidth ? n - i : Vec::kWidth);
    sum[j] = Vec::Fma(v, v, sum[j]);
  }
  return Vec::Sum(Vec::Add(Vec::Add(sum[0], sum[1]), Vec::Add(sum[2], sum[3])));
}

template <typename Out, typename X, typename W>
void ScaleRow(RowPtr out, RowPtr x, RowPtr weight, float scale, int64_t n) {
  const Vec::F s = Vec::Set1(scale);
  ForEach(n, [&](int64_t i, int64_t count) {
    const Vec::F y = Vec::Mul(Vec::Mul(Get(As<X>(x) + i, count), s), Get(As<W>(weight) + i, count));
    Put(As<Out>(out) + i, y, count);
  });
}

void RmsNormRow(RowPtr out, RowPtr residual, RowPtr x, RowPtr weight, int64_t n, float eps) {
  if (residual.data != nullptr) {
    if (residual.bf16) {
      x.bf16 ? AddRow<uint16_t, uint16_t>(residual, x, n) : AddRow<uint16_t, float>(residual, x, n);
    } else {
      x.bf16 ? AddRow<float, uint16_t>(residual, x, n) : AddRow<float, float>(residual, x, n);
    }
    x = residual;
  }
  const float sum = x.bf16 ? SumOfSquares<uint16_t>(x, n) : SumOfSquares<float>(x, n);
  const float scale = 1.0f / __builtin_sqrtf(sum / static_cast<float>(n) + eps);
  switch ((out.bf16 ? 4 : 0) | (x.bf16 ? 2 : 0) | (weight.bf16 ? 1 : 0)) {
    case 0:
      return ScaleRow<float, float, float>(out, x, weight, scale, n);
    case 1:
      return ScaleRow<float, float, uint16_t>(out, x, weight, scale, n);
    case 2:
      return ScaleRow<float, uint16_t, float>(out, x, weight, scale, n);
    case 3:
      return ScaleRow<float, uint16_t, uint16_t>(out, x, weight, scale, n);
    case 4:
      return ScaleRow<uint16_t, float, float>(out, x, weight, scale, n);
    case 5:
      return ScaleRow<uint16_t, float, uint16_t>(out, x, weight, scale, n);
    case 6:
      return ScaleRow<uint16_t, uint16_t, float>(out, x, weight, scale, n);
    case 7:
      return ScaleRow<uint16_t, uint16_t, uint16_t>(out, x, weight, scale, n);
  }
}

template <typename Out, typename X>
void SiluMulTyped(RowPtr out, RowPtr gate, RowPtr up, int64_t n) {
  const Vec::F one = Vec::Set1(1.0f);
  ForEach(n, [&](int64_t i, int64_t count) {
    const Vec::F g = Get(As<X>(gate) + i, count);
    const Vec::F silu = Vec::Div(g, Vec::Add(one, Exp(Vec::Sub(Vec::Zero(), g))));
    Put(As<Out>(out) + i, Vec::Mul(silu, Get(As<X>(up) + i, count)), count);
  });
}

void SiluMulRow(RowPtr out, RowPtr gate, RowPtr up, int64_t n) {
  if (out.bf16) {
    gate.bf16 ? SiluMulTyped<uint16_t, uint16_t>(out, gate, up, n) : SiluMulTyped<uint16_t, float>(out, gate, up, n);
  } else {
    gate.bf16 ? SiluMulTyped<float, uint16_t>(out, gate, up, n) : SiluMulTyped<float, float>(out, gate, up, n);
  }
}

// The product of a 31-bit position and a 24-bit frequency is a double off by at most 2^-54 of itself. The angle is
// reduced to |r| <= pi/4 with pi/2 in two doubles; Taylor series to r^13 and r^14 are off by less than 3e-14. What is
// left of the error is the rounding to f32: together 0.51 ulp, except where the result itself is below 1e-6.
void CosSinRow(const float* inv_freq, int64_t n, int64_t position, float* cos, float* sin) {
  using D = Vec::D;
  const D magic = Vec::Set1D(0x1.8p52);
  const D p = Vec::Set1D(static_cast<double>(position));
  for (int64_t i = 0; i < n; i += Vec::kDoubles) {
    const D angle = Vec::MulD(p, Vec::LoadND(inv_freq + i, n - i));
    const D t = Vec::FmaD(angle, Vec::Set1D(0x1.45f306dc9c883p-1), magic);  // 2 / pi; the quadrant in the low bits
    const D quadrants = Vec::SubD(t, magic);
    D r = Vec::FnmaD(quadrants, Vec::Set1D(0x1.921fb54442d18p0), angle);
    r = Vec::FnmaD(quadrants, Vec::Set1D(0x1.1a62633145c07p-54), r);
    const D r2 = Vec::MulD(r, r);
    D s = Vec::FmaD(Vec::Set1D(1.0 / 6227020800), r2, Vec::Set1D(-1.0 / 39916800));
    s = Vec::FmaD(s, r2, Vec::Set1D(1.0 / 362880));
    s = Vec::FmaD(s, r2, Vec::Set1D(-1.0 / 5040));
    s = Vec::FmaD(s, r2, Vec::Set1D(1.0 / 120));
    s = Vec::FmaD(s, r2, Vec::Set1D(-1.0 / 6));
    s = Vec::FmaD(Vec::MulD(s, r2), r, r);
    D c = Vec::FmaD(Vec::Set1D(-1.0 / 87178291200), r2, Vec::Set1D(1.0 / 479001600));
    c = Vec::FmaD(c, r2, Vec::Set1D(-1.0 / 3628800));
    c = Vec::FmaD(c, r2, Vec::Set1D(1.0 / 40320));
    c = Vec::FmaD(c, r2, Vec::Set1D(-1.0 / 720));
    c = Vec::FmaD(c, r2, Vec::Set1D(1.0 / 24));
    c = Vec::FmaD(c, r2, Vec::Set1D(-0.5));
    c = Vec::FmaD(c, r2, Vec::Set1D(1));
    // Quadrants 0 1 2 3: sin = s c -s -c, cos = c -s -c s.
    const D next = Vec::AddD(t, Vec::Set1D(1));
    Vec::StoreD(sin + i, Vec::FlipSignByBit<1>(t, Vec::SelectBit<0>(t, c, s)));
    Vec::StoreD(cos + i, Vec::FlipSignByBit<1>(next, Vec::SelectBit<0>(t, s, c)));
  }
}

template <typename Out, typename X>
void RotateTyped(RowPtr out_low, RowPtr out_high, RowPtr low, RowPtr high, const float* cos, const float* sin,
                 int64_t n) {
  ForEach(n, [&](int64_t i, int64_t count) {
    const Vec::F c = Get(cos + i, count), s = Get(sin + i, count);
    const Vec::F x = Get(As<X>(low) + i, count), y = Get(As<X>(high) + i, count);
    Put(As<Out>(out_low) + i, Vec::Fnma(y, s, Vec::Mul(x, c)), count);
    Put(As<Out>(out_high) + i, Vec::Fma(x, s, Vec::Mul(y, c)), count);
  });
}

void RotateRow(RowPtr out_low, RowPtr out_high, RowPtr low, RowPtr high, const float* cos, const float* sin,
               int64_t n) {
  if (out_low.bf16) {
    low.bf16 ? RotateTyped<uint16_t, uint16_t>(out_low, out_high, low, high, cos, sin, n)
             : RotateTyped<uint16_t, float>(out_low, out_high, low, high, cos, sin, n);
  } else {
    low.bf16 ? RotateTyped<float, uint16_t>(out_low, out_high, low, high, cos, sin, n)
             : RotateTyped<float, float>(out_low, out_high, low, high, cos, sin, n);
  }
}

void ExpRow(float* out, const float* x, int64_t n) {
  ForEach(n, [&](int64_t i, int64_t count) { Put(out + i, Exp(Get(x + i, count)), count); });
}

constexpr RowKernels kRows = {Convert, RmsNormRow, SiluMulRow, CosSinRow, RotateRow, ExpRow};

}  // namespace
}  // namespace altiplano::cpu
