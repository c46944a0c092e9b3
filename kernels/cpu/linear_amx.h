// Linear in bf16 on AMX tiles, written once for the real tiles (linear_amx.cc) and for tiles that are plain arrays
// (linear_amx_host.cc), so that everything but the instructions themselves is tested on any machine.
//
// Weights are the A operand straight from row-major memory, 16 rows by 32 of K; packed x is B; so a tile of out is
// transposed, [16 weight rows][16 tokens], and turned when it is stored:
//
//                  B: x as (k/2, token, k%2)                 An element of out is one running sum over steps of 32 of K
//                  +----+                                    in order, whatever the batch and the blocking: a token's
//                  |    | 16 k pairs                         row does not depend on the others.
//     A: weights   +----+
//   16 | 32 of K | x 16 tokens  ->  C [16 rows][16 tokens]
//
// Two A and two B tiles make four C tiles, so each tile loaded is used twice. Tiles 0-3: C, 4-5: A, 6-7: B.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cpu/linear_kernel.h"

namespace altiplano::cpu {

// Tiles, in an anonymous namespace of its file:
//   Begin(), End()                  every tile has 16 rows of 64 bytes in between
//   Zero<t>(), Load<t>(p, stride), Store<t>(p, stride)   stride in bytes
//   Dot<c, a, b>()                  tdpbf16ps: C += A * B, in f32
//   Transpose(from, to)             16 x 16 floats, 64-byte aligned
template <class Tiles>
struct LinearAmx {
  static constexpr int64_t kRows = 16, kTokens = 16, kStep = 32;
  static constexpr int64_t kTileElements = 512, kTileSums = 256;
  static constexpr int64_t kBlock = 512;  // of K: 32 weight rows of it and 32 tokens fit L1 and L2
  static constexpr int64_t kFewTokens = 32;

  static int64_t RoundUp(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
  static int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }

