// TensorView: what the model and the kernels pass to each other. Plain data, non-owning, at most four dimensions.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace altiplano {

enum class DType : uint8_t { kF32, kBF16, kI32, kI64 };

constexpr size_t SizeOf(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return 4;
    case DType::kBF16:
      return 2;
    case DType::kI32:
      return 4;
    case DType::kI64:
      return 8;
  }
  return 0;
}
constexpr const char* Name(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "f32";
    case DType::kBF16:
      return "bf16";
    case DType::kI32:
      return "i32";
    case DType::kI64:
      return "i64";
  }
  return "?";
}

enum class Device : uint8_t { kCpu, kCuda };

// bfloat16 as stored: the upper half of a float.
struct BF16 {
  uint16_t bits;
};
static_assert(sizeof(BF16) == 2);

constexpr float ToFloat(BF16 x) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16);
}
constexpr float ToFloat(float x) {
  return x;
}

// Round to nearest even; NaN stays a (quiet) NaN.
constexpr BF16 ToBF16(float x) {
  uint32_t bits = __builtin_bit_cast(uint32_t, x);
  if ((bits & 0x7FFFFFFF) > 0x7F800000) return {static_cast<uint16_t>((bits >> 16) | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)};
}

template <typename T>
struct DTypeOf;
template <>
struct DTypeOf<float> {
  static constexpr DType value = DType::kF32;
};
template <>
struct DTypeOf<BF16> {
  static constexpr DType value = DType::kBF16;
};
template <>
struct DTypeOf<int32_t> {
  static constexpr DType value = DType::kI32;
};
template <>
struct DTypeOf<int64_t> {
  static constexpr DType value = DType::kI64;
};

// Row-major: the last dimension is contiguous; `stride0` (elements between two indices of the first dimension) may
// exceed the product of the others, so that a column range of a matrix is a view too. Inner dimensions are dense.
struct TensorView {
  void* data = nullptr;
  DType dtype = DType::kF32;
  Device device = Device::kCpu;
  int rank = 0;
  std::array<int64_t, 4> shape{};
  int64_t stride0 = 0;

  static TensorView Make(void* data, DType dtype, std::initializer_list<int64_t> shape, Device device = Device::kCpu) {
    TensorView view;
    view.data = data;
    view.dtype = dtype;
    view.device = device;
    for (int64_t n : shape) view.shape[static_cast<size_t>(view.rank++)] = n;
    view.stride0 = 1;
    for (int i = 1; i < view.rank; ++i) view.stride0 *= view.shape[static_cast<size_t>(i)];
    return view;
  }

  bool empty() const { return data == nullptr; }
  int64_t dim(int i) const { return shape[static_cast<size_t>(i)]; }
  int64_t elements() const {
    int64_t n = rank > 0 ? 1 : 0;
    for (int i = 0; i < rank; ++i) n *= shape[static_cast<size_t>(i)];
    return n;
  }
  bool contiguous() const {
    int64_t inner = 1;
    for (int i = 1; i < rank; ++i) inner *= shape[static_cast<size_t>(i)];
    return rank == 0 || shape[0] <= 1 || stride0 == inner;
  }

  template <typename T>
  T* as() const {
    return static_cast<T*>(data);
  }
  template <typename T>
  T* row(int64_t i) const {
    return static_cast<T*>(data) + i * stride0;
  }
  // The first n rows.
  TensorView first(int64_t n) const {
    TensorView view = *this;
    view.shape[0] = n;
    return view;
  }
  // Of a matrix: columns [begin, begin + n) of every row.
  TensorView columns(int64_t begin, int64_t n) const {
    TensorView view = *this;
    view.data = static_cast<char*>(data) + begin * static_cast<int64_t>(SizeOf(dtype));
    view.shape[1] = n;
    return view;
  }
};

}  // namespace altiplano
