// What tests of Linear share: a product against float64.
#pragma once

#include <gtest/gtest.h>

#include <cmath>

#include "tests/kernels/cuda/cuda_testlib.h"

namespace altiplano {

class LinearTest : public CudaTest {
 protected:
  struct Shape {
    int64_t tokens, n, k;
  };
  bool batch_invariant_ = false;

  // gap: elements between rows.
  void ExpectNearOracle(const Shape& shape, DType act, DType out_dtype, bool accumulate, int64_t gap) {
    const auto [tokens, n, k] = shape;
    Matrix x(tokens, k, act, gap), weight(n, k, act, gap), out(tokens, n, out_dtype, gap), before(tokens, n, out_dtype);
    x.FillNormal(1);
    weight.FillNormal(2);
    before.FillNormal(3);
    if (accumulate) out.Fill(before);
    const OnDevice d_x(stream(), x), d_weight(stream(), weight), d_out(stream(), out);
    Linear(stream(), {.out = d_out.view(),
                      .x = d_x.view(),
                      .weight = d_weight.view(),
                      .accumulate = accumulate,
                      .batch_invariant = batch_invariant_,
                      .scratch = scratch()});
    d_out.Fetch(out);
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t j = 0; j < n; ++j) {
        double product = 0, magnitude = 0;
        for (int64_t i = 0; i < k; ++i) {
          product += x.at(t, i) * weight.at(j, i);
          magnitude += std::abs(x.at(t, i) * weight.at(j, i));
        }
        const double old = accumulate ? before.at(t, j) : 0, exact = product + old;
        ASSERT_NEAR(out.at(t, j), exact, Bound(k, magnitude, old, exact, out_dtype))
            << "token " << t << " of " << tokens << ", column " << j << " of " << n << ", K " << k << ", " << Name(act)
            << " to " << Name(out_dtype);
      }
    }
    EXPECT_TRUE(out.GapsUntouched());
  }

  // LinearSiluMul against Linear and SiluMul, to the bit.
  void ExpectSiluMulHasTheBitsOfTwo(int64_t tokens, int64_t ffn, int64_t k, DType act) {
    const int64_t gap = ffn % 8 == 0 ? 8 : 3;
    Matrix x(tokens, k, act), weight(2 * ffn, k, act), gate_up(tokens, 2 * ffn, act), one(tokens, ffn, act, gap);
    Matrix two(tokens, ffn, act, gap);
    x.FillNormal(1);
    weight.FillNormal(2, 0.3f);
    const OnDevice d_x(stream(), x), d_weight(stream(), weight), d_gate_up(stream(), gate_up);
    const OnDevice d_one(stream(), one), d_two(stream(), two);
    Linear(stream(), {.out = d_gate_up.view(),
                      .x = d_x.view(),
                      .weight = d_weight.view(),
                      .batch_invariant = batch_invariant_,
                      .scratch = scratch()});
    SiluMul(stream(), {.out = d_two.view(), .gate_up = d_gate_up.view()});
    LinearSiluMul(stream(), {.out = d_one.view(),
                             .x = d_x.view(),
                             .weight = d_weight.view(),
                             .gate_up = d_gate_up.view(),
                             .batch_invariant = batch_invariant_,
                             .scratch = scratch()});
    d_one.Fetch(one);
    d_two.Fetch(two);
    EXPECT_TRUE(one.GapsUntouched());
    for (int64_t t = 0; t < tokens; ++t) {
      ASSERT_EQ(one.RowBytes(t), two.RowBytes(t)) << t << " of " << tokens << ", ffn " << ffn << ", K " << k;
    }
  }

  // From now on products have what they can use.
  void Prepare() {
    scratch_ = Buffer::Allocate(stream(), kLinearScratchBytes);
    PrepareLinear(stream(), scratch_.data());
  }
  void* scratch() { return scratch_.data(); }
  void TearDown() override {
    CudaTest::TearDown();
    scratch_ = Buffer();
  }

 private:
  // A sum in which each product goes through at most d roundings is off by at most d u S / (1 - d u), S = sum |x w|. A
  // warp of the kernels for few tokens sums a quarter of K, four warps are added; Hopper's sums all of K, or its
  // splits; the plain kernel's paths are shorter. What is there already is added with one more rounding.
  double Bound(int64_t k, double magnitude, double before, double exact, DType out) const {
    const double d = static_cast<double>((batch_invariant_ ? k / 4 : k) + 32 + 5) * kUnitF32;
    double bound = d / (1 - d) * magnitude;
    bound += kUnitF32 * (std::abs(before) + std::abs(exact) + bound);
    return bound + RoundingBound(out, exact, bound);
  }

  Buffer scratch_;
};

}  // namespace altiplano
