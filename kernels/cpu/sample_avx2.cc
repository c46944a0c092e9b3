#include "kernels/cpu/vec_avx2.h"

// Needs Vec.
#include "kernels/cpu/sample_body.h"

namespace altiplano::cpu {

constinit const SampleKernels kSampleAvx2 = kSample;

}  // namespace altiplano::cpu
