#include "server/scheduler/plan_pool.h"

#include <utility>

namespace altiplano {

namespace {
constexpr size_t kMostSpare = 4;  // one being made, two in flight, one for the caller's hesitation
}

std::shared_ptr<StepPlan> PlanPool::Get() {
  std::unique_ptr<StepPlan> plan;
  {
    std::lock_guard lock(spare_->mutex);
    if (!spare_->plans.empty()) {
      plan = std::move(spare_->plans.back());
      spare_->plans.pop_back();
    }
  }
  if (plan == nullptr) plan = std::make_unique<StepPlan>();
  auto recycle = [spare = spare_](StepPlan* done) {
    std::unique_ptr<StepPlan> owned(done);
    owned->step = 0;
    owned->sequences.clear();
    owned->tokens.clear();
    owned->block_ids.clear();
    owned->prompt_score_ids.clear();
    owned->slot_inits.clear();  // lets go of the requests
    owned->num_prefill_tokens = 0;
    std::lock_guard lock(spare->mutex);
    if (spare->plans.size() < kMostSpare) spare->plans.push_back(std::move(owned));
  };
  return std::shared_ptr<StepPlan>(plan.release(), std::move(recycle), CountAllocator<StepPlan>(spare_));
}

}  // namespace altiplano
