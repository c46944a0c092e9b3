// Products by cuBLASLt, which is loaded when the program runs: docs/adr/0006-cublaslt-by-dlopen.md.
#pragma once

#include <string>

#include "kernels/ops.h"

namespace altiplano::cuda {

// Of bf16, with all rows aligned to 16 bytes. False: cuBLASLt cannot be used for this, and nothing was launched. It
// works with the handle and in the memory that PrepareCublasLt took; without them, or without the library, all products
// are our own kernels'.
bool CublasLtLinear(Stream& stream, const LinearArgs& args);

// What the library needs for products on this stream, since no op allocates.
void PrepareCublasLt(const Stream& stream);

// Of a stream that ends.
void ForgetCublasLt(void* stream);

// Empty, or why the library cannot be used in this process.
std::string WhyNoCublasLt();

// "cuBLASLt 13.0.2", or why there is none.
std::string DescribeCublasLt();

}  // namespace altiplano::cuda
