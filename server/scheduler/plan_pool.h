// PlanPool: StepPlans whose memory is used again once nobody holds them. Plans may be let go on any thread, also after
// the pool has died.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "server/scheduler/step_plan.h"

namespace altiplano {

class PlanPool {
 public:
  // An empty plan with the capacity of an earlier one.
  std::shared_ptr<StepPlan> Get();

 private:
  struct Spare {
    std::mutex mutex;
    std::vector<std::unique_ptr<StepPlan>> plans;  // guarded by mutex
  };
  std::shared_ptr<Spare> spare_ = std::make_shared<Spare>();
};

}  // namespace altiplano
