// PolicyOracle: the rules of docs/scheduler.md by which requests get what is scarce, read a second time: from requests'
// own facts, the plans that came and the events. It says for every plan what must be in it, in which order and with how
// many tokens, who gives up blocks and what the prefix cache must have found. Slow and obvious on purpose.
//
// All that it takes from the scheduler are the ids of blocks that were free and the learned step cost.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <memory>
#include <span>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "server/scheduler/scheduler.h"
#include "tests/sim/pool_oracle_testlib.h"

namespace altiplano::sim {

class PolicyOracle {
 public:
  // How often a rule decided something.
  struct Counts {
    uint64_t share_choices = 0;   // admissions while another tenant had something waiting that it could run
    uint64_t order_choices = 0;   // admissions before somebody of the same tenant
    uint64_t hurry_stopped = 0;   // targets that could not be met any more
    uint64_t tenant_limited = 0;  // passed because its tenant runs as many as it may
    uint64_t victims = 0, gave_up_itself = 0, waited_for_blocks = 0;
    uint64_t headroom_kept = 0;  // a head that would fit but for the headroom
    uint64_t ceiling_cut = 0;    // chunks cut by the ceiling
    uint64_t evicted = 0, hopeless = 0;
    std::array<uint64_t, 7> why{};  // by PlanNotes::Why

    // Each of them, by name.
    std::vector<std::pair<const char*, uint64_t>> All() const;
  };

  PolicyOracle(const SchedulerOptions& options, int32_t max_servable, Counts* counts);

  void Add(RequestKey key, const Request& request);
  // After a call of the scheduler, with its events and its load by then: what was against the rules, or "".
  std::string JudgePlan(const StepPlan* plan, TimePoint now, std::span<const Event> events, const SchedulerLoad& load);
  std::string JudgeApply(const StepPlan& plan, std::span<const Event> events, const SchedulerLoad& load);
  void Abort();
  void ResetPrefixCache() { pool_.ResetCache(); }
  // What each plan so far must have left behind for people.
  const std::vector<PlanNotes>& notes() const { return notes_; }

 private:
  struct Entry;
  struct Sequence {
    enum class State : uint8_t { kHeld, kWaiting, kRunning, kEnded };
    Entry* of = nullptr;
    uint32_t index = 0;
    State state = State::kHeld;
    bool admitted = false;        // ever
    std::vector<TokenId> tokens;  // the prompt's and the answer's
    std::vector<uint64_t> names;  // of the full blocks of these, as far as needed
    std::vector<int32_t> blocks;  // that plans have named
    int32_t unnamed = 0;          // that it holds besides: nobody else does
    int32_t pending = 0;          // sampled in steps in flight
    int32_t scheduled = 0, charged = 0, published = 0, preempted = 0;
    uint64_t last_step = 0;

    int32_t known() const { return static_cast<int32_t>(tokens.size()); }
    int32_t expected() const { return known() + pending; }
    int32_t num_blocks() const { return static_cast<int32_t>(blocks.size()) + unnamed; }
    int32_t remaining() const;
  };
  struct Entry {
    RequestKey key = 0;
    const Request* asked = nullptr;
    size_t account = 0;
    int32_t arrival = 0;  // counted from 1
    int64_t level = 0;
    TimePoint start_by{};
    bool hurries = false, admitted = false;
    int32_t limit = 0, scored = 0;
    Sequence* leader = nullptr;
    std::vector<Sequence> sequences;
    std::vector<int32_t> shared;
    TimePoint hopeless_at{};  // by when it was looked at last

    int32_t prompt() const { return static_cast<int32_t>(asked->prompt.size()); }
    int32_t Count(Sequence::State state) const;
    int32_t NumUnadmitted() const;
    bool scoring() const { return asked->sampling.prompt_top_logprobs >= 0 && scored < prompt() - 1; }
  };
  struct Account {
    int32_t weight = 1, max_running = 0, live = 0;
    int64_t base = 0, parts = 0;  // level = base + parts / weight, in 1/1024 of a token
    // For the bound on what one may be ahead of another.
    int64_t committed = 0;                      // parts that those running could take, when one was last admitted
    uint64_t admitted_at = 0, waits_since = 0;  // plans

    int64_t level() const { return base + parts / weight; }
  };
  struct InFlight {
    uint64_t step = 0;
    std::vector<int32_t> retired;
    int32_t unnamed = 0;
  };
  // The plan being judged.
  struct Walk {
    const StepPlan* plan = nullptr;
    TimePoint now{};
    size_t next = 0;            // of plan->sequences
    std::vector<size_t> order;  // accounts, lowest first, when the plan began
    StepWork work;
    int32_t budget = 0, streams = 0, prefills = 0, shortage = 0;
    bool pressed = false;
    uint64_t step = 0;
    std::span<const Event> admissions;  // to be explained
  };

