// Every op of a step in the shapes that 8B, 70B and 405B have on one of eight ranks, for one token or a few. Of the
// largest matrices a part of the rows is enough: blocks take 16 each and know nothing of the others.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>

#include "tests/kernels/cuda/cuda_testlib.h"
#include "tests/kernels/cuda/rope_store_kv_testlib.h"
#include "tests/kernels/paged_attention_testlib.h"

namespace altiplano {
namespace {

struct Rank {
  const char* model;
  int64_t hidden, q_heads, ffn;  // one KV head each
};
constexpr Rank kRanks[] = {{"8b", 4096, 4, 1792}, {"70b", 8192, 8, 3584}, {"405b", 16384, 16, 6656}};
constexpr int64_t kDim = 128;
constexpr int64_t kMostWeights = int64_t{1} << (kDevice == Device::kCuda ? 20 : 24);

// FillNormal takes seconds for millions.
void FillFast(const Matrix& matrix, uint32_t seed) {
  for (int64_t i = 0; i < matrix.rows(); ++i) {
    BF16* row = matrix.view().row<BF16>(i);
    for (int64_t j = 0; j < matrix.columns(); ++j) {
      seed = seed * 1664525 + 1013904223;
      row[j].bits = static_cast<uint16_t>(0x3C00 | (seed >> 16 & 0x81FF));  // of either sign, around 2^-7
    }
  }
}

class CudaModelShapesTest : public CudaTest {
 protected:
  void SetUp() override {
    CudaTest::SetUp();
    if (kUnderTsan) GTEST_SKIP() << "no race depends on these sizes";
  }

  // Some columns of x * weight^T, of all that there are rows for. scratch: or null, for the kernels of few tokens.
  void ExpectProduct(const Rank& rank, int64_t tokens, int64_t n, int64_t k, void* scratch = nullptr) {
    n = std::min(n, std::max<int64_t>(48, kMostWeights / k));
    Matrix x(tokens, k, DType::kBF16), weight(n, k, DType::kBF16), out(tokens, n, DType::kF32);
    FillFast(x, 1);
    FillFast(weight, 2);
    const OnDevice d_x(stream(), x), d_weight(stream(), weight), d_out(stream(), out);
    Linear(stream(), {.out = d_out.view(),
                      .x = d_x.view(),
                      .weight = d_weight.view(),
                      .batch_invariant = scratch == nullptr,
                      .scratch = scratch});
    d_out.Fetch(out);
    const int64_t depth = scratch == nullptr ? k / 4 : k;  // of a sum
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t j = 0; j < n; j += 7) {
        double exact = 0, magnitude = 0;
        for (int64_t i = 0; i < k; ++i) {
          exact += x.at(t, i) * weight.at(j, i);
          magnitude += std::abs(x.at(t, i) * weight.at(j, i));
        }
        ASSERT_NEAR(out.at(t, j), exact, static_cast<double>(depth + 40) * kUnitF32 * magnitude)
            << rank.model << ", " << n << " x " << k << ", column " << j;
      }
    }
  }
};

TEST_F(CudaModelShapesTest, ProductsOfADecode) {
  for (const Rank& r : kRanks) {
    for (int64_t tokens : {1, 16}) {
      ExpectProduct(r, tokens, (r.q_heads + 2) * kDim, r.hidden);
      ExpectProduct(r, tokens, r.hidden, r.q_heads * kDim);
      ExpectProduct(r, tokens, r.hidden, r.ffn);
      ExpectProduct(r, tokens, 128256 / 8, r.hidden);
    }
  }
}

TEST_F(CudaModelShapesTest, ProductsOfADecodeOfManySequences) {
  const Buffer scratch = Buffer::Allocate(stream(), kLinearScratchBytes);
  PrepareLinear(stream(), scratch.data());
  for (const Rank& r : kRanks) {
    ExpectProduct(r, 20, (r.q_heads + 2) * kDim, r.hidden, scratch.data());
    ExpectProduct(r, 20, r.hidden, r.ffn, scratch.data());
  }
}

TEST_F(CudaModelShapesTest, GateAndUpHaveTheBitsOfTwoOps) {
  for (const Rank& r : kRanks) {
    const int64_t ffn = std::min(r.ffn, std::max<int64_t>(48, kMostWeights / 2 / r.hidden));
    Matrix x(2, r.hidden, DType::kBF16), weight(2 * ffn, r.hidden, DType::kBF16), gate_up(2, 2 * ffn, DType::kBF16);
    Matrix one(2, ffn, DType::kBF16), two(2, ffn, DType::kBF16);
    FillFast(x, 3);
    FillFast(weight, 4);
    const OnDevice d_x(stream(), x), d_weight(stream(), weight), d_gate_up(stream(), gate_up);
    const OnDevice d_one(stream(), one), d_two(stream(), two);
    LinearArgs args = {.out = d_gate_up.view(), .x = d_x.view(), .weight = d_weight.view(), .batch_invariant = true};
    Linear(stream(), args);
    SiluMul(stream(), {.out = d_two.view(), .gate_up = d_gate_up.view()});
    LinearSiluMul(stream(),
                  {.out = d_one.view(), .x = d_x.view(), .weight = d_weight.view(), .gate_up = d_gate_up.view()});
    d_one.Fetch(one);
    d_two.Fetch(two);
    for (int64_t t = 0; t < 2; ++t) EXPECT_EQ(one.RowBytes(t), two.RowBytes(t)) << r.model;
  }
}

