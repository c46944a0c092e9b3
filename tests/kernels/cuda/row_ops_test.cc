// The row-wise CUDA ops against float64.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "kernels/cuda/rows_plan.h"
#include "tests/kernels/cuda/cuda_testlib.h"

namespace altiplano {
namespace {

constexpr DType kActs[] = {DType::kF32, DType::kBF16};
// Packs and single elements, less than a warp, a block and more than that.
constexpr int64_t kWidths[] = {1, 4, 7, 36, 128, 130, 1028, 4096};

class CudaRowOpsTest : public CudaTest {};

TEST_F(CudaRowOpsTest, EmbedCopiesRowsAndZerosThoseOfOtherRanks) {
  for (const auto& [out_dtype, act] :
       {std::pair{DType::kF32, DType::kF32}, {DType::kF32, DType::kBF16}, {DType::kBF16, DType::kBF16}}) {
    for (int64_t hidden : kWidths) {
      const int64_t gap = hidden % 3;
      Matrix table(5, hidden, act, gap), out(6, hidden, out_dtype, gap);
      table.FillNormal(1);
      const std::vector<int32_t> ids = {104, 100, 99, 105, 103, 0};
      const OnDevice d_table(stream(), table), d_out(stream(), out), d_ids(stream(), ids);
      Embed(stream(), {.out = d_out.view(), .table = d_table.view(), .ids = d_ids.view(), .vocab_begin = 100});
      d_out.Fetch(out);
      for (int64_t t = 0; t < 6; ++t) {
        const int64_t id = ids[static_cast<size_t>(t)] - 100;
        for (int64_t j = 0; j < hidden; ++j) {
          ASSERT_EQ(out.at(t, j), id < 0 || id >= 5 ? 0 : table.at(id, j)) << t << ", " << j << " of " << hidden;
        }
      }
      EXPECT_TRUE(out.GapsUntouched());
    }
  }
}

TEST_F(CudaRowOpsTest, EmbedTakesNegativeIdsFromWhatWasSampled) {
  for (int64_t hidden : {7, 64}) {
    Matrix table(5, hidden, DType::kBF16), out(4, hidden, DType::kF32);
    table.FillNormal(1);
    const std::vector<int32_t> expected = {1, 3, -1, 4};  // rows of the table; -1: zeros
    const OnDevice d_table(stream(), table), d_out(stream(), out);
    const OnDevice d_ids(stream(), std::vector<int32_t>{101, -1, -3, 104});
    const OnDevice d_sampled(stream(), std::vector<int32_t>{103, 102, 0});
    Embed(stream(), {.out = d_out.view(),
                     .table = d_table.view(),
                     .ids = d_ids.view(),
                     .sampled = d_sampled.view(),
                     .vocab_begin = 100});
    d_out.Fetch(out);
    for (int64_t t = 0; t < 4; ++t) {
      const int64_t row = expected[static_cast<size_t>(t)];
      for (int64_t j = 0; j < hidden; ++j) ASSERT_EQ(out.at(t, j), row < 0 ? 0 : table.at(row, j)) << t << ", " << j;
    }
  }
}

TEST_F(CudaRowOpsTest, GatherRowsCopiesBits) {
  for (DType dtype : {DType::kF32, DType::kBF16, DType::kI32, DType::kI64}) {
    for (int64_t hidden : kWidths) {
      const int64_t gap = hidden % 3;
      Matrix x(4, hidden, dtype, gap), out(5, hidden, dtype, gap);
      for (int64_t t = 0; t < 4; ++t) {
        for (int64_t j = 0; j < hidden; ++j) x.set(t, j, static_cast<double>(t * 7 - j % 100));
      }
      const std::vector<int32_t> rows = {3, 0, 0, 2, 1};
      const OnDevice d_x(stream(), x), d_out(stream(), out), d_rows(stream(), rows);
      GatherRows(stream(), {.out = d_out.view(), .x = d_x.view(), .rows = d_rows.view()});
      d_out.Fetch(out);
      for (int64_t r = 0; r < 5; ++r) EXPECT_EQ(out.RowBytes(r), x.RowBytes(rows[static_cast<size_t>(r)])) << hidden;
      EXPECT_TRUE(out.GapsUntouched());
    }
  }
}

// exp(-x) by 2^(-x log2 e): the product is off by its own rounding and the constant's, 2 u |x| log2 e as an exponent,
// and the instruction by 2^-22; then one addition, one division and one product.
double SiluBound(double gate, double exact, DType out) {
  const double relative = 2.1 * kUnitF32 * std::abs(gate) * 1.4427 * 0.6932 + 0x1p-22 + 3 * kUnitF32;
  const double bound = 1.01 * relative * std::abs(exact) + 0x1p-120;
  return bound + RoundingBound(out, exact, bound);
}

TEST_F(CudaRowOpsTest, SiluMulIsNearTheOracle) {
  for (const auto& [in, act] :
       {std::pair{DType::kF32, DType::kF32}, {DType::kF32, DType::kBF16}, {DType::kBF16, DType::kBF16}}) {
    for (int64_t ffn : kWidths) {
      const int64_t gap = ffn % 3;
      Matrix gate_up(3, 2 * ffn, in, gap), out(3, ffn, act, gap);
      gate_up.FillNormal(2, 6);
      gate_up.set(0, 0, -200);  // whose exponential is infinite
      gate_up.set(1, 0, 200);
      const OnDevice d_in(stream(), gate_up), d_out(stream(), out);
      SiluMul(stream(), {.out = d_out.view(), .gate_up = d_in.view()});
      d_out.Fetch(out);
      for (int64_t t = 0; t < 3; ++t) {
        for (int64_t j = 0; j < ffn; ++j) {
          const double gate = gate_up.at(t, j), exact = gate / (1 + std::exp(-gate)) * gate_up.at(t, ffn + j);
          ASSERT_NEAR(out.at(t, j), exact, SiluBound(gate, exact, act)) << gate << ", column " << j << " of " << ffn;
        }
      }
      EXPECT_TRUE(out.GapsUntouched());
    }
  }
}

// The squares are positive, so that each goes through a relative error of (1 + u)^d: d are the products and sums of a
// thread, 5 of the warp and one for each of at most 16 warps. The mean and eps add two roundings, the root halves them
// all and adds one, its inverse one, the two products one each.
double NormBound(int64_t n, double exact, DType out) {
  const double steps = static_cast<double>(4 * cuda::CeilDivide(n, 4 * cuda::kMostNormThreads)) + 4 + 1 + 5 + 16;
  const double bound = 1.01 * ((steps + 2) / 2 + 4) * kUnitF32 * std::abs(exact) + 0x1p-126;
  return bound + RoundingBound(out, exact, bound);
}

void ExpectNormOf(const Matrix& x, const Matrix& weight, float eps, const Matrix& out, int64_t t) {
  ExpectRmsNorm(x, weight, eps, out, t, NormBound);
}

TEST_F(CudaRowOpsTest, RmsNormIsNearTheOracle) {
  for (DType out_dtype : kActs) {
    for (DType x_dtype : kActs) {
      for (DType weight_dtype : kActs) {
        for (int64_t hidden : kWidths) {
          const int64_t gap = hidden % 3;
          Matrix x(3, hidden, x_dtype, gap), weight(1, hidden, weight_dtype), out(3, hidden, out_dtype, gap);
          x.FillNormal(1, 5);
          weight.FillNormal(2);
          const OnDevice d_x(stream(), x), d_weight(stream(), weight), d_out(stream(), out);
          RmsNorm(stream(), {.out = d_out.view(), .x = d_x.view(), .weight = d_weight.vector(), .eps = 1e-5f});
          d_out.Fetch(out);
          for (int64_t t = 0; t < 3; ++t) ExpectNormOf(x, weight, 1e-5f, out, t);
          EXPECT_TRUE(out.GapsUntouched());
        }
      }
    }
  }
}

TEST_F(CudaRowOpsTest, RmsNormAddsEpsToTheMeanOfTheSquares) {
  Matrix x(2, 100, DType::kF32), weight(1, 100, DType::kF32), out(2, 100, DType::kF32);
  x.FillNormal(3, 1e-3f);
  for (int64_t j = 0; j < 100; ++j) x.set(1, j, 0);
  weight.FillNormal(4);
  const OnDevice d_x(stream(), x), d_weight(stream(), weight), d_out(stream(), out);
  for (float eps : {1e-6f, 0.5f}) {
    RmsNorm(stream(), {.out = d_out.view(), .x = d_x.view(), .weight = d_weight.vector(), .eps = eps});
    d_out.Fetch(out);
    for (int64_t t = 0; t < 2; ++t) ExpectNormOf(x, weight, eps, out, t);
  }
}

// As the model's last norm: in place.
TEST_F(CudaRowOpsTest, RmsNormWorksInPlace) {
  Matrix x(4, 1028, DType::kF32), weight(1, 1028, DType::kBF16), before(4, 1028, DType::kF32);
  x.FillNormal(5);
  before.Fill(x);
  weight.FillNormal(6);
  const OnDevice d_x(stream(), x), d_weight(stream(), weight);
  RmsNorm(stream(), {.out = d_x.view(), .x = d_x.view(), .weight = d_weight.vector(), .eps = 1e-5f});
  d_x.Fetch(x);
  for (int64_t t = 0; t < 4; ++t) ExpectNormOf(before, weight, 1e-5f, x, t);
}

TEST_F(CudaRowOpsTest, RowsOfANormDoNotDependOnEachOther) {
  constexpr int64_t kTokens = 9, kHidden = 700;
  Matrix x(kTokens, kHidden, DType::kBF16), weight(1, kHidden, DType::kBF16);
  x.FillNormal(7);
  weight.FillNormal(8);
  x.set(5, 650, std::numeric_limits<float>::quiet_NaN());
  Matrix together(kTokens, kHidden, DType::kBF16), alone(1, kHidden, DType::kBF16), row(1, kHidden, DType::kBF16);
  const OnDevice d_x(stream(), x), d_weight(stream(), weight), d_together(stream(), together);
  RmsNorm(stream(), {.out = d_together.view(), .x = d_x.view(), .weight = d_weight.vector(), .eps = 1e-5f});
  d_together.Fetch(together);
  for (int64_t t = 0; t < kTokens; ++t) {
    for (int64_t j = 0; j < kHidden; ++j) row.set(0, j, x.at(t, j));
    const OnDevice d_row(stream(), row), d_alone(stream(), alone);
    RmsNorm(stream(), {.out = d_alone.view(), .x = d_row.view(), .weight = d_weight.vector(), .eps = 1e-5f});
    d_alone.Fetch(alone);
    for (int64_t j = 0; j < kHidden; ++j) ASSERT_EQ(std::isnan(together.at(t, j)), t == 5) << t << ", " << j;
    if (t != 5) {
      EXPECT_EQ(together.RowBytes(t), alone.RowBytes(0)) << t;
    }
  }
}

// The residual is the sum, rounded once to its dtype; the norm is of what was stored.
TEST_F(CudaRowOpsTest, AddRmsNormAddsToTheResidualFirst) {
  for (DType residual_dtype : kActs) {
    for (DType x_dtype : kActs) {
      for (DType out_dtype : kActs) {
        for (int64_t hidden : kWidths) {
          const int64_t gap = hidden % 2 * 3;
          Matrix x(3, hidden, x_dtype, gap), residual(3, hidden, residual_dtype, gap), weight(1, hidden, DType::kBF16);
          Matrix before(3, hidden, residual_dtype), out(3, hidden, out_dtype, gap);
          x.FillNormal(9);
          residual.FillNormal(10);
          before.Fill(residual);
          weight.FillNormal(11);
          const OnDevice d_x(stream(), x), d_residual(stream(), residual), d_weight(stream(), weight);
          const OnDevice d_out(stream(), out);
          AddRmsNorm(stream(), {.out = d_out.view(),
                                .residual = d_residual.view(),
                                .x = d_x.view(),
                                .weight = d_weight.vector(),
                                .eps = 1e-5f});
          d_out.Fetch(out);
          d_residual.Fetch(residual);
          for (int64_t t = 0; t < 3; ++t) {
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

#ifndef ALTIPLANO_ON_GPU
// Every byte of the operands once, in whole sectors, and no bank conflicts.
TEST_F(CudaRowOpsTest, TrafficIsTheLeastPossible) {
  constexpr int64_t kTokens = 2, kHidden = 2048;
  Matrix narrow(kTokens, kHidden, DType::kBF16), wide(kTokens, 2 * kHidden, DType::kBF16);
  Matrix residual(kTokens, kHidden, DType::kF32), weight(1, kHidden, DType::kBF16);
  for (Matrix* matrix : {&narrow, &wide, &residual, &weight}) matrix->FillNormal(1);
  const OnDevice d_narrow(stream(), narrow), d_wide(stream(), wide), d_residual(stream(), residual);
  const OnDevice d_weight(stream(), weight), d_ids(stream(), std::vector<int32_t>{0, 1}), d_out(stream(), narrow);
  sim::CountTraffic(true);
  Embed(stream(), {.out = d_residual.view(), .table = d_narrow.view(), .ids = d_ids.view()});
  SiluMul(stream(), {.out = d_out.view(), .gate_up = d_wide.view()});
  GatherRows(stream(), {.out = d_out.view(), .x = d_narrow.view(), .rows = d_ids.view()});
  AddRmsNorm(stream(), {.out = d_out.view(),
                        .residual = d_residual.view(),
                        .x = d_narrow.view(),
                        .weight = d_weight.vector(),
                        .eps = 1e-5f});
  constexpr uint64_t kElements = kTokens * kHidden;
  struct Expected {
    const char* kernel;
    uint64_t loads, stores;
  };
  // Ids are loaded by every thread.
  for (const Expected& e : {Expected{"Embed", kElements * 2 + kElements / 4 * 4, kElements * 4},
                            {"SiluMul", kElements * 4, kElements * 2},
                            {"GatherRows", kElements * 2 + kElements / 8 * 4, kElements * 2},
                            {"AddRmsNorm", kElements * (2 + 4 + 2), kElements * (4 + 2)}}) {
    const sim::Traffic traffic = sim::TrafficOf(e.kernel);
    EXPECT_EQ(traffic.launches, 1u) << e.kernel;
    EXPECT_EQ(traffic.load_bytes, e.loads) << e.kernel;
    EXPECT_EQ(traffic.store_bytes, e.stores) << e.kernel;
    EXPECT_EQ(traffic.sectors, traffic.ideal_sectors) << e.kernel << "\n" << sim::TrafficByLine();
    EXPECT_EQ(traffic.wavefronts, traffic.ideal_wavefronts) << e.kernel << "\n" << sim::TrafficByLine();
  }
  sim::CountTraffic(false);
}
#endif

TEST(CudaRowsPlan, CoversEveryRowAndPack) {
  for (int64_t rows : {1, 7, 70000}) {
    for (int64_t packs : {1, 31, 32, 33, 256, 257, 3584}) {
      const cuda::LaunchShape shape = cuda::ElementwisePlan(rows, packs);
      EXPECT_EQ(shape.grid_x, rows);
      EXPECT_GE(int64_t{shape.grid_y} * shape.threads, packs);
      EXPECT_LT(int64_t{shape.grid_y - 1} * shape.threads, packs);
      EXPECT_EQ(shape.threads % 32, 0u);
      EXPECT_LE(shape.threads, cuda::kMostRowThreads);
    }
  }
}

TEST(CudaRowsPlan, ANormFitsIntoSharedMemory) {
  EXPECT_EQ(cuda::NormPlan(3, 4096, 4), (cuda::LaunchShape{.grid_x = 3, .threads = 512, .shared_bytes = 16384}));
  EXPECT_EQ(cuda::NormPlan(1, 100, 4), (cuda::LaunchShape{.grid_x = 1, .threads = 32, .shared_bytes = 400}));
  EXPECT_EQ(cuda::NormPlan(1, 7, 1).shared_bytes, 32u);
}

TEST(CudaRowsPlan, RopeGivesEveryHeadToOneBlock) {
  for (int64_t heads : {3, 12, 48}) {
    for (const auto& [half, pack] : {std::pair{1, 1}, {9, 1}, {32, 4}, {64, 4}, {64, 1}, {256, 1}}) {
      const cuda::RopePlan plan = cuda::PlanRope(5, heads, half, pack);
      EXPECT_GE(plan.heads_per_block, 1);
      EXPECT_GE(plan.shape.grid_y * plan.heads_per_block, heads);
      EXPECT_LT((plan.shape.grid_y - 1) * plan.heads_per_block, heads);
      EXPECT_EQ(plan.shape.shared_bytes, static_cast<uint32_t>(8 * half));
    }
  }
  // Llama 3.1 8B: 32 + 8 + 8 heads of 128, of which a block of 128 threads takes 8.
  EXPECT_EQ(cuda::PlanRope(1, 48, 64, 4).heads_per_block, 8);
}

}  // namespace
}  // namespace altiplano
