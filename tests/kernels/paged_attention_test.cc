// PagedAttention against softmax in float64; and what must not show in a single bit: how a prompt was cut into steps,
// the rest of the batch, threads, pages, and whatever lies in memory that no query sees.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "kernels/ops.h"
#include "tests/kernels/paged_attention_testlib.h"

namespace altiplano {
namespace {

using Shape = AttentionShape;

struct Layout {
  int64_t page_size = 16;
  int threads = 1;
  int64_t gap = 0;
};

std::unique_ptr<Matrix> Attend(const Shape& s, const Sequences& sequences, const std::vector<Part>& parts,
                               const Layout& layout) {
  AttentionStep step(s, sequences, parts, layout.page_size, layout.gap);
  const auto stream = Stream::Cpu(layout.threads);
  PagedAttention(*stream, {.out = step.out->view(),
                           .q = step.q.view(),
                           .k_pages = step.k_pages.pool(step.pages(), s.kv_heads, layout.page_size),
                           .v_pages = step.v_pages.pool(step.pages(), s.kv_heads, layout.page_size),
                           .q_begin = VectorOf(step.q_begin),
                           .context_lengths = VectorOf(step.lengths),
                           .block_tables = step.tables.view(),
                           .scale = s.scale()});
  EXPECT_TRUE(step.out->GapsUntouched());
  return std::move(step.out);
}

std::vector<double> Doubles(const Matrix& x) {
  std::vector<double> all;
  for (int64_t i = 0; i < x.rows(); ++i) {
    for (int64_t j = 0; j < x.columns(); ++j) all.push_back(x.at(i, j));
  }
  return all;
}

// Softmax in float64, and how far a result may lie from it.
//
// With u = 2^-24, the score of key j is off by at most (D + 2) u times scale * sum |q k|: D additions of one rounding
// each (two for each pair of dimensions in vdpbf16ps), the scale and the difference to the maximum. e^x adds 2.16 u
// and, its argument being rounded, u |s_j - max|. Whenever the maximum grows, and whenever a segment of 256 is folded
// in, a weight is multiplied by another e^x, whose arguments add up to no more than |s_j - max|: 3.16 u for each of T
// tiles and segments. vdpbf16ps takes weights rounded to bf16. All this is an error of the weights, the same in sum w v
// and in sum w; each of these sums goes through at most n + 3 T roundings more. Weights below e^-87 may count as zero.
class Oracle {
 public:
  Oracle(const Shape& s, const Sequence& sequence)
      : s_(s), q_(Doubles(sequence.q)), k_(Doubles(sequence.k)), v_(Doubles(sequence.v)) {}

  void ExpectNear(const Matrix& out, int64_t row, int64_t query) const {
    for (int64_t h = 0; h < s_.kv_heads * s_.group; ++h) {
      ExpectHeadNear(out, row, query, h);
      if (testing::Test::HasFatalFailure()) return;
    }
  }

 private:
  void ExpectHeadNear(const Matrix& out, int64_t row, int64_t query, int64_t head) const {
    const int64_t keys = query + 1, kv_head = head / s_.group;
    const double u = kUnitF32, n = static_cast<double>(keys), dim = static_cast<double>(s_.dim);
    const double scale = static_cast<double>(static_cast<float>(1 / std::sqrt(dim)));
    const double* q = &q_[static_cast<size_t>(query * s_.q_width() + head * s_.dim)];
    auto at = [&](const std::vector<double>& x, int64_t key) {
      return &x[static_cast<size_t>(key * s_.kv_width() + kv_head * s_.dim)];
    };
    std::vector<double> score, magnitude;
    for (int64_t j = 0; j < keys; ++j) {
      const double* k = at(k_, j);
      double sum = 0, absolute = 0;
      for (int64_t d = 0; d < s_.dim; ++d) {
        sum += q[d] * k[d];
        absolute += std::abs(q[d] * k[d]);
      }
      score.push_back(sum * scale);
      magnitude.push_back(absolute * scale);
    }
    const double max = *std::max_element(score.begin(), score.end()), tiles = n / 64 + n / 256 + 2;
    const bool rounded_weights = s_.act == DType::kBF16 && s_.q == DType::kBF16 && CurrentIsa() >= Isa::kAvx512Bf16;
    double total = 0;
    std::vector<double> weight, error;
    for (size_t j = 0; j < score.size(); ++j) {
      weight.push_back(std::exp(score[j] - max));
      total += weight[j];
      error.push_back(u * ((dim + 2) * magnitude[j] + 2 * (max - score[j]) + 2.16 + 3.16 * tiles) +
                      (rounded_weights ? kUnitBF16 : 0));
    }
    for (int64_t d = 0; d < s_.dim; ++d) {
      double exact = 0, absolute = 0, largest = 0;
      for (int64_t j = 0; j < keys; ++j) {
        const double v = at(v_, j)[d];
        exact += weight[static_cast<size_t>(j)] / total * v;
        absolute += weight[static_cast<size_t>(j)] / total * std::abs(v);
        largest = std::max(largest, std::abs(v));
      }
      double bound = (n + 3 * tiles) * u * (absolute + std::abs(exact)) + u * std::abs(exact);
      for (int64_t j = 0; j < keys; ++j) {
        const size_t i = static_cast<size_t>(j);
        bound += weight[i] / total * error[i] * (std::abs(at(v_, j)[d]) + std::abs(exact));
      }
      bound = 1.02 * bound + n * std::exp(-86.0) * largest;
      ASSERT_NEAR(out.at(row, head * s_.dim + d), exact, bound + RoundingBound(out.dtype(), exact, bound))
          << "query " << query << ", head " << head << " of " << s_.kv_heads << " * " << s_.group << ", dimension " << d
          << " of " << s_.dim << ", pages " << Name(s_.act) << ", q " << Name(s_.q);
    }
  }

