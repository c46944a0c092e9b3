#pragma once

#include "kernels/cuda/elements.h"
#include "kernels/cuda/ptx.h"

namespace altiplano::cuda {

// x / (1 + e^-x). For x below -88 the exponential is infinite and the quotient -0.
PTX_FUNCTION float Silu(float x) {
  return ptx::Divide(x, 1.0f + ptx::Exp2(-kLog2E * x));
}

}  // namespace altiplano::cuda
