// Coefficients of a step's cost from steps that were measured.
#pragma once

#include <vector>

#include "server/base/status.h"
#include "server/scheduler/flight_record.h"
#include "server/scheduler/step_cost.h"

namespace altiplano::bench {

struct MeasuredStep {
  StepWork work;
  Duration time{};
};
// The steps of a flight record whose device time is known.
std::vector<MeasuredStep> MeasuredSteps(const FlightRecord& record);

struct StepCostFit {
  StepCost cost;
  int64_t steps = 0;                       // that were fitted
  int64_t held_up = 0;                     // others, left out: far slower than any formula of the rest would have them
  double median_error = 0, p90_error = 0;  // of a step's time, relative, over the fitted ones
};
// The non-negative coefficients with the least sum of squared relative errors. FAILED_PRECONDITION with fewer than 20
// steps.
StatusOr<StepCostFit> FitStepCost(const std::vector<MeasuredStep>& steps);

}  // namespace altiplano::bench
