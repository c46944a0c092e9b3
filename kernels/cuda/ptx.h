// What kernels use that is not plain C++. nvcc compiles the bodies of ptx_device.h, the host compiler those of
// ptx_host.h, which call the simulator (sim/); names and meanings are the same. Kernels reach global and shared memory
// only through these, so that the simulator sees and counts every access.
#pragma once

#ifdef __CUDACC__
#include "kernels/cuda/ptx_device.h"
#else
#include "kernels/cuda/ptx_host.h"
#endif
