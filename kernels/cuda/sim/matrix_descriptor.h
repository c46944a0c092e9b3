// How wgmma finds the elements of a matrix in shared memory, by the PTX ISA's "Matrix Descriptor Format" and "Canonical
// Layouts".
#pragma once

#include <cstdint>

namespace altiplano::sim {

enum class Swizzle : uint8_t { kNone, k128Bytes, k64Bytes, k32Bytes };  // bits 63 and 62 of a descriptor

// The 16-byte chunk's number, bits 4 to 6 of the address, is XORed with bits 7 to 9, or with fewer of them. The address
// is the absolute one: patterns begin at multiples of their size. TMA writes by the same rule.
constexpr uint32_t Swizzled(uint32_t address, Swizzle swizzle) {
  constexpr uint32_t kChunks[] = {0, 7, 3, 1};
  return address ^ ((address >> 7 & kChunks[static_cast<int>(swizzle)]) << 4);
}

struct MatrixDescriptor {
  uint32_t start, leading, stride;  // bytes
  uint32_t base_offset;
  Swizzle swizzle;

  constexpr explicit MatrixDescriptor(uint64_t bits)
      : start(static_cast<uint32_t>(bits & 0x3FFF) << 4),
        leading(static_cast<uint32_t>(bits >> 16 & 0x3FFF) << 4),
        stride(static_cast<uint32_t>(bits >> 32 & 0x3FFF) << 4),
        base_offset(static_cast<uint32_t>(bits >> 49 & 7)),
        swizzle(static_cast<Swizzle>(bits >> 62)) {}

  // Of the 16-bit element (mn, k), from the start and before swizzling. With T = 8 elements in a chunk and W chunks in
  // a swizzled row: K-major ((8,m),(T,2k)) : ((W T, stride), (1, T)), or without swizzle ((T, stride), (1, leading));
  // MN-major ((T,W,m),(8,k)) : ((1, T, leading), (W T, stride)), or without swizzle ((1, T, stride), (T, leading)).
  constexpr uint32_t Offset(uint32_t mn, uint32_t k, bool mn_major) const {
    constexpr uint32_t kChunks[] = {1, 8, 4, 2};
    const uint32_t chunks = kChunks[static_cast<int>(swizzle)];
    if (!mn_major) {
      return mn % 8 * chunks * 16 + mn / 8 * stride + k % 8 * 2 + k / 8 * (chunks == 1 ? leading : 16);
    }
    if (chunks == 1) return mn % 8 * 2 + mn / 8 * stride + k % 8 * 16 + k / 8 * leading;
    return mn % 8 * 2 + mn / 8 % chunks * 16 + mn / (8 * chunks) * leading + k % 8 * chunks * 16 + k / 8 * stride;
  }
};

}  // namespace altiplano::sim
