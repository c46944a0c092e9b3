// Embed: rows of the table, widened or rounded as they are, so that every comparison is exact.
#include <gtest/gtest.h>

#include <limits>
#include <vector>

#include "kernels/ops.h"
#include "tests/kernels/kernels_testlib.h"

namespace altiplano {
namespace {

class EmbedTest : public IsaTest {};

void ExpectRowsOfTheTable(DType table_dtype, DType out_dtype, int64_t hidden, int64_t gap, std::vector<int32_t> ids,
                          int64_t vocab_begin, int threads) {
  constexpr int64_t kVocab = 11;
  Matrix table(kVocab, hidden, table_dtype, gap);
  table.FillNormal(1);
  const auto tokens = static_cast<int64_t>(ids.size());
  Matrix out(tokens, hidden, out_dtype, gap);
  const auto stream = Stream::Cpu(threads);
  Embed(*stream, {.out = out.view(), .table = table.view(), .ids = VectorOf(ids), .vocab_begin = vocab_begin});
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t row = ids[static_cast<size_t>(t)] - vocab_begin;
    for (int64_t j = 0; j < hidden; ++j) {
      ASSERT_EQ(out.at(t, j), row >= 0 && row < kVocab ? table.at(row, j) : 0) << "token " << t << ", column " << j;
    }
  }
  EXPECT_TRUE(out.GapsUntouched());
}

TEST_P(EmbedTest, CopiesRowsOfEveryLength) {
  for (const auto& [table, out] :
       {std::pair{DType::kF32, DType::kF32}, {DType::kBF16, DType::kF32}, {DType::kBF16, DType::kBF16}}) {
    for (int64_t hidden : {1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 100}) {
      for (int64_t gap : {0, 3}) ExpectRowsOfTheTable(table, out, hidden, gap, {10, 0, 3, 3, 7}, 0, 1);
    }
  }
}

TEST_P(EmbedTest, GivesZerosForIdsOfOtherRanks) {
  const int32_t most = std::numeric_limits<int32_t>::max();
  for (DType dtype : {DType::kF32, DType::kBF16}) {
    ExpectRowsOfTheTable(dtype, dtype, 17, 1, {22, 21, 32, 33, 0, -1, most, 25}, 22, 1);
    ExpectRowsOfTheTable(dtype, DType::kF32, 16, 0, {0, 10, 11, -1, -most - 1, most}, 0, 1);
  }
}

TEST_P(EmbedTest, TakesNegativeIdsFromWhatWasSampled) {
  Matrix table(5, 9, DType::kBF16), out(4, 9, DType::kF32);
  table.FillNormal(1);
  std::vector<int32_t> ids = {101, -1, -3, 104}, sampled = {103, 102, 0};
  Embed(*Stream::Cpu(1), {.out = out.view(),
                          .table = table.view(),
                          .ids = VectorOf(ids),
                          .sampled = VectorOf(sampled),
                          .vocab_begin = 100});
  for (int64_t j = 0; j < 9; ++j) {
    EXPECT_EQ(out.at(0, j), table.at(1, j));
    EXPECT_EQ(out.at(1, j), table.at(3, j));
    EXPECT_EQ(out.at(2, j), 0) << "of another rank";
    EXPECT_EQ(out.at(3, j), table.at(4, j));
  }
}

TEST_P(EmbedTest, SharesRowsOutToTheTeam) {
  std::vector<int32_t> ids;
  for (int32_t t = 0; t < 97; ++t) ids.push_back(t * 7 % 13);
  ExpectRowsOfTheTable(DType::kBF16, DType::kBF16, 300, 0, ids, 1, 3);
}

INSTANTIATE_TEST_SUITE_P(Levels, EmbedTest, testing::Values(Isa::kAvx2, Isa::kAvx512), IsaTestName);

}  // namespace
}  // namespace altiplano
