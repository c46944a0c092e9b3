// PolicyOracle: what must be in a plan. The walk goes through it in the order in which the scheduler has to make it.
#include <algorithm>
#include <utility>

#include "server/base/strings.h"
#include "tests/sim/policy_oracle_testlib.h"

namespace altiplano::sim {

namespace {

// As docs/scheduler.md names them.
constexpr int32_t kMostDoublings = 6, kRetriedAfterSteps = 8;

const StepPlan kNothing;

}  // namespace

std::string PolicyOracle::JudgePlan(const StepPlan* plan, TimePoint now, std::span<const Event> events,
                                    const SchedulerLoad& load) {
  ++plans_;
  Walk walk;
  walk.plan = plan != nullptr ? plan : &kNothing;
  walk.now = now;
  walk.budget = options_.token_budget;
  size_t at = 0;
  for (; at < events.size() && events[at].kind != Event::Kind::kAdmitted; ++at) {
    if (events[at].kind == Event::Kind::kEnded) JudgeHopeless(events[at], now);
    EndBy(events[at]);
  }
  walk.admissions = events.subspan(at);
  JudgeHopeful(now);
  walk.step = plan != nullptr ? plan->step : last_step_ + 1;
  if (plan != nullptr) last_step_ = plan->step;
  if (plan != nullptr) in_flight_.push_back({.step = plan->step, .retired = {}, .unnamed = 0});
  walk.order = AccountsByLevel();
  WalkDecodes(&walk);
  decodes_ = walk.work;
  if (error_.empty()) WalkPrefills(&walk);
  if (error_.empty() && !walk.pressed) WalkAdmissions(&walk);
  if (!error_.empty()) return error_;
  if (walk.next < walk.plan->sequences.size()) {
    const PlannedSequence& more = walk.plan->sequences[walk.next];
    return StrCat(more.request, ".", more.sequence, " is planned, which was not its turn");
  }
  if (!walk.admissions.empty()) return StrCat("request ", walk.admissions.front().request, " was not admitted");
  if (preemptions_ != load.preemptions) return StrCat("preemptions: ", load.preemptions, " for ", preemptions_);
  JudgeShares();
  JudgeLoad(load);
  TakeNotes(walk);
  return error_;
}

// The head of the queue is the next of the lowest account that may run one more; where none may, of the lowest account.
void PolicyOracle::TakeNotes(const Walk& walk) {
  PlanNotes& notes = notes_.emplace_back();
  notes.blocks_held = pool_.held();
  notes.blocks_cached = pool_.cached();
  const std::vector<Tally> tallies = Tallies();
  const std::vector<size_t> order = AccountsByLevel();
  auto waits = [&](size_t account) { return tallies[account].waiting > 0; };
  auto may_run = [&](size_t account) { return MayAdmit(account, tallies); };
  for (const Tally& tally : tallies) notes.waiting += tally.waiting;
  if (notes.waiting > 0) {
    const bool somebody_may = std::ranges::any_of(order, may_run);
    const size_t account = somebody_may ? *std::ranges::find_if(order, may_run) : *std::ranges::find_if(order, waits);
    const Sequence& head = *InOrder(Sequence::State::kWaiting, account).front();
    notes.head = head.of->key;
    notes.head_sequence = head.index;
    notes.why = WhyWaits(walk, head, somebody_may);
  }
  ++counts_.why[static_cast<size_t>(notes.why)];
}

// The first reason that holds, in the order of docs/flight_records.md. That one does is a rule of its own.
PlanNotes::Why PolicyOracle::WhyWaits(const Walk& walk, const Sequence& head, bool may_run) {
  using Why = PlanNotes::Why;
  if (walk.pressed) return Why::kRunningFirst;
  if (NumRunning() == options_.max_running) return Why::kNoSlot;
  if (!may_run) return Why::kTenant;
  if (blocked_.head == &head && pool_.available() < blocked_.until_available) return Why::kNoBlocks;
  int64_t tokens = 0;
  for (const PlannedSequence& planned : walk.plan->sequences) tokens += planned.num_tokens;
  if (tokens == options_.token_budget) return Why::kBudget;
  if (options_.max_itl == Duration(0) || walk.streams == 0 || PrefillRoom(walk, 0) > 0) {
    Fail(StrCat(Who(head), " waits for no reason"));
  }
  return Why::kCeiling;
}

// The oldest running request's, then the others' in order.
void PolicyOracle::WalkDecodes(Walk* walk) {
  Entry* oldest = OldestRunning();
  if (oldest == nullptr) return;
  for (Sequence& sequence : oldest->sequences) WalkDecode(walk, &sequence);
  for (size_t account : walk->order) {
    for (Sequence* sequence : InOrder(Sequence::State::kRunning, account)) {
      if (sequence->of != oldest) WalkDecode(walk, sequence);
    }
  }
}

void PolicyOracle::WalkDecode(Walk* walk, Sequence* sequence) {
  if (!error_.empty() || sequence->state != Sequence::State::kRunning || sequence->remaining() != 1) return;
  if (Grow(walk, sequence)) Take(walk, sequence, 1, /*fresh=*/false);
}

// A block for the next position. False: it goes without in this step, or has been preempted.
bool PolicyOracle::Grow(Walk* walk, Sequence* wanting) {
  if (wanting->scheduled < wanting->num_blocks() * options_.block_size) return true;
  ++walk->shortage;
  if (pool_.available() == 0) walk->pressed = true;
  while (pool_.available() == 0 && Retiring() < walk->shortage) {
    if (!GiveUpSomething(walk, wanting) || wanting->state != Sequence::State::kRunning) return false;
  }
  if (pool_.available() == 0) {
    ++counts_.waited_for_blocks;
    return false;
  }
  --walk->shortage;
  TakeBlock(wanting);
  return true;
}

bool PolicyOracle::GiveUpSomething(Walk* walk, Sequence* wanting) {
  for (Entry* entry : sharing_) {
    if (entry->Count(Sequence::State::kRunning) > 0) continue;
    DropShare(entry);
    return true;
  }
  if (Sequence* victim = Victim(*walk, *wanting)) {
    ++preemptions_;
    ++(victim == wanting ? counts_.gave_up_itself : counts_.victims);
    Release(victim);
    victim->state = Sequence::State::kWaiting;
    ++victim->preempted;
    if (victim != wanting) DropShare(victim->of);
    return true;
  }
  if (wanting->of->shared.empty()) return false;
  DropShare(wanting->of);
  return true;
}

// The last in order, of the account that has had most; nobody of the oldest running request but behind its own others.
PolicyOracle::Sequence* PolicyOracle::Victim(const Walk& walk, const Sequence& wanting) {
  const Entry* oldest = OldestRunning();
  Sequence* last = nullptr;
  Sequence* last_of_oldest = nullptr;
  for (size_t account : walk.order) {
    for (Sequence* sequence : InOrder(Sequence::State::kRunning, account)) {
      (sequence->of == oldest ? last_of_oldest : last) = sequence;
    }
  }
  if (last != nullptr) return last;
  return wanting.of == oldest && oldest->Count(Sequence::State::kRunning) > 1 ? last_of_oldest : nullptr;
}

void PolicyOracle::WalkPrefills(Walk* walk) {
  for (size_t account : walk->order) {
    for (Sequence* sequence : InOrder(Sequence::State::kRunning, account)) {
      if (sequence->remaining() <= 1) continue;
      const int32_t room = PrefillRoom(*walk, sequence->scheduled);
      if (room == 0) {
        walk->budget = 0;  // for what waits, too
        return;
      }
      counts_.ceiling_cut += room < std::min(walk->budget, sequence->remaining());
      Take(walk, sequence, Chunk(*sequence, room), /*fresh=*/false);
      if (!error_.empty()) return;
    }
  }
}

void PolicyOracle::WalkAdmissions(Walk* walk) {
  while (error_.empty() && NumRunning() < options_.max_running && PrefillRoom(*walk, 0) > 0) {
    Sequence* head = Head(walk->now);
    if (head == nullptr) return;
    if (walk->next == walk->plan->sequences.size()) return JudgeRefused(*walk, head);
    WalkAdmission(walk, head);
  }
}

void PolicyOracle::WalkAdmission(Walk* walk, Sequence* head) {
  const PlannedSequence& planned = walk->plan->sequences[walk->next];
  if (planned.request != head->of->key || planned.sequence != head->index) {
    return Fail(StrCat(planned.request, ".", planned.sequence, " is admitted though ", Who(*head), " is next"));
  }
  if (LeftAlone(*walk, *head)) return Fail(StrCat(Who(*head), " is tried again, which was not due"));
  CountChoices(*head);
  blocked_ = {};
  const std::vector<int32_t> match = MakeRoom(head);
  JudgePrefix(*walk, *head, planned, match);
  if (!head->of->admitted) JudgeAdmission(walk, *head, planned);
  if (!error_.empty()) return;
  Admit(head, match);
  const int32_t room = std::max(1, PrefillRoom(*walk, head->scheduled));
  counts_.ceiling_cut += room < std::min(walk->budget, head->remaining());
  Take(walk, head, Chunk(*head, room), /*fresh=*/true);
}

// What it finds in the cache, when there are blocks for all that it knows and the next token, and some are left for
// those that run. When nothing runs, prompts kept for siblings give way, the last first.
std::vector<int32_t> PolicyOracle::MakeRoom(Sequence* head) {
  const int32_t headroom = Headroom(*head);
  for (;;) {
    std::vector<int32_t> match = Match(head);
    const int32_t needed = Needed(*head, match);
    if (needed + headroom <= pool_.available()) return match;
    if (NumRunning() > 0 || in_flight_.size() > 1 || sharing_.empty()) {
      Fail(StrCat(Who(*head), " is admitted with ", needed, " blocks to take and ", headroom,
                  " to leave, but there are ", pool_.available()));
      return match;
    }
    DropShare(sharing_.back());
  }
}

void PolicyOracle::JudgePrefix(const Walk& walk, const Sequence& head, const PlannedSequence& planned,
                               const std::vector<int32_t>& match) {
  if (planned.first_position != static_cast<int32_t>(match.size()) * options_.block_size) {
    return Fail(StrCat(Who(head), " starts at ", planned.first_position, ", but ", match.size(), " blocks are known"));
  }
  const auto given = std::span(walk.plan->block_ids).subspan(static_cast<size_t>(planned.block_begin), match.size());
  if (!std::ranges::equal(given, match)) Fail(StrCat(Who(head), " is given blocks that do not hold its prefix"));
}

void PolicyOracle::Admit(Sequence* head, const std::vector<int32_t>& match) {
  for (int32_t block : match) pool_.Ref(block);
  head->blocks = match;
  while (head->num_blocks() < Wanted(*head)) TakeBlock(head);
  head->published = static_cast<int32_t>(match.size());  // whoever computed these has offered them
  head->scheduled = head->published * options_.block_size;
  head->state = Sequence::State::kRunning;
  if (!head->of->admitted) {
    for (int32_t block : match) pool_.SetValued(block);
  }
  head->of->admitted = head->admitted = true;
  if (head->of->NumUnadmitted() == 0) DropShare(head->of);
  accounts_[head->of->account].admitted_at = plans_;
  accounts_[head->of->account].committed = Committed(head->of->account);
}

void PolicyOracle::CountChoices(const Sequence& head) {
  const std::vector<Tally> tallies = Tallies();
  for (size_t i = 0; i < accounts_.size(); ++i) {
    const bool may = MayAdmit(i, tallies);
    counts_.share_choices += may && i != head.of->account;
    counts_.tenant_limited += !may && tallies[i].waiting > 0;
  }
  counts_.order_choices += tallies[head.of->account].waiting > 1;
}

// A request's first admission is told, with what was found.
void PolicyOracle::JudgeAdmission(Walk* walk, const Sequence& head, const PlannedSequence& planned) {
  const bool told = !walk->admissions.empty() && walk->admissions.front().request == planned.request;
  if (!told) return Fail(StrCat(Who(head), " is admitted without an event"));
  const uint32_t cached = walk->admissions.front().cached_tokens;
  if (static_cast<int32_t>(cached) != planned.first_position) {
    Fail(StrCat(Who(head), " is told of ", cached, " cached tokens, but starts at ", planned.first_position));
  }
  walk->admissions = walk->admissions.subspan(1);
}

// A head that did not fit is not tried again before as much is there as it lacked, or some steps later.
bool PolicyOracle::LeftAlone(const Walk& walk, const Sequence& head) const {
  return blocked_.head == &head && NumRunning() > 0 && pool_.available() < blocked_.until_available &&
         walk.step < blocked_.until_step;
}

void PolicyOracle::JudgeRefused(const Walk& walk, Sequence* head) {
  if (LeftAlone(walk, *head)) return;
  const int32_t needed = Needed(*head, Match(head)), lacked = needed + Headroom(*head);
  if (lacked <= pool_.available()) return Fail(StrCat(Who(*head), " would fit and waits"));
  counts_.headroom_kept += needed <= pool_.available();
  blocked_ = {.head = head, .until_available = lacked, .until_step = walk.step + kRetriedAfterSteps};
}

// Blocks that it takes of those available: cached ones that nobody uses are such, too.
int32_t PolicyOracle::Needed(const Sequence& head, const std::vector<int32_t>& match) {
  const auto unused = std::ranges::count_if(match, [&](int32_t block) { return pool_.refs(block) == 0; });
  return Wanted(head) - static_cast<int32_t>(match.size()) + static_cast<int32_t>(unused);
}

// What the sequence wants next is the next in the plan.
void PolicyOracle::Take(Walk* walk, Sequence* sequence, int32_t tokens, bool fresh) {
  if (walk->next == walk->plan->sequences.size()) return Fail(StrCat(Who(*sequence), " is left out of the plan"));
  const PlannedSequence& planned = walk->plan->sequences[walk->next++];
  if (planned.request != sequence->of->key || planned.sequence != sequence->index) {
    return Fail(StrCat(planned.request, ".", planned.sequence, " is planned where ", Who(*sequence), " is next"));
  }
  const bool described =
      std::ranges::any_of(walk->plan->slot_inits, [&](const SlotInit& init) { return init.slot == planned.slot; });
  if (described != fresh) {
    return Fail(StrCat(Who(*sequence), fresh ? " comes back without" : " goes on with", " a new description"));
  }
  if (planned.first_position != sequence->scheduled || planned.num_tokens != tokens) {
    return Fail(StrCat(Who(*sequence), " gets ", planned.num_tokens, " tokens from ", planned.first_position, ", not ",
                       tokens, " from ", sequence->scheduled));
  }
  Entry& entry = *sequence->of;
  const int32_t end = planned.first_position + tokens;
  const bool sample = end == sequence->expected();
  const bool decode = tokens == 1 && sample && sequence->expected() > entry.prompt();
  ++(decode ? walk->streams : walk->prefills);
  walk->work.Add(planned.first_position, tokens);
  walk->budget -= tokens;
  Charge(sequence, end);
  if (entry.scoring() && planned.first_position == entry.scored) entry.scored = std::min(end, entry.prompt() - 1);
  sequence->scheduled = end;
  sequence->pending += sample;
  sequence->last_step = walk->plan->step;
  NameBlocks(*walk, sequence, planned);
}

// Positions whose scores came before a preemption are computed in a chunk of their own.
int32_t PolicyOracle::Chunk(const Sequence& sequence, int32_t room) const {
  const int32_t tokens = std::min(sequence.remaining(), room);
  const Entry& entry = *sequence.of;
  return entry.scoring() && sequence.scheduled < entry.scored ? std::min(tokens, entry.scored - sequence.scheduled)
                                                              : tokens;
}

int32_t PolicyOracle::PrefillRoom(const Walk& walk, int32_t first) const {
  if (options_.max_itl == Duration(0) || walk.streams == 0) return walk.budget;
  const int32_t room = RoomUnderCeiling(walk.work, first, walk.budget);
  return walk.prefills > 0 ? room : std::max(room, std::min(options_.block_size, walk.budget));
}

// As many tokens of a prompt as keep the step under the ceiling.
int32_t PolicyOracle::RoomUnderCeiling(const StepWork& beside, int32_t first, int32_t most) const {
  for (int32_t room = most; room > 0; --room) {
    StepWork work = beside;
    work.Add(first, room);
    if (StepTime(cost_, work) <= options_.max_itl) return room;
  }
  return 0;
}

int32_t PolicyOracle::Wanted(const Sequence& sequence) const {
  return BlocksFor(std::min(sequence.known() + 1, sequence.of->limit - 1));
}

int32_t PolicyOracle::Headroom(const Sequence& sequence) const {
  return (NumRunning() << std::min(sequence.preempted, kMostDoublings)) / 4;
}

}  // namespace altiplano::sim
