#include "kernels/cpu/vec_rows.h"

#include "kernels/cpu/cpu_features.h"

namespace altiplano::cpu {

const RowKernels& CurrentRowKernels() {
  return CurrentIsa() >= Isa::kAvx512 ? kRowsAvx512 : kRowsAvx2;
}

}  // namespace altiplano::cpu
