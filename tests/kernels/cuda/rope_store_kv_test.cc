// RopeStoreKv in CUDA against angles in long double.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <vector>

#include "tests/kernels/cuda/cuda_testlib.h"
#include "tests/kernels/rope_store_kv_testlib.h"

namespace altiplano {
namespace {

// cos and sin: the remainder is rounded once to f32 (u/2 of pi/4 as an angle), the polynomials sum a handful of terms
// below one and leave out 3e-9: less than 3 u in all. Then two products and a sum.
double Bound(double x, double y, double, double, double exact, DType out) {
  const double bound = (3 + 2) * kUnitF32 * (std::abs(x) + std::abs(y));
  return bound + RoundingBound(out, exact, bound);
}

using Case = RopeCase;

const std::vector<int32_t> kPositions = {0, 1, 2, 63, 1000, 8191, 40000, 131071, 131072};

class CudaRopeStoreKvTest : public CudaTest {
 protected:
  void ExpectNearOracle(const Case& c, const std::vector<int32_t>& positions, const std::vector<bool>& skipped) {
    RopeStep step(c, positions, PlainFrequencies(c.dim), skipped);
    const OnDevice d_qkv(stream(), step.qkv), d_k(stream(), step.k_pages), d_v(stream(), step.v_pages);
    const OnDevice d_inv(stream(), step.inv_freq), d_positions(stream(), step.positions), d_slots(stream(), step.slots);
    RopeStoreKv(stream(), {.q = d_qkv.view().columns(0, step.q_width()),
                           .k = d_qkv.view().columns(step.q_width(), step.kv_width()),
                           .v = d_qkv.view().columns(step.q_width() + step.kv_width(), step.kv_width()),
                           .k_pages = d_k.pool(step.pages(), c.kv_heads, c.page_size),
                           .v_pages = d_v.pool(step.pages(), c.kv_heads, c.page_size),
                           .positions = d_positions.view(),
                           .slots = d_slots.view(),
                           .inv_freq = d_inv.vector()});
    d_qkv.Fetch(step.qkv);
    d_k.Fetch(step.k_pages);
    d_v.Fetch(step.v_pages);
    step.ExpectDone(Bound);
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
