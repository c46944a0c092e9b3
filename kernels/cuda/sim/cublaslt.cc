// The simulated GPU has no libraries.
#include "kernels/cuda/cublaslt.h"

namespace altiplano::cuda {

void PrepareCublasLt(const Stream&) {}

bool CublasLtLinear(Stream&, const LinearArgs&) {
  return false;
}

std::string WhyNoCublasLt() {
  return "a simulated GPU has no libraries";
}

}  // namespace altiplano::cuda
