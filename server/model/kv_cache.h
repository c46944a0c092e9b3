// KvCache: the paged K and V pools of one rank, layout [layer][page][kv_head][token][dim], K and V apart.
// Which page belongs to whom is the scheduler's business (server/scheduler/block_pool.h); this only holds the memory.
#pragma once

#include <cstdint>
#include <optional>

#include "kernels/device.h"
#include "kernels/tensor.h"

namespace altiplano {

class KvCache {
 public:
  struct Shape {
    int64_t layers = 0;
    int64_t pages = 0;      // P
    int64_t kv_heads = 0;   // Hkv'
    int64_t page_size = 0;  // S, tokens
    int64_t head_dim = 0;   // D
    DType dtype = DType::kBF16;

    size_t page_bytes() const {  // of one page through all layers, K and V
      return static_cast<size_t>(2 * layers * kv_heads * page_size * head_dim) * SizeOf(dtype);
    }
  };

  // On the stream's device. nullopt when the memory cannot be had.
  static std::optional<KvCache> Create(const Shape& shape, const Stream& stream) {
    KvCache cache;
    cache.shape_ = shape;
    size_t bytes = shape.page_bytes() / 2 * static_cast<size_t>(shape.pages);
    cache.k_ = Buffer::Allocate(stream, bytes);
    cache.v_ = Buffer::Allocate(stream, bytes);
    if (!cache.k_ || !cache.v_) return std::nullopt;
    return cache;
  }

  TensorView k_pages(int64_t layer) const { return Layer(k_, layer); }  // [P, Hkv', S, D]
  TensorView v_pages(int64_t layer) const { return Layer(v_, layer); }  // [P, Hkv', S, D]
  const Shape& shape() const { return shape_; }

 private:
  TensorView Layer(const Buffer& buffer, int64_t layer) const {
    size_t layer_bytes =
        shape_.page_bytes() / 2 / static_cast<size_t>(shape_.layers) * static_cast<size_t>(shape_.pages);
    return TensorView::Make(static_cast<char*>(buffer.data()) + static_cast<size_t>(layer) * layer_bytes, shape_.dtype,
                            {shape_.pages, shape_.kv_heads, shape_.page_size, shape_.head_dim}, buffer.device());
  }

  Shape shape_;
  Buffer k_, v_;
};

}  // namespace altiplano
