// What the tests of RopeStoreKv share, on the CPU and in CUDA: a step's operands, and what must become of them.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "tests/kernels/kernels_testlib.h"

namespace altiplano {

struct RopeCase {
  int64_t q_heads = 4, kv_heads = 2, dim = 64, page_size = 16;
  DType in = DType::kF32, act = DType::kF32;
  int threads = 1;  // on the CPU
  int64_t gap = 0;
};

// The plain frequencies theta^(-2i/D), as Llama 3.1's before their scaling.
inline std::vector<float> PlainFrequencies(int64_t dim) {
  std::vector<float> frequencies;
  for (int64_t i = 0; i < dim / 2; ++i) {
    frequencies.push_back(
        static_cast<float>(std::pow(500000.0, -2.0 * static_cast<double>(i) / static_cast<double>(dim))));
  }
  return frequencies;
}

// q, k and v are columns of one matrix, as in the model. Slots are scattered over the pool; -1 where skipped[t].
class RopeStep {
 public:
  RopeStep(const RopeCase& c, std::vector<int32_t> token_positions, std::vector<float> frequencies,
           const std::vector<bool>& skipped)
      : case_(c),
        frequencies_(std::move(frequencies)),
        tokens_(static_cast<int64_t>(token_positions.size())),
        before_(tokens_, width(), c.in),
        qkv(tokens_, width(), c.in, c.gap),
        k_pages(pages() * c.kv_heads * c.page_size, c.dim, c.act),
        v_pages(k_pages.rows(), c.dim, c.act),
        inv_freq(1, c.dim / 2, DType::kF32),
        positions(std::move(token_positions)),
        slots(static_cast<size_t>(pages() * c.page_size)) {
    qkv.FillNormal(1);
    before_.Fill(qkv);
    for (int64_t i = 0; i < c.dim / 2; ++i) inv_freq.set(0, i, frequencies_[static_cast<size_t>(i)]);
    std::iota(slots.begin(), slots.end(), 0);
    std::shuffle(slots.begin(), slots.end(), std::mt19937(2));
    slots.resize(positions.size());
    for (size_t t = 0; t < skipped.size(); ++t) {
      if (skipped[t]) slots[t] = -1;
    }
  }

  const RopeCase& shape() const { return case_; }
  int64_t q_width() const { return case_.q_heads * case_.dim; }
  int64_t kv_width() const { return case_.kv_heads * case_.dim; }
  int64_t pages() const { return tokens_ / case_.page_size + 2; }

  // q rotated, k rotated into the pages, v copied there, and nothing else touched. bound(x, y, cos, sin, exact, dtype):
  // how far x cos - y sin may lie from the exact value.
  template <typename Bound>
  void ExpectDone(Bound bound) const {
    std::vector<bool> written(static_cast<size_t>(k_pages.rows()), false);
    for (int64_t t = 0; t < tokens_; ++t) {
      ExpectTokenDone(bound, t, &written);
      if (testing::Test::HasFatalFailure()) return;
    }
    const std::string untouched(k_pages.RowBytes(0).size(), '\xFF');
    for (int64_t row = 0; row < k_pages.rows(); ++row) {
      if (written[static_cast<size_t>(row)]) continue;
      ASSERT_EQ(k_pages.RowBytes(row), untouched) << row;
      ASSERT_EQ(v_pages.RowBytes(row), untouched) << row;
    }
    EXPECT_TRUE(qkv.GapsUntouched());
  }

 private:
  int64_t width() const { return q_width() + 2 * kv_width(); }

  template <typename Bound>
  void ExpectTokenDone(Bound bound, int64_t t, std::vector<bool>* written) const {
    const RopeCase& c = case_;
    const int64_t half = c.dim / 2, slot = slots[static_cast<size_t>(t)];
    std::vector<double> cos, sin;
    for (float frequency : frequencies_) {
      const long double angle =
          static_cast<long double>(positions[static_cast<size_t>(t)]) * static_cast<long double>(frequency);
      cos.push_back(static_cast<double>(cosl(angle)));
      sin.push_back(static_cast<double>(sinl(angle)));
    }
    // Columns from `column` on, rotated, are row `row` of `out` from `to` on.
    auto expect_rotated = [&](int64_t column, const Matrix& out, int64_t row, int64_t to) {
      for (int64_t i = 0; i < half; ++i) {
        const double x = before_.at(t, column + i), y = before_.at(t, column + half + i);
        const double co = cos[static_cast<size_t>(i)], si = sin[static_cast<size_t>(i)];
        const double low = x * co - y * si, high = y * co + x * si;
        ASSERT_NEAR(out.at(row, to + i), low, bound(x, y, co, si, low, out.dtype()))
            << "token " << t << " at " << positions[static_cast<size_t>(t)] << ", column " << column + i;
        ASSERT_NEAR(out.at(row, to + half + i), high, bound(y, x, co, si, high, out.dtype()))
            << "token " << t << " at " << positions[static_cast<size_t>(t)] << ", column " << column + half + i;
      }
    };
    for (int64_t h = 0; h < c.q_heads; ++h) expect_rotated(h * c.dim, qkv, t, h * c.dim);
    for (int64_t j = q_width(); j < width(); ++j) ASSERT_EQ(qkv.at(t, j), before_.at(t, j)) << t;
    if (slot < 0) return;
    for (int64_t h = 0; h < c.kv_heads; ++h) {
      const int64_t row = (slot / c.page_size * c.kv_heads + h) * c.page_size + slot % c.page_size;
      (*written)[static_cast<size_t>(row)] = true;
      expect_rotated(q_width() + h * c.dim, k_pages, row, 0);
      for (int64_t i = 0; i < c.dim; ++i) {
        const auto v = static_cast<float>(before_.at(t, q_width() + kv_width() + h * c.dim + i));
        ASSERT_EQ(v_pages.at(row, i), c.act == DType::kF32 ? v : ToFloat(ToBF16(v))) << t << ", " << h << ", " << i;
      }
    }
  }

  const RopeCase case_;
  const std::vector<float> frequencies_;
  const int64_t tokens_;
  Matrix before_;

 public:
  Matrix qkv, k_pages, v_pages, inv_freq;
  std::vector<int32_t> positions, slots;
};

}  // namespace altiplano
