// Stored number formats and how they widen to f32 or bf16.
//
// Block formats after the published GGUF layout (little-endian; d, m, dmin are f16):
//   Q8_0  32 values,  34 bytes: d, int8 q[32]                        x = d q
//   Q4_0  32 values,  18 bytes: d, nibbles q[16]                     x = d (q - 8)
//   Q4_1  32 values,  20 bytes: d, m, nibbles q[16]                  x = d q + m
//   Q4_K  256 values, 144 bytes: d, dmin, 6-bit pairs s[12], q[128]  x = (d scale) q - dmin min
//   Q6_K  256 values, 210 bytes: low[128], high[64], int8 s[16], d   x = (d scale) (q - 32)
// In Q4_0 and Q4_1 the low nibbles are the first 16 values and the high nibbles the last 16.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

#include "kernels/tensor.h"

namespace altiplano {

enum class StorageType : uint8_t { kF32, kF16, kBF16, kQ8_0, kQ4_0, kQ4_1, kQ4_K, kQ6_K };

struct StorageTraits {
  std::string_view name;   // "BF16", "Q4_K"
  int64_t block_elements;  // consecutive elements of a row that are stored together
  int64_t block_bytes;
};
const StorageTraits& Traits(StorageType type);

// Widens (or rounds to nearest even) `count` elements, the first of which is element `skip` of the block at `blocks`.
// skip < block_elements. dtype: f32 or bf16. `blocks` needs no alignment. Arithmetic in f32.
void Convert(StorageType type, const uint8_t* blocks, int64_t skip, int64_t count, DType dtype, void* out);

}  // namespace altiplano
