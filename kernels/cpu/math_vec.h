// exp of a Vec. Included after vec_avx2.h or vec_avx512.h, by files of one instruction set only.
#pragma once

namespace altiplano::cpu {
namespace {

// e^x within 1.08 ulp (the worst of all floats is at 5.19920921) for -87 <= x <= 88; 0 below, +inf above, NaN for NaN.
//
// x = n ln 2 + r with |r| <= ln 2 / 2, e^r by a polynomial of degree 6 (Chebyshev interpolation of
// (e^r - 1 - r) / r^2, off by at most 0.17 * 2^-24 with its coefficients rounded to f32). Nothing but f32 additions and
// fused multiply-adds in a fixed order: every instruction set, and a GPU that follows it, gives the same bits.
inline Vec::F Exp(Vec::F x) {
  const Vec::F magic = Vec::Set1(0x1.8p23f);  // adding it rounds to an integer, which lands in the low bits
  const Vec::F low = Vec::Set1(-87.0f), high = Vec::Set1(88.0f);
  const Vec::F y = Vec::Max(low, Vec::Min(high, x));
  const Vec::F t = Vec::Fma(y, Vec::Set1(0x1.715476p+0f), magic);
  const Vec::F n = Vec::Sub(t, magic);
  Vec::F r = Vec::Fnma(n, Vec::Set1(0x1.62e43p-1f), y);
  r = Vec::Fma(n, Vec::Set1(0x1.05c61p-29f), r);  // ln 2 = 0x1.62e43p-1 - 0x1.05c61p-29 to 2^-54
  Vec::F q = Vec::Fma(Vec::Set1(0x1.6d10fep-10f), r, Vec::Set1(0x1.120b64p-7f));
  q = Vec::Fma(q, r, Vec::Set1(0x1.55551ap-5f));
  q = Vec::Fma(q, r, Vec::Set1(0x1.5554dep-3f));
  q = Vec::Fma(q, r, Vec::Set1(0.5f));
  const Vec::F p = Vec::Add(Vec::Fma(q, Vec::Mul(r, r), r), Vec::Set1(1.0f));
  Vec::F e = Vec::ScaleByMagic(p, t);
  e = Vec::SelectLess(x, low, Vec::Zero(), e);
  e = Vec::SelectLess(high, x, Vec::Set1(__builtin_inff()), e);
  return Vec::KeepNan(x, e);
}

}  // namespace
}  // namespace altiplano::cpu
