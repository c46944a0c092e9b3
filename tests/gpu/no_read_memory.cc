// In the place of read_memory.cu in the rehearsal, which has no memory worth measuring.
#include "tests/gpu/gpu_timer.h"

namespace altiplano::gpu {

void ReadMemory(Stream&, const void*, size_t) {}

}  // namespace altiplano::gpu
