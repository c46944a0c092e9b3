#include "kernels/cpu/vec_avx512.h"
#include "kernels/cpu/vec_rows_body.h"

namespace altiplano::cpu {

constinit const RowKernels kRowsAvx512 = kRows;

}  // namespace altiplano::cpu
