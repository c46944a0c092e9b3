// PlanCheck: whether executors can carry out a plan. They index memory by what a plan says and take for granted that it
// is a scheduler's; one that comes from another process is checked first.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "server/base/types.h"
#include "server/scheduler/scheduler.h"
#include "server/scheduler/step_plan.h"

namespace altiplano {

class PlanCheck {
 public:
  static constexpr int32_t kMostTopLogprobs = 20;  // what sampling has room for; who sees both holds them equal

  // options: the executor's own, see LocalExecutor::scheduler_options.
  PlanCheck(const SchedulerOptions& options, TokenId vocab);

  // Of all plans in the order in which they are executed: what is wrong with the next one; empty: nothing. After a plan
  // that is wrong there is no next one. One thread.
  std::string Check(const StepPlan& plan);

 private:
  struct Slot {
    bool taken = false;           // a sequence has come to it
    std::vector<int32_t> blocks;  // that its sequence has named
    bool sampled_last = false;    // in the plan before
    uint64_t planned_in = 0;      // the last step that it is part of
  };
  std::string CheckInit(const SlotInit& init);
  std::string CheckSequence(const StepPlan& plan, const PlannedSequence& sequence);
  std::string CheckWrites(const StepPlan& plan, const PlannedSequence& sequence, const std::vector<int32_t>& blocks);
  bool IsToken(TokenId id) const { return id >= 0 && id < vocab_; }
  bool AreTokens(const std::vector<TokenId>& ids) const;

  const int32_t num_blocks_, block_size_, token_budget_, max_context_;
  const TokenId vocab_;
  uint64_t step_ = 0;  // the last one's
  std::vector<Slot> slots_;
  std::vector<uint64_t> written_in_;  // [blocks] the last step that writes to it
};

}  // namespace altiplano
