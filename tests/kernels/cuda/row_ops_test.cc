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
// and the instruction by 2^-22; then one addition, one division and one product. The CPU's twin takes e^-x for zero or
// infinite beyond 87.
double SiluBound(double gate, double exact, DType out) {
  const double relative = 2.1 * kUnitF32 * std::abs(gate) * 1.4427 * 0.6932 + 0x1p-22 + 3 * kUnitF32;
  const double bound = 1.01 * relative * std::abs(exact) + 0x1p-115;
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
// thread, 5 of the warp and one for each of at most 16 warps, or on the CPU n / 32 + 6. The mean and eps add two
// roundings, the root halves them all and adds one, its inverse one, the two products one each.
double NormBound(int64_t n, double exact, DType out) {
  const double cuda_steps = static_cast<double>(4 * cuda::CeilDivide(n, 4 * cuda::kMostNormThreads)) + 4 + 1 + 5 + 16;
  const double steps = kDevice == Device::kCpu ? static_cast<double>(n / 32 + 6) : cuda_steps;
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

#ifdef ALTIPLANO_IN_SIMULATOR
// In Llama 3.1 8B's shapes: every byte of the operands once, in whole sectors, and no bank conflicts. Beside them,
// whole sectors of ids for each warp, a norm's weight and the rotation's frequencies for each row: all of it from L2.
TEST_F(CudaRowOpsTest, TrafficIsTheLeastPossible) {
  constexpr int64_t kTokens = 2, kHidden = 4096, kFfn = 14336, kDim = 128, kQ = 32 * kDim, kKv = 8 * kDim;
  Matrix narrow(kTokens, kHidden, DType::kBF16), gate_up(kTokens, 2 * kFfn, DType::kBF16);
  Matrix gated(kTokens, kFfn, DType::kBF16), qkv(kTokens, kQ + 2 * kKv, DType::kBF16);
  Matrix pages(8 * 64, kDim, DType::kBF16), frequencies(1, kDim / 2, DType::kF32);
  Matrix wide(kTokens, kHidden, DType::kF32), residual(kTokens, kHidden, DType::kF32);
  Matrix weight(1, kHidden, DType::kBF16);
  for (Matrix* matrix : {&narrow, &gate_up, &gated, &qkv, &frequencies, &wide, &residual, &weight}) {
    matrix->FillNormal(1);
  }
  const OnDevice d_narrow(stream(), narrow), d_gate_up(stream(), gate_up), d_gated(stream(), gated);
  const OnDevice d_qkv(stream(), qkv), d_k(stream(), pages), d_v(stream(), pages);
  const OnDevice d_frequencies(stream(), frequencies), d_wide(stream(), wide), d_residual(stream(), residual);
  const OnDevice d_weight(stream(), weight), d_ids(stream(), std::vector<int32_t>{0, 1}), d_out(stream(), narrow);
  sim::CountTraffic(true);
  Embed(stream(), {.out = d_residual.view(), .table = d_narrow.view(), .ids = d_ids.view()});
  SiluMul(stream(), {.out = d_gated.view(), .gate_up = d_gate_up.view()});
  GatherRows(stream(), {.out = d_out.view(), .x = d_narrow.view(), .rows = d_ids.view()});
  RmsNorm(stream(), {.out = d_out.view(), .x = d_residual.view(), .weight = d_weight.vector(), .eps = 1e-5f});
  AddRmsNorm(stream(), {.out = d_out.view(),
                        .residual = d_residual.view(),
                        .x = d_wide.view(),
                        .weight = d_weight.vector(),
                        .eps = 1e-5f});
  RopeStoreKv(stream(), {.q = d_qkv.view().columns(0, kQ),
                         .k = d_qkv.view().columns(kQ, kKv),
                         .v = d_qkv.view().columns(kQ + kKv, kKv),
                         .k_pages = d_k.pool(1, 8, 64),
                         .v_pages = d_v.pool(1, 8, 64),
                         .positions = d_ids.view(),
                         .slots = d_ids.view(),
                         .inv_freq = d_frequencies.vector()});
  struct Expected {
    const char* kernel;
    uint64_t loaded, stored, beside;  // bytes of a token; beside: of sectors
  };
  const uint64_t warps = kHidden / 4 / cuda::kPacksAtOnce / 32;  // of a row
  for (const Expected& e : {Expected{"Embed", kHidden * 2, kHidden * 4, warps * 32},
                            {"SiluMul", kFfn * 4, kFfn * 2, 0},
                            {"GatherRows", kHidden * 2, kHidden * 2, warps / 2 * 32},
                            {"RmsNorm", kHidden * 4, kHidden * 2, kHidden * 2},
                            {"AddRmsNorm", kHidden * 8, kHidden * 6, kHidden * 2},
                            // Of three blocks, four warps each with a position, one with a slot, and the frequencies.
                            {"RopeStoreKv", (kQ + 2 * kKv) * 2, (kQ + 2 * kKv) * 2, 3 * (5 * 32 + kDim / 2 * 4)}}) {
    const sim::Traffic traffic = sim::TrafficOf(e.kernel);
    EXPECT_EQ(traffic.launches, 1u) << e.kernel;
    EXPECT_EQ(traffic.store_bytes, kTokens * e.stored) << e.kernel;
    EXPECT_EQ(32 * traffic.sectors, kTokens * (e.loaded + e.stored + e.beside)) << e.kernel << "\n"
                                                                                << sim::TrafficByLine();
    EXPECT_EQ(traffic.sectors, traffic.ideal_sectors) << e.kernel << "\n" << sim::TrafficByLine();
    // Two heads of a warp read the same angles, which may be one read or two.
    EXPECT_LE(traffic.wavefronts, traffic.ideal_wavefronts * (e.kernel == std::string("RopeStoreKv") ? 2 : 1))
        << e.kernel << "\n"
        << sim::TrafficByLine();
  }
  sim::CountTraffic(false);
}
#endif

TEST(CudaRowsPlan, CoversEveryRowAndPack) {
  for (int64_t rows : {1, 7, 70000}) {
    for (int64_t packs : {1, 31, 32, 33, 256, 257, 3584}) {
      const cuda::LaunchShape shape = cuda::ElementwisePlan(rows, packs);
      EXPECT_EQ(shape.grid_x, rows);
      EXPECT_GE(int64_t{shape.grid_y} * shape.threads * cuda::kPacksAtOnce, packs);
      EXPECT_LT(int64_t{shape.grid_y - 1} * shape.threads * cuda::kPacksAtOnce, packs);
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
  // Llama 3.1 8B: 32 + 8 + 8 heads of 128, of which a block of 128 threads takes 16.
  EXPECT_EQ(cuda::PlanRope(1, 48, 64, 4).heads_per_block, 16);
}

TEST(CudaRowsPlan, DividesExactly) {
  constexpr int kMost = std::numeric_limits<int>::max();
  for (int64_t divisor :
       {1, 2, 3, 5, 7, 10, 16, 65, 641, 65535, 65536, 65537, 1 << 30, (1 << 30) + 1, kMost - 1, kMost}) {
    const cuda::Divisor by(divisor);
    for (int64_t near :
         {int64_t{0}, divisor, 1000 * divisor, kMost / 2 / divisor * divisor, kMost / divisor * divisor}) {
      for (int64_t x = std::max<int64_t>(near - 1, 0); x <= std::min<int64_t>(near + 1, kMost); ++x) {
        EXPECT_EQ(by.Quotient(static_cast<int>(x)), x / divisor) << x << " by " << divisor;
      }
    }
  }
}

// Loads that a multiprocessor has under way when all its blocks have issued theirs, against what 85 % of a copy at 4.3
// TB/s needs at a latency of a microsecond: half as much again at least, since blocks also wait for ids, add up or end.
TEST(CudaRowsPlan, KeepsTheMemoryBusy) {
  constexpr double kNeeded = 0.85 * 4.3e12 * 1e-6 / 132;  // bytes, loaded or stored
  struct Kernel {
    const char* name;
    uint32_t threads;               // of a multiprocessor
    double pack_loads, pack_bytes;  // of a thread; all that it moves
    int at_once = cuda::kPacksAtOnce;
  };
  constexpr uint32_t kRow = cuda::kRowBlocks * cuda::kMostRowThreads;
  constexpr uint32_t kNorm = cuda::kNormBlocks * cuda::kMostNormThreads;
  for (const Kernel& k : {Kernel{"Embed, bf16 to f32", kRow, 8, 24},
                          {"SiluMul, bf16", kRow, 16, 24},
                          {"GatherRows", kRow, 16, 32},
                          {"RmsNorm, f32 to bf16", kNorm, 16, 24},
                          {"RmsNorm, bf16", kNorm, 8, 16},
                          {"AddRmsNorm, f32 and f32 to bf16", kNorm, 32, 56, 1},
                          {"RopeStoreKv, bf16", cuda::kRopeBlocks * cuda::kRopeThreads, 16, 32}}) {
    EXPECT_LE(k.threads, 1536u) << "of an sm_89";
    const double in_flight = k.threads * k.at_once * k.pack_loads;
    EXPECT_GE(in_flight, 1.5 * kNeeded * k.pack_loads / k.pack_bytes) << k.name;
  }
}

}  // namespace
}  // namespace altiplano
