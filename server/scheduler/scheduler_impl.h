// Scheduler::Impl: the scheduler's state. scheduler.cc: life of requests; scheduler_plan.cc: Plan; scheduler_apply.cc:
// Apply; scheduler_check.cc: invariants. Rules: docs/scheduler.md.
#pragma once

#include <memory>
#include <set>
#include <span>
#include <unordered_map>
#include <utility>
#include <vector>

#include "server/scheduler/block_pool.h"
#include "server/scheduler/fair_share.h"
#include "server/scheduler/flight_record.h"
#include "server/scheduler/flight_recorder.h"
#include "server/scheduler/live_request.h"
#include "server/scheduler/plan_pool.h"
#include "server/scheduler/prefix_cache.h"
#include "server/scheduler/scheduler.h"
#include "server/scheduler/step_cost_learner.h"

namespace altiplano {

class Scheduler::Impl {
 public:
  explicit Impl(SchedulerOptions options);

  int32_t max_servable_tokens() const;
  void Add(RequestKey key, std::shared_ptr<const Request> request);
  void Cancel(RequestKey key, Status why) { cancels_.emplace_back(key, std::move(why)); }
  void StopSequence(RequestKey key, uint32_t sequence) { stops_.emplace_back(key, sequence); }
  std::shared_ptr<const StepPlan> Plan(TimePoint now, std::vector<Event>* events);
  void Apply(const StepPlan& plan, const StepResult& result, TimePoint now, std::vector<Event>* events);
  void Abort(const Status& why, TimePoint now, std::vector<Event>* events);
  bool idle() const { return live_.empty(); }
  TimePoint next_deadline() const;
  SchedulerLoad load() const;
  int32_t ResetPrefixCache() { return cache_.Reset(); }
  void CheckInvariants() const;
  PlanNotes Notes(const StepPlan* plan);  // of the plan just made
  FlightRecorder* recorder() const { return options_.recorder; }
  // Before a plan: tells the recorder a part of what the next checkpoint relies on.
  void SayBeforeCheckpoint();
  // Before a plan: whether this is a moment for a checkpoint.
  bool CanCheckpoint() const;
  // Then: the fields of FlightCheckpoint. False: there is no room for it in *out.
  bool WriteCheckpoint(TimePoint now, FlightFrameWriter* out);
  StatusOr<std::shared_ptr<const StepPlan>> Restore(const FlightCheckpoint& checkpoint,
                                                    const std::vector<std::shared_ptr<const Request>>& requests);

 private:
  // What a plan that has not been applied yet still touches.
  struct InFlight {
    uint64_t step = 0;
    std::shared_ptr<const StepPlan> plan;
    StepWork work;
    std::vector<Sequence*> sequences;  // as planned
    std::vector<BlockId> retired;      // references that end with the step
  };
  // What belongs to one tenant.
  struct Account {
    std::set<Sequence*, ComesBefore> waiting;
    std::vector<Sequence*> running;  // in order; entries that no longer run stay until CompactRunning
    bool running_dirty = false;
    int32_t max_running = 0;
    int32_t live = 0;  // requests
    TenantLoad load;
  };
  // A call of Plan or Apply, for what it calls.
  struct Call {
    TimePoint now;
    std::vector<Event>* events;
  };

  // --- Life of requests (scheduler.cc)
  std::unique_ptr<LiveRequest> MakeLive(RequestKey key, uint64_t order, std::shared_ptr<const Request> request) const;
  bool Insert(std::unique_ptr<LiveRequest> request);  // false: its key is taken
  void TakeCommands(const Call& call);
  void Expire(const Call& call);
  void ExpireOne(const Call& call, LiveRequest& request);
  TimePoint EarliestExpiry(const LiveRequest& request) const;
  void RefuseIfHopeless(const Call& call, LiveRequest& request);
  void SetOrder(LiveRequest* live) const;
  Duration Aged(const Request& request) const;
  void CountTarget(const LiveRequest& request, TimePoint now);
  Account& AccountOf(const Sequence& sequence) { return accounts_[sequence.request->account]; }
  void MakeWaiting(Sequence* sequence);
  void EndSequence(const Call& call, Sequence* sequence);  // its last event is out; ends the request with the last one
  void FinishWithoutToken(const Call& call, Sequence* sequence, FinishReason reason);
  void EndRequest(const Call& call, LiveRequest& request, Status status);
  void LeaveQueueOrSlot(Sequence* sequence);
  void ReleaseBlocks(Sequence* sequence);
  void DropShare(LiveRequest& request);
  void DropShareIfUnused(LiveRequest& request);
  void ForgetEnded();
  InFlight* FindInFlight(uint64_t step);
  // For loops over many sequences, which find little in the caches: has some of those behind the i-th brought there.
  static void Prefetch(std::span<Sequence* const> sequences, size_t i);

