// Ranks that leave out their sums, for measuring what the sums cost.
#pragma once

#include <memory>

#include "kernels/comm/communicator.h"

namespace altiplano {

// The same rank, but AllReduceSum changes nothing: each rank goes on with its own part, so that what the model computes
// is wrong, in as many operations otherwise. Gathers and broadcasts stay.
std::unique_ptr<Communicator> MakeUnsummed(std::unique_ptr<Communicator> member);

}  // namespace altiplano
