// What the rest of the CPU side may know of Linear beyond kernels/cpu/ops.h.
#pragma once

#include <string>

namespace altiplano::cpu {

// Which kernels bf16 Linear uses at the current instruction set: "avx2", "avx512", "avx512_bf16" or "amx_bf16"; with a
// remark when AMX is there but its self-check failed and it is left alone. For logs. Any thread.
std::string LinearBackend();

}  // namespace altiplano::cpu
