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
#include "tests/kernels/kernels_testlib.h"

namespace altiplano {
namespace {

struct Shape {
  int64_t kv_heads = 1, group = 1, dim = 64;
  DType act = DType::kF32;
  DType q = DType::kF32;

  int64_t q_width() const { return kv_heads * group * dim; }
  int64_t kv_width() const { return kv_heads * dim; }
};

// All that attention may know of a sequence: what each token asks, and what it leaves in the cache.
struct Sequence {
  Sequence(const Shape& s, int64_t length, uint32_t seed)
      : q(length, s.q_width(), s.q), k(length, s.kv_width(), s.act), v(length, s.kv_width(), s.act) {
    q.FillNormal(seed);
    k.FillNormal(seed + 1000);
    v.FillNormal(seed + 2000);
  }
  Matrix q, k, v;
};
using Sequences = std::vector<std::unique_ptr<Sequence>>;

// Queries [begin, end) of a sequence, whose first `end` tokens are in the cache.
struct Part {
  size_t sequence;
  int64_t begin, end;
};

struct Layout {
  int64_t page_size = 16;
  int threads = 1;
  int64_t gap = 0;
};

// A step over `parts`. Every part has pages of its own, scattered over the pool; what its queries do not see, in its
// last page or in pages of nobody, is NaN, and what its table does not need points nowhere. Rows of q in order.
std::unique_ptr<Matrix> Attend(const Shape& s, const Sequences& sequences, const std::vector<Part>& parts,
                               const Layout& layout) {
  const int64_t page_size = layout.page_size;
  int64_t tokens = 0, most_pages = 1, used = 0;
  for (const Part& part : parts) {
    tokens += part.end - part.begin;
    const int64_t pages = (part.end + page_size - 1) / page_size;
    most_pages = std::max(most_pages, pages);
    used += pages;
  }
  const auto count = static_cast<int64_t>(parts.size());
  std::vector<int32_t> order(static_cast<size_t>(used + 3));
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), std::mt19937(7));
  const auto pages = static_cast<int64_t>(order.size());
  Matrix k_pages(pages * s.kv_heads * page_size, s.dim, s.act), v_pages(pages * s.kv_heads * page_size, s.dim, s.act);
  Matrix tables(count, most_pages, DType::kI32, layout.gap), q(tokens, s.q_width(), s.q, layout.gap);
  std::vector<int32_t> q_begin = {0}, lengths;
  const size_t element = SizeOf(s.act), head_bytes = static_cast<size_t>(s.dim) * element;
  int64_t token = 0;
  for (int64_t b = 0; b < count; ++b) {
    const Part& part = parts[static_cast<size_t>(b)];
    const Sequence& sequence = *sequences[part.sequence];
    for (int64_t i = 0; i < most_pages; ++i) tables.set(b, i, std::numeric_limits<int32_t>::max());
    for (int64_t position = 0; position < part.end; ++position) {
      if (position % page_size == 0) {
        tables.set(b, position / page_size, order.back());
        order.pop_back();
      }
      const auto page = static_cast<int64_t>(tables.at(b, position / page_size));
      for (int64_t h = 0; h < s.kv_heads; ++h) {
        const int64_t row = (page * s.kv_heads + h) * page_size + position % page_size;
        const size_t at = static_cast<size_t>(h * s.dim) * element;
        std::memcpy(k_pages.view().row<char>(row * static_cast<int64_t>(element)),
                    sequence.k.RowBytes(position).data() + at, head_bytes);
        std::memcpy(v_pages.view().row<char>(row * static_cast<int64_t>(element)),
                    sequence.v.RowBytes(position).data() + at, head_bytes);
      }
    }
    for (int64_t i = part.begin; i < part.end; ++i, ++token) {
      std::memcpy(q.view().row<char>(0) + static_cast<size_t>(token * (s.q_width() + layout.gap)) * SizeOf(s.q),
                  sequence.q.RowBytes(i).data(), sequence.q.RowBytes(i).size());
    }
    q_begin.push_back(static_cast<int32_t>(token));
    lengths.push_back(static_cast<int32_t>(part.end));
  }
  auto out = std::make_unique<Matrix>(tokens, s.q_width(), s.act, layout.gap);
  const auto stream = Stream::Cpu(layout.threads);
  PagedAttention(*stream, {.out = out->view(),
                           .q = q.view(),
                           .k_pages = k_pages.pool(pages, s.kv_heads, page_size),
                           .v_pages = v_pages.pool(pages, s.kv_heads, page_size),
                           .q_begin = VectorOf(q_begin),
                           .context_lengths = VectorOf(lengths),
                           .block_tables = tables.view(),
                           .scale = static_cast<float>(1 / std::sqrt(static_cast<double>(s.dim)))});
  EXPECT_TRUE(out->GapsUntouched());
  return out;
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
// and, its argument being rounded, u |s_j - max|. Whenever the maximum grows, and whenever a segment of 512 is folded
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
    const double max = *std::max_element(score.begin(), score.end()), tiles = n / 64 + n / 512 + 2;
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

Sequences MakeSequences(const Shape& s, const std::vector<int64_t>& lengths) {
  Sequences sequences;
  for (size_t i = 0; i < lengths.size(); ++i) {
    sequences.push_back(std::make_unique<Sequence>(s, lengths[i], static_cast<uint32_t>(i + 1)));
  }
  return sequences;
}

// Around the tiles of 64 keys and the segments of 512.
const std::vector<int64_t> kContexts = {1,   2,   3,   31,  63,  64,  65,   127,  128,  129,
                                        191, 511, 512, 513, 575, 577, 1023, 1024, 1025, 1100};

class PagedAttentionTest : public IsaTest {
 protected:
  // Pages and queries of one dtype, and f32 queries on bf16 pages.
  static std::vector<Shape> WithDTypes(Shape s) {
    std::vector<Shape> all;
    for (const auto& [act, q] :
         {std::pair{DType::kF32, DType::kF32}, {DType::kBF16, DType::kBF16}, {DType::kBF16, DType::kF32}}) {
      s.act = act;
      s.q = q;
      all.push_back(s);
    }
    return all;
  }
};

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
