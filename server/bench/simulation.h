// A load on the real scheduler, with a formula in place of the device and a clock that is turned, not waited for.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "server/base/status.h"
#include "server/bench/dataset.h"
#include "server/bench/report.h"
#include "server/scheduler/scheduler.h"
#include "server/scheduler/step_cost.h"

namespace altiplano::bench {

struct SimulationOptions {
  SchedulerOptions scheduler;
  StepCost cost;
  int32_t max_queued_requests = 512;  // as the engine's
  int64_t max_queued_tokens = 4 << 20;
  std::function<bool()> interrupted;  // asked before each step; true: it ends as it is
};

struct SimulationTotals {
  uint64_t steps = 0;
  Duration busy{};  // sum of all steps
  Duration longest_step{};
  uint64_t sequences = 0;  // of all steps together
  uint64_t tokens = 0;
  int32_t peak_blocks = 0;  // held at one time
  SchedulerLoad load;       // at the end
};

// Fills report->requests and ->duration; report->max_concurrency limits what runs at one time. Steps overlap with
// planning as the engine's do: step n + 1 is planned while n runs. INVALID_ARGUMENT when the options contradict.
StatusOr<SimulationTotals> Simulate(const Dataset& dataset, const std::vector<Duration>& arrivals,
                                    const SimulationOptions& options, BenchReport* report);

}  // namespace altiplano::bench
