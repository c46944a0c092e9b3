// RopeStoreKv against angles in long double.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <numeric>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "kernels/ops.h"
#include "tests/kernels/rope_store_kv_testlib.h"

namespace altiplano {
namespace {

// How far x cos - y sin may lie from the exact value: cos and sin are off by 0.51 units in the last place (1.02 u), or
// by 3e-14 where they are tiny; one product is rounded, and the fused multiply-add once more.
double Bound(double x, double y, double cos, double sin, double exact, DType out) {
  const double bound = 3.1 * kUnitF32 * (std::abs(x * cos) + std::abs(y * sin)) + 3e-14 * (std::abs(x) + std::abs(y));
  return bound + RoundingBound(out, exact, bound);
}

using Case = RopeCase;

class RopeStoreKvTest : public IsaTest {
 protected:
  void ExpectNearOracle(const Case& c, std::vector<int32_t> positions, const std::vector<float>& frequencies,
                        const std::vector<bool>& skipped) {
    RopeStep step(c, std::move(positions), frequencies, skipped);
    const auto stream = Stream::Cpu(c.threads);
    RopeStoreKv(*stream, {.q = step.qkv.view().columns(0, step.q_width()),
                          .k = step.qkv.view().columns(step.q_width(), step.kv_width()),
                          .v = step.qkv.view().columns(step.q_width() + step.kv_width(), step.kv_width()),
                          .k_pages = step.k_pages.pool(step.pages(), c.kv_heads, c.page_size),
                          .v_pages = step.v_pages.pool(step.pages(), c.kv_heads, c.page_size),
                          .positions = VectorOf(step.positions),
                          .slots = VectorOf(step.slots),
                          .inv_freq = step.inv_freq.vector()});
    step.ExpectDone(Bound);
  }
};

const std::vector<int32_t> kPositions = {0, 1, 2, 63, 1000, 8191, 8192, 40000, 131071, 131072};

TEST_P(RopeStoreKvTest, IsNearTheOracleForEveryHeadSize) {
  // Pairs are worked on 128 at a time.
  for (int64_t dim : {2, 6, 16, 30, 64, 80, 128, 130, 256, 258, 300}) {
    for (const auto& [in, act] :
         {std::pair{DType::kF32, DType::kF32}, {DType::kF32, DType::kBF16}, {DType::kBF16, DType::kBF16}}) {
      ExpectNearOracle({.dim = dim, .in = in, .act = act, .gap = dim % 3}, kPositions, PlainFrequencies(dim), {});
    }
  }
}

TEST_P(RopeStoreKvTest, IsNearTheOracleForHeadsAndPagesOfAnyNumber) {
  for (int64_t kv_heads : {1, 3, 8}) {
    for (int64_t group : {1, 4, 7}) {
      for (int64_t page_size : {1, 5, 16}) {
        ExpectNearOracle({.q_heads = kv_heads * group, .kv_heads = kv_heads, .dim = 18, .page_size = page_size},
                         kPositions, PlainFrequencies(18), {});
      }
    }
  }
}

TEST_P(RopeStoreKvTest, StoresNothingAtSlotMinusOne) {
  std::vector<bool> skipped(kPositions.size());
  skipped[0] = skipped[3] = skipped.back() = true;
  ExpectNearOracle({.dim = 260, .act = DType::kBF16}, kPositions, PlainFrequencies(260), skipped);
  skipped.assign(kPositions.size(), true);
  ExpectNearOracle({}, kPositions, PlainFrequencies(64), skipped);
}

TEST_P(RopeStoreKvTest, SharesTokensOutToTheTeam) {
  std::vector<int32_t> positions;
  for (int32_t t = 0; t < 67; ++t) positions.push_back(t * 1999);
  ExpectNearOracle({.dim = 128, .act = DType::kBF16, .threads = 3}, positions, PlainFrequencies(128), {});
}

// The frequencies of Llama 3.1 8B, scaled for long contexts.
TEST_P(RopeStoreKvTest, IsNearTheOracleForLlama31) {
  std::ifstream file(ALTIPLANO_DATA_DIR "/quant_rope/rope_llama3_inv_freq.tsv");
  if (!file) GTEST_SKIP() << "no quant_rope/rope_llama3_inv_freq.tsv in " << ALTIPLANO_DATA_DIR;
  std::vector<float> frequencies;
  std::string line;
  std::getline(file, line);  // names of columns
  while (std::getline(file, line)) {
    std::istringstream columns(line);
    double index = 0, plain = 0, scaled = 0;
    columns >> index >> plain >> scaled;
    frequencies.push_back(static_cast<float>(scaled));
  }
  ASSERT_EQ(frequencies.size(), 64u);
  std::vector<int32_t> positions = kPositions;
  for (int32_t p = 3; p < 131072; p += 1777) positions.push_back(p);
  ExpectNearOracle({.q_heads = 4, .kv_heads = 1, .dim = 128, .act = DType::kF32}, positions, frequencies, {});
}

INSTANTIATE_TEST_SUITE_P(Levels, RopeStoreKvTest, testing::Values(Isa::kAvx2, Isa::kAvx512), IsaTestName);

}  // namespace
}  // namespace altiplano
