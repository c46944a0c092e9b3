// setmaxnreg, as kernels call it. Apart from thread.h, because few do.
#pragma once

#include "kernels/cuda/sim/site.h"

namespace altiplano::sim {

// `registers` are those that the thread has from then on.
void GiveRegistersBack(int registers, Site site);
void TakeRegisters(int registers, Site site);

}  // namespace altiplano::sim
