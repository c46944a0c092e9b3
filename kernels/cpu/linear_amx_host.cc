// The AMX kernel on tiles that are plain arrays. Slow; linked so that tests can judge linear_amx.h on any machine.
#include <cstring>

#include "kernels/cpu/linear_amx.h"

namespace altiplano::cpu {
namespace {

struct HostTiles {
  struct Tile {
    alignas(64) uint8_t row[16][64];
  };
  static inline thread_local Tile tiles[8];
  static inline thread_local bool configured = false;

  static void Begin() {
    configured = true;
    std::memset(tiles, 0xFF, sizeof(tiles));  // NaN: a sum that was not zeroed shows
  }
  static void End() { configured = false; }

  template <int kTile>
  static void Zero() {
    std::memset(&tiles[kTile], 0, sizeof(Tile));
  }
  template <int kTile>
  static void Load(const void* p, int64_t stride) {
    if (!configured) __builtin_trap();  // the processor raises #UD
    for (int r = 0; r < 16; ++r) std::memcpy(tiles[kTile].row[r], static_cast<const char*>(p) + r * stride, 64);
  }
  template <int kTile>
  static void Store(float* p, int64_t stride) {
    for (int r = 0; r < 16; ++r) std::memcpy(reinterpret_cast<char*>(p) + r * stride, tiles[kTile].row[r], 64);
  }

  static float Bf16(const Tile& tile, int row, int column) {
    uint16_t bits;
    std::memcpy(&bits, tile.row[row] + 2 * column, 2);
    const float value = __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16);
    return __builtin_fabsf(value) < 0x1p-126f ? 0.0f : value;  // denormals are zeros
  }

  // TDPBF16PS as the Programming Reference gives it: C[m][n] += sum over pairs of A[m][2i] * B[i][2n] and of
  // A[m][2i+1] * B[i][2n+1], even and odd products summed apart, in order, then added to each other and to C.
  template <int kC, int kA, int kB>
  static void Dot() {
    const Tile &a = tiles[kA], &b = tiles[kB];
    for (int m = 0; m < 16; ++m) {
      for (int n = 0; n < 16; ++n) {
        float even = 0, odd = 0, sum;
        for (int i = 0; i < 16; ++i) {
          even += Bf16(a, m, 2 * i) * Bf16(b, i, 2 * n);
          odd += Bf16(a, m, 2 * i + 1) * Bf16(b, i, 2 * n + 1);
        }
        std::memcpy(&sum, tiles[kC].row[m] + 4 * n, 4);
        sum += even + odd;
        std::memcpy(tiles[kC].row[m] + 4 * n, &sum, 4);
      }
    }
  }

  static void Transpose(const float* from, float* to) {
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < 16; ++j) to[16 * j + i] = from[16 * i + j];
    }
  }
};

}  // namespace

constinit const LinearKernel kLinearBf16AmxHost = LinearAmx<HostTiles>::Kernel("amx_host");

}  // namespace altiplano::cpu