TEST_F(CudaModelShapesTest, RowsOfTheHiddenSize) {
  for (const Rank& r : kRanks) {
    Matrix table(3, r.hidden, DType::kBF16), wide(2, r.hidden, DType::kF32), weight(1, r.hidden, DType::kBF16);
    Matrix x(2, r.hidden, DType::kBF16), out(2, r.hidden, DType::kBF16), sum(2, r.hidden, DType::kF32);
    FillFast(table, 5);
    FillFast(weight, 6);
    FillFast(x, 7);
    const OnDevice d_table(stream(), table), d_wide(stream(), wide), d_weight(stream(), weight), d_x(stream(), x);
    const OnDevice d_out(stream(), out), d_ids(stream(), std::vector<int32_t>{2, 0});
    Embed(stream(), {.out = d_wide.view(), .table = d_table.view(), .ids = d_ids.view()});
    AddRmsNorm(
        stream(),
        {.out = d_out.view(), .residual = d_wide.view(), .x = d_x.view(), .weight = d_weight.vector(), .eps = 1e-5f});
    d_wide.Fetch(sum);
    d_out.Fetch(out);
    const auto bound = [](int64_t n, double exact, DType dtype) {
      const double before = static_cast<double>(n / 32 + 40) * kUnitF32 * std::abs(exact) + 0x1p-126;
      return before + RoundingBound(dtype, exact, before);
    };
    for (int64_t t = 0; t < 2; ++t) {
      for (int64_t j = 0; j < r.hidden; ++j) {
        ASSERT_EQ(sum.at(t, j), static_cast<float>(table.at(t == 0 ? 2 : 0, j) + x.at(t, j))) << r.model << ", " << j;
      }
      ExpectRmsNorm(sum, weight, 1e-5f, out, t, bound);
    }
    GatherRows(stream(), {.out = d_x.view(), .x = d_table.view(), .rows = d_ids.view()});
    d_x.Fetch(x);
    EXPECT_EQ(x.RowBytes(0), table.RowBytes(2)) << r.model;
    EXPECT_EQ(x.RowBytes(1), table.RowBytes(0)) << r.model;
  }
}

TEST_F(CudaModelShapesTest, RotationOfTheHeads) {
  for (const Rank& r : kRanks) {
    RopeStep step(
        {.q_heads = r.q_heads, .kv_heads = 1, .dim = kDim, .page_size = 64, .in = DType::kBF16, .act = DType::kBF16},
        {0, 777, 131071}, PlainFrequencies(kDim), {});
    RotateOnDevice(stream(), &step);
    step.ExpectDone(RopeBound);
  }
}

// Decodes and, on Hopper, parts for the prefill kernel: values of ones must come back as ones.
TEST_F(CudaModelShapesTest, AttentionOfTheGroup) {
  for (const Rank& r : kRanks) {
    const AttentionShape s = {.group = r.q_heads, .dim = kDim, .act = DType::kBF16, .q = DType::kBF16};
    const Sequences sequences = MakeSequences(s, {200});
    for (int64_t i = 0; i < 200; ++i) {
      for (int64_t j = 0; j < kDim; ++j) sequences[0]->v.set(i, j, j % 2 == 0 ? 1 : -2);
    }
    AttentionStep step(s, sequences, {{0, 199, 200}, {0, 150, 150 + 128 / r.q_heads}}, 64, 0);
    const OnDevice d_out(stream(), *step.out), d_q(stream(), step.q), d_k(stream(), step.k_pages);
    const OnDevice d_v(stream(), step.v_pages), d_begin(stream(), step.q_begin), d_lengths(stream(), step.lengths);
    const OnDevice d_tables(stream(), step.tables);
    const cuda::AttentionSizes sizes = {.q_heads = r.q_heads,
                                        .kv_heads = 1,
                                        .dim = kDim,
                                        .may_prefill = cuda::TakesPrefill(architecture(), DType::kBF16, kDim, 64),
                                        .scratch_bytes = 0};
    const AttentionList work(sizes, step.q_begin, step.lengths);
    const OnDevice d_list(stream(), work.list);
    AttentionWork attention_work = work.work;
    attention_work.list = d_list.view();
    PagedAttention(stream(), {.out = d_out.view(),
                              .q = d_q.view(),
                              .k_pages = d_k.pool(step.pages(), 1, 64),
                              .v_pages = d_v.pool(step.pages(), 1, 64),
                              .q_begin = d_begin.view(),
                              .context_lengths = d_lengths.view(),
                              .block_tables = d_tables.view(),
                              .scale = s.scale(),
                              .work = attention_work});
    d_out.Fetch(*step.out);
    for (int64_t t = 0; t < step.out->rows(); ++t) {
      for (int64_t j = 0; j < s.q_width(); ++j) {
        ASSERT_NEAR(step.out->at(t, j), j % 2 == 0 ? 1 : -2, 0.02) << r.model << ", " << t << ", " << j;
      }
    }
  }
}

}  // namespace
}  // namespace altiplano
