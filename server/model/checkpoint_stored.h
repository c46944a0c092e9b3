// The Checkpoint that both formats become once opened: checked tensors at known places in files, read on demand.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "server/model/checkpoint.h"
#include "server/model/checkpoint_tensors.h"
#include "server/model/file_reader.h"

namespace altiplano {

struct CheckpointParts {
  std::string path;
  std::string_view format;  // a literal
  ModelConfig config;
  GenerationDefaults generation;
  TextAssets text;
  std::vector<std::shared_ptr<const ByteSource>> files;
  std::vector<StoredTensor> tensors;  // matched
};

class StoredCheckpoint final : public Checkpoint {
 public:
  explicit StoredCheckpoint(CheckpointParts parts);

  const std::string& path() const override { return parts_.path; }
  std::string_view format() const override { return parts_.format; }
  const ModelConfig& config() const override { return parts_.config; }
  const GenerationDefaults& generation_defaults() const override { return parts_.generation; }
  const TextAssets& text_assets() const override { return parts_.text; }
  const std::vector<TensorInfo>& tensors() const override { return infos_; }
  uint64_t total_bytes() const override { return total_bytes_; }
  Status Read(std::string_view tensor, int64_t row_begin, int64_t rows, int64_t col_begin, int64_t cols, DType dtype,
              void* out, int64_t out_stride, uint64_t* bytes_read) const override;

 private:
  // Immutable after construction.
  CheckpointParts parts_;
  std::vector<TensorInfo> infos_;
  std::map<std::string, const StoredTensor*, std::less<>> by_name_;
  uint64_t total_bytes_ = 0;
};

}  // namespace altiplano
