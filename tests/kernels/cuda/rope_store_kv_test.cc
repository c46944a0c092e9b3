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
  // Of 80 a thread's packs are different pairs; of 520 a head is more than a block's threads hold, 2056 also in packs.
  for (int64_t dim : {2, 6, 16, 64, 80, 128, 256, 520, 2056}) {
    for (const auto& [in, act] :
         {std::pair{DType::kF32, DType::kF32}, {DType::kF32, DType::kBF16}, {DType::kBF16, DType::kBF16}}) {
      for (int64_t gap : {int64_t{0}, dim % 3}) {
        ExpectNearOracle({.dim = dim, .in = in, .act = act, .gap = gap}, kPositions, {});
      }
    }
  }
}

TEST_F(CudaRopeStoreKvTest, IsNearTheOracleForHeadsAndPagesOfAnyNumber) {
  for (int64_t kv_heads : {1, 3, 8}) {
    for (int64_t group : {1, 4, 7}) {
      for (int64_t page_size : {1, 5, 16}) {
        for (DType type : {DType::kF32, DType::kBF16}) {
          RopeCase c = {.q_heads = kv_heads * group, .kv_heads = kv_heads, .dim = 16, .page_size = page_size};
          c.in = c.act = type;
          ExpectNearOracle(c, kPositions, {});
        }
      }
    }
  }
}

TEST_F(CudaRopeStoreKvTest, IsNearTheOracleWhereABlockEndsAmongTheHeads) {
  for (int64_t kv_heads : {5, 8, 11}) {  // a block takes 16 heads of 128
    ExpectNearOracle({.q_heads = 17, .kv_heads = kv_heads, .dim = 128, .in = DType::kBF16, .act = DType::kBF16},
                     {0, 63, 131071}, {});
  }
}

TEST_F(CudaRopeStoreKvTest, StoresNothingAtSlotMinusOne) {
  std::vector<bool> skipped(kPositions.size());
  skipped[0] = skipped[3] = skipped.back() = true;
  for (DType in : {DType::kF32, DType::kBF16}) {
    ExpectNearOracle({.dim = 128, .in = in, .act = DType::kBF16}, kPositions, skipped);
  }
  ExpectNearOracle({}, kPositions, std::vector<bool>(kPositions.size(), true));
}

}  // namespace
}  // namespace altiplano
