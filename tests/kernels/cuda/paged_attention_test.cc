// Paged attention in CUDA against softmax in float64; and what must not show in a single bit: how a prompt was cut into
// steps, the rest of the batch, pages, and whether contexts were split over blocks.
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

#include "kernels/cuda/backend.h"
#include "tests/kernels/cuda/cuda_testlib.h"
#include "tests/kernels/paged_attention_testlib.h"

namespace altiplano {
namespace {

using Shape = AttentionShape;

struct Layout {
  int64_t page_size = 16;
  bool split = false;
  int64_t gap = 0;
  bool batch_invariant = false;
  int64_t multiprocessors = cuda::kMultiprocessors;  // that the work is shared by
};

class CudaPagedAttentionTest : public CudaTest {
 protected:
  std::unique_ptr<Matrix> Attend(const Shape& s, const Sequences& sequences, const std::vector<Part>& parts,
                                 const Layout& layout) {
    AttentionStep step(s, sequences, parts, layout.page_size, layout.gap);
    const OnDevice d_out(stream(), *step.out), d_q(stream(), step.q), d_k(stream(), step.k_pages);
    const OnDevice d_v(stream(), step.v_pages), d_begin(stream(), step.q_begin), d_lengths(stream(), step.lengths);
    const OnDevice d_tables(stream(), step.tables);
    const cuda::AttentionSizes sizes = {
        .q_heads = s.kv_heads * s.group,
        .kv_heads = s.kv_heads,
        .dim = s.dim,
        .may_prefill = !layout.batch_invariant && cuda::TakesPrefill(architecture(), s.act, s.dim, layout.page_size),
        .scratch_bytes = layout.split ? size_t{4} << 20 : 0,
        .multiprocessors = layout.multiprocessors};
    const AttentionList work(sizes, step.q_begin, step.lengths);
    const OnDevice d_list(stream(), work.list);
    AttentionWork attention_work = work.work;
    attention_work.list = d_list.view();
    const Buffer scratch = Buffer::Allocate(kDevice, sizes.scratch_bytes);
    PagedAttention(stream(), {.out = d_out.view(),
                              .q = d_q.view(),
                              .k_pages = d_k.pool(step.pages(), s.kv_heads, layout.page_size),
                              .v_pages = d_v.pool(step.pages(), s.kv_heads, layout.page_size),
                              .q_begin = d_begin.view(),
                              .context_lengths = d_lengths.view(),
                              .block_tables = d_tables.view(),
                              .scale = s.scale(),
                              .work = attention_work,
                              .scratch = scratch.data(),
                              .scratch_bytes = sizes.scratch_bytes});
    d_out.Fetch(*step.out);
    EXPECT_TRUE(step.out->GapsUntouched());
    return std::move(step.out);
  }

