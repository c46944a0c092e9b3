// Checkpoint: a model on disk, opened and wholly checked before a byte of weights is read. Hugging Face folders
// (safetensors), GGUF v3 files and models of random numbers look the same from here: Hugging Face tensor names,
// row-major [out, in] matrices, Q and K rows in the half-split RoPE order.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/tensor.h"
#include "server/base/status.h"
#include "server/model/config.h"

namespace altiplano {

struct TensorInfo {
  std::string name;   // "model.layers.0.self_attn.q_proj.weight"
  std::string dtype;  // as stored: "BF16", "Q4_1"
  std::vector<int64_t> shape;
  uint64_t bytes = 0;  // on disk
  std::string file;
};

// The fields of text/tokenizer.h's GgufVocabulary.
struct GgufTokenizer {
  std::string model, pre;
  std::vector<std::string> tokens, merges;
  std::vector<int32_t> types;
  int32_t bos = -1;
  bool add_bos = false;
};

// What the tokenizer and the chat format are made from; the text layer reads it.
struct TextAssets {
  std::string tokenizer_json;  // file contents; empty when there is none
  std::string tiktoken_model;  // Meta's tokenizer.model
  std::string chat_template;   // from tokenizer_config.json, chat_template.jinja or GGUF; may be empty
  std::optional<GgufTokenizer> gguf;
};

class Checkpoint {
 public:
  // A folder, a .gguf file or "random:8b" (random_checkpoint.h). Checks everything: headers, offsets, the exact set of
  // tensors, shapes against the config. Each error names file, tensor, expected and found. Reads by pread: a file that
  // shrinks later is an error, no SIGBUS.
  static StatusOr<std::unique_ptr<Checkpoint>> Open(const std::string& path);
  virtual ~Checkpoint() = default;

  virtual const std::string& path() const = 0;
  virtual std::string_view format() const = 0;  // "safetensors" | "gguf" | "random"
  virtual const ModelConfig& config() const = 0;
  virtual const GenerationDefaults& generation_defaults() const = 0;
  virtual const TextAssets& text_assets() const = 0;
  virtual const std::vector<TensorInfo>& tensors() const = 0;
  virtual uint64_t total_bytes() const = 0;

  // Reads the block rows [row_begin, row_begin + rows) x columns [col_begin, col_begin + cols) of a tensor (a vector is
  // one row), widened or rounded to `dtype` (f32 or bf16, nearest even), into `out`, whose rows lie `out_stride`
  // elements apart. Only the bytes needed are read. Any thread, several at a time.
  // *bytes_read (optional) grows by the bytes that came from disk.
  virtual Status Read(std::string_view tensor, int64_t row_begin, int64_t rows, int64_t col_begin, int64_t cols,
                      DType dtype, void* out, int64_t out_stride, uint64_t* bytes_read = nullptr) const = 0;
};

}  // namespace altiplano
