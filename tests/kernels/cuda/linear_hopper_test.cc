// Linear of 9 to 64 tokens by what only Hopper has. The same tests run where other kernels do it, on older GPUs and on
// the CPU: what they demand holds of those, too.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "kernels/cuda/linear_plan.h"
#include "kernels/cuda/overlap.h"
#include "tests/kernels/cuda/linear_testlib.h"

namespace altiplano {
namespace {

class CudaLinearHopperTest : public LinearTest {
 protected:
  void SetUp() override {
    LinearTest::SetUp();
    if (!IsSkipped()) Prepare();
  }
};

// Tokens below, at and above the columns of a wgmma; N within a tile and beyond; K within a stage, whole stages, not a
// multiple of 16, more than the ring holds.
TEST_F(CudaLinearHopperTest, IsNearTheOracle) {
  for (int64_t tokens : {9, 16, 17, 32, 33, 64}) {
    for (int64_t n : {1, 64, 70}) {
      for (int64_t k : {8, 64, 72, 200, 1000}) {
        ASSERT_TRUE(cuda::UsesHopper(tokens, n, k));
        if ((kUnderTsan || kDevice == Device::kCuda) && k == 1000 && tokens != 33) continue;
        if (kUnderTsan && (k == 200 || tokens % 16 == 1) && k != 1000) continue;
        ExpectNearOracle({tokens, n, k}, DType::kBF16, k % 64 == 8 ? DType::kBF16 : DType::kF32, k == 200, 8);
      }
    }
  }
}

// Rows of out that are not aligned to a pack.
TEST_F(CudaLinearHopperTest, IsNearTheOracleForEveryStride) {
  for (int64_t n : {33, 130}) {
    for (DType out : {DType::kF32, DType::kBF16}) ExpectNearOracle({20, n, 72}, DType::kBF16, out, true, 0);
  }
}

// K in two, three and four splits, of which the last has less. Under TSan four: only consecutive blocks are strangers.
TEST_F(CudaLinearHopperTest, AddsSplitsOfK) {
  for (const auto& [k, splits] : {std::pair<int64_t, int>{1100, 2}, {1544, 3}, {2104, 4}}) {
    ASSERT_EQ(cuda::HopperSplits(70, k), splits);
    if (kUnderTsan && splits < 4) continue;
    for (int64_t tokens : {17, 40}) {
      if (kUnderTsan && tokens > 17) continue;
      ExpectNearOracle({tokens, 70, k}, DType::kBF16, DType::kF32, tokens == 40, 0);
    }
  }
}

// Tiles of 128 rows, the last of them in part; with up to 32 tokens it takes 64 of them.
TEST_F(CudaLinearHopperTest, TallTilesAreNearTheOracle) {
  if (kUnderTsan) GTEST_SKIP() << "low tiles are the same code";
  for (const auto& [tokens, n] : {std::pair<int64_t, int64_t>{40, 6040}, {20, 8120}, {9, 8120}}) {
    ASSERT_EQ(cuda::PlanHopperLinear(tokens, n, 72).block_rows, 128);
    ExpectNearOracle({tokens, n, 72}, DType::kBF16, DType::kBF16, tokens == 9, 0);
  }
}

// More tiles than blocks.
TEST_F(CudaLinearHopperTest, BlocksTakeOneTileAfterTheOther) {
  constexpr int64_t kTokens = 9, kN = 17000;
  ASSERT_GT(cuda::PlanHopperLinear(kTokens, kN, 8).units(), 132);
  ExpectNearOracle({kTokens, kN, 8}, DType::kBF16, DType::kBF16, false, 0);
  // Two tiles, the second of which needs the slot in which the first one's last stage was. Random numbers would take
  // seconds.
  constexpr int64_t kK = (cuda::HopperStages(16, 128) + 1) * cuda::kHopperDepth;
  if (kUnderTsan) return;
  Matrix x(kTokens, kK, DType::kBF16), weight(kN, kK, DType::kBF16), out(kTokens, kN, DType::kBF16);
  out.FillNormal(1);
  for (const Matrix* matrix : {&x, &weight})
    std::memset(matrix->view().data, 0, static_cast<size_t>(matrix->rows() * kK * 2));
  const OnDevice d_x(stream(), x), d_weight(stream(), weight), d_out(stream(), out);
  Linear(stream(), {.out = d_out.view(), .x = d_x.view(), .weight = d_weight.view(), .scratch = scratch()});
  d_out.Fetch(out);
  for (int64_t t = 0; t < kTokens; ++t) EXPECT_EQ(out.RowBytes(t), std::string(2 * kN, 0)) << t;
}

// One block after the other ends as the last of its tile.
TEST_F(CudaLinearHopperTest, BitsDoNotDependOnTheOrderOfSplits) {
  constexpr int64_t kTokens = 20, kN = 130, kK = 2104;
  ASSERT_EQ(cuda::HopperSplits(kN, kK), 4);
  if (kUnderTsan) GTEST_SKIP() << "seen where splits are added";
  Matrix x(kTokens, kK, DType::kBF16), weight(kN, kK, DType::kBF16), first(kTokens, kN, DType::kF32);
  Matrix again(kTokens, kN, DType::kF32);
  x.FillNormal(1);
  weight.FillNormal(2);
  const OnDevice d_x(stream(), x), d_weight(stream(), weight), d_out(stream(), first);
  const LinearArgs args = {.out = d_out.view(), .x = d_x.view(), .weight = d_weight.view(), .scratch = scratch()};
  Linear(stream(), args);
  d_out.Fetch(first);
  for (int i = 0; i < 4; ++i) {
    Linear(stream(), args);
    d_out.Fetch(again);
    for (int64_t t = 0; t < kTokens; ++t) ASSERT_EQ(first.RowBytes(t), again.RowBytes(t)) << t;
  }
}

// Nor on the rows beside it, with as many columns; what is not finite stays where it is.
TEST_F(CudaLinearHopperTest, ARowDoesNotDependOnTheOthers) {
  constexpr int64_t kN = 70;
  for (int64_t k : {264, 1100}) {
    if (kUnderTsan && k > 264) continue;
    for (const auto& [many, few] : {std::pair<int64_t, int64_t>{64, 33}, {32, 17}}) {
      Matrix x(many, k, DType::kBF16), weight(kN, k, DType::kBF16), all(many, kN, DType::kF32);
      Matrix some(few, kN, DType::kF32);
      x.FillNormal(1);
      weight.FillNormal(2);
      x.set(5, 7, NAN);
      const OnDevice d_x(stream(), x), d_weight(stream(), weight), d_all(stream(), all), d_some(stream(), some);
      Linear(stream(), {.out = d_all.view(), .x = d_x.view(), .weight = d_weight.view(), .scratch = scratch()});
      Linear(stream(),
             {.out = d_some.view(), .x = d_x.view().first(few), .weight = d_weight.view(), .scratch = scratch()});
      d_all.Fetch(all);
      d_some.Fetch(some);
      for (int64_t t = 0; t < many; ++t) {
        for (int64_t j = 0; j < kN; ++j) ASSERT_EQ(std::isnan(all.at(t, j)), t == 5) << t << ", " << j;
        if (t != 5 && t < few) {
          EXPECT_EQ(all.RowBytes(t), some.RowBytes(t)) << t << " of " << many << ", K " << k;
        }
      }
    }
  }
}

// ffn within the half of a tile, beyond it, and not a multiple of a pack; 3100 takes tall tiles.
TEST_F(CudaLinearHopperTest, SiluMulInTheSameKernelHasTheBitsOfTwo) {
  for (const auto& [tokens, ffn, k] : {std::tuple<int64_t, int64_t, int64_t>{9, 20, 72},
                                       {17, 72, 264},
                                       {40, 33, 264},
                                       {40, 40, 1100},
                                       {64, 32, 64},
                                       {40, 3100, 40}}) {
    ASSERT_TRUE(cuda::UsesHopper(tokens, 2 * ffn, k));
    if (kUnderTsan && (ffn == 3100 || k == 264)) continue;
    ExpectSiluMulHasTheBitsOfTwo(tokens, ffn, k, DType::kBF16);
  }
}

#ifdef ALTIPLANO_IN_SIMULATOR
// Which products are this kernel's shows in how often x is loaded.
TEST_F(CudaLinearHopperTest, IsLeftAloneWhereBitsOrScratchForbidIt) {
  constexpr int64_t kTokens = 20, kN = 40;
  const auto by_hopper = [&](int64_t k, bool batch_invariant, void* scratch) {
    Matrix x(kTokens, k, DType::kBF16), weight(kN, k, DType::kBF16), out(kTokens, kN, DType::kF32);
    for (const Matrix* matrix : {&x, &weight})
      std::memset(matrix->view().data, 0, static_cast<size_t>(matrix->rows() * k * 2));
    const OnDevice d_x(stream(), x), d_weight(stream(), weight), d_out(stream(), out);
    sim::CountTraffic(true);
    Linear(stream(), {.out = d_out.view(),
                      .x = d_x.view(),
                      .weight = d_weight.view(),
                      .batch_invariant = batch_invariant,
                      .scratch = scratch});
    const bool whole = sim::TrafficOf("Linear").load_bytes < static_cast<uint64_t>(2 * k * (kN + 2 * kTokens));
    sim::CountTraffic(false);
    return whole;  // x is loaded once for all 40 rows, and not for 16 each
  };
  EXPECT_TRUE(by_hopper(512, false, nullptr));
  EXPECT_FALSE(by_hopper(512, true, scratch()));
  EXPECT_TRUE(by_hopper(1024, false, scratch()));
  EXPECT_FALSE(by_hopper(1024, false, nullptr));
  const SimulatedArchitecture older(80);
  EXPECT_FALSE(by_hopper(512, false, scratch()));
}

// The weights once, in whole sectors, and x once for each tile. Splits leave their sums and read them once.
TEST_F(CudaLinearHopperTest, TrafficIsThatOfTheWeightsAndXForEachTile) {
  for (const auto& [tokens, n, k] :
       {std::tuple<int64_t, int64_t, int64_t>{32, 128, 960}, {64, 128, 1024}, {16, 64, 512}}) {
    if (kUnderTsan) continue;
    const cuda::HopperLinear plan = cuda::PlanHopperLinear(tokens, n, k);
    Matrix x(tokens, k, DType::kBF16), weight(n, k, DType::kBF16), out(tokens, n, DType::kBF16);
    x.FillNormal(1);
    weight.FillNormal(2);
    const OnDevice d_x(stream(), x), d_weight(stream(), weight), d_out(stream(), out);
    sim::CountTraffic(true);
    Linear(stream(), {.out = d_out.view(), .x = d_x.view(), .weight = d_weight.view(), .scratch = scratch()});
    const sim::Traffic traffic = sim::TrafficOf("Linear");
    const int64_t sums = plan.splits > 1 ? plan.units() * cuda::HopperUnitBytes(plan) : 0;
    EXPECT_EQ(traffic.load_bytes, static_cast<uint64_t>(2 * n * k + 2 * tokens * k * n / plan.block_rows + sums));
    EXPECT_EQ(traffic.store_bytes,
              static_cast<uint64_t>(2 * tokens * n + sums + (plan.splits > 1 ? 4 * (plan.units() + plan.tiles) : 0)));
    EXPECT_EQ(traffic.sectors, traffic.ideal_sectors) << sim::TrafficByLine();
    EXPECT_EQ(traffic.wavefronts, traffic.ideal_wavefronts) << sim::TrafficByLine();
    sim::CountTraffic(false);
  }
}

// Before the wait for the kernels before a ring of weights is on its way; of short rows that is all there is.
TEST_F(CudaLinearHopperTest, WeightsAreOnTheirWayBeforeTheWait) {
  for (const auto& [tokens, k] : {std::pair<int64_t, int64_t>{20, 960}, {64, 960}}) {
    constexpr int64_t kN = 64;
    Matrix x(tokens, k, DType::kBF16), weight(kN, k, DType::kBF16), out(tokens, kN, DType::kBF16);
    x.FillNormal(1);
    weight.FillNormal(2);
    const OnDevice d_x(stream(), x), d_weight(stream(), weight), d_out(stream(), out);
    const int64_t ring = cuda::HopperStages(cuda::HopperColumns(tokens), 64) * cuda::kHopperDepth;
    for (bool overlap : {true, false}) {
      cuda::OverlapKernels(overlap);
      sim::CountTraffic(true);
      Linear(stream(), {.out = d_out.view(), .x = d_x.view(), .weight = d_weight.view(), .scratch = scratch()});
      const sim::Traffic traffic = sim::TrafficOf("Linear");
      sim::CountTraffic(false);
      EXPECT_EQ(traffic.early_bytes, static_cast<uint64_t>(2 * kN * std::min(k, ring)));
    }
    cuda::OverlapKernels(true);
  }
}
#endif

// Of every matrix of Llama 3, whole and as one of eight ranks.
TEST(CudaLinearHopperPlan, FitsEveryShape) {
  struct {
    int64_t hidden, q_heads, kv_heads, dim, ffn;
  } models[] = {{2048, 32, 8, 64, 8192},
                {3072, 24, 8, 128, 8192},
                {4096, 32, 8, 128, 14336},
                {8192, 64, 8, 128, 28672},
                {16384, 128, 8, 128, 53248}};
  for (const auto& m : models) {
    for (int64_t ranks : {1, 2, 4, 8}) {
      const std::pair<int64_t, int64_t> shapes[] = {{(m.q_heads + 2 * m.kv_heads) / ranks * m.dim, m.hidden},
                                                    {m.hidden, m.q_heads * m.dim / ranks},
                                                    {2 * m.ffn / ranks, m.hidden},
                                                    {m.hidden, m.ffn / ranks},
                                                    {128256 / ranks, m.hidden}};
      for (const auto& [rows, k] : shapes) {
        for (int64_t tokens : {9, 17, 33, 64}) {
          const cuda::HopperLinear plan = cuda::PlanHopperLinear(tokens, rows, k);
          const cuda::LaunchShape shape = cuda::HopperLinearShape(plan, 132);
          EXPECT_LE(shape.shared_bytes, cuda::kHopper.shared_bytes);
          // 3 MB are on their way, or all there are.
          const int64_t ring = int64_t{shape.grid_x} * cuda::HopperStages(plan.columns, plan.block_rows) *
                               plan.block_rows * cuda::kHopperDepth * 2;
          EXPECT_TRUE(ring >= 3'000'000 || ring >= rows * k * 2) << rows << " x " << k << ": " << ring;
          EXPECT_GE(plan.units(), std::min<int64_t>(48, (rows + 63) / 64 * (k / 512))) << rows << " x " << k;
        }
      }
    }
  }
}

TEST(CudaLinearHopperPlan, SplitsAreNeverEmptyAndFitTheScratch) {
  for (int64_t rows = 1; rows < 20000; rows += rows < 200 ? 1 : 61) {
    for (int64_t k : {8, 64, 512, 1024, 1032, 2104, 4096, 8200, 14336, 28672, 53248}) {
      const int splits = cuda::HopperSplits(rows, k);
      ASSERT_GE(splits, 1);
      for (int64_t tokens : {9, 20, 64}) {
        const cuda::HopperLinear plan = cuda::PlanHopperLinear(tokens, rows, k);
        ASSERT_EQ(plan.splits, splits);  // of the matrix alone
        ASSERT_LT((splits - 1) * plan.depth, plan.stages) << rows << " x " << k;
        ASSERT_GE(splits * plan.depth, plan.stages) << rows << " x " << k;
        if (splits == 1) continue;
        ASSERT_LE(plan.units(), cuda::kMostHopperUnits) << rows << " x " << k;
        ASSERT_LE(plan.units() * cuda::HopperUnitBytes(plan), cuda::kHopperSumsBytes) << rows << " x " << k;
      }
    }
  }
  // qkv of 8B, 70B and 405B on one of eight ranks; 8B's down, whole; what has blocks enough.
  EXPECT_EQ(cuda::HopperSplits(768, 4096), 6);
  EXPECT_EQ(cuda::HopperSplits(1280, 8192), 4);
  EXPECT_EQ(cuda::HopperSplits(2304, 16384), 4);
  EXPECT_EQ(cuda::HopperSplits(4096, 14336), 2);
  EXPECT_EQ(cuda::HopperSplits(4096, 512), 1);
  EXPECT_EQ(cuda::HopperSplits(28672, 4096), 1);
}

}  // namespace
}  // namespace altiplano
