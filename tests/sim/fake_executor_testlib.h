// FakeExecutor: runs plans on a fake KV store, and distrusts every plan.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "server/scheduler/scheduler.h"
#include "server/scheduler/step_plan.h"
#include "tests/sim/oracle_testlib.h"

namespace altiplano::sim {

class FakeExecutor {
 public:
  FakeExecutor(const FakeModel& model, const SchedulerOptions& options, int32_t max_servable);

  // Judges a plan when it has been made: `running` is the plan in flight then, or null. Returns what is wrong, or "".
  std::string Judge(const StepPlan& plan, const StepPlan* running) const;
  // Runs a step. For a planned sequence named in `make_nan` (index into plan.sequences), all that it computes is NaN.
  StepResult Execute(const StepPlan& plan, const std::vector<size_t>& make_nan);
  // What Execute found wrong so far, or "".
  const std::string& error() const { return error_; }

 private:
  struct Cell {  // one token's key and value in one block
    uint64_t value = 0;
    TokenId token = -1;
    int32_t position = -1;
    bool nan = false;
  };
  struct Slot {
    std::shared_ptr<const Request> request;
    uint32_t sequence = 0;
    int32_t next_position = -1;  // -1: the first chunk decides
    TokenId last_sampled = -1;
    std::vector<TokenId> history;
  };
  struct Row {  // a planned sequence while it is computed
    uint64_t attention = 0;
    bool nan = false;
  };
  Cell& At(const StepPlan& plan, const PlannedSequence& planned, int32_t position);
  void InitSlots(const StepPlan& plan);
  Row ReadContext(const StepPlan& plan, const PlannedSequence& planned);
  void RunSequence(const StepPlan& plan, const PlannedSequence& planned, bool make_nan, StepResult* result);
  void Complain(const StepPlan& plan, const PlannedSequence& planned, const std::string& what);

  const FakeModel& model_;
  const SchedulerOptions options_;
  const int32_t max_servable_;
  std::vector<Cell> cells_;  // [block][offset]
  std::vector<Slot> slots_;
  std::string error_;
};

}  // namespace altiplano::sim
