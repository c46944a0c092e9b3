// Products by cuBLASLt, which is loaded when the program runs: docs/adr/0006-cublaslt-by-dlopen.md.
#pragma once

#include <string>

#include "kernels/ops.h"

namespace altiplano::cuda {

// With each stream come a handle, memory for cuBLASLt to work in and the choices that it has made; nothing is allocated
// later. Without the library or the memory all products are our own kernels'.
void PrepareCublasLt(void* stream, int ordinal);
void ForgetCublasLt(void* stream);

// Of bf16, with all rows aligned to 16 bytes. False: cuBLASLt cannot be used for this, and nothing was launched.
bool CublasLtLinear(Stream& stream, const LinearArgs& args);

// "cuBLASLt 13.0.2", or why there is none. Of the last stream prepared.
std::string DescribeCublasLt();

}  // namespace altiplano::cuda
