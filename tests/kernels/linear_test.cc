// Linear on every instruction set that this machine has, and the AMX kernel on emulated tiles, against float64.
#include "kernels/cpu/linear.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "kernels/cpu/cpu_features.h"
#include "kernels/cpu/linear_kernel.h"
#include "kernels/cpu/ops.h"
#include "kernels/cpu/thread_team.h"
#include "kernels/ops.h"
#include "tests/kernels/kernels_testlib.h"

namespace altiplano {
namespace {

struct Path {
  const cpu::LinearKernel* kernel;
  DType dtype;
  Isa needs;
  std::string name;
};

std::vector<Path> AllPaths() {
  return {{&cpu::kLinearF32Avx2, DType::kF32, Isa::kAvx2, "f32_avx2"},
          {&cpu::kLinearF32Avx512, DType::kF32, Isa::kAvx512, "f32_avx512"},
          {&cpu::kLinearBf16Avx2, DType::kBF16, Isa::kAvx2, "bf16_avx2"},
          {&cpu::kLinearBf16Avx512, DType::kBF16, Isa::kAvx512, "bf16_avx512"},
          {&cpu::kLinearBf16Avx512Bf16, DType::kBF16, Isa::kAvx512Bf16, "bf16_avx512_bf16"},
          {&cpu::kLinearBf16AmxHost, DType::kBF16, Isa::kAvx2, "bf16_amx_host"},
          {&cpu::kLinearBf16Amx, DType::kBF16, Isa::kAmxBf16, "bf16_amx"}};
}

// How far a result may lie from the exact one. With unit roundoff u = 2^-24, a sum in which each product goes through
// at most d roundings is off by at most gamma_d * S, gamma_d = d u / (1 - d u), S = sum |x w| (Higham, Accuracy and
// Stability of Numerical Algorithms, 4.2). Lanes shorten the path: the narrowest kernel has 8, so d <= K/8 steps, 3
// folds, one addition for each block of K, at most K/128 + 1 of them, and the product's own rounding; vdpbf16ps and AMX
// take two roundings a step of 32, or 18 and one more for each step. d = K/8 + K/128 + 24 covers all. Denormal inputs,
// products or sums may count as zero: 2^-126 for each of K. Adding to what is there rounds once more; bf16 results are
// rounded to 8 bits, half a unit being at most 2^-8 of the value.
double Bound(int64_t k, double magnitude, double before, double exact, DType out) {
  const double u = 0x1p-24, d = static_cast<double>(k / 8 + k / 128 + 24);
  double bound = d * u / (1 - d * u) * magnitude + static_cast<double>(k) * 0x1p-126 * 8;
  bound += u * (std::abs(before) + std::abs(exact) + bound);
  if (out == DType::kBF16) bound += 0x1p-8 * (std::abs(exact) + bound);
  return bound;
}

struct Shape {
  int64_t tokens, n, k;
};

class LinearTest : public testing::TestWithParam<Path> {
 protected:
  void SetUp() override {
    if (GetParam().needs > DetectedIsa()) GTEST_SKIP() << "this machine lacks " << Name(GetParam().needs);
  }

  void Multiply(ThreadTeam& team, const TensorView& out, const TensorView& x, const TensorView& weight,
                bool accumulate = false) {
    cpu::LinearWith(*GetParam().kernel, team, {.out = out, .x = x, .weight = weight, .accumulate = accumulate});
  }

  void ExpectNearOracle(const Shape& shape, DType out_dtype, bool accumulate, int64_t gap, int threads) {
    const auto [tokens, n, k] = shape;
    const DType act = GetParam().dtype;
    Matrix x(tokens, k, act, gap), weight(n, k, act, gap), out(tokens, n, out_dtype, gap), before(tokens, n, out_dtype);
    x.FillNormal(1);
    weight.FillNormal(2);
    before.FillNormal(3);
    out.Fill(before);
    ThreadTeam team(threads);
    Multiply(team, out.view(), x.view(), weight.view(), accumulate);
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t j = 0; j < n; ++j) {
        double exact = accumulate ? before.at(t, j) : 0, magnitude = 0;
        const double old = exact;
        for (int64_t i = 0; i < k; ++i) {
          exact += x.at(t, i) * weight.at(j, i);
          magnitude += std::abs(x.at(t, i) * weight.at(j, i));
        }
        ASSERT_NEAR(out.at(t, j), exact, Bound(k, magnitude, old, exact, out_dtype))
            << "token " << t << " of " << tokens << ", column " << j << " of " << n << ", k " << k << ", "
            << Name(out_dtype) << (accumulate ? ", accumulated" : "");
      }
    }
    EXPECT_TRUE(out.GapsUntouched());
  }
};

