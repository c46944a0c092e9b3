// Elements of tensors inside kernels: f32 or bf16 in memory, f32 in registers, kPack neighbours at a time.
#pragma once

#include <cstdint>

#include "kernels/cuda/ptx.h"
#include "kernels/tensor.h"

namespace altiplano::cuda {

inline constexpr float kLog2E = 1.44269504f;

// A matrix as kernels see it. The dtype is a value and not a type: the branch is the same for all threads, and an op
// with four operands would otherwise be sixteen kernels.
struct Elements {
  void* data = nullptr;
  int64_t stride = 0;  // elements between rows
  bool bf16 = false;

  Elements() = default;
  explicit Elements(const TensorView& view)
      : data(view.data), stride(view.rank > 1 ? view.stride0 : 0), bf16(view.dtype == DType::kBF16) {}
};

// True when rows of `view` can be accessed `pack` elements at a time.
inline bool IsPacked(const TensorView& view, int64_t pack) {
  const size_t bytes = static_cast<size_t>(pack) * SizeOf(view.dtype);
  const int64_t width = view.dim(view.rank - 1);
  return reinterpret_cast<uintptr_t>(view.data) % bytes == 0 && width % pack == 0 &&
         (view.rank < 2 || view.stride0 % pack == 0);
}

// What begins so many bytes further on: of few of them one instruction makes an address.
template <typename Bytes>
PTX_FUNCTION Elements Behind(Elements x, Bytes bytes) {
  x.data = static_cast<char*>(x.data) + bytes;
  return x;
}
// A row, whose elements are then counted from its first in 32 bits.
PTX_FUNCTION Elements RowOf(Elements x, int64_t row) {
  return Behind(x, row * x.stride * (x.bf16 ? 2 : 4));
}

// A pack as it lies in memory, in the first words. Apart from its widening, so that several packs are on their way
// before the first is waited for.
// `at` counts elements from the matrix's first and is a multiple of kPack.
template <int kPack>
PTX_FUNCTION void LoadRaw(const Elements& from, int64_t at, uint32_t (&raw)[kPack] PTX_CALLER) {
  static_assert(kPack == 1 || kPack == 4);
  if (from.bf16) {
    const BF16* data = static_cast<const BF16*>(from.data) + at;
    if constexpr (kPack == 4) {
      const uint2 pairs = ptx::LdGlobal(reinterpret_cast<const uint2*>(data) PTX_PASS_CALLER);
      raw[0] = pairs.x;
      raw[1] = pairs.y;
    } else {
      raw[0] = ptx::LdGlobal(&data->bits PTX_PASS_CALLER);
    }
  } else {
    const float* data = static_cast<const float*>(from.data) + at;
    if constexpr (kPack == 4) {
      const uint4 words = ptx::LdGlobal(reinterpret_cast<const uint4*>(data) PTX_PASS_CALLER);
      raw[0] = words.x;
      raw[1] = words.y;
      raw[2] = words.z;
      raw[3] = words.w;
    } else {
      raw[0] = ptx::LdGlobal(reinterpret_cast<const uint32_t*>(data) PTX_PASS_CALLER);
    }
  }
}

template <int kPack>
PTX_FUNCTION void Widen(const uint32_t (&raw)[kPack], bool bf16, float (&x)[kPack]) {
  PTX_UNROLL
  for (int i = 0; i < kPack; ++i) {
    const uint32_t pair = raw[i / 2];
    x[i] = ptx::FloatOfBits(!bf16 ? raw[i] : i % 2 == 0 ? pair << 16 : pair & 0xFFFF0000);
  }
}

template <int kPack>
PTX_FUNCTION void Load(const Elements& from, int64_t at, float (&x)[kPack] PTX_CALLER) {
  uint32_t raw[kPack] = {};
  LoadRaw(from, at, raw PTX_PASS_CALLER);
  Widen(raw, from.bf16, x);
}

template <int kPack>
PTX_FUNCTION void Store(const Elements& to, int64_t at, const float (&x)[kPack] PTX_CALLER) {
  static_assert(kPack == 1 || kPack == 4);
  if (to.bf16) {
    BF16* data = static_cast<BF16*>(to.data) + at;
    if constexpr (kPack == 4) {
      const uint2 pairs = {ptx::PackBF16(x[0], x[1]), ptx::PackBF16(x[2], x[3])};
      ptx::StGlobal(reinterpret_cast<uint2*>(data), pairs PTX_PASS_CALLER);
    } else {
      ptx::StGlobal(data, ptx::RoundBF16(x[0]) PTX_PASS_CALLER);
    }
  } else {
    float* data = static_cast<float*>(to.data) + at;
    if constexpr (kPack == 4) {
      const uint4 words = {ptx::BitsOfFloat(x[0]), ptx::BitsOfFloat(x[1]), ptx::BitsOfFloat(x[2]),
                           ptx::BitsOfFloat(x[3])};
      ptx::StGlobal(reinterpret_cast<uint4*>(data), words PTX_PASS_CALLER);
    } else {
      ptx::StGlobal(data, x[0] PTX_PASS_CALLER);
    }
  }
}

// x as it will be read back after a store.
PTX_FUNCTION float Rounded(float x, bool bf16) {
  return bf16 ? ptx::FloatOfBits(static_cast<uint32_t>(ptx::RoundBF16(x).bits) << 16) : x;
}

// The same sum in every lane, always in the same order.
PTX_FUNCTION float WarpSum(float x) {
  PTX_UNROLL
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xFFFFFFFF, x, lanes);
  return x;
}

}  // namespace altiplano::cuda
