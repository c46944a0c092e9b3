// RopeStoreKv in CUDA against angles in long double.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <vector>

#include "tests/kernels/cuda/cuda_testlib.h"

namespace altiplano {
namespace {

// cos and sin: the remainder is rounded once to f32 (u/2 of pi/4 as an angle), the polynomials sum a handful of terms
// below one and leave out 3e-9: less than 3 u in all. Then two products and a sum.
double Bound(double x, double y, double exact, DType out) {
  const double bound = (3 + 2) * kUnitF32 * (std::abs(x) + std::abs(y));
  return bound + RoundingBound(out, exact, bound);
}

struct Case {
  int64_t q_heads = 4, kv_heads = 2, dim = 64, page_size = 16;
  DType in = DType::kF32, act = DType::kF32;
  int64_t gap = 0;
};

// theta^(-2i/D), as Llama 3.1 before its scaling.
std::vector<float> Frequencies(int64_t dim) {
  std::vector<float> frequencies;
  for (int64_t i = 0; i < dim / 2; ++i) {
    frequencies.push_back(
        static_cast<float>(std::pow(500000.0, -2.0 * static_cast<double>(i) / static_cast<double>(dim))));
  }
  return frequencies;
}

const std::vector<int32_t> kPositions = {0, 1, 2, 63, 1000, 8191, 40000, 131071, 131072};

class CudaRopeStoreKvTest : public CudaTest {
 protected:
  // q, k and v are columns of one matrix, as in the model. Slots are scattered over the pool; -1 where skipped[t].
  void ExpectNearOracle(const Case& c, const std::vector<int32_t>& positions, const std::vector<bool>& skipped) {
    const auto tokens = static_cast<int64_t>(positions.size());
    const int64_t half = c.dim / 2, q_width = c.q_heads * c.dim, kv_width = c.kv_heads * c.dim;
    const int64_t pages = tokens / c.page_size + 2, rows = pages * c.kv_heads * c.page_size;
    const std::vector<float> frequencies = Frequencies(c.dim);
    Matrix qkv(tokens, q_width + 2 * kv_width, c.in, c.gap), before(tokens, q_width + 2 * kv_width, c.in);
    qkv.FillNormal(1);
    before.Fill(qkv);
    Matrix k_pages(rows, c.dim, c.act), v_pages(rows, c.dim, c.act), inv_freq(1, half, DType::kF32);
    for (int64_t i = 0; i < half; ++i) inv_freq.set(0, i, frequencies[static_cast<size_t>(i)]);
    std::vector<int32_t> slots(static_cast<size_t>(pages * c.page_size));
    std::iota(slots.begin(), slots.end(), 0);
    std::shuffle(slots.begin(), slots.end(), std::mt19937(2));
    slots.resize(positions.size());
    for (size_t t = 0; t < skipped.size(); ++t) {
      if (skipped[t]) slots[t] = -1;
    }

    const OnDevice d_qkv(stream(), qkv), d_k(stream(), k_pages), d_v(stream(), v_pages), d_inv(stream(), inv_freq);
    const OnDevice d_positions(stream(), positions), d_slots(stream(), slots);
    RopeStoreKv(stream(), {.q = d_qkv.view().columns(0, q_width),
                           .k = d_qkv.view().columns(q_width, kv_width),
                           .v = d_qkv.view().columns(q_width + kv_width, kv_width),
                           .k_pages = d_k.pool(pages, c.kv_heads, c.page_size),
                           .v_pages = d_v.pool(pages, c.kv_heads, c.page_size),
                           .positions = d_positions.view(),
                           .slots = d_slots.view(),
                           .inv_freq = d_inv.vector()});
    d_qkv.Fetch(qkv);
    d_k.Fetch(k_pages);
    d_v.Fetch(v_pages);

    std::vector<bool> written(static_cast<size_t>(rows), false);
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t slot = slots[static_cast<size_t>(t)];
      // Columns from `column` on, rotated, are row `row` of `out` from `to` on.
      auto expect_rotated = [&](int64_t column, const Matrix& out, int64_t row, int64_t to) {
        for (int64_t i = 0; i < half; ++i) {
          const long double angle = static_cast<long double>(positions[static_cast<size_t>(t)]) *
                                    static_cast<long double>(frequencies[static_cast<size_t>(i)]);
          const auto cos = static_cast<double>(cosl(angle)), sin = static_cast<double>(sinl(angle));
          const double x = before.at(t, column + i), y = before.at(t, column + half + i);
          const double low = x * cos - y * sin, high = y * cos + x * sin;
          ASSERT_NEAR(out.at(row, to + i), low, Bound(x, y, low, out.dtype()))
              << "token " << t << " at " << positions[static_cast<size_t>(t)] << ", column " << column + i;
          ASSERT_NEAR(out.at(row, to + half + i), high, Bound(y, x, high, out.dtype()))
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

TEST_F(CudaRopeStoreKvTest, IsNearTheOracleForEveryHeadSizeAndDType) {
  for (int64_t dim : {2, 6, 16, 64, 80, 128, 256}) {
    for (const auto& [in, act] :
         {std::pair{DType::kF32, DType::kF32}, {DType::kF32, DType::kBF16}, {DType::kBF16, DType::kBF16}}) {
      ExpectNearOracle({.dim = dim, .in = in, .act = act, .gap = dim % 3}, kPositions, {});
    }
  }
}

TEST_F(CudaRopeStoreKvTest, IsNearTheOracleForHeadsAndPagesOfAnyNumber) {
  for (int64_t kv_heads : {1, 3, 8}) {
    for (int64_t group : {1, 4, 7}) {
      for (int64_t page_size : {1, 5, 16}) {
        ExpectNearOracle({.q_heads = kv_heads * group, .kv_heads = kv_heads, .dim = 16, .page_size = page_size},
                         kPositions, {});
      }
    }
  }
}

TEST_F(CudaRopeStoreKvTest, StoresNothingAtSlotMinusOne) {
  std::vector<bool> skipped(kPositions.size());
  skipped[0] = skipped[3] = skipped.back() = true;
  ExpectNearOracle({.dim = 128, .act = DType::kBF16}, kPositions, skipped);
  ExpectNearOracle({}, kPositions, std::vector<bool>(kPositions.size(), true));
}

}  // namespace
}  // namespace altiplano
