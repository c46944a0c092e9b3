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

}  // namespace altiplano::cuda