  // --- Planning (scheduler_plan.cc)
  void PlanDecodes(StepPlan* plan);
  void PlanDecode(StepPlan* plan, Sequence* sequence);
  LiveRequest* OldestRunning() const;  // null: nobody runs
  LiveRequest* FindOldestRunning() const;
  void PlanPrefills(StepPlan* plan);
  void AdmitWaiting(StepPlan* plan, const Call& call);
  bool TryAdmit(Sequence* sequence, const Call& call);
  bool FindRoom(Sequence* sequence, int32_t num_blocks);
  void TakeBlocks(Sequence* sequence, int32_t num_blocks);
  void StartRunning(Sequence* sequence);
  void CountAdmission(const Sequence& sequence, const Call& call);
  void ReserveAnswer(Sequence* sequence);
  int32_t Headroom(const Sequence& sequence) const;
  int32_t PrefillRoom(int32_t first_position) const;
  int32_t RoomUnderCeiling(const StepWork& beside, int32_t first_position, int32_t most) const;
  Duration CertainPrefillTime(int32_t first, int32_t count) const;
  Duration PrefillTime(int32_t first, int32_t count, const StepWork& beside) const;
  bool StopHurrying(Sequence* sequence, TimePoint now);
  Sequence* NextToAdmit();
  void Charge(Sequence* sequence, int32_t end);
  void MatchPrefix(Sequence* sequence, std::vector<BlockId>* blocks);
  bool Grow(Sequence* sequence);
  bool GiveUpSomething(const Sequence* wanting);
  Sequence* ChooseVictim(const Sequence* wanting) const;
  void Preempt(Sequence* victim);
  void AppendChunk(StepPlan* plan, Sequence* sequence, int32_t budget_left);
  void AppendPromptScores(StepPlan* plan, PlannedSequence* planned, LiveRequest& request);
  void AppendSlotInit(StepPlan* plan, Sequence* sequence);
  void CompactRunning();

  // --- Applying (scheduler_apply.cc)
  void ApplyOne(const Call& call, Sequence* sequence, const PlannedSequence& planned, const TokenScore* sampled,
                const std::vector<TokenScore>* prompt_scores);
  bool DeliverPromptScores(const Call& call, LiveRequest& request, const std::vector<TokenScore>& scores);
  void AppendToken(const Call& call, Sequence* sequence, const TokenScore& score);
  void CountLateness(const Call& call, Sequence* sequence);
  FinishReason StopReason(const Sequence& sequence, TokenId token) const;
  void Publish(Sequence* sequence);
  void ShareWithSiblings(Sequence* leader);
  void FailNonFinite(const Call& call, LiveRequest& request);

  // The tokens and the name of the sequence's full block i; the name's chain is extended as far as needed.
  std::span<const TokenId> BlockTokens(const Sequence& sequence, int32_t i, std::vector<TokenId>* scratch) const;
  const BlockHash& HashOf(Sequence* sequence, int32_t i);
  const BlockHash& ParentOf(Sequence* sequence, int32_t i);
  const BlockHash* KnownHash(const Sequence& sequence, int32_t i) const;  // null: not needed so far

  // --- Checking (scheduler_check.cc): the invariant that is broken, null if none is
  const char* BrokenInvariant() const;
  const char* BrokenIn(const Sequence& sequence) const;
  const char* BrokenReferences() const;
  const char* BrokenQueues() const;
  const char* BrokenBeforePlan() const;
  const char* BrokenBeforePlan(const Sequence& sequence) const;

