// What the tests of Sample and Score share: log-probabilities, ranks and the most probable tokens in float64.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "kernels/ops.h"
#include "tests/kernels/kernels_testlib.h"

namespace altiplano {

// Ids in the order in which tokens are kept: the larger logit first, of equal ones the lower id.
inline std::vector<int32_t> MostProbableFirst(const std::vector<double>& logits) {
  std::vector<int32_t> ids(logits.size());
  std::iota(ids.begin(), ids.end(), 0);
  std::stable_sort(ids.begin(), ids.end(), [&](int32_t a, int32_t b) {
    return logits[static_cast<size_t>(a)] > logits[static_cast<size_t>(b)];
  });
  return ids;
}

// How far a log-probability may lie from the exact one. Each weight e^(x - max) is off by 2.16 u for e^x and u |x -
// max| for its argument, and rounded to a multiple of 2^-40; their sum is at least 1. The result is rounded once.
inline double LogprobBound(const std::vector<double>& logits, double max, double total, double exact) {
  double bound = 2.16 * kUnitF32 + static_cast<double>(logits.size()) * 0x1p-41;
  for (double x : logits) {
    if (std::isfinite(x)) bound += kUnitF32 * (max - x) * std::exp(x - max) / total;
  }
  return 1.01 * bound + kUnitF32 * std::abs(exact);
}

// The row's softmax as `result` tells it: of its token, and of the `num_top` most probable.
inline void ExpectLogprobs(const std::vector<double>& logits, int64_t num_top, const SampleResult& result) {
  const double max = *std::max_element(logits.begin(), logits.end());
  double total = 0;
  for (double x : logits) total += std::exp(x - max);
  auto expect_logprob = [&](float logprob, int32_t token) {
    const double exact = logits[static_cast<size_t>(token)] - max - std::log(total);
    if (std::isinf(exact)) {
      EXPECT_EQ(logprob, exact) << token;
    } else {
      EXPECT_NEAR(logprob, exact, LogprobBound(logits, max, total, exact)) << token;
    }
  };
  ASSERT_TRUE(result.finite);
  ASSERT_GE(result.token, 0);
  ASSERT_LT(result.token, static_cast<int64_t>(logits.size()));
  expect_logprob(result.logprob, result.token);
  const double own = logits[static_cast<size_t>(result.token)];
  EXPECT_EQ(result.rank, 1 + std::count_if(logits.begin(), logits.end(), [&](double x) { return x > own; }));
  num_top = std::min<int64_t>({num_top, kMaxTopLogprobs, static_cast<int64_t>(logits.size())});
  ASSERT_EQ(result.num_top, num_top);
  const std::vector<int32_t> order = MostProbableFirst(logits);
  for (int64_t i = 0; i < num_top; ++i) {
    EXPECT_EQ(result.top_ids[i], order[static_cast<size_t>(i)]) << i;
    expect_logprob(result.top_logprobs[i], order[static_cast<size_t>(i)]);
  }
}

inline std::vector<double> RowOf(const Matrix& logits, int64_t r) {
  std::vector<double> row;
  for (int64_t i = 0; i < logits.columns(); ++i) row.push_back(logits.at(r, i));
  return row;
}

}  // namespace altiplano
