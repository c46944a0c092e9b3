// The functions under the ops, where their promise is finer than an op's test can see.
#include "kernels/cpu/vec_rows.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "tests/kernels/kernels_testlib.h"

namespace altiplano {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The distance between neighbouring floats around x.
double UlpOf(double x) {
  return std::ldexp(1.0, std::max(std::ilogb(x == 0 ? 0x1p-149 : x), -126) - 23);
}

class VecRowsTest : public IsaTest {};

std::vector<float> Exp(const std::vector<float>& x) {
  std::vector<float> e(x.size());
  cpu::CurrentRowKernels().exp(e.data(), x.data(), static_cast<int64_t>(x.size()));
  return e;
}

TEST_P(VecRowsTest, ExpIsWithin108HundredthsOfAnUlp) {
  std::vector<float> x;
  for (float f = -87; f <= 88; f += 0.0003f) x.push_back(f);
  for (float f = 1e-30f; f < 1; f *= 1.01f) {
    x.push_back(f);
    x.push_back(-f);
  }
  x.insert(x.end(), {-87, 88, 0, -0.0f, 5.19920921f});
  const std::vector<float> e = Exp(x);
  for (size_t i = 0; i < x.size(); ++i) {
    const double exact = std::exp(static_cast<double>(x[i]));
    ASSERT_NEAR(e[i], exact, 1.08 * UlpOf(exact)) << x[i];
  }
}

TEST_P(VecRowsTest, ExpEndsWhereItSays) {
  const float below = std::nextafter(-87.0f, -kInfinity), above = std::nextafter(88.0f, kInfinity);
  const std::vector<float> e = Exp({below, -1e30f, -kInfinity, above, 1e30f, kInfinity, NAN, 0, -0.0f});
  for (size_t i = 0; i < 3; ++i) EXPECT_EQ(std::bit_cast<uint32_t>(e[i]), 0u) << i;
  for (size_t i = 3; i < 6; ++i) EXPECT_EQ(e[i], kInfinity) << i;
  EXPECT_TRUE(std::isnan(e[6]));
  EXPECT_EQ(e[7], 1);
  EXPECT_EQ(e[8], 1);
}

TEST_P(VecRowsTest, ConvertsEveryBf16) {
  Matrix all(1, 0x10000, DType::kBF16), wide(1, 0x10000, DType::kF32), back(1, 0x10000, DType::kBF16);
  for (uint32_t bits = 0; bits < 0x10000; ++bits) all.view().as<uint16_t>()[bits] = static_cast<uint16_t>(bits);
  const cpu::RowKernels& kernels = cpu::CurrentRowKernels();
  kernels.convert({wide.view().data, false}, {all.view().data, true}, 0x10000);
  for (uint32_t lower : {0x0000u, 0x0001u, 0x7FFFu, 0x8000u, 0x8001u, 0xFFFFu}) {
    for (uint32_t bits = 0; bits < 0x10000; ++bits) {
      uint32_t& x = wide.view().as<uint32_t>()[bits];
      ASSERT_EQ(x >> 16, bits);
      x = bits << 16 | lower;
    }
    kernels.convert({back.view().data, true}, {wide.view().data, false}, 0x10000);
    for (uint32_t bits = 0; bits < 0x10000; ++bits) {
      ASSERT_EQ(back.view().as<uint16_t>()[bits], ToBF16(wide.view().as<float>()[bits]).bits) << bits << ", " << lower;
    }
  }
}

// The angle position * inv_freq is exact in a double up to 2^29, and in a long double beyond.
TEST_P(VecRowsTest, CosAndSinAreWithin51HundredthsOfAnUlp) {
  for (int64_t n = 1; n <= 19; ++n) {
    Matrix frequencies(1, n, DType::kF32);
    for (int64_t position : {0, 1, 2, 3, 100, 8191, 8192, 65535, 131071, 131072, 1 << 24, (1 << 29) - 1}) {
      for (int64_t i = 0; i < n; ++i) {
        frequencies.set(0, i, std::pow(500000.0, -static_cast<double>(i * 37 % 64) / 64) * (i % 3 ? 1 : 0.7));
      }
      std::vector<float> cos(24), sin(24);
      cpu::CurrentRowKernels().cos_sin(frequencies.view().as<float>(), n, position, cos.data(), sin.data());
      for (int64_t i = 0; i < n; ++i) {
        const long double angle =
            static_cast<long double>(position) * static_cast<long double>(frequencies.view().as<float>()[i]);
        const auto exact_cos = static_cast<double>(cosl(angle)), exact_sin = static_cast<double>(sinl(angle));
        const auto at = static_cast<size_t>(i);
        // Results below 1e-6 are off by what is left of the reduction and the series.
        ASSERT_NEAR(cos[at], exact_cos, std::max(0.51 * UlpOf(exact_cos), 3e-14)) << position << ", " << i;
        ASSERT_NEAR(sin[at], exact_sin, std::max(0.51 * UlpOf(exact_sin), 3e-14)) << position << ", " << i;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Levels, VecRowsTest, testing::Values(Isa::kAvx2, Isa::kAvx512), IsaTestName);

// Exp and the angles feed sampling and the cache, which must not tell machines apart.
TEST(VecRows, LevelsAgreeToTheBit) {
  if (DetectedIsa() < Isa::kAvx512) GTEST_SKIP() << "this machine has one level";
  std::vector<float> x, narrow(200000), wide(200000);
  for (size_t i = 0; i < narrow.size(); ++i) x.push_back(static_cast<float>(i) * 0.001f - 100);
  cpu::kRowsAvx2.exp(narrow.data(), x.data(), static_cast<int64_t>(x.size()));
  cpu::kRowsAvx512.exp(wide.data(), x.data(), static_cast<int64_t>(x.size()));
  EXPECT_EQ(std::memcmp(narrow.data(), wide.data(), x.size() * sizeof(float)), 0);
  for (int64_t position = 0; position < 200000; position += 77) {
    const float frequencies[] = {1, 0.3f, 0.01f, 2e-5f, 0.7f, 0.5f, 1e-6f, 0.25f};
    float cos[2][8], sin[2][8];
    cpu::kRowsAvx2.cos_sin(frequencies, 8, position, cos[0], sin[0]);
    cpu::kRowsAvx512.cos_sin(frequencies, 8, position, cos[1], sin[1]);
    ASSERT_EQ(std::memcmp(cos[0], cos[1], sizeof(cos[0])), 0) << position;
    ASSERT_EQ(std::memcmp(sin[0], sin[1], sizeof(sin[0])), 0) << position;
  }
}

}  // namespace
}  // namespace altiplano
