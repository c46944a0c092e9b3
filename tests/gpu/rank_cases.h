// The calls between ranks as ./run gpu measures them: each rank a thread of this process with a stream of its own.
//
// All ranks on one GPU measure the kernels, their launches and their waits for each other, in that GPU's memory: no
// NVLink. Where there are as many GPUs as ranks, which reach each other's memory, each has its own.
#pragma once

#include <vector>

#include "tests/gpu/gpu_cases.h"

namespace altiplano::gpu {

// gpus: that there are.
std::vector<Case> AllReduceCases(int gpus);

}  // namespace altiplano::gpu
