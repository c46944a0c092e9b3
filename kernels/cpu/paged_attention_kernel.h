// The contract between paged_attention.cc, which walks over sequences, heads, pages and tiles, and the kernels of each
// instruction set. Plain data and function pointers: nothing inline that could be compiled twice with different
// instruction sets.
//
// A row is one query of one head. Rows whose heads share a KV head are worked on together, up to kAttentionRows at a
// time, against a tile of kKeyTile keys that was packed once. No row's arithmetic depends on the rows beside it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cpu/vec_rows.h"

namespace altiplano::cpu {

inline constexpr int64_t kKeyTile = 64;
inline constexpr int kAttentionRows = 6;

// Running softmax of some rows: sum over keys of e^(score - max), and of e^(score - max) * v.
struct AttentionState {
  float* max;  // [rows], -inf at the start
  float* sum;  // [rows], 0 at the start
  float* acc;  // [rows, padded], 0 at the start
};

// Where the keys and values of a tile lie.
struct KeyRows {
  const void* k[kKeyTile];
  const void* v[kKeyTile];
};

// A tile as it lies in the pages.
struct UnpackedTile {
  const KeyRows* rows;  // all of them addresses, the first `keys` of them looked at
  const KeyRows* next;  // of the next tile: on their way into the cache afterwards
  int64_t keys;
  int64_t dim;
};

struct AttentionPanel {
  int64_t rows;            // 1 to kAttentionRows
  const int64_t* visible;  // [rows]: how many of the tile's keys the row sees, at least 1 for the last; <= 0: none
  const void* q;           // [rows, padded] packed
  const void* k;           // packed tile, or an UnpackedTile
  const void* v;           // packed tile, or the same UnpackedTile
  int64_t keys;            // in the tile
  int64_t padded;          // D rounded up to the kernel's dim_unit
  float scale;
  AttentionState state;
};

struct AttentionKernel {
  const char* name;
  int64_t dim_unit;       // packed rows are padded with zeros to a multiple of it
  size_t packed_element;  // bytes
  void (*pack_q)(void* packed, RowPtr q, int64_t dim, int64_t padded);
  // The first `keys` of rows; the rest of the tile becomes zeros. k, v: [kKeyTile * padded], 64-byte aligned. Rows of
  // `next`, all of them addresses, are on their way into the cache afterwards: pages are too short for the hardware's
  // prefetchers to get into their stride.
  void (*pack_kv)(const KeyRows& rows, const KeyRows& next, int64_t keys, int64_t dim, int64_t padded, void* k,
                  void* v);
  void (*attend)(const AttentionPanel& panel);
  // The same, to the bit, on an UnpackedTile: when a tile serves one panel only, as in decode, packing it costs more
  // than it saves.
  void (*attend_unpacked)(const AttentionPanel& panel);
  // total += part, as if the part's keys had followed the total's.
  void (*fold)(AttentionState total, AttentionState part, int64_t rows, int64_t padded);
  // out = acc / sum of one row.
  void (*finish)(RowPtr out, const float* acc, float sum, int64_t dim);
};

extern const AttentionKernel kAttentionF32Avx2, kAttentionBf16Avx2;
extern const AttentionKernel kAttentionF32Avx512, kAttentionBf16Avx512;
extern const AttentionKernel kAttentionBf16Avx512Bf16;  // q must be bf16

}  // namespace altiplano::cpu
