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
#include "tests/kernels/kernels_testlib.h"

namespace altiplano {
namespace {

// How far x cos - y sin may lie from the exact value: cos and sin are off by 0.51 units in the last place (1.02 u), or
// by 3e-14 where they are tiny; one product is rounded, and the fused multiply-add once more.
double Bound(double x, double y, double cos, double sin, double exact, DType out) {
  const double bound = 3.1 * kUnitF32 * (std::abs(x * cos) + std::abs(y * sin)) + 3e-14 * (std::abs(x) + std::abs(y));
  return bound + RoundingBound(out, exact, bound);
}

struct Case {
  int64_t q_heads = 4, kv_heads = 2, dim = 64, page_size = 16;
  DType in = DType::kF32, act = DType::kF32;
  int threads = 1;
  int64_t gap = 0;
};

// The plain frequencies theta^(-2i/D).
std::vector<float> Frequencies(int64_t dim) {
  std::vector<float> frequencies;
  for (int64_t i = 0; i < dim / 2; ++i) {
    frequencies.push_back(
        static_cast<float>(std::pow(500000.0, -2.0 * static_cast<double>(i) / static_cast<double>(dim))));
  }
  return frequencies;
}

class RopeStoreKvTest : public IsaTest {
 protected:
  // q, k and v are columns of one matrix, as in the model. Slots are scattered over the pool; -1 where skipped[t].
  void ExpectNearOracle(const Case& c, std::vector<int32_t> positions, const std::vector<float>& frequencies,
                        const std::vector<bool>& skipped) {
    const auto tokens = static_cast<int64_t>(positions.size());
    const int64_t half = c.dim / 2, q_width = c.q_heads * c.dim, kv_width = c.kv_heads * c.dim;
    const int64_t pages = tokens / c.page_size + 2, rows = pages * c.kv_heads * c.page_size;
    Matrix qkv(tokens, q_width + 2 * kv_width, c.in, c.gap), before(tokens, q_width + 2 * kv_width, c.in);
    qkv.FillNormal(1);
    before.Fill(qkv);
    Matrix k_pages(rows, c.dim, c.act), v_pages(rows, c.dim, c.act), inv_freq(1, half, DType::kF32);
    for (int64_t i = 0; i < half; ++i) inv_freq.set(0, i, frequencies[static_cast<size_t>(i)]);
    std::vector<int32_t> slots(static_cast<size_t>(pages * c.page_size));
    std::iota(slots.begin(), slots.end(), 0);
    std::shuffle(slots.begin(), slots.end(), std::mt19937(2));
    slots.resize(positions.size());
    for (size_t t = 0; t < slots.size(); ++t) {
      if (!skipped.empty() && skipped[t]) slots[t] = -1;
    }

    const auto stream = Stream::Cpu(c.threads);
    RopeStoreKv(*stream, {.q = qkv.view().columns(0, q_width),
                          .k = qkv.view().columns(q_width, kv_width),
                          .v = qkv.view().columns(q_width + kv_width, kv_width),
                          .k_pages = k_pages.pool(pages, c.kv_heads, c.page_size),
                          .v_pages = v_pages.pool(pages, c.kv_heads, c.page_size),
                          .positions = VectorOf(positions),
                          .slots = VectorOf(slots),
                          .inv_freq = inv_freq.vector()});

    std::vector<bool> written(static_cast<size_t>(rows), false);
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t slot = slots[static_cast<size_t>(t)];
      std::vector<double> cos, sin;
      for (int64_t i = 0; i < half; ++i) {
        const long double angle = static_cast<long double>(positions[static_cast<size_t>(t)]) *
                                  static_cast<long double>(frequencies[static_cast<size_t>(i)]);
        cos.push_back(static_cast<double>(cosl(angle)));
        sin.push_back(static_cast<double>(sinl(angle)));
      }
      // Columns from `column` on, rotated, are row `row` of `out` from `to` on.
      auto expect_rotated = [&](int64_t column, const Matrix& out, int64_t row, int64_t to) {
        for (int64_t i = 0; i < half; ++i) {
          const double x = before.at(t, column + i), y = before.at(t, column + half + i);
          const double co = cos[static_cast<size_t>(i)], si = sin[static_cast<size_t>(i)];
          const double low = x * co - y * si, high = y * co + x * si;
          ASSERT_NEAR(out.at(row, to + i), low, Bound(x, y, co, si, low, out.dtype()))
              << "token " << t << " at " << positions[static_cast<size_t>(t)] << ", column " << column + i;
          ASSERT_NEAR(out.at(row, to + half + i), high, Bound(y, x, co, si, high, out.dtype()))
              << "token " << t << " at " << positions[static_cast<size_t>(t)] << ", column " << column + half + i;
        }
      };
      for (int64_t h = 0; h < c.q_heads; ++h) expect_rotated(h * c.dim, qkv, t, h * c.dim);
      for (int64_t j = q_width; j < q_width + 2 * kv_width; ++j) ASSERT_EQ(qkv.at(t, j), before.at(t, j)) << t;
      if (slot < 0) continue;
      for (int64_t h = 0; h < c.kv_heads; ++h) {
        const int64_t row = (slot / c.page_size * c.kv_heads + h) * c.page_size + slot % c.page_size;
        written[static_cast<size_t>(row)] = true;
        expect_rotated(q_width + h * c.dim, k_pages, row, 0);
        for (int64_t i = 0; i < c.dim; ++i) {
          const auto v = static_cast<float>(before.at(t, q_width + kv_width + h * c.dim + i));
          ASSERT_EQ(v_pages.at(row, i), c.act == DType::kF32 ? v : ToFloat(ToBF16(v))) << t << ", " << h << ", " << i;
        }
      }
    }
    const std::string untouched(k_pages.RowBytes(0).size(), '\xFF');
    for (int64_t row = 0; row < rows; ++row) {
      if (written[static_cast<size_t>(row)]) continue;
      ASSERT_EQ(k_pages.RowBytes(row), untouched) << row;
      ASSERT_EQ(v_pages.RowBytes(row), untouched) << row;
    }
    EXPECT_TRUE(qkv.GapsUntouched());
  }
};

const std::vector<int32_t> kPositions = {0, 1, 2, 63, 1000, 8191, 8192, 40000, 131071, 131072};

TEST_P(RopeStoreKvTest, IsNearTheOracleForEveryHeadSize) {
  // Pairs are worked on 128 at a time.
  for (int64_t dim : {2, 6, 16, 30, 64, 80, 128, 130, 256, 258, 300}) {
    for (const auto& [in, act] :
         {std::pair{DType::kF32, DType::kF32}, {DType::kF32, DType::kBF16}, {DType::kBF16, DType::kBF16}}) {
      ExpectNearOracle({.dim = dim, .in = in, .act = act, .gap = dim % 3}, kPositions, Frequencies(dim), {});
    }
  }
}

TEST_P(RopeStoreKvTest, IsNearTheOracleForHeadsAndPagesOfAnyNumber) {
  for (int64_t kv_heads : {1, 3, 8}) {
    for (int64_t group : {1, 4, 7}) {
      for (int64_t page_size : {1, 5, 16}) {
        ExpectNearOracle({.q_heads = kv_heads * group, .kv_heads = kv_heads, .dim = 18, .page_size = page_size},
                         kPositions, Frequencies(18), {});
      }
    }
  }
}

TEST_P(RopeStoreKvTest, StoresNothingAtSlotMinusOne) {
  std::vector<bool> skipped(kPositions.size());
  skipped[0] = skipped[3] = skipped.back() = true;
  ExpectNearOracle({.dim = 260, .act = DType::kBF16}, kPositions, Frequencies(260), skipped);
  skipped.assign(kPositions.size(), true);
  ExpectNearOracle({}, kPositions, Frequencies(64), skipped);
}

TEST_P(RopeStoreKvTest, SharesTokensOutToTheTeam) {
  std::vector<int32_t> positions;
  for (int32_t t = 0; t < 67; ++t) positions.push_back(t * 1999);
  ExpectNearOracle({.dim = 128, .act = DType::kBF16, .threads = 3}, positions, Frequencies(128), {});
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
