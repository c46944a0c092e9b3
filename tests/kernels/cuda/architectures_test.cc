#include "kernels/cuda/architectures.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <utility>

#include "kernels/cuda/linear_plan.h"
#include "kernels/cuda/paged_attention_plan.h"
#include "kernels/cuda/rows_plan.h"

namespace altiplano::cuda {
namespace {

constexpr char kAll[] = "80-real 89-real 90a-real";

TEST(CudaArchitectures, ThoseWithKernelsAreUsed) {
  for (const Architecture& each : kArchitectures) EXPECT_EQ(WhyRefused(0, "NVIDIA X", each.capability, kAll), "");
  EXPECT_EQ(WhyRefused(0, "NVIDIA H200", 90, "90a"), "");
  EXPECT_EQ(WhyRefused(0, "NVIDIA A100-SXM4-80GB", 80, "80"), "");
}

TEST(CudaArchitectures, OthersAreRefusedInASentence) {
  EXPECT_EQ(WhyRefused(1, "NVIDIA A10", 86, kAll),
            "GPU 1, NVIDIA A10, is of sm_86; this program has kernels for sm_80, sm_89 and sm_90a alone");
  for (int capability : {70, 75, 86, 87, 100, 103, 120}) EXPECT_NE(WhyRefused(0, "NVIDIA X", capability, kAll), "");
  EXPECT_EQ(WhyRefused(0, "NVIDIA L4", 89, "90a-real"),
            "GPU 0, NVIDIA L4, is of sm_89; this program has kernels for sm_90a alone");
}

TEST(CudaArchitectures, HaveNames) {
  EXPECT_EQ(TargetNames(kAll), "sm_80, sm_89 and sm_90a");
  EXPECT_EQ(TargetNames("80-real 90a"), "sm_80 and sm_90a");
  EXPECT_EQ(TargetNames("80"), "sm_80");
}

// Kernels for 9.0 without what only it has would trap in wgmma.
TEST(CudaArchitectures, HopperIsUsedWithItsOwnInstructionsOrNotAtAll) {
  EXPECT_NE(WhyRefused(0, "NVIDIA H200", 90, "80-real 90-real"), "");
}

TEST(CudaArchitectures, EveryPlanFitsEveryOneOfThem) {
  for (const Architecture& each : kArchitectures) {
    const uint32_t limit = each.shared_bytes;
    SCOPED_TRACE(each.target);
    EXPECT_LE(kLeastSharedBytes, limit);
    for (int64_t tokens : {1, 8, 16, 64, 100, 2048, 8192}) {
      for (const auto& [n, k] : {std::pair{16, 64}, {1280, 8192}, {6144, 4096}, {128256, 16384}}) {
        EXPECT_LE(MmaLinearPlan(tokens, n, LinearParts(n, k)).shared_bytes, limit) << tokens << " x " << n;
        const LinearTile& tile = IsLargeTile(tokens, n, limit) ? kLargeTile : kSmallTile;
        EXPECT_LE(TiledLinearPlan(tile, tokens, n).shared_bytes, limit) << tokens << " x " << n;
      }
    }
    EXPECT_LE(NormPlan(1, kWidestNorm, 1).shared_bytes + kMostNormThreads / 32 * 4, limit);
    EXPECT_GE(kWidestNorm, 16384);  // of 405B
    for (int64_t dim : {64, 128}) EXPECT_LE(MmaAttentionSharedBytes(dim), limit) << dim;
    for (int64_t dim : {16, 64, 80, 128, 256}) {
      EXPECT_LE(PlainAttentionSharedBytes(dim) + 4 * kAttentionRows * 4, limit) << dim;
      EXPECT_LE(PlanRope(1, 160, dim / 2, 1).shape.shared_bytes, limit) << dim;
    }
  }
  for (int64_t dim : {64, 128}) EXPECT_LE(PrefillSharedBytes(dim), kHopper.shared_bytes) << dim;
}

// Large tiles and two blocks of decode attention for each multiprocessor, where there is room for them.
TEST(CudaArchitectures, LargerOnesUseWhatTheyHave) {
  EXPECT_TRUE(IsLargeTile(8192, 8192, FindArchitecture(90)->shared_bytes));
  EXPECT_TRUE(IsLargeTile(8192, 8192, FindArchitecture(80)->shared_bytes));
  EXPECT_FALSE(IsLargeTile(8192, 8192, FindArchitecture(89)->shared_bytes));
  EXPECT_LE(2 * (MmaAttentionSharedBytes(128) + 1024), 228 * 1024u);
}

}  // namespace
}  // namespace altiplano::cuda
