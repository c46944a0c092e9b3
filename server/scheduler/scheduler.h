// Scheduler: decides what every step computes and owns all state of requests, sequences and KV blocks.
//
// Integers only: no model, no kernels, no threads, no clock but the `now` passed in. One thread (the engine's) calls
// it, in the order Plan(n) [execution starts] Plan(n+1) Apply(n) [execution of n+1 starts] ...: at most two plans are
// ahead of the results. Policies and invariants are normative in docs/scheduler.md.
#pragma once

#include <memory>
#include <vector>

#include "server/base/clock.h"
#include "server/base/status.h"
#include "server/scheduler/request.h"
#include "server/scheduler/step_cost.h"
#include "server/scheduler/step_plan.h"
#include "server/scheduler/tenants.h"

namespace altiplano {

class BlockNamer;
class FlightRecorder;
struct FlightCheckpoint;

struct SchedulerOptions {
  int32_t num_blocks = 0;       // KV blocks in the pool
  int32_t block_size = 16;      // tokens in a block, a power of two
  int32_t max_running = 256;    // sequences with a slot at one time
  int32_t token_budget = 2048;  // tokens computed in one step, prefill and decode together
  int32_t max_context = 0;      // prompt and answer together
  bool prefix_cache = true;
  std::vector<TokenId> eos_ids;
  // While answers are being streamed, prompts get no more of a step than keeps it within max_itl by step_cost.
  Duration max_itl{};  // zero: no ceiling
  StepCost step_cost;
  bool learn_step_cost = false;  // corrects step_cost by StepResult::device_time
  // What waits is ordered by the latest start that meets its target. Who names none counts as if it had to start by
  // then; who has missed its own, that much later.
  Duration default_ttft_target = std::chrono::seconds(10);
  Duration priority_ageing{};          // waiting for so long makes up for one level of priority; zero: nothing does
  std::vector<TenantOptions> tenants;  // that share the server; empty: nobody is told from anybody
  FlightRecorder* recorder = nullptr;  // outlives the scheduler; null: nothing is recorded
  // Null but in replays: gives blocks their recorded names, since their tokens are not there.
  const BlockNamer* namer = nullptr;
};

// What one plan leaves behind for people: why the head of the queue waits, and what the pool looks like.
struct PlanNotes {
  enum class Why : uint8_t {
    kNobodyWaits,
    kNoSlot,        // max_running sequences run
    kNoBlocks,      // the pool has too few for it
    kRunningFirst,  // a running sequence found no block at once: nobody is admitted in this step
    kBudget,        // the step's tokens are spent
    kCeiling,       // max_itl leaves no room
    kTenant,        // each waiting tenant runs as many sequences as it may
  };
  Why why = Why::kNobodyWaits;
  int32_t waiting = 0;  // sequences
  RequestKey head = 0;
  uint32_t head_sequence = 0;
  int32_t blocks_held = 0, blocks_cached = 0;

  bool operator==(const PlanNotes&) const = default;
};

struct TenantLoad {
  int32_t running_sequences = 0;
  int32_t waiting_requests = 0;
  int64_t waiting_tokens = 0;
  uint64_t prompt_tokens = 0;  // of admitted requests
  uint64_t generated_tokens = 0;

  bool operator==(const TenantLoad&) const = default;
};

struct SchedulerLoad {
  int32_t running_requests = 0;
  int32_t waiting_requests = 0;
  int64_t waiting_tokens = 0;  // prompt tokens not yet admitted
  int32_t blocks_total = 0;
  int32_t blocks_used = 0;    // held by live requests or by a step still running
  int32_t blocks_cached = 0;  // unreferenced, kept for the prefix cache
  uint64_t steps = 0;
  uint64_t preemptions = 0;
  uint64_t prompt_tokens = 0;  // of admitted requests
  uint64_t cached_tokens = 0;  // of these, found in the prefix cache
  uint64_t generated_tokens = 0;
  // Tokens that came later after the one before them than max_itl, and by how much.
  uint64_t late_tokens = 0;
  Duration late_total{}, late_most{};
  std::vector<TenantLoad> tenants;  // as the options', the others last
  // Of requests with a ttft_target: first tokens in time; late, or none by then.
  uint64_t targets_met = 0, targets_missed = 0;
  uint64_t hopeless = 0;        // requests refused because they could not meet their deadline
  StepCost step_cost;           // as learned by now
  uint64_t measured_steps = 0;  // that it was learned from
  double step_cost_error = 0;   // mean of |predicted - measured| / measured lately
};

class Scheduler {
 public:
  // INVALID_ARGUMENT when the options contradict each other, naming what to change.
  static StatusOr<std::unique_ptr<Scheduler>> Create(SchedulerOptions options);
  // The scheduler that a checkpoint was made of, for a replay: options.namer is not null. requests: as the
  // checkpoint's; *in_flight: the plan whose result comes next, null when there is none. INVALID_ARGUMENT for a state
  // that no scheduler comes to.
  static StatusOr<std::unique_ptr<Scheduler>> Restore(SchedulerOptions options, const FlightCheckpoint& checkpoint,
                                                      const std::vector<std::shared_ptr<const Request>>& requests,
                                                      std::shared_ptr<const StepPlan>* in_flight);
  ~Scheduler();

  // The most tokens (prompt and answer) that one sequence can ever hold here.
  int32_t max_servable_tokens() const;

  // Takes the request into the waiting queue. Its last event is always one kEnded, whatever happens to it.
  // The caller has validated it; prompt + 1 token must fit max_servable_tokens (CHECKed).
  void Add(RequestKey key, std::shared_ptr<const Request> request);
  // Ends the request with `why` at the next Plan or Apply; unknown keys are ignored.
  void Cancel(RequestKey key, Status why);
  // Ends one sequence with FinishReason::kStop; unknown keys are ignored.
  void StopSequence(RequestKey key, uint32_t sequence);

  // The next step, or null when there is nothing to compute now. Appends events (admissions, expiries) to `events`.
  std::shared_ptr<const StepPlan> Plan(TimePoint now, std::vector<Event>* events);
  // The result of the oldest plan not yet applied.
  void Apply(const StepPlan& plan, const StepResult& result, TimePoint now, std::vector<Event>* events);

  // Ends everything with `why`: after a failed step. Plans in flight are forgotten.
  void Abort(const Status& why, TimePoint now, std::vector<Event>* events);

  // No request is live (a step may still be in flight).
  bool idle() const;
  // When a waiting or running request next expires; kNever if none does.
  TimePoint next_deadline() const;
  SchedulerLoad load() const;
  // Forgets all unreferenced cached blocks; returns how many.
  int32_t ResetPrefixCache();

  // Dies when an invariant of docs/scheduler.md is broken. O(state): tests after every step, the server when idle.
  void CheckInvariants() const;

 private:
  class Impl;
  explicit Scheduler(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace altiplano
