// How the simulated TMA sees a matrix of bf16 in global memory: what cuTensorMapEncodeTiled packs into 128 bytes.
#pragma once

#include <cstdint>

namespace altiplano::sim {

struct TensorMap {
  const void* data = nullptr;
  uint64_t rows = 0, columns = 0;
  uint64_t stride_bytes = 0;  // between rows
  uint32_t box_rows = 0;      // of 64 columns, which lie in shared memory with a swizzle of 128 bytes
};

}  // namespace altiplano::sim
