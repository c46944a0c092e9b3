// The contract between linear.cc, which plans and shares out the work, and the kernels of each instruction set.
// Plain data and function pointers: nothing inline that could be compiled twice with different instruction sets.
#pragma once

#include <cstddef>
#include <cstdint>

namespace altiplano {
class ThreadTeam;
struct LinearArgs;
}  // namespace altiplano

namespace altiplano::cpu {

// out = x * weight^T (+ out) for one block of tokens, x being packed.
struct LinearTask {
  const void* weight = nullptr;  // [n, k]
  int64_t weight_stride = 0;     // elements between rows
  int64_t n = 0;
  int64_t k = 0;
  const void* packed = nullptr;  // x as LinearKernel::pack left it, 64-byte aligned
  int64_t tokens = 0;
  void* out = nullptr;     // [tokens, n]
  int64_t out_stride = 0;  // elements
  bool out_f32 = false;    // else the dtype of the weights
  bool accumulate = false;
};

struct LinearKernel {
  const char* name;
  int64_t panel;          // weight rows worked on together: shares of the work are multiples of it
  int64_t group;          // tokens packed together
  int64_t step;           // k is padded to it in packed x
  size_t packed_element;  // bytes of an element of packed x

  // Packs tokens [begin, end) of a block of `tokens`. begin is a multiple of group; end too, unless it is `tokens`.
  // packed holds at least tokens x k elements, each dimension rounded up to group and step.
  void (*pack)(const void* x, int64_t x_stride, int64_t tokens, int64_t k, int64_t begin, int64_t end, void* packed);
  // Columns [begin, end) of out. partial: kLinearColumns x tokens (rounded up to 32) floats of this thread's own,
  // 64-byte aligned.
  void (*run)(const LinearTask& task, int64_t begin, int64_t end, float* partial);
};

// Columns of out whose partial sums a thread keeps at a time.
inline constexpr int64_t kLinearColumns = 192;

extern const LinearKernel kLinearBf16Avx2, kLinearF32Avx2;
extern const LinearKernel kLinearBf16Avx512, kLinearF32Avx512;
extern const LinearKernel kLinearBf16Avx512Bf16;
extern const LinearKernel kLinearBf16Amx;
extern const LinearKernel kLinearBf16AmxHost;  // the AMX kernel on tiles that are plain arrays: for tests, on any CPU

// Linear by a given kernel. The caller knows that the CPU can run it.
void LinearWith(const LinearKernel& kernel, ThreadTeam& team, const LinearArgs& args);

// Whether `kernel` gives what `trusted` gives, within rounding, on a small product with ragged edges.
bool LinearKernelsAgree(const LinearKernel& kernel, const LinearKernel& trusted);

}  // namespace altiplano::cpu
