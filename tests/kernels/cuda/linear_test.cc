// Linear in CUDA against float64.
#include <gtest/gtest.h>

#include <cmath>

#include "kernels/cuda/linear_plan.h"
#include "tests/kernels/cuda/cuda_testlib.h"

namespace altiplano {
namespace {

// A sum in which each product goes through at most d roundings is off by at most d u S / (1 - d u), S = sum |x w|. A
// warp of the tensor core kernel sums a quarter of K, four warps are added; the plain kernel's paths are shorter. What
// is there already is added with one more rounding.
double Bound(int64_t k, double magnitude, double before, double exact, DType out) {
  const double d = static_cast<double>(k / 4 + 32 + 5) * kUnitF32;
  double bound = d / (1 - d) * magnitude;
  bound += kUnitF32 * (std::abs(before) + std::abs(exact) + bound);
  return bound + RoundingBound(out, exact, bound);
}

struct Shape {
  int64_t tokens, n, k;
};

class CudaLinearTest : public CudaTest {
 protected:
  void ExpectNearOracle(const Shape& shape, DType act, DType out_dtype, bool accumulate, int64_t gap) {
    const auto [tokens, n, k] = shape;
    Matrix x(tokens, k, act, gap), weight(n, k, act, gap), out(tokens, n, out_dtype, gap), before(tokens, n, out_dtype);
    x.FillNormal(1);
    weight.FillNormal(2);
    before.FillNormal(3);
    if (accumulate) out.Fill(before);
    const OnDevice d_x(stream(), x), d_weight(stream(), weight), d_out(stream(), out);
    Linear(stream(), {.out = d_out.view(), .x = d_x.view(), .weight = d_weight.view(), .accumulate = accumulate});
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
};

// K: within a chunk, whole chunks, an uneven number for the warps, not aligned; N: within a block's columns and beyond.
constexpr int64_t kDepths[] = {8, 32, 40, 200, 1056, 1, 36, 67};
constexpr int64_t kColumns[] = {1, 16, 35};

TEST_F(CudaLinearTest, IsNearTheOracle) {
  for (int64_t tokens : {1, 7, 8, 9, 16, 17, 70}) {
    for (int64_t n : kColumns) {
      for (int64_t k : kDepths) {
        if ((tokens == 70 || kUnderTsan) && k > 200) continue;
        ExpectNearOracle({tokens, n, k}, DType::kBF16, DType::kF32, false, 0);
      }
    }
  }
}

TEST_F(CudaLinearTest, IsNearTheOracleForEveryDTypeAndStride) {
  for (const auto& [act, out] :
       {std::pair{DType::kF32, DType::kF32}, {DType::kBF16, DType::kF32}, {DType::kBF16, DType::kBF16}}) {
    for (bool accumulate : {false, true}) {
      for (int64_t gap : {0, 8, 3}) {
        for (int64_t tokens : {1, 5, 19}) ExpectNearOracle({tokens, 33, 104}, act, out, accumulate, gap);
      }
    }
  }
}

TEST_F(CudaLinearTest, ARowDoesNotDependOnTheOthers) {
  constexpr int64_t kTokens = 70, kN = 24, kK = 264;
  for (DType act : {DType::kF32, DType::kBF16}) {
    Matrix x(kTokens, kK, act), weight(kN, kK, act), together(kTokens, kN, DType::kF32), alone(1, kN, DType::kF32);
    x.FillNormal(1);
    weight.FillNormal(2);
    x.set(40, 7, NAN);
    const OnDevice d_x(stream(), x), d_weight(stream(), weight), d_together(stream(), together);
    const OnDevice d_alone(stream(), alone);
    for (int64_t tokens : {70, 41, 16, 8, 3}) {
      Linear(stream(),
             {.out = d_together.view().first(tokens), .x = d_x.view().first(tokens), .weight = d_weight.view()});
      d_together.Fetch(together);
      for (int64_t t = 0; t < tokens; t += 5) {
        TensorView row = d_x.view().first(1);
        row.data = static_cast<char*>(row.data) + t * kK * static_cast<int64_t>(SizeOf(act));
        Linear(stream(), {.out = d_alone.view(), .x = row, .weight = d_weight.view()});
        d_alone.Fetch(alone);
        for (int64_t j = 0; j < kN; ++j) ASSERT_EQ(std::isnan(together.at(t, j)), t == 40) << t;
        if (t != 40) {
          EXPECT_EQ(together.RowBytes(t), alone.RowBytes(0)) << t << " of " << tokens;
        }
      }
    }
  }
}

#ifndef ALTIPLANO_ON_GPU
// The weights once, in whole sectors, and x once for each block of 16 columns.
TEST_F(CudaLinearTest, TrafficOfADecodeIsThatOfTheWeights) {
  constexpr int64_t kN = 64, kK = 2048;
  for (int64_t tokens : {1, 16}) {
    Matrix x(tokens, kK, DType::kBF16), weight(kN, kK, DType::kBF16), out(tokens, kN, DType::kBF16);
    x.FillNormal(1);
    weight.FillNormal(2);
    const OnDevice d_x(stream(), x), d_weight(stream(), weight), d_out(stream(), out);
    sim::CountTraffic(true);
    Linear(stream(), {.out = d_out.view(), .x = d_x.view(), .weight = d_weight.view()});
    const sim::Traffic traffic = sim::TrafficOf("Linear");
    EXPECT_EQ(traffic.load_bytes, static_cast<uint64_t>(2 * kN * kK + 2 * tokens * kK * kN / 16)) << tokens;
    EXPECT_EQ(traffic.store_bytes, static_cast<uint64_t>(2 * tokens * kN));
    EXPECT_EQ(traffic.sectors, traffic.ideal_sectors) << sim::TrafficByLine();
    // The warps' sums are stored without conflicts; two tokens are read back at a time and meet in some banks.
    EXPECT_LE(2 * traffic.wavefronts, 3 * traffic.ideal_wavefronts) << sim::TrafficByLine();
    sim::CountTraffic(false);
  }
}
#endif

TEST(CudaLinearPlan, CoversTokensAndColumns) {
  EXPECT_EQ(cuda::MmaLinearPlan(1, 6144),
            (cuda::LaunchShape{.grid_x = 384, .grid_y = 1, .threads = 128, .shared_bytes = 4 * 8 * 20 * 4}));
  EXPECT_EQ(cuda::MmaLinearPlan(16, 6145).grid_x, 385u);
  EXPECT_EQ(cuda::MmaLinearPlan(16, 6145).grid_y, 1u);
  EXPECT_EQ(cuda::MmaLinearPlan(129, 16).grid_y, 3u);
  EXPECT_EQ(cuda::PlainLinearPlan(9, 5), (cuda::LaunchShape{.grid_x = 2, .grid_y = 2, .threads = 128}));
}

}  // namespace
}  // namespace altiplano
