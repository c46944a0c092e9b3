#include "kernels/cpu/vec_avx2.h"
#include "kernels/cpu/vec_rows_body.h"

namespace altiplano::cpu {

constinit const RowKernels kRowsAvx2 = kRows;

}  // namespace altiplano::cpu
