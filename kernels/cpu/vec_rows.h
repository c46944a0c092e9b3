// The inner loops of the row-wise ops, one table per instruction set, chosen when an op starts.
// Plain data and function pointers: nothing inline that could be compiled twice with different instruction sets.
#pragma once

#include <cstdint>

namespace altiplano::cpu {

// One row of f32 or bf16 numbers.
struct RowPtr {
  void* data;
  bool bf16;
};

struct RowKernels {
  // out = x, converted; rounded to nearest even.
  void (*convert)(RowPtr out, RowPtr x, int64_t n);
  // residual += x when residual.data is not null, and stands for x below; out = x / sqrt(mean(x^2) + eps) * weight.
  void (*rms_norm)(RowPtr out, RowPtr residual, RowPtr x, RowPtr weight, int64_t n, float eps);
  // out = gate / (1 + e^-gate) * up. gate and up have one dtype.
  void (*silu_mul)(RowPtr out, RowPtr gate, RowPtr up, int64_t n);
  // cos and sin of position * inv_freq[i], each within 0.51 ulp. cos and sin have room for a multiple of 8.
  void (*cos_sin)(const float* inv_freq, int64_t n, int64_t position, float* cos, float* sin);
  // (out_low, out_high) = (low cos - high sin, high cos + low sin); out may be the inputs. out_low and out_high have
  // one dtype, low and high too.
  void (*rotate)(RowPtr out_low, RowPtr out_high, RowPtr low, RowPtr high, const float* cos, const float* sin,
                 int64_t n);
  // out = e^x, for tests.
  void (*exp)(float* out, const float* x, int64_t n);
};

extern const RowKernels kRowsAvx2, kRowsAvx512;

const RowKernels& CurrentRowKernels();

}  // namespace altiplano::cpu
