// RmsNorm and AddRmsNorm against float64.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "kernels/ops.h"
#include "tests/kernels/kernels_testlib.h"

namespace altiplano {
namespace {

// How far a result may lie from the exact one. The squares are positive, so each goes through a relative error of
// (1 + u)^d, d being the steps of a lane (four sums of at least 8 lanes: n/32 + 1 fused multiply-adds) and 5 folds. The
// mean and eps add two roundings, the root halves them all and adds one, its inverse one, the two products one each.
double Bound(int64_t n, double exact, DType out) {
  const double roundings = (static_cast<double>(n / 32 + 1 + 5) + 2) / 2 + 4;
  const double bound = 1.01 * roundings * kUnitF32 * std::abs(exact) + 0x1p-126;
  return bound + RoundingBound(out, exact, bound);
}

void ExpectNormOf(const Matrix& x, const Matrix& weight, float eps, const Matrix& out, int64_t t) {
  ExpectRmsNorm(x, weight, eps, out, t, Bound);
}

constexpr DType kActs[] = {DType::kF32, DType::kBF16};
constexpr int64_t kWidths[] = {1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 576, 1000, 4096};

class RmsNormTest : public IsaTest {};

TEST_P(RmsNormTest, IsNearTheOracle) {
  const auto stream = Stream::Cpu(1);
  for (DType out_dtype : kActs) {
    for (DType x_dtype : kActs) {
      for (DType weight_dtype : kActs) {
        for (int64_t hidden : kWidths) {
          const int64_t gap = hidden % 3;
          Matrix x(3, hidden, x_dtype, gap), weight(1, hidden, weight_dtype), out(3, hidden, out_dtype, gap);
          x.FillNormal(1, 5);
          weight.FillNormal(2);
          RmsNorm(*stream, {.out = out.view(), .x = x.view(), .weight = weight.vector(), .eps = 1e-5f});
          for (int64_t t = 0; t < 3; ++t) ExpectNormOf(x, weight, 1e-5f, out, t);
          EXPECT_TRUE(out.GapsUntouched());
        }
      }
    }
  }
}

TEST_P(RmsNormTest, AddsEpsToTheMeanOfTheSquares) {
  const auto stream = Stream::Cpu(1);
  for (float eps : {1e-6f, 1e-5f, 1e-3f, 0.5f}) {
    Matrix x(2, 100, DType::kF32), weight(1, 100, DType::kF32), out(2, 100, DType::kF32);
    x.FillNormal(3, 1e-3f);  // eps is as large as the mean, or larger
    for (int64_t j = 0; j < 100; ++j) x.set(1, j, 0);
    weight.FillNormal(4);
    RmsNorm(*stream, {.out = out.view(), .x = x.view(), .weight = weight.vector(), .eps = eps});
    ExpectNormOf(x, weight, eps, out, 0);
    for (int64_t j = 0; j < 100; ++j) EXPECT_EQ(out.at(1, j), 0) << "a row of zeros";
  }
}

TEST_P(RmsNormTest, WorksInPlace) {
  const auto stream = Stream::Cpu(1);
  Matrix x(4, 77, DType::kF32), weight(1, 77, DType::kBF16), before(4, 77, DType::kF32);
  x.FillNormal(5);
  before.Fill(x);
  weight.FillNormal(6);
  RmsNorm(*stream, {.out = x.view(), .x = x.view(), .weight = weight.vector(), .eps = 1e-5f});
  for (int64_t t = 0; t < 4; ++t) ExpectNormOf(before, weight, 1e-5f, x, t);
}

TEST_P(RmsNormTest, RowsDoNotDependOnEachOtherOrOnThreads) {
  constexpr int64_t kTokens = 60, kHidden = 700;
  Matrix x(kTokens, kHidden, DType::kBF16), weight(1, kHidden, DType::kBF16);
  x.FillNormal(7);
  weight.FillNormal(8);
  x.set(13, 650, std::numeric_limits<float>::quiet_NaN());
  const auto one = Stream::Cpu(1), three = Stream::Cpu(3);
  Matrix together(kTokens, kHidden, DType::kBF16), alone(1, kHidden, DType::kBF16);
  RmsNorm(*three, {.out = together.view(), .x = x.view(), .weight = weight.vector(), .eps = 1e-5f});
  for (int64_t t = 0; t < kTokens; ++t) {
    TensorView row = x.view().first(1);
    row.data = x.view().row<BF16>(t);
    RmsNorm(*one, {.out = alone.view(), .x = row, .weight = weight.vector(), .eps = 1e-5f});
    EXPECT_EQ(together.RowBytes(t), alone.RowBytes(0)) << t;
    for (int64_t j = 0; j < kHidden; ++j) ASSERT_EQ(std::isnan(together.at(t, j)), t == 13) << t << ", " << j;
  }
}

// The residual is the sum, rounded once to its dtype; the norm is of what was stored.
TEST_P(RmsNormTest, AddsToTheResidualFirst) {
  const auto stream = Stream::Cpu(2);
  for (DType residual_dtype : kActs) {
    for (DType x_dtype : kActs) {
      for (DType out_dtype : kActs) {
        for (int64_t hidden : kWidths) {
          const int64_t gap = hidden % 2 * 3;
          Matrix x(4, hidden, x_dtype, gap), residual(4, hidden, residual_dtype, gap), weight(1, hidden, DType::kBF16);
          Matrix before(4, hidden, residual_dtype), out(4, hidden, out_dtype, gap);
          x.FillNormal(9);
          residual.FillNormal(10);
          before.Fill(residual);
          weight.FillNormal(11);
          AddRmsNorm(
              *stream,
              {.out = out.view(), .residual = residual.view(), .x = x.view(), .weight = weight.vector(), .eps = 1e-5f});
          for (int64_t t = 0; t < 4; ++t) {
            for (int64_t j = 0; j < hidden; ++j) {
              const float sum = static_cast<float>(before.at(t, j) + x.at(t, j));
              ASSERT_EQ(residual.at(t, j), residual_dtype == DType::kF32 ? sum : ToFloat(ToBF16(sum)))
                  << "token " << t << ", column " << j << " of " << hidden;
            }
            ExpectNormOf(residual, weight, 1e-5f, out, t);
          }
          EXPECT_TRUE(out.GapsUntouched());
          EXPECT_TRUE(residual.GapsUntouched());
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Levels, RmsNormTest, testing::Values(Isa::kAvx2, Isa::kAvx512), IsaTestName);

}  // namespace
}  // namespace altiplano
