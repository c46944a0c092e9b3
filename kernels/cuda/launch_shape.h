// How a kernel is launched. The *_plan.h headers compute one from an op's shapes, by pure functions.
#pragma once

#include <cstdint>

namespace altiplano::cuda {

struct LaunchShape {
  uint32_t grid_x = 1, grid_y = 1, grid_z = 1;
  uint32_t threads = 32;  // per block
  uint32_t shared_bytes = 0;

  bool operator==(const LaunchShape&) const = default;
};

// Of shared memory that a block of sm_90 may ask for; sm_80 allows 163 KiB.
inline constexpr uint32_t kSharedBytesPerBlock = 227 * 1024;

}  // namespace altiplano::cuda
