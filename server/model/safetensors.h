// The header of a safetensors file: 8 bytes of little-endian length, JSON, then the tensors' bytes
// (https://huggingface.co/docs/safetensors, section "Format").
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "server/base/status.h"
#include "server/model/file_reader.h"

namespace altiplano {

inline constexpr uint64_t kMaxSafetensorsHeader = 100'000'000;  // the format's own limit
inline constexpr size_t kMaxSafetensorsRank = 8;

struct SafetensorsTensor {
  std::string name;
  std::string dtype;  // as in the file: "BF16"
  std::vector<int64_t> shape;
  uint64_t begin = 0, end = 0;  // in the file
};

// Tensors by ascending offset. Checked: header within the limits and the file, no duplicate names, known dtypes,
// products without overflow, sizes equal to shape times dtype, and that the tensors cover the rest of the file exactly:
// no overlap, no gap, nothing before or after. INVALID_ARGUMENT, or DATA_LOSS for a file that is too short.
StatusOr<std::vector<SafetensorsTensor>> ReadSafetensorsHeader(const ByteSource& file);

}  // namespace altiplano
