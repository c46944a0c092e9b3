#include "kernels/cpu/vec_avx512.h"
#include "kernels/cpu/vec_rows_body.h"

namespace altiplano::cpu {

const RowKernels kRowsAvx512 = kRows;

}  // namespace altiplano::cpu
