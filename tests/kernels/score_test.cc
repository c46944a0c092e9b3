// Score against float64.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "kernels/ops.h"
#include "tests/kernels/kernels_testlib.h"
#include "tests/kernels/sample_testlib.h"

namespace altiplano {
namespace {

std::vector<SampleResult> ScoreTokens(const Matrix& logits, const std::vector<int32_t>& tokens,
                                      const std::vector<int32_t>& num_top, int threads = 1) {
  std::vector<SampleResult> results(tokens.size());
  for (size_t r = 0; r < tokens.size(); ++r) results[r].token = tokens[r];
  const auto stream = Stream::Cpu(threads);
  Score(*stream, {.results = results.data(), .num_top = num_top.data(), .logits = logits.view()});
  for (size_t r = 0; r < tokens.size(); ++r) EXPECT_EQ(results[r].token, tokens[r]);
  return results;
}

class ScoreTest : public IsaTest {};

TEST_P(ScoreTest, IsNearTheOracle) {
  for (int64_t vocab : {1, 2, 15, 16, 17, 20, 21, 100, 2048, 2049, 7001}) {
    for (float deviation : {0.1f, 3.0f, 30.0f}) {
      Matrix logits(4, vocab, DType::kF32, vocab % 5);
      logits.FillNormal(static_cast<uint32_t>(vocab), deviation);
      for (int64_t i = 0; i < vocab; ++i) {
        logits.set(2, i, std::round(logits.at(2, i)));  // many equal ones
        if (i % 3 == 1) logits.set(3, i, -std::numeric_limits<float>::infinity());
      }
      const auto last = static_cast<int32_t>(vocab - 1);
      const std::vector<int32_t> tokens = {0, last, last / 2, last}, num_top = {0, 20, 7, 20};
      const std::vector<SampleResult> results = ScoreTokens(logits, tokens, num_top, 2);
      for (size_t r = 0; r < tokens.size(); ++r) {
        SCOPED_TRACE(testing::Message() << "row " << r << ", vocabulary " << vocab << ", deviation " << deviation);
        ExpectLogprobs(RowOf(logits, static_cast<int64_t>(r)), num_top[r], results[r]);
      }
      EXPECT_TRUE(logits.GapsUntouched());
    }
  }
}

TEST_P(ScoreTest, GivesMinusInfinityToImpossibleTokens) {
  Matrix logits(1, 30, DType::kF32);
  logits.FillNormal(1);
  logits.set(0, 29, -std::numeric_limits<float>::infinity());
  const SampleResult result = ScoreTokens(logits, {29}, {3})[0];
  EXPECT_TRUE(result.finite);
  EXPECT_EQ(result.logprob, -std::numeric_limits<float>::infinity());
  EXPECT_EQ(result.rank, 30);
}

TEST_P(ScoreTest, ReportsRowsThatAreNotFiniteAndThemAlone) {
  constexpr int64_t kVocab = 70;
  const float infinity = std::numeric_limits<float>::infinity();
  for (int64_t at = 0; at < kVocab; ++at) {
    Matrix logits(4, kVocab, DType::kF32);
    logits.FillNormal(2);
    logits.set(1, at, NAN);
    logits.set(2, at, infinity);
    for (int64_t i = 0; i < kVocab; ++i) logits.set(3, i, -infinity);
    const std::vector<SampleResult> results = ScoreTokens(logits, {5, 5, 5, 5}, {3, 3, 3, 3});
    ExpectLogprobs(RowOf(logits, 0), 3, results[0]);
    for (size_t r : {1, 2, 3}) EXPECT_FALSE(results[r].finite) << r << ", " << at;
  }
}

INSTANTIATE_TEST_SUITE_P(Levels, ScoreTest, testing::Values(Isa::kAvx2, Isa::kAvx512), IsaTestName);

TEST(ScoreDeathTest, DiesOfATokenOutsideOfTheVocabulary) {
  Matrix logits(1, 30, DType::kF32);
  logits.FillNormal(1);
  EXPECT_DEATH(ScoreTokens(logits, {30}, {0}), "Score: token 30 is outside of the vocabulary");
  EXPECT_DEATH(ScoreTokens(logits, {-1}, {0}), "Score: token -1 is outside of the vocabulary");
}

}  // namespace
}  // namespace altiplano
