// Simulator: one seed is one world: options, workload, faults and the order of everything. It drives the real Scheduler
// as the engine does (the next plan is made before the step in flight has been applied) and judges all that comes out.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "server/scheduler/flight_recorder.h"
#include "server/scheduler/plan_check.h"
#include "server/scheduler/queue_bounds.h"
#include "server/scheduler/scheduler.h"
#include "tests/sim/fake_executor_testlib.h"
#include "tests/sim/oracle_testlib.h"
#include "tests/sim/policy_oracle_testlib.h"
#include "tests/sim/queue_oracle_testlib.h"

namespace altiplano::sim {

// How often the interesting things happened: a simulation in which they never do proves nothing.
struct Coverage {
  uint64_t steps = 0, tokens = 0, requests = 0;
  uint64_t preemptions = 0, cached_tokens = 0, siblings = 0, prompt_scores = 0, from_slot = 0, chunked = 0;
  uint64_t cancelled = 0, stopped = 0, time_limits = 0, deadlines = 0, queue_timeouts = 0, non_finite = 0, aborts = 0;
  uint64_t dropped_results = 0, replayed = 0, restored = 0;
  uint64_t targets_met = 0, targets_missed = 0, late_tokens = 0, overtaken = 0;
  PolicyOracle::Counts policies;
  QueueOracle::Counts queue;
};

// Parts of a world that a failure may not need: keys of requests, and names of kParts.
using Omitted = std::set<std::string>;
extern const std::vector<std::string> kParts;
inline constexpr int32_t kMostRequests = 40;

class Simulator {
 public:
  // Without what is in `omitted`, but for the last request that is left: to see how little a failure needs.
  Simulator(uint64_t seed, Coverage* coverage, Omitted omitted = {});
  // What went wrong, or "".
  std::string Run();

 private:
  struct SimSequence {
    SequenceOracle oracle;
    bool finished = false;
    bool stop_requested = false;
    std::optional<TimePoint> last_token_at{};
  };
  struct SimRequest {
    std::shared_ptr<const Request> request;
    int32_t arrival_step = 0;
    size_t account = 0;
    std::vector<SimSequence> sequences;
    bool added = false, admitted = false, ended = false;
    std::optional<Code> cancel;
    bool nan = false;              // a result that it was waiting for was NaN
    bool must_fail = false;        // and it must end in this Apply
    int32_t scores = 0;            // prompt scores received
    uint64_t score_attention = 0;  // of the oracle, before the next score
    uint64_t tokens = 0, cached_tokens = 0;
  };
  struct Running {
    std::shared_ptr<const StepPlan> plan;
    StepResult result;
    std::vector<size_t> nan;
  };

  void MakeOptions();
  void MakeCosts();
  void MakeTenants();
  void MakeQueue();
  void Simplify();
  void MakeWorkload();
  void AddToWorkload(RequestKey key, int32_t arrival_step, bool in_flood);
  std::shared_ptr<Request> MakeRequest(RequestKey key, bool in_flood);
  void SetTimes(Request* request);
  bool Without(const std::string& part) const { return omitted_.contains(part); }
  void Loop();
  void Inject();
  bool Enter(RequestKey key, const SimRequest& request);
  void LeaveQueue(const SimRequest& request, bool admitted);
  void CancelOne();
  std::shared_ptr<const StepPlan> Plan(const StepPlan* running);
  Running Launch(std::shared_ptr<const StepPlan> plan);
  void Apply(Running running);
  void AbortAll();
  void JudgeEvents(bool after_plan);
  void JudgeEvent(const Event& event);
  void JudgeOrder(RequestKey key, const SimRequest& admitted);
  void JudgeTarget(const SimRequest& request);
  void JudgeLateness(SimSequence* sequence);
  void JudgeToken(const Event& event, SimRequest& request);
  void JudgeScores(const Event& event, SimRequest& request);
  void JudgeFinished(const Event& event, SimRequest& request);
  void JudgeEnd(const Event& event, SimRequest& request);
  void JudgePromises(bool after_plan);
  void JudgeProgress();
  void JudgeRecord();
  void JudgeNotes(const FlightRecord& record);
  void JudgeReplay(const FlightRecord& record);
  void JudgeRest();
  void JudgeTotals(const SchedulerLoad& load);
  void Count(const StepPlan& plan);
  void Fail(std::string what);
  template <typename... Parts>
  void Trace(const Parts&... parts);

  const uint64_t seed_;
  const bool trace_;
  const Omitted omitted_;
  Coverage& coverage_;
  Random random_;
  FakeModel model_;
  SchedulerOptions options_;
  std::unique_ptr<FlightRecorder> recorder_;  // of every fourth world
  std::unique_ptr<Scheduler> scheduler_;
  std::unique_ptr<FakeExecutor> executor_;
  std::optional<PlanCheck> plan_check_;  // finds nothing wrong with any plan
  std::unique_ptr<PolicyOracle> policies_;
  std::unique_ptr<QueueBounds> queue_;  // as the engine has it; null: all are let in
  std::unique_ptr<QueueOracle> queue_oracle_;
  std::map<RequestKey, SimRequest> requests_;
  std::vector<Event> events_;
  TimePoint now_{std::chrono::hours(1)};
  int32_t ticks_ = 0;
  int32_t plans_without_progress_ = 0;
  uint64_t targets_met_ = 0, targets_missed_ = 0, late_tokens_ = 0;
  Duration late_total_{}, late_most_{};
  // How this world behaves.
  double cancel_rate_ = 0, stop_rate_ = 0, nan_rate_ = 0, abort_rate_ = 0, lockstep_rate_ = 0, deadline_rate_ = 0;
  double reset_rate_ = 0, target_rate_ = 0, tenant_rate_ = 0.3, salt_rate_ = 0.1, pause_rate_ = 0;
  int32_t flood_ = 0;  // so many requests of one tenant at one time
  int32_t step_milliseconds_ = 1;
  std::optional<StepCost> true_cost_;  // of steps; none: they take any time
  std::string error_;
};

// Prints how to run the current seed again if the process dies on a CHECK.
void AnnounceSeedOnAbort(uint64_t seed);
std::string ReplayCommand(uint64_t seed, const Omitted& omitted = {});
// As many of `all` as can be left out with `fails` still true.
Omitted Shrink(const std::vector<std::string>& all, const std::function<bool(const Omitted&)>& fails);

}  // namespace altiplano::sim