TEST_P(LinearTest, IsNearTheOracleForRaggedShapes) {
  // Around every width of the kernels: steps of 8, 16 and 32, panels of 6 and 32 rows, groups of 2, 4 and 16 tokens.
  for (int64_t k : {1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 65}) {
    for (int64_t n : {1, 5, 6, 7, 17, 33}) {
      for (int64_t tokens : {1, 2, 3, 5, 17}) ExpectNearOracle({tokens, n, k}, DType::kF32, false, 0, 1);
    }
  }
  for (int64_t tokens = 1; tokens <= 70; ++tokens) ExpectNearOracle({tokens, 13, 50}, DType::kF32, false, 0, 1);
}

TEST_P(LinearTest, IsNearTheOracleForSeveralBlocks) {
  // Blocks of K are at most 1536 long (768 in f32), of columns 192, of tokens 256.
  for (const Shape& shape : {Shape{3, 20, 770}, Shape{40, 20, 770}, Shape{2, 7, 1537}, Shape{33, 9, 3100},
                             Shape{5, 400, 65}, Shape{36, 397, 40}, Shape{258, 11, 70}}) {
    ExpectNearOracle(shape, DType::kF32, false, 0, 1);
    ExpectNearOracle(shape, GetParam().dtype, true, 0, 2);
  }
}

TEST_P(LinearTest, AddsToWhatIsThereAndRoundsOnce) {
  for (DType out : {DType::kF32, GetParam().dtype}) {
    for (bool accumulate : {false, true}) {
      for (int64_t tokens : {1, 4, 7, 16, 35}) ExpectNearOracle({tokens, 23, 129}, out, accumulate, 0, 1);
    }
  }
}

TEST_P(LinearTest, TakesViewsWhoseRowsLieApart) {
  for (int64_t gap : {1, 3, 64}) {
    for (int64_t tokens : {1, 2, 9, 34}) {
      ExpectNearOracle({tokens, 29, 77}, DType::kF32, false, gap, 2);
      ExpectNearOracle({tokens, 8, 1550}, GetParam().dtype, true, gap, 1);
    }
  }
}

// The same weights, gapless and apart (memory is then walked in another order), must give the same bits.
TEST_P(LinearTest, RowsDoNotDependOnBatchThreadsOrStrides) {
  const DType act = GetParam().dtype;
  ThreadTeam one(1), three(3);
  for (const auto& [n, k] : {std::pair<int64_t, int64_t>{47, 100}, {200, 130}, {19, 1600}, {13, 3090}}) {
    constexpr int64_t kTokens = 300;
    Matrix x(kTokens, k, act), weight(n, k, act), apart(n, k, act, 5);
    x.FillNormal(4);
    weight.FillNormal(5);
    apart.Fill(weight);
    Matrix all(kTokens, n, DType::kF32);
    Multiply(three, all.view(), x.view(), weight.view());
    for (int64_t tokens : {1, 2, 3, 4, 5, 6, 7, 8, 11, 16, 17, 24, 31, 33, 64, 70, 257}) {
      for (int64_t begin : {int64_t{0}, kTokens - tokens}) {
        TensorView part = x.view().first(tokens);
        part.data = x.view().row<char>(begin * static_cast<int64_t>(SizeOf(act)));
        Matrix out(tokens, n, DType::kF32);
        for (const Matrix* w : {&weight, &apart}) {
          Multiply(one, out.view(), part, w->view());
          for (int64_t t = 0; t < tokens; ++t) {
            ASSERT_EQ(out.RowBytes(t), all.RowBytes(begin + t))
                << "token " << begin + t << " as number " << t << " of " << tokens << ", n " << n << ", k " << k;
          }
        }
      }
    }
  }
}

TEST_P(LinearTest, KeepsNanAndInfinityInTheirRowAndColumn) {
  constexpr int64_t kTokens = 11, kN = 20, kK = 45;
  const float nan = std::numeric_limits<float>::quiet_NaN(), infinity = std::numeric_limits<float>::infinity();
  ThreadTeam team(1);
  for (DType out_dtype : {DType::kF32, GetParam().dtype}) {
    Matrix x(kTokens, kK, GetParam().dtype), weight(kN, kK, GetParam().dtype);
    Matrix clean(kTokens, kN, out_dtype), dirty(kTokens, kN, out_dtype);
    x.FillNormal(6);
    weight.FillNormal(7);
    weight.set(3, 44, 1.5f);
    Multiply(team, clean.view(), x.view(), weight.view());
    x.set(4, 2, nan);
    x.set(9, 44, infinity);
    weight.set(17, 40, nan);
    Multiply(team, dirty.view(), x.view(), weight.view());
    EXPECT_EQ(dirty.at(9, 3), infinity);
    for (int64_t t = 0; t < kTokens; ++t) {
      for (int64_t j = 0; j < kN; ++j) {
        if (t == 4 || j == 17) {
          EXPECT_TRUE(std::isnan(dirty.at(t, j))) << t << ", " << j;
        } else if (t != 9) {
          EXPECT_EQ(dirty.at(t, j), clean.at(t, j)) << t << ", " << j;
        }
      }
    }
  }
}

