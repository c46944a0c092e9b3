// What only sm_90a has, for kernels that are launched where the architecture is kHopper: mbarriers and TMA, and the
// matrix instructions of a warpgroup, which is four warps from a multiple of four. Two bodies, as ptx.h has.
#pragma once

#include "kernels/cuda/ptx.h"

#ifdef __CUDACC__
#include "kernels/cuda/ptx_hopper_device.h"
#else
#include "kernels/cuda/ptx_hopper_host.h"
#endif

namespace altiplano::ptx {

// Where wgmma finds a matrix of bf16 in shared memory that lies in rows of 128 bytes with a swizzle of 128 bytes, as
// TMA leaves it; eight such rows, aligned to 1024 bytes, are an atom. `start` lies in the first row of an atom.
// K-major, rows along k: `stride` bytes lie between atoms along the columns, `leading` is not used.
// MN-major, rows along the columns: `stride` bytes lie between atoms along k, `leading` bytes between atoms along the
// columns.
PTX_FUNCTION uint64_t MatrixDescriptor(const void* start, uint32_t leading, uint32_t stride) {
  constexpr uint64_t kSwizzle128 = 1;
  return static_cast<uint64_t>((SharedAddress(start) & 0x3FFFF) >> 4) | static_cast<uint64_t>(leading >> 4) << 16 |
         static_cast<uint64_t>(stride >> 4) << 32 | kSwizzle128 << 62;
}
// Of the matrix that lies so many bytes, a multiple of 16, behind that of `descriptor`: one addition, since shared
// memory ends before its field for the start does.
PTX_FUNCTION uint64_t FurtherOn(uint64_t descriptor, uint32_t bytes) {
  const uint32_t low = static_cast<uint32_t>(descriptor) + (bytes >> 4);
  return (descriptor >> 32 << 32) | low;
}

}  // namespace altiplano::ptx
