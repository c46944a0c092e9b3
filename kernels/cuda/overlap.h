// Programmatic dependent launch, of kernels that are started by LaunchOverlapping (launch.h).
#pragma once

#include <atomic>

namespace altiplano::cuda {

inline std::atomic<bool> kernels_overlap{true};

// Whether they may start while the kernel before them ends, on GPUs that can: from sm_90 on. Before the first launch.
inline void OverlapKernels(bool on) {
  kernels_overlap = on;
}

}  // namespace altiplano::cuda
