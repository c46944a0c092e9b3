// How many of a GPU's issue slots the kernels take in the time that their bars leave for their bytes: warps'
// instructions of nvcc's PTX for sm_90a, as they were interpreted (Instruction::issue_slots). docs/kernels.md argues
// from these shares, in percent. Each is printed, and may not become larger than is stated there.
#include <gtest/gtest.h>

#include <cstdint>
#include <cstdio>
#include <string>
#include <tuple>
#include <vector>

#include "kernels/cuda/backend.h"
#include "tests/kernels/cuda/cuda_testlib.h"
#include "tests/kernels/cuda/ptx/machine_testlib.h"
#include "tests/kernels/cuda/rope_store_kv_testlib.h"
#include "tests/kernels/paged_attention_testlib.h"

namespace altiplano {
namespace {

constexpr double kClock = 1.7e9;          // cycles a second
constexpr double kMultiprocessors = 132;  // each with four schedulers, which issue an instruction a cycle
constexpr double kCopy = 0.85 * 4.3e12;   // of row operations: 85 % of a copy on an H200

class IssueSlots : public CudaTest {
 protected:
  template <typename Op>
  double SlotsOf(Op op) {
    const uint64_t before = ptx_machine::IssueSlots();
    op();
    EXPECT_EQ(stream().Synchronize(), "");
    return static_cast<double>(ptx_machine::IssueSlots() - before);
  }
  // Of `slots` for so many bytes, where the bar is so many bytes a second.
  static void HoldAgainst(const std::string& what, double slots, double bytes, double bar, double stated,
                          double multiprocessors = kMultiprocessors) {
    Hold(what, slots, bytes / bar * kClock * multiprocessors, stated);
  }
  // Where a multiprocessor has so many cycles for them.
  static void Hold(const std::string& what, double slots, double cycles, double stated) {
    const double percent = 100 * slots / (4 * cycles);
    std::printf("%-60s %12.0f slots, %5.1f %%\n", what.c_str(), slots, percent);
    EXPECT_LE(percent, stated + 1.5) << what;  // interleavings differ, and with them who goes together
  }

  OnDevice Make(int64_t rows, int64_t columns, DType dtype) {
    Matrix matrix(rows, columns, dtype);
    matrix.FillNormal(1);
    return OnDevice(stream(), matrix);
  }

