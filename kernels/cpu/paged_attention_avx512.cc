#include "kernels/cpu/paged_attention_transpose512.h"

// Needs TransposeSquare.
#include "kernels/cpu/paged_attention_f32.h"

namespace altiplano::cpu {

constinit const AttentionKernel kAttentionF32Avx512 = KernelF32<float>("f32 in avx512");
constinit const AttentionKernel kAttentionBf16Avx512 = KernelF32<uint16_t>("bf16 in avx512");

}  // namespace altiplano::cpu
