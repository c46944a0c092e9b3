// Writers of small safetensors and GGUF files (right or wrong), a complete small model in both, and slow obvious
// decoders of every stored format.
#pragma once

#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "server/base/json.h"
#include "server/model/checkpoint.h"

namespace altiplano {

class TempFolder {
 public:
  TempFolder();
  ~TempFolder();
  TempFolder(const TempFolder&) = delete;
  TempFolder& operator=(const TempFolder&) = delete;
  const std::string& path() const { return path_; }
  std::string At(std::string_view name) const;
  void Write(std::string_view name, std::string_view bytes) const;
  void Remove(std::string_view name) const;

 private:
  std::string path_;
};

struct RawTensor {
  std::string name;
  std::string dtype;
  std::vector<int64_t> shape;
  std::string data;
};

// Any header and data as a safetensors file; and a right one of `tensors` in that order.
std::string SafetensorsFile(std::string_view header, std::string_view data);
std::string SafetensorsFile(const std::vector<RawTensor>& tensors);

// A complete Llama that is consistent until a test spoils it. Values are random and exact in every format.
struct ModelFiles {
  Json config, generation;
  std::vector<RawTensor> tensors;
  RawTensor& Tensor(std::string_view name);
  void Drop(std::string_view name);
  void WriteTo(const TempFolder& folder) const;                    // model.safetensors
  void WriteShards(const TempFolder& folder, size_t count) const;  // model-0000I-of-0000N.safetensors and the index
  Json index;                                                      // of the last WriteShards when not given by the test
};
ModelFiles SmallModel(std::string_view dtype = "BF16");

class GgufWriter {
 public:
  explicit GgufWriter(uint32_t version = 3) : version_(version) {}
  GgufWriter& U32(std::string_view key, uint32_t value);
  GgufWriter& F32(std::string_view key, float value);
  GgufWriter& Bool(std::string_view key, bool value);
  GgufWriter& String(std::string_view key, std::string_view value);
  GgufWriter& Strings(std::string_view key, const std::vector<std::string>& values);
  GgufWriter& I32s(std::string_view key, const std::vector<int32_t>& values);
  GgufWriter& Raw(std::string_view key, uint32_t type, std::string_view bytes);  // any value, as it stands in a file
  GgufWriter& Erase(std::string_view key);
  // shape outermost first; dtype by name.
  GgufWriter& Tensor(const RawTensor& tensor);
  RawTensor& tensor(std::string_view name);
  void DropTensor(std::string_view name);

  struct Overrides {
    int64_t tensor_count = -1, metadata_count = -1;
    int64_t shift_offset = 0;  // of the last tensor
    int32_t type = -1;         // of the last tensor
    std::string magic = "GGUF";
  };
  std::string Bytes(const Overrides& overrides) const;
  std::string Bytes() const { return Bytes(Overrides()); }

 private:
  uint32_t version_;
  std::vector<std::pair<std::string, std::string>> metadata_;  // key, type and value
  std::vector<RawTensor> tensors_;
};
// vocab 64, hidden 256, 2 layers, 4 query and 2 KV heads of 64, ffn 512; matrices in `dtype`, norms F32, tied.
GgufWriter SmallGguf(std::string_view dtype = "F32");

// `elements` random numbers stored as dtype, such that f32 holds each widened one exactly.
std::string RandomStored(std::string_view dtype, int64_t elements, std::mt19937_64* random);
// Element i of a stored row (or of any run of whole blocks), in double, straight from the format's description.
double DecodeOne(std::string_view dtype, std::string_view bytes, int64_t i);
// The nearest bf16, ties to even, found by comparing candidates.
uint16_t NearestBF16(double value);
float HalfValue(uint16_t half);

}  // namespace altiplano