  void ExpectSameBits(const Shape& s, const Sequences& sequences, const std::vector<Part>& parts, const Layout& layout,
                      const Matrix& whole) {
    const auto out = Attend(s, sequences, parts, layout);
    int64_t row = 0;
    for (const Part& part : parts) {
      for (int64_t i = part.begin; i < part.end; ++i, ++row) ASSERT_EQ(out->RowBytes(row), whole.RowBytes(i)) << i;
    }
  }
};

// Softmax in float64, and how far a result may lie from it. A score is off by D + 3 roundings of its terms; weights, by
// the error of their score as an exponent, by 2^-22 of each exponential, of which there are three where states are
// folded, and where matrix instructions take them, by their rounding to bf16, as q may be. All this is an error of the
// weights, in the sum w v and in the sum w; each sum has at most n + 4 roundings.
void ExpectNearOracle(const Shape& s, const Sequence& sequence, const Matrix& out, int64_t row, int64_t query) {
  const double scale = 1 / std::sqrt(static_cast<double>(s.dim));
  const double q_unit = s.act == DType::kBF16 && s.q == DType::kF32 ? kUnitBF16 : 0;
  const double p_unit = s.act == DType::kBF16 ? kUnitBF16 : 0;
  const int64_t keys = query + 1;
  for (int64_t h = 0; h < s.kv_heads * s.group; ++h) {
    const int64_t kv = h / s.group;
    std::vector<double> scores, errors;
    for (int64_t j = 0; j < keys; ++j) {
      double score = 0, size = 0;
      for (int64_t d = 0; d < s.dim; ++d) {
        const double term = sequence.q.at(query, h * s.dim + d) * sequence.k.at(j, kv * s.dim + d) * scale;
        score += term;
        size += std::abs(term);
      }
      scores.push_back(score);
      errors.push_back((static_cast<double>(s.dim + 3) * kUnitF32 + q_unit) * size);
    }
    const double most = *std::max_element(scores.begin(), scores.end());
    double total = 0, weight_error = 0;
    std::vector<double> weights;
    for (size_t j = 0; j < scores.size(); ++j) {
      weights.push_back(std::exp(scores[j] - most));
      total += weights[j];
      errors[j] = weights[j] * (errors[j] + 4 * kUnitF32 * std::abs(scores[j] - most) + 3 * 0x1p-22 + p_unit);
      weight_error += errors[j];
    }
    for (int64_t d = 0; d < s.dim; ++d) {
      double sum = 0, size = 0, error = 0;
      for (int64_t j = 0; j < keys; ++j) {
        const double v = sequence.v.at(j, kv * s.dim + d);
        sum += weights[static_cast<size_t>(j)] * v;
        size += weights[static_cast<size_t>(j)] * std::abs(v);
        error += errors[static_cast<size_t>(j)] * std::abs(v);
      }
      const double exact = sum / total;
      const double roundings = static_cast<double>(keys + 4) * kUnitF32;
      const double bound = (error + roundings * size) / total + std::abs(exact) * (weight_error / total + roundings);
      ASSERT_NEAR(out.at(row, h * s.dim + d), exact, bound + RoundingBound(s.act, exact, bound))
          << "query " << query << ", head " << h << ", column " << d;
    }
  }
}

// Both dtypes of q, both of the cache.
// Contexts around a tile of keys, a page and a split.
constexpr int64_t kContexts[] = {1, 2, 15, 16, 17, 63, 64, 65, 511, 512, 513, 700};

TEST_F(CudaPagedAttentionTest, DecodeIsNearTheOracle) {
  for (const Shape& s : WithDTypes({.kv_heads = 2, .group = 4, .dim = 64})) {
    const Sequences sequences = MakeSequences(s, {700});
    std::vector<Part> parts;
    for (int64_t context : kContexts) {
      if (!kUnderTsan || context % 16 == 1) parts.push_back({0, context - 1, context});
    }
    const auto out = Attend(s, sequences, parts, {.gap = 4});
    for (size_t i = 0; i < parts.size(); ++i) {
      ExpectNearOracle(s, *sequences[0], *out, static_cast<int64_t>(i), parts[i].begin);
    }
  }
}

TEST_F(CudaPagedAttentionTest, IsNearTheOracleForEveryHeadSizeAndGroup) {
  for (int64_t dim : {16, 32, 33, 80, 128, 256}) {
    for (int64_t group : {1, 3, 8, 16, 20}) {
      if (kUnderTsan && group != 3) continue;
      for (const Shape& s : WithDTypes({.group = group, .dim = dim})) {
        const Sequences sequences = MakeSequences(s, {40});
        const auto out = Attend(s, sequences, {{0, 37, 40}, {0, 0, 2}, {0, 16, 17}}, {});
        int64_t row = 0;
        for (int64_t query : {37, 38, 39, 0, 1, 16}) ExpectNearOracle(s, *sequences[0], *out, row++, query);
      }
    }
  }
}

// Values are the number of their key: each key up to a query's own counts once, and no other.
TEST_F(CudaPagedAttentionTest, SeesEachKeyUpToItsOwnOnce) {
  constexpr int64_t kLength = 600;
  for (const Shape& s : WithDTypes({.kv_heads = 2, .group = 2, .dim = 64})) {
    const Sequences sequences = MakeSequences(s, {kLength});
    Sequence& sequence = *sequences[0];
    for (int64_t i = 0; i < kLength; ++i) {
      for (int64_t j = 0; j < s.q_width(); ++j) sequence.q.set(i, j, 0);
      for (int64_t j = 0; j < s.kv_width(); ++j) sequence.v.set(i, j, j % s.dim == i % s.dim);
    }
    const std::vector<Part> parts = {{0, 0, 40}, {0, 500, 530}, {0, 599, 600}};
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

TEST_F(CudaPagedAttentionTest, PrefillChunksDecodeAndSplitsGiveTheSameBits) {
  constexpr int64_t kLength = 530;
  for (const Shape& s : WithDTypes({.group = 3, .dim = 64})) {
    const Sequences sequences = MakeSequences(s, {kLength});
    const auto whole = Attend(s, sequences, {{0, 0, kLength}}, {});
    for (int64_t query : {0, 77, 511, 529}) ExpectNearOracle(s, *sequences[0], *whole, query, query);
    for (bool split : {false, true}) {
      std::vector<Part> decodes;
      for (int64_t context : kContexts) {
        if (context <= kLength) decodes.push_back({0, context - 1, context});
      }
      ExpectSameBits(s, sequences, decodes, {.split = split}, *whole);
      ExpectSameBits(s, sequences, {{0, 500, 530}, {0, 3, 24}}, {.page_size = 5, .split = split}, *whole);
      ExpectSameBits(s, sequences, {{0, 529, 530}}, {.page_size = 64, .split = split}, *whole);
    }
  }
}

#ifdef ALTIPLANO_IN_SIMULATOR
// Without wgmma a long part of a prompt goes through the kernel of short ones, which fits into less shared memory.
TEST_F(CudaPagedAttentionTest, OtherGpusHaveTheBitsOfShortParts) {
  const Shape s = {.group = 4, .dim = 128, .act = DType::kBF16, .q = DType::kBF16};
  const Sequences sequences = MakeSequences(s, {70});
  const auto invariant = Attend(s, sequences, {{0, 0, 70}}, {.page_size = 64, .batch_invariant = true});
  for (int capability : {80, 89}) {
    const SimulatedArchitecture other(capability);
    ExpectSameBits(s, sequences, {{0, 0, 70}}, {.page_size = 64}, *invariant);
  }
}
#endif

TEST_F(CudaPagedAttentionTest, TheRestOfTheBatchDoesNotShow) {
  for (const Shape& s : WithDTypes({.kv_heads = 2, .group = 4, .dim = 64})) {
    const Sequences sequences = MakeSequences(s, {600, 1, 70, 64, 130});
    sequences[2]->k.set(0, 3, NAN);  // ruins sequence 2, and it alone
    std::vector<Part> parts = {{0, 590, 600}, {1, 0, 1}, {2, 60, 70}, {3, 64, 64}, {4, 129, 130}};
    for (int i = 0; i < 40; ++i) parts.push_back({1, 0, 1});  // so that sequences are found beyond the first 32
    parts.push_back({4, 100, 103});
    for (bool split : {false, true}) {
      const auto together = Attend(s, sequences, parts, {.split = split});
      int64_t row = 0;
      for (const Part& part : parts) {
        if (part.begin == part.end) continue;
        const auto alone = Attend(s, sequences, {part}, {.page_size = 64});
        for (int64_t i = 0; i < part.end - part.begin; ++i, ++row) {
          for (int64_t j = 0; j < s.group * s.dim; ++j) {
            ASSERT_EQ(std::isnan(together->at(row, j)), part.sequence == 2) << part.sequence << ", " << i;
          }
          if (part.sequence != 2) {
            EXPECT_EQ(together->RowBytes(row), alone->RowBytes(i)) << part.sequence << ", " << i;
          }
        }
      }
    }
  }
}

// Workers that take several tiles one after the other, and pieces of several splits: the first of a tile folds them,
// the others leave each.
TEST_F(CudaPagedAttentionTest, PiecesOfAnyLengthGiveTheSameBits) {
  for (const Shape& s : WithDTypes({.group = 4, .dim = 64})) {
    if (kUnderTsan && s.q != s.act) continue;
    const Sequences sequences = MakeSequences(s, {2700, 30});
    const std::vector<Part> parts = {{1, 29, 30}, {0, 2697, 2700}, {1, 0, 3}, {1, 3, 7}, {1, 11, 12}};
    const auto whole = Attend(s, sequences, parts, {});
    ExpectNearOracle(s, *sequences[0], *whole, 3, 2699);
    for (int64_t multiprocessors : {1, 2}) {
      const auto cut = Attend(s, sequences, parts, {.split = true, .multiprocessors = multiprocessors});
      for (int64_t i = 0; i < 12; ++i) ASSERT_EQ(cut->RowBytes(i), whole->RowBytes(i)) << i;
    }
  }
}

// 147 splits of 70 tiles for the 78, 108, 132 or 147 workers of each of two KV heads.
TEST_F(CudaPagedAttentionTest, GpusOfAnySizeGiveTheSameBits) {
  const Shape s = {.kv_heads = 2, .group = 1, .dim = 64, .act = DType::kBF16, .q = DType::kBF16};
  std::vector<int64_t> lengths(kUnderTsan ? 30 : 70, 513);
  lengths.front() = 4500;
  const Sequences sequences = MakeSequences(s, lengths);
  std::vector<Part> parts;
  for (size_t i = 0; i < lengths.size(); ++i) parts.push_back({i, lengths[i] - 1, lengths[i]});
  std::unique_ptr<Matrix> first;
  for (int64_t multiprocessors : {78, 108, 132, 148}) {
    auto out = Attend(s, sequences, parts, {.split = true, .multiprocessors = multiprocessors});
    if (first == nullptr) first = std::move(out);
    for (size_t i = 0; out != nullptr && i < parts.size(); ++i) {
      const auto row = static_cast<int64_t>(i);
      ASSERT_EQ(out->RowBytes(row), first->RowBytes(row)) << multiprocessors << ", " << i;
    }
  }
}

TEST_F(CudaPagedAttentionTest, StandsScoresOfAnySize) {
  constexpr int64_t kLength = 560;
  for (const Shape& s : WithDTypes({.group = 2, .dim = 64})) {
    for (bool growing : {true, false}) {
      const Sequences sequences = MakeSequences(s, {kLength});
      Sequence& sequence = *sequences[0];
      for (int64_t i = 0; i < kLength; ++i) {
        const double size = static_cast<double>(growing ? i : kLength - i) / 35 - 8;
        for (int64_t j = 0; j < s.q_width(); ++j) sequence.q.set(i, j, 10 + sequence.q.at(i, j));
        for (int64_t j = 0; j < s.kv_width(); ++j) sequence.k.set(i, j, 10 * size + sequence.k.at(i, j));
      }
      const auto out = Attend(s, sequences, {{0, 545, 560}, {0, 63, 65}}, {.split = true});
      ExpectNearOracle(s, sequence, *out, 14, 559);
      ExpectNearOracle(s, sequence, *out, 0, 545);
      ExpectNearOracle(s, sequence, *out, 16, 64);
    }
  }
}

// ---- parts of at least 128 rows, on pages of 64: the prefill kernel's, where there is one

// Heads of a bf16 cache, and parts around a tile of rows and a run of keys: whole prompts, chunks that begin within a
// run, contexts that go round the ring, and beside them parts that are another kernel's.
TEST_F(CudaPagedAttentionTest, LongPartsAreNearTheOracle) {
  struct Case {
    int64_t kv_heads, group, dim;
    std::vector<Part> parts;
  };
  const Case cases[] = {
      {1, 4, 128, {{0, 360, 401}, {0, 0, 32}, {0, 20, 22}, {0, 64, 128}}},
      {2, 4, 64, {{0, 330, 394}, {0, 0, 1}, {0, 100, 133}}},
      {1, 1, 64, {{0, 0, 128}, {0, 271, 401}}},
      {1, 3, 64, {{0, 190, 255}, {0, 0, 42}}},
      {1, 16, 128, {{0, 120, 129}, {0, 300, 307}}},
  };
  for (const Case& c : cases) {
    for (const Shape& s : WithDTypes({.kv_heads = c.kv_heads, .group = c.group, .dim = c.dim})) {
      if (s.act == DType::kF32 || (kUnderTsan && (s.q == DType::kF32 || c.group > 4))) continue;
      const Sequences sequences = MakeSequences(s, {401});
      const auto out = Attend(s, sequences, c.parts, {.page_size = 64, .gap = 8});
      int64_t row = 0;
      for (const Part& part : c.parts) {
        for (int64_t query = part.begin; query < part.end; ++query, ++row) {
          if (query % 8 == 0 || query + 1 == part.end) ExpectNearOracle(s, *sequences[0], *out, row, query);
        }
      }
    }
  }
}

TEST_F(CudaPagedAttentionTest, LongPartsSeeEachKeyUpToTheirOwnOnce) {
  constexpr int64_t kLength = 300;
  const Shape s = {.kv_heads = 1, .group = 4, .dim = 128, .act = DType::kBF16, .q = DType::kBF16};
  const Sequences sequences = MakeSequences(s, {kLength});
  Sequence& sequence = *sequences[0];
  for (int64_t i = 0; i < kLength; ++i) {
    for (int64_t j = 0; j < s.q_width(); ++j) sequence.q.set(i, j, 0);
    for (int64_t j = 0; j < s.kv_width(); ++j) sequence.v.set(i, j, j == i % s.dim);
  }
  const auto out = Attend(s, sequences, {{0, 0, kLength}}, {.page_size = 64});
  for (int64_t i = 0; i < kLength; ++i) {
    for (int64_t j = 0; j < s.q_width(); ++j) {
      const int64_t seen = i / s.dim + (j % s.dim <= i % s.dim ? 1 : 0);
      const double exact = static_cast<double>(seen) / static_cast<double>(i + 1);
      ASSERT_NEAR(out->at(i, j), exact, kUnitF32 * exact + RoundingBound(s.act, exact, 0)) << i << ", " << j;
    }
  }
}

// However a prompt is cut, as long as each part is the prefill kernel's, and whatever else is in the step.
TEST_F(CudaPagedAttentionTest, LongPartsGiveTheSameBitsInChunksAndInBatches) {
  const Shape s = {.kv_heads = 2, .group = 4, .dim = 64, .act = DType::kBF16, .q = DType::kBF16};
  const Sequences sequences = MakeSequences(s, {170, 70});
  const auto whole = Attend(s, sequences, {{0, 0, 170}}, {.page_size = 64});
  ExpectSameBits(s, sequences, {{0, 0, 37}, {0, 37, 101}, {0, 101, 170}}, {.page_size = 64, .split = true}, *whole);
  ExpectSameBits(s, sequences, {{0, 90, 170}}, {.page_size = 128}, *whole);

  sequences[1]->v.set(0, 3, NAN);  // ruins sequence 1, and it alone
  std::vector<Part> parts = {{1, 0, 40}, {0, 60, 170}, {1, 69, 70}};
  for (int i = 0; i < 40; ++i) parts.push_back({1, 0, 1});
  parts.push_back({0, 0, 33});
  const auto together = Attend(s, sequences, parts, {.page_size = 64});
  for (int64_t i = 0; i < 110; ++i) ASSERT_EQ(together->RowBytes(40 + i), whole->RowBytes(60 + i)) << i;
  for (int64_t i = 0; i < 33; ++i) ASSERT_EQ(together->RowBytes(191 + i), whole->RowBytes(i)) << i;
  EXPECT_TRUE(std::isnan(together->at(0, 3)));
}

// Rows of which the first see nothing of the second split, on one block and on one for each split.
TEST_F(CudaPagedAttentionTest, LongPartsFoldTheSplitsOfLongContexts) {
  for (int64_t dim : {64, 128}) {
    if (kUnderTsan && dim == 128) continue;
    const Shape s = {.group = 16, .dim = dim, .act = DType::kBF16, .q = DType::kBF16};
    const Sequences sequences = MakeSequences(s, {2051});
    // The second warpgroup has rows that see nothing of the second split beside rows that do.
    const std::vector<Part> parts = {{0, 2042, 2051}};
    const auto whole = Attend(s, sequences, parts, {.page_size = 64});
    const auto cut = Attend(s, sequences, parts, {.page_size = 64, .split = true});
    for (int64_t i = 0; i < 9; ++i) {
      ASSERT_EQ(cut->RowBytes(i), whole->RowBytes(i)) << i;
      if (i % 4 == 0) ExpectNearOracle(s, *sequences[0], *whole, i, 2042 + i);
    }
  }
}

// Blocks that stay for several tiles, of contexts that end within a page, of more splits than one and of one KV head
// and the other.
TEST_F(CudaPagedAttentionTest, LongPartsGiveTheSameBitsOnFewMultiprocessors) {
  for (const int64_t dim : {128, 64}) {
    if (kUnderTsan && dim == 64) continue;
    const Shape s = {.kv_heads = 2, .group = 4, .dim = dim, .act = DType::kBF16, .q = DType::kBF16};
    const int64_t length = kUnderTsan ? 201 : 2100;
    const Sequences sequences = MakeSequences(s, {length, 201});
    const std::vector<Part> parts = {{1, 160, 201}, {0, length - 33, length}, {1, 0, 64}, {1, 20, 54}};
    const auto many = Attend(s, sequences, parts, {.page_size = 64});
    ExpectNearOracle(s, *sequences[1], *many, 40, 200);
    for (int64_t multiprocessors : {1, 2, 3, 5}) {
      if (kUnderTsan && multiprocessors != 2) continue;
      const auto few = Attend(s, sequences, parts, {.page_size = 64, .multiprocessors = multiprocessors});
      for (int64_t i = 0; i < 41 + 33 + 64 + 34; ++i) {
        ASSERT_EQ(few->RowBytes(i), many->RowBytes(i)) << multiprocessors << ", " << i;
      }
    }
  }
}

TEST_F(CudaPagedAttentionTest, ABatchInvariantPromptHasTheBitsOfItsDecodes) {
  const Shape s = {.group = 4, .dim = 64, .act = DType::kBF16, .q = DType::kBF16};
  const Sequences sequences = MakeSequences(s, {100});
  const auto whole = Attend(s, sequences, {{0, 0, 100}}, {.page_size = 64, .batch_invariant = true});
  ExpectSameBits(s, sequences, {{0, 30, 31}, {0, 70, 72}, {0, 99, 100}}, {.page_size = 64}, *whole);
}

TEST_F(CudaPagedAttentionTest, LongPartsStandScoresOfAnySize) {
  constexpr int64_t kLength = 200;
  const Shape s = {.group = 4, .dim = 64, .act = DType::kBF16, .q = DType::kBF16};
  for (bool growing : {true, false}) {
    const Sequences sequences = MakeSequences(s, {kLength});
    Sequence& sequence = *sequences[0];
    for (int64_t i = 0; i < kLength; ++i) {
      const double size = static_cast<double>(growing ? i : kLength - i) / 12 - 8;
      for (int64_t j = 0; j < s.q_width(); ++j) sequence.q.set(i, j, 10 + sequence.q.at(i, j));
      for (int64_t j = 0; j < s.kv_width(); ++j) sequence.k.set(i, j, 10 * size + sequence.k.at(i, j));
    }
    const auto out = Attend(s, sequences, {{0, 150, 200}}, {.page_size = 64});
    for (int64_t i : {0, 23, 49}) ExpectNearOracle(s, sequence, *out, i, 150 + i);
  }
}

#ifdef ALTIPLANO_IN_SIMULATOR
// Nor does the order of threads and copies, while the ring goes round almost twice.
TEST_F(CudaPagedAttentionTest, LongPartsGiveTheSameBitsInAnyOrder) {
  for (int64_t dim : {64, 128}) {
    const Shape s = {.group = 16, .dim = dim, .act = DType::kBF16, .q = DType::kBF16};
    const Sequences sequences = MakeSequences(s, {401});
    const std::vector<Part> parts = {{0, 391, 401}};
    const auto once = Attend(s, sequences, parts, {.page_size = 64});
    for (uint64_t seed = 2; seed < (kUnderTsan ? 4 : 12); ++seed) {
      sim::SetSeed(seed);
      const auto again = Attend(s, sequences, parts, {.page_size = 64});
      for (int64_t i = 0; i < 10; ++i) ASSERT_EQ(again->RowBytes(i), once->RowBytes(i)) << "seed " << seed;
    }
  }
}

// The warpgroups issue the wgmmas of one run each in turn, warpgroup 0 first, while both have runs; from one split to
// the next, too. A tile's first run has no turn. Each warp commits two groups for a run, of which the second is issued
// in its turn.
TEST_F(CudaPagedAttentionTest, LongPartsTakeTurnsAtTheTensorCores) {
  struct Case {
    int64_t group, keys;
    size_t runs[2];  // of each warpgroup
    uint64_t seeds;
  };
  for (const Case& c : {Case{16, 200, {4, 4}, 8}, {1, 200, {3, 4}, 8}, {16, 2200, {35, 35}, kUnderTsan ? 1 : 2}}) {
    const Shape s = {.group = c.group, .dim = 64, .act = DType::kBF16, .q = DType::kBF16};
    const Sequences sequences = MakeSequences(s, {c.keys});
    for (uint64_t seed = 1; seed <= c.seeds; ++seed) {
      sim::SetSeed(seed);
      sim::CountTraffic(true);
      Attend(s, sequences, {{0, c.keys - 128 / c.group, c.keys}}, {.page_size = 64});
      const std::vector<int> commits = sim::WgmmaCommits();
      sim::CountTraffic(false);
      size_t done[8] = {};  // of each warp
      const auto fewest = [&](size_t group) { return *std::min_element(done + 4 * group, done + 4 * group + 4); };
      for (const int committing : commits) {
        const auto warp = static_cast<size_t>(committing);
        const size_t run = done[warp]++ / 2;
        if (done[warp] % 2 == 0 || run == 0 || run >= c.runs[0]) continue;
        if (warp >= 4) {
          ASSERT_GE(fewest(0), 2 * run + 1) << "run " << run << ", seed " << seed;
        } else {
          ASSERT_GE(fewest(1), 2 * run - 1) << "run " << run << ", seed " << seed;
        }
      }
      for (size_t warp = 0; warp < 8; ++warp) ASSERT_EQ(done[warp], 2 * c.runs[warp / 4]);
    }
  }
}

// Every tile of 128 rows reads the keys and values that it sees once, and all but the queries' share in whole sectors.
TEST_F(CudaPagedAttentionTest, LongPartsReadKeysAndValuesOnceForATile) {
  for (int64_t dim : {64, 128}) {
    const Shape s = {.kv_heads = 2, .group = 4, .dim = dim, .act = DType::kBF16, .q = DType::kBF16};
    const Sequences sequences = MakeSequences(s, {192});
    sim::CountTraffic(true);
    Attend(s, sequences, {{0, 128, 192}}, {.page_size = 64});
    const sim::Traffic traffic = sim::TrafficOf("PrefillAttention");
    EXPECT_EQ(traffic.launches, 1u);
    // Two tiles of 32 queries, which see 160 and 192 keys in three pages each.
    const auto cache = static_cast<uint64_t>(2 * 192 * 2 * s.kv_width() * 2);
    const auto rows = static_cast<uint64_t>(64 * s.q_width() * 2);
    EXPECT_GE(traffic.load_bytes, cache + rows);
    EXPECT_LT(static_cast<double>(traffic.load_bytes), 1.03 * static_cast<double>(cache + rows))
        << sim::TrafficByLine();
    EXPECT_EQ(traffic.store_bytes, rows);
    EXPECT_EQ(sim::TrafficOf("PagedAttention").store_bytes, 0u) << "nothing is left to the other kernel";
    EXPECT_LT(static_cast<double>(traffic.sectors), 1.02 * static_cast<double>(traffic.ideal_sectors))
        << sim::TrafficByLine();
    EXPECT_EQ(traffic.wavefronts, traffic.ideal_wavefronts) << sim::TrafficByLine();
    sim::CountTraffic(false);
  }
}

// A decode of Llama 3.1 8B's heads reads each key and value once for the whole group, in whole sectors.
TEST_F(CudaPagedAttentionTest, TrafficIsThatOfKeysAndValues) {
  for (int64_t dim : {64, 128}) {
    const Shape s = {.kv_heads = 2, .group = 4, .dim = dim, .act = DType::kBF16, .q = DType::kBF16};
    const Sequences sequences = MakeSequences(s, {512});
    sim::CountTraffic(true);
    Attend(s, sequences, {{0, 511, 512}}, {.page_size = 64});
    const sim::Traffic traffic = sim::TrafficOf("PagedAttention");
    EXPECT_EQ(traffic.launches, 1u);
    const auto cache = static_cast<uint64_t>(512 * 2 * s.kv_width() * 2);
    EXPECT_GE(traffic.load_bytes, cache);
    EXPECT_LT(static_cast<double>(traffic.load_bytes), 1.15 * static_cast<double>(cache)) << sim::TrafficByLine();
    EXPECT_LT(static_cast<double>(traffic.sectors), 1.02 * static_cast<double>(traffic.ideal_sectors))
        << sim::TrafficByLine();
    EXPECT_LT(static_cast<double>(traffic.wavefronts), 1.1 * static_cast<double>(traffic.ideal_wavefronts))
        << sim::TrafficByLine();
    sim::CountTraffic(false);
  }
}

// docs/kernels.md argues from these: what both kernels load, over the keys and values that the rows of each tile see
// and the queries; and the fewest sectors and wavefronts.
TEST_F(CudaPagedAttentionTest, CountersAreThoseThatTheDocsArgueFrom) {
  if (kUnderTsan) GTEST_SKIP() << "a prompt of 512 tokens";
  struct Case {
    const char* kernel;
    int64_t group, begin, end, tile_tokens;  // tokens of a tile
    double loaded, wavefronts;               // at most
  };
  for (const Case& c : {Case{"PrefillAttention", 4, 0, 512, 32, 1.06, 1},
                        {"PrefillAttention", 4, 512, 1024, 32, 1.03, 1},
                        {"PagedAttention", 4, 2047, 2048, 1, 1.03, 1.11},
                        {"PagedAttention", 8, 2047, 2048, 1, 1.03, 1.11},
                        {"PagedAttention", 16, 2047, 2048, 1, 1.03, 1.11}}) {
    const Shape s = {.group = c.group, .dim = 128, .act = DType::kBF16, .q = DType::kBF16};
    const Sequences sequences = MakeSequences(s, {c.end});
    sim::CountTraffic(true);
    Attend(s, sequences, {{0, c.begin, c.end}}, {.page_size = 64});
    const sim::Traffic traffic = sim::TrafficOf(c.kernel);
    sim::CountTraffic(false);
    double needed = static_cast<double>((c.end - c.begin) * s.q_width() * 2);
    for (int64_t last = c.begin + c.tile_tokens; last <= c.end; last += c.tile_tokens) {
      needed += static_cast<double>(last * s.kv_width() * 2 * 2);
    }
    const double loaded = static_cast<double>(traffic.load_bytes) / needed;
    const double sectors = static_cast<double>(traffic.sectors) / static_cast<double>(traffic.ideal_sectors);
    const double wavefronts = static_cast<double>(traffic.wavefronts) / static_cast<double>(traffic.ideal_wavefronts);
    EXPECT_EQ(traffic.launches, 1u);
    EXPECT_GE(loaded, 1) << c.kernel << ", group " << c.group;
    EXPECT_LE(loaded, c.loaded) << c.kernel << ", group " << c.group << "\n" << sim::TrafficByLine();
    EXPECT_LE(sectors, 1.005) << c.kernel << ", group " << c.group;
    EXPECT_LE(wavefronts, c.wavefronts) << c.kernel << ", group " << c.group << "\n" << sim::TrafficByLine();
  }
}
#endif

}  // namespace
}  // namespace altiplano
