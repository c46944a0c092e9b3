// The simulated GPU has no libraries.
#include "kernels/cuda/cublaslt.h"

namespace altiplano::cuda {

bool CublasLtLinear(Stream&, const LinearArgs&) {
  return false;
}

}  // namespace altiplano::cuda
