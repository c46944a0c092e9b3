// The container format GGUF, versions 2 and 3, little-endian: metadata, tensor descriptions, aligned tensor data
// (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). What the metadata means is gguf_checkpoint's business.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "server/base/status.h"
#include "server/model/dequantize.h"
#include "server/model/file_reader.h"

namespace altiplano {

inline constexpr uint64_t kMaxGgufHeader = uint64_t{512} << 20;  // metadata and descriptions together
inline constexpr uint64_t kMaxGgufEntries = 100'000;             // metadata keys; tensors
inline constexpr uint64_t kMaxGgufArray = 4'000'000;             // elements of an array that is kept
inline constexpr size_t kMaxGgufName = 256;                      // of keys and tensors (the format: 65535 and 64)

// An array whose elements nobody here reads.
struct GgufSkippedArray {
  uint64_t count = 0;
};

// Integers of any width as int64_t (a u64 above its range is an error), floats as double. Arrays of strings and of
// integers are kept; arrays of floats, bools and arrays only counted.
using GgufValue =
    std::variant<int64_t, double, bool, std::string, std::vector<int64_t>, std::vector<std::string>, GgufSkippedArray>;

struct GgufTensor {
  std::string name;
  std::vector<int64_t> shape;  // outermost first: the reverse of the file's order
  StorageType type = StorageType::kF32;
  uint64_t offset = 0;  // in the file
  uint64_t bytes = 0;
};

struct GgufFile {
  uint32_t version = 0;
  std::map<std::string, GgufValue, std::less<>> metadata;
  std::vector<GgufTensor> tensors;  // by ascending offset
};

// The four bytes that every GGUF file begins with.
bool HasGgufMagic(const ByteSource& file);

// Checked: every count and length against the file before memory is taken, no duplicate keys or names, tensors that lie
// one after the other with nothing but alignment between them, inside the file. INVALID_ARGUMENT, DATA_LOSS for a file
// that is too short, UNIMPLEMENTED naming the tensor for a type that Altiplano does not read.
StatusOr<GgufFile> ReadGguf(const ByteSource& file);

}  // namespace altiplano