  double SlotsOfAttention(const AttentionShape& s, const std::vector<int64_t>& contexts, int64_t queries) {
    const Sequences sequences = MakeSequences(s, contexts);
    std::vector<Part> parts;
    for (size_t i = 0; i < contexts.size(); ++i) parts.push_back({i, contexts[i] - queries, contexts[i]});
    const AttentionStep step(s, sequences, parts, 64, 0);
    const OnDevice out(stream(), *step.out), q(stream(), step.q), k(stream(), step.k_pages), v(stream(), step.v_pages);
    const OnDevice begin(stream(), step.q_begin), lengths(stream(), step.lengths), tables(stream(), step.tables);
    const AttentionList planned({.q_heads = s.kv_heads * s.group,
                                 .kv_heads = s.kv_heads,
                                 .dim = s.dim,
                                 .may_prefill = cuda::TakesPrefill(architecture(), s.act, s.dim, 64)},
                                step.q_begin, step.lengths);
    const OnDevice list(stream(), planned.list);
    AttentionWork work = planned.work;
    work.list = list.view();
    return SlotsOf([&] {
      PagedAttention(stream(), {.out = out.view(),
                                .q = q.view(),
                                .k_pages = k.pool(step.pages(), s.kv_heads, 64),
                                .v_pages = v.pool(step.pages(), s.kv_heads, 64),
                                .q_begin = begin.view(),
                                .context_lengths = lengths.view(),
                                .block_tables = tables.view(),
                                .scale = s.scale(),
                                .work = work});
    });
  }
};

constexpr DType kBF16 = DType::kBF16, kF32 = DType::kF32;

TEST_F(IssueSlots, OfProductsOfFewTokens) {
  struct Case {
    int64_t tokens, n, k;
    double multiprocessors, stated;
  };
  for (const Case& c : {Case{1, 2304, 1024, 132, 22}, Case{8, 2304, 1024, 72, 35}, Case{16, 2304, 1024, 72, 50},
                        Case{1, 768, 4096, 48, 54}, Case{16, 768, 4096, 48, 76}}) {
    const OnDevice x = Make(c.tokens, c.k, kBF16), weight = Make(c.n, c.k, kBF16), out = Make(c.tokens, c.n, kBF16);
    const double slots =
        SlotsOf([&] { Linear(stream(), {.out = out.view(), .x = x.view(), .weight = weight.view()}); });
    HoldAgainst("Linear, " + std::to_string(c.n) + " x " + std::to_string(c.k) + ", " + std::to_string(c.tokens) +
                    " tokens, " + std::to_string(static_cast<int>(c.multiprocessors)) + " multiprocessors, 3 TB/s",
                slots, static_cast<double>(c.n * c.k * 2), 3e12, c.stated, c.multiprocessors);
  }
}

TEST_F(IssueSlots, OfProductsOfSomeTokensOnHopper) {
  struct Case {
    int64_t tokens, n, k;
    double stated;
  };
  for (const Case& c : {Case{32, 4096, 1792, 41}, Case{64, 8192, 1024, 34}}) {
    const OnDevice x = Make(c.tokens, c.k, kBF16), weight = Make(c.n, c.k, kBF16), out = Make(c.tokens, c.n, kBF16);
    const double slots =
        SlotsOf([&] { Linear(stream(), {.out = out.view(), .x = x.view(), .weight = weight.view()}); });
    HoldAgainst("Linear on Hopper, " + std::to_string(c.n) + " x " + std::to_string(c.k) + ", " +
                    std::to_string(c.tokens) + " tokens, 64 multiprocessors, 3 TB/s",
                slots, static_cast<double>(c.n * c.k * 2), 3e12, c.stated, 64);
  }
}

TEST_F(IssueSlots, OfRowOperations) {
  const int64_t tokens = 64, hidden = 4096;
  const auto elements = static_cast<double>(tokens * hidden);
  const OnDevice x = Make(tokens, hidden, kF32), residual = Make(tokens, hidden, kF32), weight = Make(1, hidden, kF32);
  const OnDevice out = Make(tokens, hidden, kBF16), gate_up = Make(tokens, 2 * hidden, kBF16);
  HoldAgainst("RmsNorm, f32 to bf16", SlotsOf([&] {
                RmsNorm(stream(), {.out = out.view(), .x = x.view(), .weight = weight.vector(), .eps = 1e-5F});
              }),
              elements * 6, kCopy, 60);
  HoldAgainst(
      "AddRmsNorm, f32 to bf16", SlotsOf([&] {
        AddRmsNorm(
            stream(),
            {.out = out.view(), .residual = residual.view(), .x = x.view(), .weight = weight.vector(), .eps = 1e-5F});
      }),
      elements * 14, kCopy, 29);
  HoldAgainst("SiluMul, bf16", SlotsOf([&] { SiluMul(stream(), {.out = out.view(), .gate_up = gate_up.view()}); }),
              elements * 6, kCopy, 55);
  const int64_t heads = 48, kv_heads = 8, dim = 128;
  const OnDevice qkv = Make(tokens, heads * dim, kBF16), k_pages = Make(2 * kv_heads * 64, dim, kBF16);
  const OnDevice v_pages = Make(2 * kv_heads * 64, dim, kBF16), frequencies = Make(1, dim / 2, kF32);
  std::vector<int32_t> numbers(static_cast<size_t>(tokens));
  for (size_t i = 0; i < numbers.size(); ++i) numbers[i] = static_cast<int32_t>(i);
  const OnDevice positions(stream(), numbers), slots(stream(), numbers);
  HoldAgainst("RopeStoreKv, bf16", SlotsOf([&] {
                RopeStoreKv(stream(), {.q = qkv.view().columns(0, 32 * dim),
                                       .k = qkv.view().columns(32 * dim, kv_heads * dim),
                                       .v = qkv.view().columns(40 * dim, kv_heads * dim),
                                       .k_pages = k_pages.pool(2, kv_heads, 64),
                                       .v_pages = v_pages.pool(2, kv_heads, 64),
                                       .positions = positions.view(),
                                       .slots = slots.view(),
                                       .inv_freq = frequencies.vector()});
              }),
              static_cast<double>(tokens * heads * dim) * 4, kCopy, 48);
}

TEST_F(IssueSlots, OfDecodeAttention) {
  for (const auto& [kv_heads, group, stated] :
       {std::tuple{int64_t{2}, int64_t{4}, 24.0}, {int64_t{2}, int64_t{8}, 25.0}, {int64_t{1}, int64_t{16}, 28.0}}) {
    const AttentionShape s = {.kv_heads = kv_heads, .group = group, .dim = 128, .act = kBF16, .q = kBF16};
    HoldAgainst("decode attention, group of " + std::to_string(group) + ", 3.9 TB/s",
                SlotsOfAttention(s, {2048, 2048}, 1), static_cast<double>(2 * 2048 * kv_heads * 128 * 2 * 2), 3.9e12,
                stated);
  }
}

// A run is 64 keys of a tile of 128 rows; its products take a multiprocessor's tensor cores 1024 cycles. What more of
// them takes that all rows see, and what is left: the diagonal, a tile's start and its end.
TEST_F(IssueSlots, OfPrefillAttention) {
  const AttentionShape s = {.kv_heads = 1, .group = 4, .dim = 128, .act = kBF16, .q = kBF16};
  const int64_t tokens = 128, tiles = tokens / 32, few = 512, many = 2048;
  const double of_few = SlotsOfAttention(s, {few}, tokens), of_many = SlotsOfAttention(s, {many}, tokens);
  const double of_run = (of_many - of_few) / static_cast<double>((many - few) / 64 * tiles);
  Hold("prefill attention, a run that all rows see", of_run, 1024, 80);
  const double seen = static_cast<double>((few - tokens) / 64);
  Hold("prefill attention, what else a tile takes", of_few / tiles - of_run * seen, 1024, 360);
}

}  // namespace
}  // namespace altiplano
