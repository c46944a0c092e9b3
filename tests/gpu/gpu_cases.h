// The ops as ./run gpu measures them: in the shapes of Llama 3.1, whole and as one of eight ranks.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "kernels/cuda/architectures.h"
#include "kernels/device.h"
#include "kernels/tensor.h"
#include "tests/gpu/gpu_timer.h"

namespace altiplano::gpu {

// Device memory to read, full of small random numbers, and some to write. Both are handed out so that what one call
// touches is in no cache: the next turn's piece of the same size lies elsewhere.
class Arena {
 public:
  static constexpr size_t kInputBytes = size_t{4} << 30, kOutputBytes = size_t{1} << 30;

  explicit Arena(Stream& stream);
  explicit operator bool() const { return inputs_ && outputs_ && linear_scratch_; }
  const cuda::GpuProperties& gpu() const { return cuda::PropertiesOf(stream_); }
  // A matrix that turn's call reads, or writes. Larger than the memory is a bug in the list of cases.
  TensorView Input(int turn, int64_t rows, int64_t columns, DType dtype) const {
    return Piece(inputs_, turn, rows, columns, dtype);
  }
  TensorView Output(int turn, int64_t rows, int64_t columns, DType dtype) const {
    return Piece(outputs_, turn, rows, columns, dtype);
  }
  // All of the inputs as a pool of keys and one of values, or the outputs so; [P, heads, page_size, dim].
  TensorView InputPool(int which, int64_t heads, int64_t page_size, int64_t dim, DType dtype) const {
    return Pool(inputs_, which, heads, page_size, dim, dtype);
  }
  TensorView OutputPool(int which, int64_t heads, int64_t page_size, int64_t dim, DType dtype) const {
    return Pool(outputs_, which, heads, page_size, dim, dtype);
  }
  // Of the stream's products.
  void* linear_scratch() const { return linear_scratch_.data(); }
  // Indices, in a place of their own.
  TensorView Keep(const std::vector<int32_t>& values, std::initializer_list<int64_t> shape);
  // For what ops send to the host: a copy to other memory would be waited for.
  Buffer Pinned(size_t bytes) const { return Buffer::AllocateHost(stream_, bytes); }

 private:
  static TensorView Piece(const Buffer& memory, int turn, int64_t rows, int64_t columns, DType dtype);
  static TensorView Pool(const Buffer& memory, int which, int64_t heads, int64_t page_size, int64_t dim, DType dtype);

  Stream& stream_;
  Buffer inputs_, outputs_, linear_scratch_;
  std::vector<Buffer> kept_;
};

struct Case {
  std::string part;  // "linear"
  std::string name;  // unique: "Linear 8b qkv, 16 tokens"
  std::map<std::string, int64_t> sizes;
  double bytes = 0, flops = 0;  // the least that must be moved and computed
  bool captured = true;         // can be part of a CUDA graph
  // The op's calls; one call a turn. Runs on the device from here on.
  std::function<std::function<void(Stream&, int turn)>(Arena&)> prepare;
  // Instead, of what has streams and memory of its own.
  std::function<Time(const Effort&)> measure;
};

std::vector<Case> AllCases();

}  // namespace altiplano::gpu
