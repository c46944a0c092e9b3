// The passes over a row of logits, and the cut that they find, against loops that sort and count.
#include "kernels/cpu/sample_kernels.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "kernels/cpu/sample_row.h"
#include "tests/kernels/kernels_testlib.h"

namespace altiplano {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
const std::vector<int64_t> kLengths = {1, 2, 7, 8, 9, 15, 16, 17, 63, 64, 65, 511, 2047, 2048, 2049, 5000};

uint64_t WeightOf(float e) {
  return static_cast<uint64_t>(std::nearbyint(static_cast<double>(e) * 0x1p40));
}

class SampleKernelsTest : public IsaTest {};

TEST_P(SampleKernelsTest, FindsTheFirstMaximum) {
  const cpu::SampleKernels& kernels = cpu::CurrentSampleKernels();
  for (int64_t n : kLengths) {
    Matrix x(1, n, DType::kF32);
    for (int64_t first = 0; first < n; first += 1 + n / 97) {
      for (int64_t second : {first, std::min(n - 1, first + 1), n - 1}) {
        x.FillNormal(1);
        x.set(0, second, 9);
        x.set(0, first, 9);
        float max = 0;
        int64_t index = -1;
        ASSERT_TRUE(kernels.max_of(x.view().as<float>(), n, &max, &index));
        ASSERT_EQ(max, 9);
        ASSERT_EQ(index, first) << n;
      }
    }
  }
}

TEST_P(SampleKernelsTest, RefusesNanAndInfinityAnywhere) {
  const cpu::SampleKernels& kernels = cpu::CurrentSampleKernels();
  for (int64_t n : kLengths) {
    Matrix x(1, n, DType::kF32);
    x.FillNormal(2);
    float max = 0;
    int64_t index = 0;
    for (int64_t at = 0; at < n; at += 1 + n / 97) {
      for (float bad : {NAN, -NAN, kInf}) {
        const double good = x.at(0, at);
        x.set(0, at, bad);
        ASSERT_FALSE(kernels.max_of(x.view().as<float>(), n, &max, &index)) << bad << " at " << at << " of " << n;
        x.set(0, at, -kInf);
        ASSERT_TRUE(kernels.max_of(x.view().as<float>(), n, &max, &index));
        x.set(0, at, good);
      }
    }
  }
}

TEST_P(SampleKernelsTest, WeightsAreExactSumsOfRoundedExponentials) {
  const cpu::SampleKernels& kernels = cpu::CurrentSampleKernels();
  for (int64_t n : kLengths) {
    Matrix x(1, n, DType::kF32), e(1, n, DType::kF32);
    x.FillNormal(3, 8);
    const float* logits = x.view().as<float>();
    const float max = *std::max_element(logits, logits + n);
    for (float factor : {1.0f, 0.37f, 1e6f}) {
      const uint64_t total = kernels.exponentials(logits, n, max, factor, e.view().as<float>());
      EXPECT_EQ(kernels.exponentials(logits, n, max, factor, nullptr), total);
      uint64_t sum = 0;
      for (int64_t i = 0; i < n; ++i) {
        const float weight = e.view().as<float>()[i];
        const double exact = std::exp(static_cast<double>((logits[i] - max) * factor));
        ASSERT_NEAR(weight, exact, 2.16 * kUnitF32 * exact + std::exp(-87.0)) << i;
        sum += WeightOf(weight);
      }
      EXPECT_EQ(total, sum) << n;
      for (float threshold : {0.0f, 1e-6f, 0.01f, 0.5f, 1.0f, 1.5f}) {
        uint64_t above = 0;
        for (int64_t i = 0; i < n; ++i) {
          const float weight = e.view().as<float>()[i];
          above += weight >= threshold ? WeightOf(weight) : 0;
        }
        EXPECT_EQ(kernels.weight_at_least(e.view().as<float>(), n, threshold), above) << threshold;
      }
    }
  }
  // Halfway between two multiples of 2^-40: to the even one.
  Matrix halves(1, 4, DType::kF32);
  for (int64_t i = 0; i < 4; ++i) halves.set(0, i, (static_cast<double>(i) + 0.5) * 0x1p-40);
  EXPECT_EQ(kernels.weight_at_least(halves.view().as<float>(), 4, 0), 0u + 2 + 2 + 4);
}

TEST_P(SampleKernelsTest, CountsFindsAndCollects) {
  const cpu::SampleKernels& kernels = cpu::CurrentSampleKernels();
  for (int64_t n : kLengths) {
    Matrix matrix(1, n, DType::kF32);
    matrix.FillNormal(4);
    float* x = matrix.view().as<float>();
    x[n / 2] = -kInf;
    for (float low : {-kInf, -1.0f, 0.0f, x[n - 1], 2.0f, 9.0f}) {
      EXPECT_EQ(kernels.count_at_least(x, n, low), std::count_if(x, x + n, [&](float v) { return v >= low; }));
      for (int64_t begin : {int64_t{0}, n / 3, n - 1, n}) {
        EXPECT_EQ(kernels.find_at_least(x, begin, n, low),
                  std::find_if(x + begin, x + n, [&](float v) { return v >= low; }) - x);
      }
      for (float high : {0.0f, 0.5f, kInf}) {
        std::vector<int32_t> expected, found(static_cast<size_t>(n));
        for (int64_t i = 0; i < n; ++i) {
          if (x[i] >= low && x[i] < high) expected.push_back(static_cast<int32_t>(i));
        }
        found.resize(static_cast<size_t>(kernels.indices_between(x, n, low, high, found.data(), n)));
        EXPECT_EQ(found, expected) << low << ", " << high << ", " << n;
      }
    }
  }
}

// What a cut keeps, by the definition: the shortest run of elements, larger ones and then lower indices first, that
// reaches the target.
void ExpectShortestRun(const std::vector<float>& x, float max, cpu::Measure measure, uint64_t target) {
  const auto n = static_cast<int64_t>(x.size());
  std::vector<int64_t> order(x.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return x[static_cast<size_t>(a)] > x[static_cast<size_t>(b)]; });
  uint64_t reached = 0;
  size_t kept = 0;
  while (reached < target) {
    reached += measure == cpu::Measure::kWeight ? WeightOf(x[static_cast<size_t>(order[kept])]) : 1;
    ++kept;
  }
  const float last = x[static_cast<size_t>(order[kept - 1])];
  const int64_t above = std::count_if(x.begin(), x.end(), [&](float v) { return v > last; });
  const cpu::Cut cut = cpu::FindCut(cpu::CurrentSampleKernels(), x.data(), n, max, measure, target);
  EXPECT_EQ(cut.value, last) << "target " << target << " of " << n;
  EXPECT_EQ(cut.ties, static_cast<int64_t>(kept) - above) << "target " << target << " of " << n;
  EXPECT_EQ(cut.equal, std::count(x.begin(), x.end(), last)) << "target " << target << " of " << n;
}