  const Shape s_;
  const std::vector<double> q_, k_, v_;
};

// The step over `parts` gives the bits that `whole`, the prefill of sequence 0 alone in one step, has for its queries.
void ExpectSameBits(const Shape& s, const Sequences& sequences, const std::vector<Part>& parts, const Layout& layout,
                    const Matrix& whole) {
  const auto out = Attend(s, sequences, parts, layout);
  int64_t row = 0;
  for (const Part& part : parts) {
    for (int64_t i = part.begin; i < part.end; ++i, ++row) {
      ASSERT_EQ(out->RowBytes(row), whole.RowBytes(i))
          << "query " << i << " in [" << part.begin << ", " << part.end << "), pages of " << layout.page_size << ", "
          << layout.threads << " threads, " << Name(s.act);
    }
  }
}

// Around the tiles of 64 keys and the segments of 256.
const std::vector<int64_t> kContexts = {1,   2,   3,   31,  63,  64,  65,  127,  128,  129,  191, 255,
                                        256, 257, 320, 321, 511, 512, 513, 1023, 1024, 1025, 1100};

class PagedAttentionTest : public IsaTest {};

TEST_P(PagedAttentionTest, IsNearTheOracleForEveryGroupAndHeadSize) {
  for (int64_t group = 1; group <= 8; ++group) {
    for (int64_t dim : {64, 128}) {
      for (const Shape& s : WithDTypes({.kv_heads = 2, .group = group, .dim = dim})) {
        const Sequences sequences = MakeSequences(s, {70});
        const Oracle oracle(s, *sequences[0]);
        const auto out = Attend(s, sequences, {{0, 0, 70}}, {.gap = group % 2 * 5});
        for (int64_t i : {0, 1, 7, 33, 63, 64, 65, 69}) oracle.ExpectNear(*out, i, i);
      }
    }
  }
}

TEST_P(PagedAttentionTest, IsNearTheOracleForOddHeadSizesAndWideGroups) {
  for (int64_t dim : {1, 7, 16, 33, 80, 100, 257}) {
    for (const Shape& s : WithDTypes({.kv_heads = 3, .group = 2, .dim = dim})) {
      const Sequences sequences = MakeSequences(s, {67});
      const Oracle oracle(s, *sequences[0]);
      const auto out = Attend(s, sequences, {{0, 0, 67}}, {.page_size = 5, .gap = 1});
      for (int64_t i : {0, 5, 64, 66}) oracle.ExpectNear(*out, i, i);
    }
  }
  // A unit of work holds at most 96 rows unless a single query has more.
  for (int64_t group : {13, 48, 49, 96, 97, 130}) {
    for (const Shape& s : WithDTypes({.kv_heads = 1, .group = group, .dim = 8})) {
      const Sequences sequences = MakeSequences(s, {9});
      const Oracle oracle(s, *sequences[0]);
      const auto out = Attend(s, sequences, {{0, 0, 9}}, {});
      for (int64_t i = 0; i < 9; ++i) oracle.ExpectNear(*out, i, i);
    }
  }
}

TEST_P(PagedAttentionTest, IsNearTheOracleAcrossTilesAndSegments) {
  for (const Shape& s : WithDTypes({.group = 3, .dim = 64})) {
    const Sequences sequences = MakeSequences(s, {kContexts.back()});
    const Oracle oracle(s, *sequences[0]);
    std::vector<Part> decodes;
    for (int64_t context : kContexts) decodes.push_back({0, context - 1, context});
    const auto out = Attend(s, sequences, decodes, {.threads = 2});
    for (size_t i = 0; i < kContexts.size(); ++i) {
      oracle.ExpectNear(*out, static_cast<int64_t>(i), kContexts[i] - 1);
    }
  }
}

// With queries of zeros every key weighs the same. Key j has a one in dimension j % D alone, so each dimension counts
// the keys that were seen.
TEST_P(PagedAttentionTest, SeesEachKeyUpToItsOwnOnce) {
  for (const Shape& s : WithDTypes({.kv_heads = 2, .group = 2, .dim = 80})) {
    Sequences sequences = MakeSequences(s, {kContexts.back()});
    Sequence& sequence = *sequences[0];
    for (int64_t i = 0; i < kContexts.back(); ++i) {
      for (int64_t j = 0; j < s.q_width(); ++j) sequence.q.set(i, j, 0);
      for (int64_t j = 0; j < s.kv_width(); ++j) sequence.v.set(i, j, j % s.dim == i % s.dim);
    }
    std::vector<Part> parts = {{0, 0, kContexts.back()}};
    for (int64_t context : kContexts) parts.push_back({0, context - 1, context});
    const auto out = Attend(s, sequences, parts, {});
    int64_t row = 0;
    for (const Part& part : parts) {
      for (int64_t i = part.begin; i < part.end; ++i, ++row) {
        for (int64_t j = 0; j < s.q_width(); ++j) {
          const int64_t seen = i / s.dim + (j % s.dim <= i % s.dim ? 1 : 0);
          const double exact = static_cast<double>(seen) / static_cast<double>(i + 1);
          ASSERT_NEAR(out->at(row, j), exact, kUnitF32 * exact + RoundingBound(s.act, exact, 0)) << i << ", " << j;
        }
      }
    }
  }
}

TEST_P(PagedAttentionTest, PrefillChunksAndDecodeGiveTheSameBits) {
  constexpr int64_t kLength = 1100;
  for (const Shape& s : WithDTypes({.group = 3, .dim = 64})) {
    const Sequences sequences = MakeSequences(s, {kLength});
    const auto whole = Attend(s, sequences, {{0, 0, kLength}}, {});
    std::vector<Part> decodes;  // of every tenth token, and of those around the boundaries
    for (int64_t i = 0; i < kLength; i += 10) decodes.push_back({0, i, i + 1});
    for (int64_t context : kContexts) decodes.push_back({0, context - 1, context});
    ExpectSameBits(s, sequences, decodes, {.threads = 3}, *whole);
    for (int64_t context : kContexts) {
      ExpectSameBits(s, sequences, {{0, context - 1, context}}, {.threads = 3}, *whole);
    }
    std::mt19937 random(5);
    for (int64_t most : {7, 64, 200, 700}) {
      for (int64_t begin = most == 7 ? kLength - 80 : 0; begin < kLength;) {
        const int64_t end = std::min(kLength, begin + 1 + static_cast<int64_t>(random() % static_cast<uint32_t>(most)));
        ExpectSameBits(s, sequences, {{0, begin, end}}, {.threads = 2}, *whole);
        begin = end;
      }
    }
  }
}

TEST_P(PagedAttentionTest, PageSizeAndThreadsDoNotShow) {
  constexpr int64_t kLength = 1100;
  for (const Shape& s : WithDTypes({.kv_heads = 2, .group = 2, .dim = 33})) {
    const Sequences sequences = MakeSequences(s, {kLength});
    const auto whole = Attend(s, sequences, {{0, 0, kLength}}, {});
    const std::vector<std::vector<Part>> steps = {{{0, 0, 400}},
                                                  {{0, kLength - 1, kLength}},  // few units: segments apart
                                                  {{0, 500, 520}, {0, 1000, kLength}},
                                                  {{0, 500, 501}, {0, 200, 201}, {0, 1024, 1025}}};
    for (const std::vector<Part>& step : steps) {
      for (int64_t page_size : {1, 3, 16, 64, 100, 4096}) {
        ExpectSameBits(s, sequences, step, {.page_size = page_size}, *whole);
      }
      for (int threads : {2, 3, 5}) ExpectSameBits(s, sequences, step, {.threads = threads}, *whole);
    }
  }
}

TEST_P(PagedAttentionTest, TheRestOfTheBatchDoesNotShow) {
  for (const Shape& s : WithDTypes({.kv_heads = 2, .group = 4, .dim = 64})) {
    Sequences sequences = MakeSequences(s, {600, 1, 70, 1025, 5, 64, 130});
    sequences[4]->k.set(2, 3, NAN);  // ruins sequence 4, and it alone
    const std::vector<Part> parts = {{0, 512, 600}, {1, 0, 1},   {2, 0, 70},   {3, 1024, 1025},
                                     {4, 0, 5},     {5, 64, 64}, {6, 129, 130}};
    for (int threads : {1, 3}) {
      const auto together = Attend(s, sequences, parts, {.threads = threads});
      int64_t row = 0;
      for (const Part& part : parts) {
        if (part.begin == part.end) continue;
        const auto alone = Attend(s, sequences, {part}, {.page_size = 64});
        for (int64_t i = 0; i < part.end - part.begin; ++i, ++row) {
          EXPECT_EQ(together->RowBytes(row), alone->RowBytes(i)) << "sequence " << part.sequence << ", row " << i;
          for (int64_t j = 0; j < s.group * s.dim; ++j) {
            ASSERT_EQ(std::isnan(together->at(row, j)), part.sequence == 4 && i >= 2) << part.sequence << ", " << i;
          }
        }
      }
    }
  }
}

TEST_P(PagedAttentionTest, StandsScoresOfAnySize) {
  constexpr int64_t kLength = 700;
  for (const Shape& s : WithDTypes({.group = 2, .dim = 64})) {
    for (bool growing : {true, false}) {
      Sequences sequences = MakeSequences(s, {kLength});
      Sequence& sequence = *sequences[0];
      // Scores run from about -8000 to 8000 in order, so that the maximum grows with each key or is found at once.
      for (int64_t i = 0; i < kLength; ++i) {
        const double size = static_cast<double>(growing ? i : kLength - i) / 35 - 10;
        for (int64_t j = 0; j < s.q_width(); ++j) sequence.q.set(i, j, 10 + sequence.q.at(i, j));
        for (int64_t j = 0; j < s.kv_width(); ++j) sequence.k.set(i, j, 10 * size + sequence.k.at(i, j));
      }
      const Oracle oracle(s, sequence);
      const auto out = Attend(s, sequences, {{0, 0, kLength}}, {});
      for (int64_t i : {0, 63, 64, 300, 511, 512, 699}) oracle.ExpectNear(*out, i, i);
      ExpectSameBits(s, sequences, {{0, 699, 700}, {0, 520, 600}, {0, 511, 512}}, {.threads = 3}, *out);
    }
  }
}

// Keys that a query does not see may be added to its sum with weights of zero; a zero must not change its sign by it.
// Here the first keys weigh nothing against the later ones, so that a negative sum shrinks to -0 before -0 is added.
TEST_P(PagedAttentionTest, ZerosHaveOneSign) {
  constexpr int64_t kLength = 250;
  for (const Shape& s : WithDTypes({.group = 2, .dim = 16})) {
    Sequences sequences = MakeSequences(s, {kLength});
    Sequence& sequence = *sequences[0];
    for (int64_t i = 0; i < kLength; ++i) {
      for (int64_t j = 0; j < s.q_width(); ++j) sequence.q.set(i, j, 10);
      for (int64_t j = 0; j < s.kv_width(); ++j) {
        sequence.k.set(i, j, i < 64 ? -2 : 2);
        sequence.v.set(i, j, i < 64 ? -1 : i < 130 ? -0.0 : 1);
      }
    }
    const auto whole = Attend(s, sequences, {{0, 0, kLength}}, {});
    for (int64_t i = 64; i < 130; ++i) {
      ExpectSameBits(s, sequences, {{0, i, i + 1}}, {}, *whole);
      EXPECT_EQ(whole->RowBytes(i), std::string(whole->RowBytes(i).size(), 0)) << i;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Levels, PagedAttentionTest,
                         testing::Values(Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16, Isa::kAmxBf16), IsaTestName);

}  // namespace
}  // namespace altiplano
