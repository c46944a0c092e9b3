// SiluMul against float64.
#include <gtest/gtest.h>

#include <cmath>

#include "kernels/ops.h"
#include "tests/kernels/kernels_testlib.h"

namespace altiplano {
namespace {

// How far a result may lie from the exact one: e^-g within 1.08 units in the last place (2.16 u), then an addition,
// a quotient and a product of one rounding each. Where e^-g overflows or counts as zero, beyond |g| = 87, silu(g) is
// off by at most 89 e^-87.
double Bound(double up, double exact, DType out) {
  const double bound = 1.01 * 5.16 * kUnitF32 * std::abs(exact) + 89 * std::exp(-87.0) * std::abs(up);
  return bound + RoundingBound(out, exact, bound);
}

double Silu(double x) {
  return x / (1 + std::exp(-x));
}

class SiluMulTest : public IsaTest {
 protected:
  void ExpectNearOracle(const Matrix& gate_up, DType out_dtype, int64_t gap, int threads) {
    const int64_t tokens = gate_up.rows(), ffn = gate_up.columns() / 2;
    Matrix out(tokens, ffn, out_dtype, gap);
    const auto stream = Stream::Cpu(threads);
    SiluMul(*stream, {.out = out.view(), .gate_up = gate_up.view()});
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t j = 0; j < ffn; ++j) {
        const double up = gate_up.at(t, ffn + j), exact = Silu(gate_up.at(t, j)) * up;
        ASSERT_NEAR(out.at(t, j), exact, Bound(up, exact, out_dtype))
            << "token " << t << ", column " << j << " of " << ffn << ", gate " << gate_up.at(t, j);
      }
    }
    EXPECT_TRUE(out.GapsUntouched());
  }
};

TEST_P(SiluMulTest, IsNearTheOracle) {
  for (const auto& [in, out] :
       {std::pair{DType::kF32, DType::kF32}, {DType::kF32, DType::kBF16}, {DType::kBF16, DType::kBF16}}) {
    for (int64_t ffn : {1, 7, 8, 9, 15, 16, 17, 33, 100, 1536}) {
      for (int64_t gap : {0, 3}) {
        Matrix gate_up(3, 2 * ffn, in, gap);
        gate_up.FillNormal(1, 4);
        ExpectNearOracle(gate_up, out, gap, 1);
      }
    }
  }
}

// Columns are shared out too, in pieces of 4096.
TEST_P(SiluMulTest, IsNearTheOracleInSeveralPieces) {
  for (int64_t ffn : {4095, 4096, 4097, 8200, 14336}) {
    Matrix gate_up(2, 2 * ffn, DType::kBF16, 5);
    gate_up.FillNormal(2);
    ExpectNearOracle(gate_up, DType::kBF16, 1, 3);
  }
}

TEST_P(SiluMulTest, SpansTheWholeRangeOfTheGate) {
  constexpr int64_t kFfn = 4001;
  Matrix gate_up(1, 2 * kFfn, DType::kF32);
  for (int64_t j = 0; j < kFfn; ++j) {
    gate_up.set(0, j, static_cast<double>(j - 2000) * 0.1);  // -200 to 200
    gate_up.set(0, kFfn + j, j % 2 ? 3 : -0.5);
  }
  ExpectNearOracle(gate_up, DType::kF32, 0, 1);
}

TEST_P(SiluMulTest, KeepsNanInItsPlace) {
  Matrix gate_up(2, 40, DType::kF32), out(2, 20, DType::kF32);
  gate_up.FillNormal(3);
  gate_up.set(0, 3, NAN);
  gate_up.set(1, 20 + 19, NAN);
  const auto stream = Stream::Cpu(1);
  SiluMul(*stream, {.out = out.view(), .gate_up = gate_up.view()});
  for (int64_t t = 0; t < 2; ++t) {
    for (int64_t j = 0; j < 20; ++j) {
      EXPECT_EQ(std::isnan(out.at(t, j)), (t == 0 && j == 3) || (t == 1 && j == 19)) << t << ", " << j;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Levels, SiluMulTest, testing::Values(Isa::kAvx2, Isa::kAvx512), IsaTestName);

}  // namespace
}  // namespace altiplano
