// RopeStoreKv in CUDA against angles in long double.
#include <gtest/gtest.h>

#include <vector>

#include "tests/kernels/cuda/rope_store_kv_testlib.h"

namespace altiplano {
namespace {

using Case = RopeCase;

const std::vector<int32_t> kPositions = {0, 1, 2, 63, 1000, 8191, 40000, 131071, 131072};

class CudaRopeStoreKvTest : public CudaTest {
 protected:
  void ExpectNearOracle(const Case& c, const std::vector<int32_t>& positions, const std::vector<bool>& skipped) {
    RopeStep step(c, positions, PlainFrequencies(c.dim), skipped);
    RotateOnDevice(stream(), &step);
    step.ExpectDone(RopeBound);
  }
};

TEST_F(CudaRopeStoreKvTest, IsNearTheOracleForEveryHeadSizeAndDType) {
  for (int64_t dim : {2, 6, 16, 64, 80, 128, 256, 520}) {  // of the last a head is more than a block's threads hold
    for (const auto& [in, act] :
         {std::pair{DType::kF32, DType::kF32}, {DType::kF32, DType::kBF16}, {DType::kBF16, DType::kBF16}}) {
      ExpectNearOracle({.dim = dim, .in = in, .act = act, .gap = dim % 3}, kPositions, {});
    }
  }
}

TEST_F(CudaRopeStoreKvTest, IsNearTheOracleForHeadsAndPagesOfAnyNumber) {
  for (int64_t kv_heads : {1, 3, 8}) {
    for (int64_t group : {1, 4, 7}) {
      for (int64_t page_size : {1, 5, 16}) {
        ExpectNearOracle({.q_heads = kv_heads * group, .kv_heads = kv_heads, .dim = 16, .page_size = page_size},
                         kPositions, {});
      }
    }
  }
}

TEST_F(CudaRopeStoreKvTest, StoresNothingAtSlotMinusOne) {
  std::vector<bool> skipped(kPositions.size());
  skipped[0] = skipped[3] = skipped.back() = true;
  ExpectNearOracle({.dim = 128, .act = DType::kBF16}, kPositions, skipped);
  ExpectNearOracle({}, kPositions, std::vector<bool>(kPositions.size(), true));
}

}  // namespace
}  // namespace altiplano
