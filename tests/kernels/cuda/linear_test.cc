// Linear in CUDA against float64.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "kernels/cuda/architectures.h"
#include "kernels/cuda/linear_plan.h"
#include "kernels/cuda/overlap.h"
#include "tests/kernels/cuda/linear_testlib.h"

namespace altiplano {
namespace {

class CudaLinearTest : public LinearTest {
 protected:
  // The kernels whose bits do not depend on the number of tokens.
  CudaLinearTest() { batch_invariant_ = true; }
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

// The least columns that go two groups of 16 to a block, in the last of which there is nothing for the second; two for
// it.
constexpr int64_t kPairedColumns[] = {2113, 2130};

TEST_F(CudaLinearTest, TwoGroupsOfRowsToABlockAreNearTheOracle) {
  for (int64_t n : kPairedColumns) {
    for (int64_t tokens : {5, 8, 9, 16}) {
      ASSERT_EQ(cuda::LinearRowGroups(tokens, n), 2);
      for (int64_t k : {8, 200}) {
        if (kUnderTsan && (k > 8 || tokens % 8 != 0)) continue;
        ExpectNearOracle({tokens, n, k}, DType::kBF16, k == 8 ? DType::kBF16 : DType::kF32, tokens % 2 == 0,
                         tokens % 3 * 8);
      }
    }
  }
}

// On a GPU by cuBLASLt, in the simulator by our tiles; cublaslt_test has what is asked of the library.
TEST_F(CudaLinearTest, ManyTokensByWhicheverIsThereAreNearTheOracle) {
  PrepareLinear(stream());
  batch_invariant_ = false;
  for (DType out : {DType::kF32, DType::kBF16}) {
    for (bool accumulate : {false, true}) ExpectNearOracle({130, 72, 264}, DType::kBF16, out, accumulate, 8);
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

// Few tokens, 64 and tiles of many are three kernels.
TEST_F(CudaLinearTest, ARowDoesNotDependOnTheOthers) {
  constexpr int64_t kTokens = 130, kN = 24;
  struct {
    DType act;
    int64_t k;
    int parts;
  } cases[] = {{DType::kF32, 264, 4}, {DType::kBF16, 264, 4}, {DType::kBF16, 1064, 8}, {DType::kBF16, 2104, 16}};
  for (const auto& [act, k, parts] : cases) {
    if (kUnderTsan && k > 264) continue;
    EXPECT_EQ(cuda::LinearParts(kN, k), parts);
    Matrix x(kTokens, k, act), weight(kN, k, act), together(kTokens, kN, DType::kF32), alone(1, kN, DType::kF32);
    x.FillNormal(1);
    weight.FillNormal(2);
    x.set(40, 7, NAN);
    const OnDevice d_x(stream(), x), d_weight(stream(), weight), d_together(stream(), together);
    const OnDevice d_alone(stream(), alone);
    for (int64_t tokens : {130, 65, 41, 16, 8, 3}) {
      Linear(stream(), {.out = d_together.view().first(tokens),
                        .x = d_x.view().first(tokens),
                        .weight = d_weight.view(),
                        .batch_invariant = true});
      d_together.Fetch(together);
      for (int64_t t = 0; t < tokens; t += 5) {
        TensorView row = d_x.view().first(1);
        row.data = static_cast<char*>(row.data) + t * k * static_cast<int64_t>(SizeOf(act));
        Linear(stream(), {.out = d_alone.view(), .x = row, .weight = d_weight.view(), .batch_invariant = true});
        d_alone.Fetch(alone);
        for (int64_t j = 0; j < kN; ++j) ASSERT_EQ(std::isnan(together.at(t, j)), t == 40) << t;
        if (t != 40) {
          EXPECT_EQ(together.RowBytes(t), alone.RowBytes(0)) << t << " of " << tokens << ", K " << k;
        }
      }
    }
  }
}

// How many groups of rows a block has depends on the tokens, and is not to show.
TEST_F(CudaLinearTest, TwoGroupsOfRowsToABlockHaveTheBitsOfOne) {
  constexpr int64_t kTokens = 16, kN = 2120;
  for (const auto& [k, parts] : {std::pair<int64_t, int>{264, 4}, {1064, 8}}) {
    if (kUnderTsan && k > 264) continue;
    ASSERT_EQ(cuda::LinearParts(kN, k), parts);
    Matrix x(kTokens, k, DType::kBF16), weight(kN, k, DType::kBF16), together(kTokens, kN, DType::kF32);
    Matrix alone(4, kN, DType::kF32);
    x.FillNormal(1);
    weight.FillNormal(2);
    const OnDevice d_x(stream(), x), d_weight(stream(), weight), d_together(stream(), together);
    const OnDevice d_alone(stream(), alone);
    const auto product = [&](const OnDevice& out, const TensorView& rows) {
      Linear(stream(),
             {.out = out.view().first(rows.dim(0)), .x = rows, .weight = d_weight.view(), .batch_invariant = true});
    };
    std::vector<std::string> expected;
    for (int64_t first = 0; first < kTokens; first += 4) {
      TensorView four = d_x.view().first(4);
      four.data = static_cast<char*>(four.data) + first * k * 2;
      ASSERT_EQ(cuda::LinearRowGroups(4, kN), 1);
      product(d_alone, four);
      d_alone.Fetch(alone);
      for (int64_t t = 0; t < 4; ++t) expected.push_back(alone.RowBytes(t));
    }
    for (int64_t tokens : {16, 9, 8, 5}) {
      ASSERT_EQ(cuda::LinearRowGroups(tokens, kN), 2);
      product(d_together, d_x.view().first(tokens));
      d_together.Fetch(together);
      for (int64_t t = 0; t < tokens; ++t) {
        EXPECT_EQ(together.RowBytes(t), expected[static_cast<size_t>(t)]) << t << " of " << tokens << ", K " << k;
      }
    }
  }
}

TEST_F(CudaLinearTest, LargeTilesHaveTheBitsOfFewTokens) {
  constexpr int64_t kTokens = 1500, kN = 1380, kK = 40;  // neither of them whole tiles
  ASSERT_TRUE(cuda::IsLargeTile(kTokens, kN, cuda::kHopper.shared_bytes));
  if (kUnderTsan) GTEST_SKIP() << "the small tile is the same code";
  Matrix x(kTokens, kK, DType::kBF16), weight(kN, kK, DType::kBF16), many(kTokens, kN, DType::kBF16, 8);
  Matrix few(3, kN, DType::kBF16);
  x.FillNormal(1);
  weight.FillNormal(2);
  const OnDevice d_x(stream(), x), d_weight(stream(), weight), d_many(stream(), many), d_few(stream(), few);
  Linear(stream(), {.out = d_many.view(), .x = d_x.view(), .weight = d_weight.view(), .batch_invariant = true});
  d_many.Fetch(many);
  EXPECT_TRUE(many.GapsUntouched());
  for (int64_t first : {0, 126, 700, 1497}) {
    TensorView rows = d_x.view().first(3);
    rows.data = static_cast<char*>(rows.data) + first * kK * 2;
    Linear(stream(), {.out = d_few.view(), .x = rows, .weight = d_weight.view(), .batch_invariant = true});
    d_few.Fetch(few);
    for (int64_t t = 0; t < 3; ++t) EXPECT_EQ(many.RowBytes(first + t), few.RowBytes(t)) << first + t;
  }
}

#ifdef ALTIPLANO_IN_SIMULATOR
TEST_F(CudaLinearTest, SmallerSharedMemoryHasItsTilesAndTheSameBits) {
  constexpr int64_t kTokens = 129, kN = 8500, kK = 8;
  ASSERT_TRUE(cuda::IsLargeTile(kTokens, kN, cuda::kHopper.shared_bytes));
  if (kUnderTsan) GTEST_SKIP() << "both tiles are raced by other tests";
  Matrix x(kTokens, kK, DType::kBF16), weight(kN, kK, DType::kBF16), large(kTokens, kN, DType::kBF16);
  Matrix small(kTokens, kN, DType::kBF16);
  x.FillNormal(1);
  weight.FillNormal(2);
  const OnDevice d_x(stream(), x), d_weight(stream(), weight), d_large(stream(), large), d_small(stream(), small);
  Linear(stream(), {.out = d_large.view(), .x = d_x.view(), .weight = d_weight.view(), .batch_invariant = true});
  {
    const SimulatedArchitecture ada(89);
    Linear(stream(), {.out = d_small.view(), .x = d_x.view(), .weight = d_weight.view(), .batch_invariant = true});
  }
  d_large.Fetch(large);
  d_small.Fetch(small);
  for (int64_t t = 0; t < kTokens; ++t) ASSERT_EQ(large.RowBytes(t), small.RowBytes(t)) << t;
}
#endif

// The residual, in f32.
TEST_F(CudaLinearTest, AddingWhereTheProductEndsHasTheBitsOfAddingLater) {
  constexpr int64_t kN = 72, kK = 264;
  for (DType act : {DType::kBF16, DType::kF32}) {
    for (int64_t tokens : {1, 16, 70}) {
      if (kUnderTsan && tokens > 1) continue;
      Matrix x(tokens, kK, act), weight(kN, kK, act), before(tokens, kN, DType::kF32), out(tokens, kN, DType::kF32);
      Matrix added(tokens, kN, DType::kF32);
      x.FillNormal(1);
      weight.FillNormal(2);
      before.FillNormal(3);
      const OnDevice d_x(stream(), x), d_weight(stream(), weight), d_out(stream(), out), d_added(stream(), before);
      LinearArgs args = {.out = d_out.view(), .x = d_x.view(), .weight = d_weight.view(), .batch_invariant = true};
      Linear(stream(), args);
      args.out = d_added.view();
      args.accumulate = true;
      Linear(stream(), args);
      d_out.Fetch(out);
      d_added.Fetch(added);
      for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t j = 0; j < kN; ++j) {
          const float later = static_cast<float>(before.at(t, j)) + static_cast<float>(out.at(t, j));
          ASSERT_EQ(static_cast<float>(added.at(t, j)), later) << t << " of " << tokens << ", column " << j;
        }
      }
    }
  }
}

// 1060: two groups of rows to a block for 9 tokens, in whose last block there is nothing for the second.
TEST_F(CudaLinearTest, SiluMulInTheSameKernelHasTheBitsOfTwo) {
  for (DType act : {DType::kBF16, DType::kF32}) {
    for (int64_t tokens : {1, 7, 9, 40, 70}) {
      for (int64_t ffn : {1, 8, 20, 72, 1060}) {
        if (ffn == 1060 && cuda::LinearRowGroups(tokens, 2 * ffn) == 1) continue;
        for (int64_t k : {40, 264}) {
          if (ffn == 1060 && (k > 40 || act == DType::kF32)) continue;
          if (kUnderTsan && (k > 40 || (ffn > 20 && tokens != 9))) continue;
          ExpectSiluMulHasTheBitsOfTwo(tokens, ffn, k, act);
        }
      }
    }
  }
}

#ifdef ALTIPLANO_IN_SIMULATOR
// The weights once, in whole sectors, and x once for each block of 16 or 32 columns.
TEST_F(CudaLinearTest, TrafficOfADecodeIsThatOfTheWeights) {
  struct {
    int64_t tokens, n, k, block;
  } cases[] = {{1, 64, 2048, 16}, {16, 64, 2048, 16}, {4, 2144, 32, 16},
               {5, 2144, 32, 32}, {8, 2144, 32, 32},  {16, 2144, 32, 32}};
  for (const auto& [tokens, n, k, block] : cases) {
    Matrix x(tokens, k, DType::kBF16), weight(n, k, DType::kBF16), out(tokens, n, DType::kBF16);
    x.FillNormal(1);
    weight.FillNormal(2);
    const OnDevice d_x(stream(), x), d_weight(stream(), weight), d_out(stream(), out);
    sim::CountTraffic(true);
    Linear(stream(), {.out = d_out.view(), .x = d_x.view(), .weight = d_weight.view(), .batch_invariant = true});
    const sim::Traffic traffic = sim::TrafficOf("Linear");
    EXPECT_EQ(traffic.load_bytes, static_cast<uint64_t>(2 * n * k + 2 * tokens * k * n / block)) << tokens;
    EXPECT_EQ(traffic.store_bytes, static_cast<uint64_t>(2 * tokens * n));
    EXPECT_EQ(traffic.sectors, traffic.ideal_sectors) << sim::TrafficByLine();
    // The warps' sums are stored without conflicts; two tokens are read back at a time and meet in some banks, unless
    // one has 32 columns.
    EXPECT_LE(2 * traffic.wavefronts, (block == 32 ? 2 : 3) * traffic.ideal_wavefronts) << sim::TrafficByLine();
    sim::CountTraffic(false);
  }
}

// 16 tokens have no registers for two groups of rows before sm_90.
TEST_F(CudaLinearTest, OlderArchitecturesPairRowsForEightTokensAlone) {
  constexpr int64_t kN = 2144, kK = 32;
  for (int capability : {80, 89}) {
    const SimulatedArchitecture older(capability);
    for (const auto& [tokens, block] : {std::pair<int64_t, int64_t>{8, 32}, {9, 16}, {16, 16}}) {
      Matrix x(tokens, kK, DType::kBF16), weight(kN, kK, DType::kBF16), out(tokens, kN, DType::kBF16);
      x.FillNormal(1);
      weight.FillNormal(2);
      const OnDevice d_x(stream(), x), d_weight(stream(), weight), d_out(stream(), out);
      sim::CountTraffic(true);
      Linear(stream(), {.out = d_out.view(), .x = d_x.view(), .weight = d_weight.view(), .batch_invariant = true});
      EXPECT_EQ(sim::TrafficOf("Linear").load_bytes, static_cast<uint64_t>(2 * kN * kK + 2 * tokens * kK * kN / block))
          << tokens << " tokens, sm_" << capability;
      sim::CountTraffic(false);
    }
  }
}

// docs/kernels.md argues from these: what the memory sees of a decode's product, in sectors, over its operands.
TEST_F(CudaLinearTest, CountersAreThoseThatTheDocsArgueFrom) {
  if (kUnderTsan) GTEST_SKIP() << "millions of weights";
  struct Case {
    int64_t tokens, n, k;
    double moved, wavefronts;  // at most
  };
  // qkv of 8B on one of eight ranks and o, or a part of it; a part of 405B's qkv, with its K, and with its N.
  for (const Case& c : {Case{1, 768, 4096, 1.07, 1},
                        {16, 768, 4096, 2.0, 1.5},
                        {1, 1024, 512, 1.07, 1},
                        {8, 4096, 512, 1.25, 1},
                        {16, 4096, 512, 1.5, 1},
                        {1, 128, 16384, 1.07, 1},
                        {8, 2304, 1024, 1.25, 1},
                        {16, 2304, 1024, 1.5, 1}}) {
    Matrix x(c.tokens, c.k, DType::kBF16), weight(c.n, c.k, DType::kBF16), out(c.tokens, c.n, DType::kBF16);
    for (const Matrix* matrix : {&x, &weight})
      std::memset(matrix->view().data, 0, static_cast<size_t>(matrix->rows() * c.k * 2));
    const OnDevice d_x(stream(), x), d_weight(stream(), weight), d_out(stream(), out);
    sim::CountTraffic(true);
    Linear(stream(), {.out = d_out.view(), .x = d_x.view(), .weight = d_weight.view(), .batch_invariant = true});
    const sim::Traffic traffic = sim::TrafficOf("Linear");
    const std::string lines = sim::TrafficByLine();
    sim::CountTraffic(false);
    const double needed = 2.0 * static_cast<double>(c.n * c.k + c.tokens * (c.k + c.n));
    const double moved = 32 * static_cast<double>(traffic.sectors) / needed;
    const double wavefronts = static_cast<double>(traffic.wavefronts) / static_cast<double>(traffic.ideal_wavefronts);
    EXPECT_EQ(traffic.sectors, traffic.ideal_sectors) << c.n << " x " << c.k << "\n" << lines;
    EXPECT_GE(moved, 1);
    EXPECT_LE(moved, c.moved) << c.n << " x " << c.k << "\n" << lines;
    EXPECT_LE(wavefronts, c.wavefronts) << c.n << " x " << c.k << "\n" << lines;
  }
}

// Before the wait for the kernels before warps load their first weights, and the block asks L2 for those behind them:
// of short rows that is all there is. Without overlap nothing is early.
TEST_F(CudaLinearTest, WeightsAreOnTheirWayBeforeTheWait) {
  struct {
    int64_t tokens, n, k;
    bool gated;
  } cases[] = {{1, 40, 1024, false},  {16, 40, 2048, false},  {3, 24, 520, true},
               {64, 40, 1024, false}, {16, 2120, 520, false}, {5, 1060, 520, true}};
  for (const auto& [tokens, n, k, gated] : cases) {
    const int64_t rows = gated ? 2 * n : n;
    Matrix x(tokens, k, DType::kBF16), weight(rows, k, DType::kBF16), out(tokens, n, DType::kBF16);
    x.FillNormal(1);
    weight.FillNormal(2);
    const OnDevice d_x(stream(), x), d_weight(stream(), weight), d_out(stream(), out);
    const OnDevice d_gate_up(stream(), Matrix(tokens, rows, DType::kBF16));
    const auto count = [&] {
      sim::CountTraffic(true);
      if (gated) {
        LinearSiluMul(stream(), {.out = d_out.view(),
                                 .x = d_x.view(),
                                 .weight = d_weight.view(),
                                 .gate_up = d_gate_up.view(),
                                 .batch_invariant = true});
      } else {
        Linear(stream(), {.out = d_out.view(), .x = d_x.view(), .weight = d_weight.view(), .batch_invariant = true});
      }
      const sim::Traffic traffic = sim::TrafficOf("Linear");
      sim::CountTraffic(false);
      return traffic;
    };
    const auto loaded =
        static_cast<uint64_t>(2 * rows * std::min(k, cuda::LinearLoadedAhead(tokens, cuda::LinearParts(rows, k))));
    const sim::Traffic ahead = count();
    EXPECT_EQ(ahead.early_bytes, loaded) << tokens << " tokens, K " << k;
    EXPECT_EQ(ahead.early_bytes + ahead.prefetched_bytes, static_cast<uint64_t>(2 * rows * k))
        << tokens << " tokens, K " << k;
    cuda::OverlapKernels(false);
    const sim::Traffic behind = count();
    cuda::OverlapKernels(true);
    EXPECT_EQ(behind.prefetched_bytes, 0u);
    EXPECT_EQ(behind.load_bytes, ahead.load_bytes);
  }
}

// Each tile reads its rows of both operands once, in whole sectors, and shared memory without conflicts.
TEST_F(CudaLinearTest, TrafficOfTilesIsTheirOperandsWithoutConflicts) {
  constexpr int64_t kTokens = 128, kN = 128, kK = 512;
  Matrix x(kTokens, kK, DType::kBF16), weight(kN, kK, DType::kBF16), out(kTokens, kN, DType::kBF16);
  x.FillNormal(1);
  weight.FillNormal(2);
  const OnDevice d_x(stream(), x), d_weight(stream(), weight), d_out(stream(), out);
  sim::CountTraffic(true);
  Linear(stream(), {.out = d_out.view(), .x = d_x.view(), .weight = d_weight.view(), .batch_invariant = true});
  const sim::Traffic traffic = sim::TrafficOf("Linear");
  EXPECT_EQ(traffic.load_bytes, static_cast<uint64_t>(2 * 2 * (kTokens + kN) * kK));  // two tiles either way
  EXPECT_EQ(traffic.store_bytes, static_cast<uint64_t>(2 * kTokens * kN));
  EXPECT_EQ(traffic.sectors, traffic.ideal_sectors) << sim::TrafficByLine();
  EXPECT_EQ(traffic.wavefronts, traffic.ideal_wavefronts) << sim::TrafficByLine();
  sim::CountTraffic(false);
}

// The product and SiLU in one kernel: gate and up are neither stored nor read.
TEST_F(CudaLinearTest, TrafficOfSiluMulInTheSameKernelIsThatOfTheProduct) {
  constexpr int64_t kFfn = 32, kK = 1024;
  Matrix x(1, kK, DType::kBF16), weight(2 * kFfn, kK, DType::kBF16), gate_up(1, 2 * kFfn, DType::kBF16);
  Matrix out(1, kFfn, DType::kBF16);
  x.FillNormal(1);
  weight.FillNormal(2);
  const OnDevice d_x(stream(), x), d_weight(stream(), weight), d_gate_up(stream(), gate_up), d_out(stream(), out);
  sim::CountTraffic(true);
  LinearSiluMul(stream(),
                {.out = d_out.view(), .x = d_x.view(), .weight = d_weight.view(), .gate_up = d_gate_up.view()});
  const sim::Traffic traffic = sim::TrafficOf("Linear");
  EXPECT_EQ(traffic.launches, 1u);
  EXPECT_EQ(sim::TrafficOf("SiluMul").launches, 0u);
  EXPECT_EQ(traffic.load_bytes, static_cast<uint64_t>(2 * 2 * kFfn * kK + 2 * kK * 2 * kFfn / 16));
  EXPECT_EQ(traffic.store_bytes, static_cast<uint64_t>(2 * kFfn));
  EXPECT_EQ(traffic.sectors, traffic.ideal_sectors) << sim::TrafficByLine();
  sim::CountTraffic(false);
}
#endif

TEST(CudaLinearPlan, CoversTokensAndColumns) {
  EXPECT_EQ(cuda::MmaLinearPlan(1, 6144, 4),
            (cuda::LaunchShape{.grid_x = 384, .grid_y = 1, .threads = 128, .shared_bytes = 4 * 8 * 20 * 4}));
  EXPECT_EQ(cuda::MmaLinearPlan(16, 6145, 8).grid_x, 193u);
  EXPECT_EQ(cuda::MmaLinearPlan(16, 6145, 8).grid_y, 1u);
  EXPECT_EQ(cuda::MmaLinearPlan(16, 6145, 8).threads, 256u);
  EXPECT_EQ(cuda::MmaLinearPlan(129, 16, 4).grid_y, 3u);
  EXPECT_EQ(cuda::MmaLinearPlan(4, 6145, 4).grid_x, 385u);
  EXPECT_EQ(cuda::MmaLinearPlan(16, 6144, 4),
            (cuda::LaunchShape{.grid_x = 192, .grid_y = 1, .threads = 128, .shared_bytes = 4 * 16 * 36 * 4}));
  EXPECT_EQ(cuda::PlainLinearPlan(9, 5), (cuda::LaunchShape{.grid_x = 2, .grid_y = 2, .threads = 128}));
  EXPECT_EQ(cuda::TiledLinearPlan(cuda::kLargeTile, 2049, 28672),
            (cuda::LaunchShape{.grid_x = 17, .grid_y = 224, .threads = 256, .shared_bytes = 128 * 1024}));
  EXPECT_EQ(cuda::TiledLinearPlan(cuda::kSmallTile, 65, 70),
            (cuda::LaunchShape{.grid_x = 2, .grid_y = 2, .threads = 64, .shared_bytes = 64 * 1024}));
}

// Two groups of rows to a block where x is much and no multiprocessor idles for it.
TEST(CudaLinearPlan, PairsGroupsOfRowsWhereAllMultiprocessorsStayBusy) {
  const auto rows_of_busiest = [](int64_t blocks, int64_t each) { return (blocks + 131) / 132 * each; };
  for (int64_t rows = 1; rows < 20000; rows += 7) {
    const int64_t groups = (rows + 15) / 16;
    for (int64_t tokens : {1, 4, 17, 64}) EXPECT_EQ(cuda::LinearRowGroups(tokens, rows), 1) << tokens << ", " << rows;
    for (int64_t tokens : {5, 8, 9, 16}) {
      ASSERT_EQ(cuda::LinearRowGroups(tokens, rows), groups > 132 ? 2 : 1) << tokens << ", " << rows;
      if (groups <= 132) continue;
      const int64_t blocks = cuda::MmaLinearPlan(tokens, rows, 4).grid_x, busiest = rows_of_busiest(blocks, 32);
      EXPECT_LE(66 * busiest, 32 * blocks) << rows;
      if (groups <= 2 * 132) {
        EXPECT_EQ(busiest, rows_of_busiest(groups, 16)) << rows;
      }
    }
  }
}

// What is asked of L2 lies behind what warps load, within the row, and is no more than may stay there.
TEST(CudaLinearPlan, PrefetchesWhatL2Keeps) {
  // 405B on eight ranks, qkv: 144 blocks of 8 warps, each row 32 KiB; 64 tokens load nothing early.
  EXPECT_EQ(cuda::PlanLinearPrefetch(1, 2304, 16384, 8),
            (cuda::LinearPrefetch{.begin = 2048, .bytes = 7168, .blocks = 144}));
  EXPECT_EQ(cuda::PlanLinearPrefetch(64, 2304, 16384, 8),
            (cuda::LinearPrefetch{.begin = 0, .bytes = 7168, .blocks = 144}));
  // Its gate and up.
  EXPECT_EQ(cuda::PlanLinearPrefetch(16, 13312, 16384, 4),
            (cuda::LinearPrefetch{.begin = 1024, .bytes = 1152, .blocks = 416}));
  // 405B's head and 8B's whole: of two groups to a block half as many warps find room, with as much for each row.
  EXPECT_EQ(cuda::PlanLinearPrefetch(16, 16032, 16384, 4),
            (cuda::LinearPrefetch{.begin = 1024, .bytes = 1024, .blocks = 501}));
  EXPECT_EQ(cuda::PlanLinearPrefetch(16, 128256, 4096, 4),
            (cuda::LinearPrefetch{.begin = 1024, .bytes = 896, .blocks = 528}));
  EXPECT_EQ(cuda::LinearEarlyBytes(16, 128256, 4096), 528 * 32 * (1024 + 896));
  // Rows that are loaded whole, and the rest of a row.
  EXPECT_EQ(cuda::PlanLinearPrefetch(1, 4096, 512, 4).bytes, 0);
  EXPECT_EQ(cuda::PlanLinearPrefetch(1, 4096, 200, 4), (cuda::LinearPrefetch{.begin = 400, .bytes = 0, .blocks = 256}));
  EXPECT_EQ(cuda::PlanLinearPrefetch(1, 4096, 520, 4),
            (cuda::LinearPrefetch{.begin = 1024, .bytes = 16, .blocks = 256}));
  // Blocks that find no room ask for nothing.
  for (const auto& [rows, k] : {std::pair<int64_t, int64_t>{128256, 4096}, {57344, 8192}, {6144, 4096}}) {
    const cuda::LinearPrefetch head = cuda::PlanLinearPrefetch(1, rows, k, 4);
    EXPECT_LE(head.blocks, 1056);
    EXPECT_LE(int64_t{head.blocks} * 16 * head.bytes, cuda::kPrefetchedBytes);
    EXPECT_EQ(head.bytes % 128, 0);
    EXPECT_GT(head.bytes, 0);
  }
}

// Of every matrix of Llama 3.1, whole and as one of eight ranks: with up to 16 tokens at least 2 MB of weights are in
// flight, with more 1.5, unless K is too short for more warps; the launch is one that a GPU takes.
TEST(CudaLinearPlan, KeepsTheMemoryBusyInEveryShape) {
  struct {
    int64_t hidden, q_heads, kv_heads, ffn;
  } models[] = {{4096, 32, 8, 14336}, {8192, 64, 8, 28672}, {16384, 128, 8, 53248}};
  for (const auto& m : models) {
    for (int64_t ranks : {1, 8}) {
      const std::pair<int64_t, int64_t> shapes[] = {{(m.q_heads + 2 * m.kv_heads) / ranks * 128, m.hidden},
                                                    {m.hidden, m.q_heads * 128 / ranks},
                                                    {2 * m.ffn / ranks, m.hidden},
                                                    {m.hidden, m.ffn / ranks},
                                                    {128256 / ranks, m.hidden}};
      for (const auto& [n, k] : shapes) {
        const int parts = cuda::LinearParts(n, k);
        for (int64_t tokens : {1, 8, 16, 64}) {
          const cuda::LaunchShape shape = cuda::MmaLinearPlan(tokens, n, parts);
          const int tiles = cuda::MmaLinearTokenTiles(tokens), unroll = cuda::LinearUnroll(tiles, parts);
          EXPECT_LE(shape.threads, cuda::LinearMostThreads(tiles, unroll));
          const int64_t warps = int64_t{shape.grid_x} * parts;
          const int64_t rows = 16 * cuda::LinearRowGroups(tokens, n);
          const int64_t in_flight = warps * std::min<int64_t>(unroll, k / 32 / parts) * rows * 64;
          EXPECT_TRUE(in_flight >= (tokens > 16 ? 1'500'000 : 2'000'000) || parts * unroll * 64 > k)
              << n << " x " << k << ": " << parts << " parts, " << in_flight << " bytes in flight";
        }
      }
    }
  }
}

}  // namespace
}  // namespace altiplano
