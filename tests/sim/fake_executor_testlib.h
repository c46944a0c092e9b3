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

  // Judges a plan when it has been made: `running` is the plan in flight then, which is the last one executed, or null.
  // Returns what is wrong, or "".
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
    std::vector<int32_t> blocks;  // that plans have named so far
  };
  // Of each planned sequence, from position 0 on.
  using BlockTables = std::vector<std::vector<int32_t>>;
  struct Row {  // a planned sequence while it is computed
    uint64_t attention = 0;
    bool nan = false;
  };
  BlockTables TablesOf(const StepPlan& plan) const;
  std::string JudgeKnownBlocks(const StepPlan& plan) const;
  std::string JudgeInFlight(const StepPlan& plan, const BlockTables& tables, const std::map<int32_t, size_t>& writers,
                            const StepPlan& running) const;
  Cell& At(const PlannedSequence& planned, int32_t position);
  void InitSlots(const StepPlan& plan);
  Row ReadContext(const StepPlan& plan, const PlannedSequence& planned);
  void RunSequence(const StepPlan& plan, const PlannedSequence& planned, bool make_nan, StepResult* result);
  void Complain(const StepPlan& plan, const PlannedSequence& planned, const std::string& what);

  const FakeModel& model_;
  const SchedulerOptions options_;
  const int32_t max_servable_;
  std::vector<Cell> cells_;  // [block][offset]
  std::vector<Slot> slots_;
  BlockTables executed_;  // of the last plan executed
  std::string error_;
};

}  // namespace altiplano::sim