  // --- Requests
  Entry* Find(RequestKey key);
  Sequence* Find(RequestKey key, uint32_t sequence);
  void EndBy(const Event& event);
  void EndSequence(Sequence* sequence);
  void EndRequest(Entry* entry);
  Duration PrefillTime(int32_t first, int32_t count, const StepWork& beside) const;
  Duration CertainPrefillTime(int32_t first, int32_t count) const;
  Duration Aged(const Request& request) const;
  TimePoint HopelessFrom(Entry* entry);
  void JudgeHopeless(const Event& event, TimePoint now);
  void JudgeHopeful(TimePoint now);

  // --- Order
  using Rank = std::tuple<int64_t, TimePoint, int32_t, uint32_t>;
  static Rank RankOf(const Sequence& sequence);
  std::vector<Sequence*> InOrder(Sequence::State state, size_t account);
  std::vector<size_t> AccountsByLevel() const;
  struct Tally {  // sequences of an account
    int32_t running = 0, waiting = 0;
  };
  std::vector<Tally> Tallies() const;
  int32_t NumRunning() const;
  Entry* OldestRunning();  // null: nobody runs
  Sequence* Head(TimePoint now);
  // It has something waiting that it may run.
  bool MayAdmit(size_t account, const std::vector<Tally>& tallies) const {
    return tallies[account].waiting > 0 && tallies[account].running < accounts_[account].max_running;
  }
  void RaiseFloor();
  void Join(size_t account);
  void Leave(size_t account);
  int64_t Committed(size_t account);
  void JudgeShares();

  // --- Plans (policy_oracle_plan_testlib.cc)
  void WalkDecodes(Walk* walk);
  void WalkDecode(Walk* walk, Sequence* sequence);
  bool Grow(Walk* walk, Sequence* wanting);
  bool GiveUpSomething(Walk* walk, Sequence* wanting);
  Sequence* Victim(const Walk& walk, const Sequence& wanting);
  void WalkPrefills(Walk* walk);
  void WalkAdmissions(Walk* walk);
  void WalkAdmission(Walk* walk, Sequence* head);
  void CountChoices(const Sequence& head);
  std::vector<int32_t> MakeRoom(Sequence* head);
  void JudgePrefix(const Walk& walk, const Sequence& head, const PlannedSequence& planned,
                   const std::vector<int32_t>& match);
  void Admit(Sequence* head, const std::vector<int32_t>& match);
  void JudgeAdmission(Walk* walk, const Sequence& head, const PlannedSequence& planned);
  bool LeftAlone(const Walk& walk, const Sequence& head) const;
  void JudgeRefused(const Walk& walk, Sequence* head);
  void TakeNotes(const Walk& walk);
  PlanNotes::Why WhyWaits(const Walk& walk, const Sequence& head, bool may_run);
  int32_t Needed(const Sequence& head, const std::vector<int32_t>& match);
  void Take(Walk* walk, Sequence* sequence, int32_t tokens, bool fresh);
  int32_t Chunk(const Sequence& sequence, int32_t room) const;
  int32_t PrefillRoom(const Walk& walk, int32_t first) const;
  int32_t RoomUnderCeiling(const StepWork& beside, int32_t first, int32_t most) const;
  int32_t Wanted(const Sequence& sequence) const;
  int32_t Headroom(const Sequence& sequence) const;
  void Charge(Sequence* sequence, int32_t end);

  // --- Blocks
  int32_t BlocksFor(int32_t tokens) const { return (tokens + options_.block_size - 1) / options_.block_size; }
  int32_t Retiring() const;
  void TakeBlock(Sequence* sequence);
  void NameBlocks(const Walk& walk, Sequence* sequence, const PlannedSequence& planned);
  void Release(Sequence* sequence);
  void DropShare(Entry* entry);
  void Publish(Sequence* sequence, int32_t computed);
  void Withdraw(const Entry& entry);
  void ShareWithSiblings(Entry* entry);
  uint64_t NameOf(Sequence* sequence, int32_t block);
  std::vector<int32_t> Match(Sequence* sequence);

  void JudgeLoad(const SchedulerLoad& load);
  void Fail(std::string what);
  static std::string Who(const Sequence& sequence);

  const SchedulerOptions options_;
  const int32_t max_servable_;
  Counts& counts_;
  StepCost cost_;                             // as learned by now
  double cost_error_ = 0;                     // of that
  std::vector<std::unique_ptr<Entry>> live_;  // in order of arrival
  std::vector<Entry*> sharing_;               // in the order in which they began to
  std::vector<Account> accounts_;
  int64_t floor_ = 0;
  int32_t arrivals_ = 0;
  StepWork decodes_;  // of the last plan
  std::deque<InFlight> in_flight_;
  PoolOracle pool_;
  uint64_t preemptions_ = 0, plans_ = 0, last_step_ = 0;
  std::vector<PlanNotes> notes_;
  struct Blocked {
    const Sequence* head = nullptr;
    int32_t until_available = 0;
    uint64_t until_step = 0;
  };
  Blocked blocked_;  // the head that did not fit
  std::string error_;
};

}  // namespace altiplano::sim