TEST_P(SampleKernelsTest, CutsWhereACountIsReached) {
  std::mt19937 random(5);
  for (size_t n : {1, 2, 5, 100, 511, 512, 513, 600, 2000, 6000}) {
    for (int kind = 0; kind < 6; ++kind) {
      std::normal_distribution<float> normal(kind == 1 ? -30.0f : 0.0f, kind == 2 ? 20.0f : 3.0f);
      std::vector<float> x(n);
      for (float& v : x) {
        v = normal(random);
        if (kind == 3) v = std::round(v);                     // many equal
        if (kind == 4) v = v > 0 ? -0.0f : std::round(v);     // the maximum may be -0
        if (kind == 5) v = v > 3 ? v : v > 0 ? -kInf : 1.0f;  // masked, and a large tie
      }
      const float max = *std::max_element(x.begin(), x.end());
      for (uint64_t target : {size_t{1}, size_t{2}, n / 3, n / 2, n - 1, n}) {
        if (target >= 1 && target <= n) ExpectShortestRun(x, max, cpu::Measure::kCount, target);
      }
    }
  }
}

TEST_P(SampleKernelsTest, CutsWhereAWeightIsReached) {
  std::mt19937 random(6);
  for (size_t n : {1, 2, 5, 100, 512, 513, 2000, 6000}) {
    for (float spread : {0.0f, 0.01f, 1.0f, 5.0f, 20.0f}) {
      for (bool rounded : {false, true}) {
        std::vector<float> e(n);
        std::exponential_distribution<float> below;
        for (float& v : e) {
          const float distance = below(random) * spread;
          v = std::exp(-(rounded ? std::round(distance) : distance));
        }
        e[n / 2] = 1;
        uint64_t total = 0;
        for (float v : e) total += WeightOf(v);
        for (double share : {0.0, 0.01, 0.3, 0.5, 0.9, 0.999, 1.0}) {
          const auto target = std::max<uint64_t>(1, static_cast<uint64_t>(share * static_cast<double>(total)));
          ExpectShortestRun(e, 1, cpu::Measure::kWeight, target);
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Levels, SampleKernelsTest, testing::Values(Isa::kAvx2, Isa::kAvx512), IsaTestName);

}  // namespace
}  // namespace altiplano
