// The simulated GPU has no libraries.
#include "kernels/cuda/cublaslt.h"

#include "kernels/cuda/backend.h"

namespace altiplano::cuda {

void PrepareLinear(const Stream&) {}

bool CublasLtLinear(Stream&, const LinearArgs&) {
  return false;
}

std::string WhyNoCublasLt() {
  return "a simulated GPU has no libraries";
}

}  // namespace altiplano::cuda
