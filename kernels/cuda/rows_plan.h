// Launch geometry of the row-wise kernels.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/cuda/architectures.h"
#include "kernels/cuda/launch_shape.h"

namespace altiplano::cuda {

inline constexpr int64_t kRowPack = 4;  // elements that a thread accesses at once where alignment permits
inline constexpr uint32_t kMostRowThreads = 256;
// What keeps the memory busy: a thread has so many packs of each operand on their way at once, and a multiprocessor at
// least so many blocks, for which the compiler saves registers.
inline constexpr int kPacksAtOnce = 2;
inline constexpr uint32_t kRowBlocks = 6;

constexpr int64_t CeilDivide(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Divides by a number that the host knows, with a product and a shift instead of some twenty instructions. Exact for
// 0 <= x < 2^31: with d <= 2^s < 2 d the factor, ceil(2^(31 + s) / d), has 32 bits and makes x / d too large by less
// than 1 / d.
struct Divisor {
  uint32_t factor = 0, shift = 0;

  Divisor() = default;
  constexpr explicit Divisor(int64_t divisor) {
    while (int64_t{1} << shift < divisor) ++shift;
    factor = static_cast<uint32_t>(CeilDivide(int64_t{1} << (31 + shift), divisor));
  }
  constexpr int Quotient(int x) const {
    const uint64_t twice = 2 * static_cast<uint32_t>(x);
    return static_cast<int>(static_cast<uint32_t>(twice * factor >> 32) >> shift);
  }
};

// Whole warps, one thread for each pack of a row, at most `most`.
constexpr uint32_t ThreadsForPacks(int64_t packs, uint32_t most) {
  return static_cast<uint32_t>(std::clamp<int64_t>(CeilDivide(packs, 32) * 32, 32, most));
}

// One thread for kPacksAtOnce packs that lie a block's threads apart: rows along x, which has no limit that matters,
// parts of a row along y.
constexpr LaunchShape ElementwisePlan(int64_t rows, int64_t packs) {
  const int64_t items = CeilDivide(std::max<int64_t>(packs, 1), kPacksAtOnce);
  const uint32_t threads = ThreadsForPacks(items, kMostRowThreads);
  return {.grid_x = static_cast<uint32_t>(rows),
          .grid_y = static_cast<uint32_t>(CeilDivide(items, threads)),
          .threads = threads};
}

// One block for each row, so that a row's sum does not depend on the other rows. The row waits in shared memory as f32
// between the sum and the scaling.
inline constexpr uint32_t kMostNormThreads = 512;
inline constexpr uint32_t kNormBlocks = 3;  // of a multiprocessor, by registers; rows beyond 18000 elements have less
inline constexpr int64_t kWidestNorm = kLeastSharedBytes / 4 - 256;  // the rest is for the warps' sums
constexpr LaunchShape NormPlan(int64_t rows, int64_t width, int64_t pack) {
  return {.grid_x = static_cast<uint32_t>(rows),
          .threads = ThreadsForPacks(width / pack, kMostNormThreads),
          .shared_bytes = static_cast<uint32_t>(CeilDivide(width, 4) * 16)};
}

// One block for some heads of one token: q heads, then k heads, then v heads. A head is half / pack items, of which a
// thread has kPacksAtOnce.
inline constexpr uint32_t kRopeThreads = 128;
inline constexpr uint32_t kRopeBlocks = 10;  // of a multiprocessor, by registers
struct RopePlan {
  LaunchShape shape;
  int64_t heads_per_block;
};
constexpr RopePlan PlanRope(int64_t tokens, int64_t heads, int64_t half, int64_t pack) {
  const int64_t heads_per_block = std::clamp<int64_t>(kPacksAtOnce * kRopeThreads * pack / half, 1, heads);
  return {.shape = {.grid_x = static_cast<uint32_t>(tokens),
                    .grid_y = static_cast<uint32_t>(CeilDivide(heads, heads_per_block)),
                    .threads = kRopeThreads,
                    .shared_bytes = static_cast<uint32_t>(2 * half * 4)},
          .heads_per_block = heads_per_block};
}

}  // namespace altiplano::cuda
