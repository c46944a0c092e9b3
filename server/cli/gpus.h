// Which GPUs the replicas of this process compute on.
#pragma once

#include <string_view>
#include <vector>

#include "server/base/status.h"

namespace altiplano::cli {

// [replicas][ranks]: the GPU of each rank. list: their ordinals, "0,1,4,5", a replica's together; the same one several
// times is shared by those. Empty: from 0 on. present: how many GPUs there are. OUT_OF_RANGE for a list of other
// things or of another length, UNAVAILABLE with the numbers when there are too few.
StatusOr<std::vector<std::vector<int>>> AssignGpus(std::string_view list, int replicas, int ranks, int present);

}  // namespace altiplano::cli