  // Own copies of tensor.h's: a shared inline function compiled here could be linked into other files.
  static float Widen(uint16_t x) { return __builtin_bit_cast(float, static_cast<uint32_t>(x) << 16); }
  static uint16_t Round(float x) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, x);
    if ((bits & 0x7FFFFFFF) > 0x7F800000) return static_cast<uint16_t>((bits >> 16) | 0x40);
    return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
  }

  // Packed x: [group of 16 tokens][step of 32][k/2][token][k%2], zeros beyond tokens and k.
  static void Pack(const void* x, int64_t x_stride, int64_t tokens, int64_t k, int64_t begin, int64_t end,
                   void* packed) {
    const int64_t steps = RoundUp(k, kStep) / kStep;
    for (int64_t t0 = begin; t0 < end; t0 += kTokens) {
      uint16_t* tile = static_cast<uint16_t*>(packed) + t0 / kTokens * steps * kTileElements;
      for (int64_t s = 0; s < steps; ++s, tile += kTileElements) {
        const int64_t length = Min(kStep, k - s * kStep);
        if (length < kStep || tokens - t0 < kTokens) {
          for (int64_t i = 0; i < kTileElements; ++i) tile[i] = 0;
        }
        for (int64_t t = 0; t < Min(kTokens, tokens - t0); ++t) {
          const uint16_t* from = static_cast<const uint16_t*>(x) + (t0 + t) * x_stride + s * kStep;
          for (int64_t j = 0; j < length; ++j) tile[j / 2 * 32 + t * 2 + j % 2] = from[j];
        }
      }
    }
  }

  struct Block {
    const LinearTask* task;
    float* partial;  // C tiles: [16 columns of out from n0 on][16 tokens]
    int64_t n0;
    int64_t end;  // no column from here on is ours to store
    int64_t k0, k1;
    bool first, last;
  };

  // Loads 16 weight rows from n on, at column k, into a tile; rows and columns beyond the matrix are zeros.
  template <int kTile>
  static void LoadWeights(const LinearTask& task, int64_t n, int64_t k) {
    const uint16_t* from = static_cast<const uint16_t*>(task.weight) + n * task.weight_stride + k;
    const int64_t rows = Min(kRows, task.n - n), length = Min(kStep, task.k - k);
    if (rows == kRows && length == kStep) {
      Tiles::template Load<kTile>(from, task.weight_stride * 2);
      return;
    }
    alignas(64) uint16_t padded[kTileElements] = {};
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < length; ++j) padded[r * kStep + j] = from[r * task.weight_stride + j];
    }
    Tiles::template Load<kTile>(padded, 64);
  }

  static float* Sums(const Block& block, int64_t n, int64_t t) {
    const int64_t token_tiles = RoundUp(block.task->tokens, kTokens) / kTokens;
    return block.partial + ((n - block.n0) / kRows * token_tiles + t / kTokens) * kTileSums;
  }

  template <int kTile>
  static void BeginSums(const Block& block, int64_t n, int64_t t) {
    if (block.first) {
      Tiles::template Zero<kTile>();
    } else {
      Tiles::template Load<kTile>(Sums(block, n, t), 64);
    }
  }

  template <int kTile>
  static void EndSums(const Block& block, int64_t n, int64_t t) {
    if (!block.last) {
      Tiles::template Store<kTile>(Sums(block, n, t), 64);
      return;
    }
    alignas(64) float tile[kTileSums], turned[kTileSums];
    Tiles::template Store<kTile>(tile, 64);
    Tiles::Transpose(tile, turned);
    const LinearTask& task = *block.task;
    const int64_t columns = Min(kRows, block.end - n);
    for (int64_t i = 0; i < Min(kTokens, task.tokens - t); ++i) {
      const float* sums = turned + i * kRows;
      const int64_t offset = (t + i) * task.out_stride + n;
      if (task.out_f32) {
        float* out = static_cast<float*>(task.out) + offset;
        for (int64_t j = 0; j < columns; ++j) out[j] = task.accumulate ? out[j] + sums[j] : sums[j];
      } else {
        uint16_t* out = static_cast<uint16_t*>(task.out) + offset;
        for (int64_t j = 0; j < columns; ++j) out[j] = Round(task.accumulate ? Widen(out[j]) + sums[j] : sums[j]);
      }
    }
  }

  // kA tiles of weight rows times kB tiles of tokens, over the block's part of K.
  template <int kA, int kB>
  static void Multiply(const Block& block, int64_t n, int64_t t) {
    const LinearTask& task = *block.task;
    const int64_t steps = RoundUp(task.k, kStep) / kStep;
    BeginSums<0>(block, n, t);
    if constexpr (kB > 1) BeginSums<1>(block, n, t + kTokens);
    if constexpr (kA > 1) BeginSums<2>(block, n + kRows, t);
    if constexpr (kA > 1 && kB > 1) BeginSums<3>(block, n + kRows, t + kTokens);
    for (int64_t k = block.k0; k < block.k1; k += kStep) {
      const uint16_t* x = static_cast<const uint16_t*>(task.packed) + (t / kTokens * steps + k / kStep) * kTileElements;
      Tiles::template Load<6>(x, 64);
      LoadWeights<4>(task, n, k);
      Tiles::template Dot<0, 4, 6>();
      if constexpr (kB > 1) {
        Tiles::template Load<7>(x + steps * kTileElements, 64);
        Tiles::template Dot<1, 4, 7>();
      }
      if constexpr (kA > 1) {
        LoadWeights<5>(task, n + kRows, k);
        Tiles::template Dot<2, 5, 6>();
        if constexpr (kB > 1) Tiles::template Dot<3, 5, 7>();
      }
    }
    EndSums<0>(block, n, t);
    if constexpr (kB > 1) EndSums<1>(block, n, t + kTokens);
    if constexpr (kA > 1) EndSums<2>(block, n + kRows, t);
    if constexpr (kA > 1 && kB > 1) EndSums<3>(block, n + kRows, t + kTokens);
  }

  template <int kA>
  static void Panel(const Block& block, int64_t n) {
    int64_t t = 0;
    for (; t + kTokens < block.task->tokens; t += 2 * kTokens) Multiply<kA, 2>(block, n, t);
    if (t < block.task->tokens) Multiply<kA, 1>(block, n, t);
  }

  static void Run(const LinearTask& task, int64_t begin, int64_t end, float* partial) {
    Tiles::Begin();
    // Few tokens: weight rows are walked to their ends, so that memory is read in long runs.
    const bool few = task.tokens <= kFewTokens;
    const int64_t columns = few ? 2 * kRows : kLinearColumns;
    const int64_t length = few ? RoundUp(task.k, kStep) : kBlock;
    for (int64_t n0 = begin; n0 < end; n0 += columns) {
      const int64_t n1 = Min(end, n0 + columns);
      for (int64_t k0 = 0; k0 < task.k; k0 += length) {
        const int64_t k1 = Min(k0 + length, task.k);
        const Block block{&task, partial, n0, end, k0, k1, k0 == 0, k1 == task.k};
        int64_t n = n0;
        for (; n + kRows < n1; n += 2 * kRows) Panel<2>(block, n);
        if (n < n1) Panel<1>(block, n);
      }
    }
    Tiles::End();
  }

  static constexpr LinearKernel Kernel(const char* name) {
    return {.name = name,
            .panel = 2 * kRows,
            .group = kTokens,
            .step = kStep,
            .packed_element = 2,
            .pack = &Pack,
            .run = &Run};
  }
};

}  // namespace altiplano::cpu