  // --- Checkpoints (scheduler_checkpoint.cc, scheduler_restore.cc)
  bool HasRoomForBlocks(const FlightFrameWriter& out) const;
  bool HasRoomForRest(const FlightFrameWriter& out) const;
  void WriteBlocks(FlightFrameWriter* out) const;
  void WriteRequest(const LiveRequest& request, FlightFrameWriter* out) const;
  void Say(LiveRequest* request) const;
  void WriteSaidRequest(const LiveRequest& request, FlightFrameWriter* out) const;
  uint8_t* PutNames(std::span<const BlockHash> names, std::span<const BlockId> blocks, uint8_t* at) const;
  Status RestoreBlocks(const FlightCheckpoint& checkpoint);
  Status RestoreHeld(const std::vector<FlightCheckpoint::Held>& held, const std::vector<int32_t>& refs);
  Status RestoreName(BlockId block, uint64_t name);
  Status RestoreRequest(const FlightCheckpoint::Request& from, std::shared_ptr<const Request> request);
  Status RestoreSequence(const FlightCheckpoint::Sequence& from, Sequence* sequence);
  Status RestoreQueues(const FlightCheckpoint& checkpoint);
  StatusOr<std::shared_ptr<const StepPlan>> RestoreInFlight(const FlightCheckpoint& checkpoint);
  StatusOr<Sequence*> PlannedOf(const FlightPlanned& planned);

  int32_t BlocksFor(int32_t tokens) const { return (tokens + options_.block_size - 1) >> block_shift_; }

  // Constant after construction.
  const SchedulerOptions options_;
  const int block_shift_;  // log2 of options_.block_size

  BlockPool pool_;
  PrefixCache cache_;
  PlanPool plans_;
  StepCostLearner learner_;

  std::unordered_map<RequestKey, std::unique_ptr<LiveRequest>> live_;
  std::vector<LiveRequest*> all_live_;               // of these, for who has no time to look for them; in any order
  std::vector<std::unique_ptr<LiveRequest>> ended_;  // ended, but steps in flight still point at them
  std::vector<Account> accounts_;                    // as options_.tenants
  FairShare share_;                                  // of these
  std::vector<size_t> order_;                        // of the accounts in the plan being made: least served first
  int32_t num_running_ = 0;                          // sequences
  mutable LiveRequest* oldest_ = nullptr;            // of those with sequences that run; null: to be found
  std::vector<LiveRequest*> sharing_;                // requests that hold `shared`
  std::vector<int32_t> free_slots_;
  std::vector<InFlight> in_flight_;  // oldest first, at most two
  InFlight spare_in_flight_;         // for its capacity

  std::vector<std::pair<RequestKey, Status>> cancels_;
  std::vector<std::pair<RequestKey, uint32_t>> stops_;

  uint32_t checkpoint_ = 1;  // the next one
  uint64_t step_ = 0;        // of the last plan
  uint64_t arrivals_ = 0;
  // Of the plan being made:
  int32_t budget_left_ = 0;   // its work is in_flight_.back().work
  StepWork decodes_;          // stays until the next plan
  int32_t streams_ = 0;       // answers that wait for a token of this step
  int32_t prefills_ = 0;      // the other sequences
  bool prompts_run_ = false;  // some running sequence has more than one token to compute
  int32_t shortage_ = 0;      // blocks that sequences went without
  bool pressed_ = false;      // a running sequence found no block at once

  // The head of the queue did not fit: it is tried again when that many blocks are available, or some steps later,
  // since what it may share with the prefix cache changes. Saves matching its whole prompt in every step.
  const Sequence* blocked_ = nullptr;
  int32_t blocked_until_available_ = 0;
  uint64_t blocked_until_step_ = 0;

  mutable TimePoint next_expiry_ = kNever;
  mutable bool next_expiry_stale_ = false;  // whoever determined it may be gone

  // Load.
  int32_t waiting_requests_ = 0;
  int64_t waiting_tokens_ = 0;
  uint64_t preemptions_ = 0, prompt_tokens_ = 0, cached_tokens_ = 0, generated_tokens_ = 0, late_tokens_ = 0;
  Duration late_total_{}, late_most_{};
  uint64_t targets_met_ = 0, targets_missed_ = 0, hopeless_ = 0;

  std::vector<BlockId> match_;          // scratch of TryAdmit: the prefix that FindRoom found
  std::vector<TokenId> token_scratch_;  // scratch of hashing and publishing
};

}  // namespace altiplano
