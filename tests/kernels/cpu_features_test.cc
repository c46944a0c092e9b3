#include "kernels/cpu/cpu_features.h"

#include <gtest/gtest.h>

namespace altiplano {
namespace {

constexpr Isa kIsas[] = {Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16, Isa::kAmxBf16};

TEST(CpuFeatures, NamesAndLevelsAreOneToOne) {
  EXPECT_STREQ(Name(Isa::kAvx2), "avx2");
  EXPECT_STREQ(Name(Isa::kAvx512), "avx512");
  EXPECT_STREQ(Name(Isa::kAvx512Bf16), "avx512_bf16");
  EXPECT_STREQ(Name(Isa::kAmxBf16), "amx_bf16");
  for (Isa isa : kIsas) EXPECT_EQ(ParseIsa(Name(isa)), isa);
  for (const char* name : {"", "avx", "AVX2", "avx512 ", "avx512_bf1", "sse2"}) EXPECT_EQ(ParseIsa(name), std::nullopt);
}

TEST(CpuFeatures, TheLevelCanBeLoweredButNotRaisedAboveTheMachine) {
  ASSERT_TRUE(CpuIsSupported());
  ScopedIsa restored(CurrentIsa());
  for (Isa isa : kIsas) {
    ASSERT_TRUE(SetIsa(Isa::kAvx2));
    EXPECT_EQ(SetIsa(isa), isa <= DetectedIsa());
    EXPECT_EQ(CurrentIsa(), isa <= DetectedIsa() ? isa : Isa::kAvx2);
  }
}

TEST(CpuFeatures, AScopeRestoresTheLevelBeforeIt) {
  const Isa before = CurrentIsa();
  {
    ScopedIsa outer(Isa::kAvx2);
    EXPECT_TRUE(outer.available());
    for (Isa isa : kIsas) {
      ScopedIsa inner(isa);
      EXPECT_EQ(inner.available(), isa <= DetectedIsa());
    }
    EXPECT_EQ(CurrentIsa(), Isa::kAvx2);
  }
  EXPECT_EQ(CurrentIsa(), before);
}

TEST(CpuFeatures, OnlyIntelsLoneVdpbf16psIsLeftAlone) {
  for (Isa isa : kIsas) {
    EXPECT_EQ(FavouredIsa(isa, "AuthenticAMD"), isa);
    EXPECT_EQ(FavouredIsa(isa, "GenuineIntel"), isa == Isa::kAvx512Bf16 ? Isa::kAvx512 : isa);
  }
  EXPECT_TRUE(CurrentIsa() == DetectedIsa() || CurrentIsa() == Isa::kAvx512);
}

TEST(CpuFeatures, TheModelNameIsTrimmed) {
  const std::string name = CpuModelName();
  ASSERT_FALSE(name.empty());
  EXPECT_NE(name.front(), ' ');
  EXPECT_NE(name.back(), ' ');
}

}  // namespace
}  // namespace altiplano
