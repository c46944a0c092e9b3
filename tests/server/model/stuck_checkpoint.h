// A checkpoint, one tensor of which is in a file system that does not answer until released, or for a minute: a test
// that is not told of it has an end.
#pragma once

#include <chrono>
#include <future>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "server/model/checkpoint.h"

namespace altiplano {

class StuckCheckpoint : public Checkpoint {
 public:
  StuckCheckpoint(const Checkpoint& checkpoint, std::string tensor, std::shared_future<void> released)
      : checkpoint_(checkpoint), tensor_(std::move(tensor)), released_(std::move(released)) {}
  const std::string& path() const override { return checkpoint_.path(); }
  std::string_view format() const override { return checkpoint_.format(); }
  const ModelConfig& config() const override { return checkpoint_.config(); }
  const GenerationDefaults& generation_defaults() const override { return checkpoint_.generation_defaults(); }
  const TextAssets& text_assets() const override { return checkpoint_.text_assets(); }
  const std::vector<TensorInfo>& tensors() const override { return checkpoint_.tensors(); }
  uint64_t total_bytes() const override { return checkpoint_.total_bytes(); }
  Status Read(std::string_view tensor, int64_t row_begin, int64_t rows, int64_t col_begin, int64_t cols, DType dtype,
              void* out, int64_t out_stride, uint64_t* bytes_read) const override {
    if (tensor == tensor_) released_.wait_for(std::chrono::minutes(1));
    return checkpoint_.Read(tensor, row_begin, rows, col_begin, cols, dtype, out, out_stride, bytes_read);
  }

 private:
  const Checkpoint& checkpoint_;
  const std::string tensor_;
  const std::shared_future<void> released_;
};

}  // namespace altiplano
