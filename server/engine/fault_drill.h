// Failures on purpose, to see what clients, probes and supervisors do about them. docs/parallelism.md.
#pragma once

#include <cstdint>
#include <functional>

#include "server/base/status.h"

namespace altiplano {

// What ALTIPLANO_FAULT asks for, as LocalExecutorOptions::before_step: "RANK:STEP:throw" or "RANK:STEP:hang", in the
// first step from STEP on that the rank runs, once in the life of the process. STEP 0 is the warm-up before READY. Null
// when it is not set; OUT_OF_RANGE when it says anything else. A warning in the log says that it is set.
StatusOr<std::function<void(int rank, uint64_t step)>> FaultDrillFromEnvironment();

}  // namespace altiplano