TEST_P(LinearTest, RoundsBf16ResultsToNearestEven) {
  if (GetParam().dtype != DType::kBF16) GTEST_SKIP() << "f32 results are not rounded";
  // 1 + j * 2^-9 in two products: a bf16 has steps of 2^-7 there, so j = 2 and 6 are ties.
  Matrix x(1, 2, DType::kBF16), weight(8, 2, DType::kBF16), out(1, 8, DType::kBF16);
  x.set(0, 0, 1);
  x.set(0, 1, 0x1p-9f);
  for (int64_t j = 0; j < 8; ++j) {
    weight.set(j, 0, 1);
    weight.set(j, 1, static_cast<float>(j));
  }
  ThreadTeam team(1);
  Multiply(team, out.view(), x.view(), weight.view());
  const double expected[] = {0, 0, 0, 1, 1, 1, 2, 2};
  for (int64_t j = 0; j < 8; ++j) EXPECT_EQ(out.at(0, j), 1 + expected[j] * 0x1p-7) << j;
}

INSTANTIATE_TEST_SUITE_P(AllKernels, LinearTest, testing::ValuesIn(AllPaths()),
                         [](const auto& test) { return test.param.name; });

TEST(LinearDispatch, UsesTheKernelsOfTheLevel) {
  constexpr int64_t kTokens = 3, kN = 10, kK = 333;
  ThreadTeam team(1);
  for (Isa isa : {Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16}) {
    ScopedIsa scope(isa);
    if (!scope.available()) continue;
    EXPECT_EQ(cpu::LinearBackend(), Name(isa));
    for (const Path& path : AllPaths()) {
      const bool expected = path.dtype == DType::kBF16 ? path.needs == isa && path.kernel != &cpu::kLinearBf16AmxHost
                                                       : path.needs == std::min(isa, Isa::kAvx512);
      if (!expected) continue;
      Matrix x(kTokens, kK, path.dtype), weight(kN, kK, path.dtype);
      Matrix dispatched(kTokens, kN, DType::kF32), direct(kTokens, kN, DType::kF32);
      x.FillNormal(8);
      weight.FillNormal(9);
      cpu::Linear(team, {.out = dispatched.view(), .x = x.view(), .weight = weight.view()});
      cpu::LinearWith(*path.kernel, team, {.out = direct.view(), .x = x.view(), .weight = weight.view()});
      for (int64_t t = 0; t < kTokens; ++t) EXPECT_EQ(dispatched.RowBytes(t), direct.RowBytes(t)) << path.name;
    }
  }
}

TEST(LinearDispatch, SelfCheckPassesGoodKernelsAndFailsBrokenOnes) {
  EXPECT_TRUE(cpu::LinearKernelsAgree(cpu::kLinearBf16AmxHost, cpu::kLinearBf16Avx2));
  if (DetectedIsa() >= Isa::kAvx512Bf16) {
    EXPECT_TRUE(cpu::LinearKernelsAgree(cpu::kLinearBf16AmxHost, cpu::kLinearBf16Avx512Bf16));
  }
  cpu::LinearKernel stale = cpu::kLinearBf16AmxHost;  // writes nothing at all
  stale.run = [](const cpu::LinearTask&, int64_t, int64_t, float*) {};
  EXPECT_FALSE(cpu::LinearKernelsAgree(stale, cpu::kLinearBf16Avx2));
  cpu::LinearKernel swapped = cpu::kLinearBf16AmxHost;  // two elements of K change places in one token
  swapped.pack = [](const void* x, int64_t stride, int64_t tokens, int64_t k, int64_t begin, int64_t end,
                    void* packed) {
    cpu::kLinearBf16AmxHost.pack(x, stride, tokens, k, begin, end, packed);
    uint16_t* elements = static_cast<uint16_t*>(packed);
    std::swap(elements[0], elements[1]);
  };
  EXPECT_FALSE(cpu::LinearKernelsAgree(swapped, cpu::kLinearBf16Avx2));
  cpu::LinearKernel nan = cpu::kLinearBf16AmxHost;
  nan.run = [](const cpu::LinearTask& task, int64_t begin, int64_t end, float* partial) {
    cpu::kLinearBf16AmxHost.run(task, begin, end, partial);
    static_cast<float*>(task.out)[5] = std::numeric_limits<float>::quiet_NaN();
  };
  EXPECT_FALSE(cpu::LinearKernelsAgree(nan, cpu::kLinearBf16Avx2));
}

}  // namespace
}  // namespace altiplano
