// Which tensors a model of a given config consists of, and matching what a file holds against them.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "server/model/checkpoint.h"
#include "server/model/config.h"
#include "server/model/dequantize.h"

namespace altiplano {

// Where a tensor lies. info.name is the file's own name until MatchTensors gives it Hugging Face's.
struct StoredTensor {
  TensorInfo info;
  StorageType type = StorageType::kF32;
  size_t file = 0;      // index into the checkpoint's files
  uint64_t offset = 0;  // in that file
  // GGUF stores Q and K for RoPE over neighbours: in each head of so many rows, row j of the first half and row j of
  // the second half lie next to each other. 0: rows are in the order that we use.
  int64_t interleaved_head_dim = 0;
};

struct WantedTensor {
  std::string name;  // Hugging Face's
  std::vector<int64_t> shape;
  std::string meaning;  // of the shape: "vocab x hidden"
};

// All of them, in the order of the forward pass; no lm_head when it is tied.
std::vector<WantedTensor> WantedTensors(const ModelConfig& config);

// "[2, 3]"
std::string ShowShape(const std::vector<int64_t>& shape);

// F32, F16, BF16 and the block formats by name; nullopt for others.
std::optional<StorageType> StorageTypeNamed(std::string_view name);

struct Matched {
  std::vector<StoredTensor> tensors;           // as wanted, in that order, with Hugging Face's names
  std::optional<StoredTensor> redundant_head;  // an lm_head although the config says that it is tied
};

// Demands that `found` is exactly the wanted set, in shape and in a dtype that can be read. `stored_name` gives the
// name that a tensor has in the file. INVALID_ARGUMENT or UNIMPLEMENTED naming file, tensor, expected and found;
// `where` is the file to blame for what is missing. Buffers of rotary embedding that old exports carry
// (rotary_emb.inv_freq) are passed over: they are functions of the config.
StatusOr<Matched> MatchTensors(const std::string& where, const ModelConfig& config,
                               const std::function<std::string(const std::string&)>& stored_name,
                               std::vector<StoredTensor> found);

}  // namespace altiplano
