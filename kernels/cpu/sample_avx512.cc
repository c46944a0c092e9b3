#include "kernels/cpu/vec_avx512.h"

// Needs Vec.
#include "kernels/cpu/sample_body.h"

namespace altiplano::cpu {

constinit const SampleKernels kSampleAvx512 = kSample;

}  // namespace altiplano::cpu
