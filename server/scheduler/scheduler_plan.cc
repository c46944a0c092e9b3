#include <algorithm>
#include <cmath>

#include "server/base/check.h"
#include "server/scheduler/flight_recorder.h"
#include "server/scheduler/scheduler_impl.h"

namespace altiplano {

namespace {
constexpr uint64_t kRetryBlockedAfterSteps = 8;
// Tokens of an answer that a sequence has room for from its admission on. Only a longer one allocates while it decodes.
constexpr int32_t kReservedTokens = 8192;
// Of the headroom, at most: then there are 16 blocks for each sequence that runs.
constexpr int32_t kMostDoublings = 6;
// A token of an answer counts as so many of a prompt: its step computes few others beside it.
constexpr int32_t kAnswerService = 2;
}  // namespace

std::shared_ptr<const StepPlan> Scheduler::Impl::Plan(TimePoint now, std::vector<Event>* events) {
  CHECK(in_flight_.size() <= 1);
  const Call call{now, events};
  TakeCommands(call);
  Expire(call);
  ForgetEnded();

  ++step_;
  InFlight& in_flight = in_flight_.emplace_back(std::move(spare_in_flight_));
  in_flight.step = step_;
  in_flight.work = {};
  budget_left_ = options_.token_budget;
  streams_ = prefills_ = 0;
  prompts_run_ = false;
  shortage_ = 0;
  pressed_ = false;
  std::shared_ptr<StepPlan> plan = plans_.Get();
  plan->step = step_;
  // Room for any step at once; only prefixes shared by many make the last of these grow.
  plan->sequences.reserve(static_cast<size_t>(options_.max_running));
  plan->tokens.reserve(static_cast<size_t>(options_.token_budget));
  plan->block_ids.reserve(static_cast<size_t>(pool_.size()));

  order_.assign(share_.Order().begin(), share_.Order().end());
  PlanDecodes(plan.get());
  decodes_ = in_flight_.back().work;
  CompactRunning();
  if (prompts_run_) PlanPrefills(plan.get());
  // What waits must not take blocks that a running sequence went without, nor come back in the step that preempted it.
  if (!pressed_) AdmitWaiting(plan.get(), call);

  if (!plan->sequences.empty()) {
    in_flight_.back().plan = plan;
    return plan;
  }
  CHECK(in_flight_.back().retired.empty());  // a plan retires only what earlier plans touch
  spare_in_flight_ = std::move(in_flight_.back());
  in_flight_.pop_back();
  --step_;
  // With nothing under way, whatever is live could be planned.
  CHECK(!in_flight_.empty() || live_.empty());
  return nullptr;
}

PlanNotes Scheduler::Impl::Notes(const StepPlan* plan) {
  PlanNotes notes;
  notes.blocks_held = pool_.num_held();
  notes.blocks_cached = pool_.num_cached();
  for (const Account& account : accounts_) notes.waiting += static_cast<int32_t>(account.waiting.size());
  if (notes.waiting == 0) return notes;
  const Sequence* next = NextToAdmit();
  const Sequence* head = next;
  for (size_t i = 0; head == nullptr; ++i) {
    const Account& account = accounts_[share_.Order()[i]];
    if (!account.waiting.empty()) head = *account.waiting.begin();
  }
  notes.head = head->request->key;
  notes.head_sequence = head->index;
  if (pressed_) {
    notes.why = PlanNotes::Why::kRunningFirst;
  } else if (free_slots_.empty()) {
    notes.why = PlanNotes::Why::kNoSlot;
  } else if (next == nullptr) {
    notes.why = PlanNotes::Why::kTenant;
  } else if (head == blocked_ && pool_.available() < blocked_until_available_) {
    notes.why = PlanNotes::Why::kNoBlocks;
  } else if (plan != nullptr && static_cast<int32_t>(plan->tokens.size()) >= options_.token_budget) {
    notes.why = PlanNotes::Why::kBudget;
  } else {
    notes.why = PlanNotes::Why::kCeiling;
  }
  return notes;
}

// Every running sequence with one token to compute. The oldest running request comes first: it is never preempted, so
// whoever must give up blocks for it has not been planned yet. Then in order, and victims come later in the order.
void Scheduler::Impl::PlanDecodes(StepPlan* plan) {
  LiveRequest* oldest = OldestRunning();
  if (oldest == nullptr) return;
  for (Sequence& sequence : oldest->sequences) PlanDecode(plan, &sequence);
  for (size_t account : order_) {
    const std::vector<Sequence*>& running = accounts_[account].running;
    for (size_t i = 0; i < running.size(); ++i) {
      Prefetch(running, i);
      if (running[i]->request != oldest) PlanDecode(plan, running[i]);
    }
  }
}

LiveRequest* Scheduler::Impl::OldestRunning() const {
  if (oldest_ == nullptr) oldest_ = FindOldestRunning();
  return oldest_;
}

LiveRequest* Scheduler::Impl::FindOldestRunning() const {
  LiveRequest* oldest = nullptr;
  for (const Account& account : accounts_) {
    for (const Sequence* sequence : account.running) {
      if (sequence->state != Sequence::State::kRunning) continue;
      if (oldest == nullptr || sequence->request->order < oldest->order) oldest = sequence->request;
    }
  }
  return oldest;
}

void Scheduler::Impl::PlanDecode(StepPlan* plan, Sequence* sequence) {
  if (sequence->state != Sequence::State::kRunning) return;
  const int32_t remaining = sequence->remaining();
  prompts_run_ |= remaining > 1;
  if (remaining != 1 || budget_left_ == 0) return;
  if (Grow(sequence)) AppendChunk(plan, sequence, budget_left_);
}

void Scheduler::Impl::PlanPrefills(StepPlan* plan) {
  for (size_t account : order_) {
    for (Sequence* sequence : accounts_[account].running) {
      if (sequence->remaining() <= 1) continue;
      const int32_t room = PrefillRoom(sequence->scheduled);
      if (room == 0) {
        budget_left_ = 0;  // nor for what waits
        return;
      }
      AppendChunk(plan, sequence, room);
    }
  }
}

// Tokens of a prompt, from `first_position` on, that this step may still take. Under a ceiling the first prompt in
// order gets a block's worth in any case: it must not wait for the streams' ends.
int32_t Scheduler::Impl::PrefillRoom(int32_t first_position) const {
  if (options_.max_itl == Duration(0) || streams_ == 0) return budget_left_;
  const int32_t room = RoomUnderCeiling(in_flight_.back().work, first_position, budget_left_);
  return prefills_ > 0 ? room : std::max(room, std::min(options_.block_size, budget_left_));
}

int32_t Scheduler::Impl::RoomUnderCeiling(const StepWork& beside, int32_t first_position, int32_t most) const {
  auto fits = [&](int32_t tokens) {
    StepWork work = beside;
    work.Add(first_position, tokens);
    return StepTime(learner_.cost(), work) <= options_.max_itl;
  };
  // A single token attends as a decode does, which may take longer than two of a prompt.
  if (most < 2 || !fits(2)) return most > 0 && fits(1) ? 1 : 0;
  int32_t room = 2;
  while (room < most) {
    const int32_t middle = room + (most - room + 1) / 2;
    if (fits(middle)) {
      room = middle;
    } else {
      most = middle - 1;
    }
  }
  return room;
}

// How long `count` positions of a prompt take on an idle server at least: less by twice what the step cost errs lately,
// so that nobody is refused for what has been learned badly, or hardly at all.
Duration Scheduler::Impl::CertainPrefillTime(int32_t first, int32_t count) const {
  const double certain = options_.learn_step_cost ? std::max(0.0, 1 - 2 * learner_.error()) : 1;
  return Duration(std::llround(certain * static_cast<double>(PrefillTime(first, count, {}).count())));
}

// How long `count` positions of a prompt take when nothing but `beside` is in their steps.
Duration Scheduler::Impl::PrefillTime(int32_t first, int32_t count, const StepWork& beside) const {
  int32_t chunk = std::max(1, options_.token_budget - static_cast<int32_t>(beside.tokens));
  if (options_.max_itl > Duration(0) && beside.tokens > 0) {
    chunk = std::max(std::min(options_.block_size, chunk), RoomUnderCeiling(beside, first, chunk));
  }
  auto step = [&](int32_t tokens) {
    StepWork work = beside;
    ++work.sequences;
    work.tokens += tokens;
    return static_cast<double>(StepTime(learner_.cost(), work).count()) / 1e3;
  };
  StepWork prompt;
  prompt.Add(first, count);
  // A single token, with all before it cached, attends as a decode does.
  const double attention_us = learner_.cost().attention_us * static_cast<double>(prompt.prefill_context) +
                              learner_.cost().kv_token_us * static_cast<double>(prompt.decode_context);
  const int32_t before_last = (count - 1) / chunk;
  return DurationOf(before_last * step(chunk) + step(count - before_last * chunk) + attention_us);
}

// --- Blocks ----------------------------------------------------------------------------------------------------------

// Makes sure that the next position has a block. False: not in this step, or the sequence itself was preempted.
bool Scheduler::Impl::Grow(Sequence* sequence) {
  if (sequence->scheduled < static_cast<int32_t>(sequence->blocks.size()) * options_.block_size) return true;
  ++shortage_;
  // Blocks that come back when the steps in flight have ended are as good as there: nobody else is preempted for them.
  if (pool_.available() == 0) pressed_ = true;
  while (pool_.available() == 0 && pool_.num_retiring() < shortage_) {
    if (!GiveUpSomething(sequence) || sequence->state != Sequence::State::kRunning) return false;
  }
  std::optional<BlockId> block = cache_.Allocate();
  if (!block) return false;
  --shortage_;
  sequence->blocks.push_back(*block);
  return true;
}

// Frees blocks for `wanting`, at once or when a step in flight ends. False: there was nothing left to give up.
bool Scheduler::Impl::GiveUpSomething(const Sequence* wanting) {
  // A prompt kept for siblings that could not start yet, with nobody running on it.
  auto unused = [](const LiveRequest* request) { return request->num_running == 0; };
  if (auto it = std::ranges::find_if(sharing_, unused); it != sharing_.end()) {
    DropShare(**it);
    return true;
  }
  if (Sequence* victim = ChooseVictim(wanting)) {
    LiveRequest& request = *victim->request;
    Preempt(victim);
    if (victim != wanting) DropShare(request);
    return true;
  }
  if (wanting->request->shared.empty()) return false;
  DropShare(*wanting->request);
  return true;
}

// The last in order: lowest priority, then newest. Never of the oldest running request, unless it is that request
// itself that wants a block: then its sequences behind the wanting one. A sequence that nobody stands behind gives up
// itself.
Sequence* Scheduler::Impl::ChooseVictim(const Sequence* wanting) const {
  const LiveRequest* oldest = OldestRunning();
  const Sequence* last_of_same = nullptr;
  Sequence* last = nullptr;
  for (size_t account : order_) {
    for (Sequence* sequence : accounts_[account].running) {
      if (sequence->state != Sequence::State::kRunning) continue;
      if (sequence->request == wanting->request) last_of_same = sequence;
      if (sequence->request != oldest) last = sequence;
    }
  }
  if (wanting->request != oldest) return last;  // perhaps `wanting` itself
  if (last != nullptr) return last;
  if (wanting->request->num_running == 1) return nullptr;
  return const_cast<Sequence*>(last_of_same);
}

void Scheduler::Impl::Preempt(Sequence* victim) {
  CHECK(victim->last_step != step_);  // not planned already
  LeaveQueueOrSlot(victim);
  ReleaseBlocks(victim);
  MakeWaiting(victim);
  if (options_.recorder != nullptr) options_.recorder->OnPreempt(victim->request->key, victim->index);
  ++victim->preempted;
  ++victim->request->preemptions;
  ++preemptions_;
}

// --- Admission -------------------------------------------------------------------------------------------------------

void Scheduler::Impl::AdmitWaiting(StepPlan* plan, const Call& call) {
  while (!free_slots_.empty() && PrefillRoom(0) > 0) {
    Sequence* sequence = NextToAdmit();
    if (sequence == nullptr) return;
    if (StopHurrying(sequence, call.now)) continue;
    // Nobody passes a head that does not fit, or a large request would wait for ever.
    if (!TryAdmit(sequence, call)) return;
    // Behind a prefix that was found there may be less room than PrefillRoom(0) said; it is in the step all the same.
    AppendChunk(plan, sequence, std::max(1, PrefillRoom(sequence->scheduled)));
  }
}

// The first in the queue of the least served account that may run one more; null: there is none.
Sequence* Scheduler::Impl::NextToAdmit() {
  for (size_t index : share_.Order()) {
    const Account& account = accounts_[index];
    if (!account.waiting.empty() && account.load.running_sequences < account.max_running) {
      return *account.waiting.begin();
    }
  }
  return nullptr;
}

// A target that can no longer be met hurries nobody: those go first that can still meet theirs. False: it can.
bool Scheduler::Impl::StopHurrying(Sequence* sequence, TimePoint now) {
  LiveRequest& request = *sequence->request;
  if (!request.hurries || request.admitted || now <= request.start_by + Aged(*request.request)) return false;
  Account& account = AccountOf(*sequence);
  account.waiting.erase(sequence);  // alone: its siblings wait for it to compute the prompt
  request.hurries = false;
  request.start_by += options_.default_ttft_target;
  account.waiting.insert(sequence);
  return true;
}

// Blocks for all known tokens and the next one are taken at once, so that a prompt under way never has to wait or
// preempt.
bool Scheduler::Impl::TryAdmit(Sequence* sequence, const Call& call) {
  // Else results of an earlier run would meet this one.
  CHECK(sequence->pending == 0 && FindInFlight(sequence->last_step) == nullptr);
  const int32_t num_blocks = BlocksFor(std::min(sequence->known() + 1, sequence->request->limit - 1));
  if (!FindRoom(sequence, num_blocks)) return false;
  AccountOf(*sequence).waiting.erase(sequence);
  TakeBlocks(sequence, num_blocks);
  StartRunning(sequence);
  LiveRequest& request = *sequence->request;
  if (!request.admitted) CountAdmission(*sequence, call);
  if (!sequence->admitted) {
    sequence->admitted = true;
    ReserveAnswer(sequence);
    --request.num_unadmitted;
    DropShareIfUnused(request);
  }
  return true;
}

// Whether the sequence can have that many blocks, match_ among them, and leave the headroom. False: it is blocked_.
bool Scheduler::Impl::FindRoom(Sequence* sequence, int32_t num_blocks) {
  if (sequence == blocked_ && num_running_ > 0 && pool_.available() < blocked_until_available_ &&
      step_ < blocked_until_step_) {
    return false;
  }
  blocked_ = nullptr;
  for (;;) {
    MatchPrefix(sequence, &match_);
    const auto unreferenced = std::ranges::count_if(match_, [&](BlockId block) { return pool_.refs(block) == 0; });
    const int32_t needed = num_blocks - static_cast<int32_t>(match_.size()) + static_cast<int32_t>(unreferenced);
    const int32_t headroom = Headroom(*sequence);
    if (needed + headroom <= pool_.available()) return true;
    if (num_running_ == 0 && in_flight_.size() == 1 && !sharing_.empty()) {
      // Nothing runs: prompts kept for later siblings must not keep it so.
      DropShare(*sharing_.back());
      continue;
    }
    blocked_ = sequence;
    blocked_until_available_ = needed + headroom;
    blocked_until_step_ = step_ + kRetryBlockedAfterSteps;
    return false;
  }
}

// Those of match_ first.
void Scheduler::Impl::TakeBlocks(Sequence* sequence, int32_t num_blocks) {
  for (BlockId block : match_) pool_.Ref(block);
  sequence->blocks.assign(match_.begin(), match_.end());
  while (static_cast<int32_t>(sequence->blocks.size()) < num_blocks) {
    std::optional<BlockId> block = cache_.Allocate();
    CHECK(block.has_value());
    sequence->blocks.push_back(*block);
  }
  // Whoever computed them has offered them to the cache, which may know by then that they are not to be trusted.
  sequence->published = static_cast<int32_t>(match_.size());
  sequence->computed = sequence->scheduled = sequence->published * options_.block_size;
}

void Scheduler::Impl::StartRunning(Sequence* sequence) {
  LiveRequest& request = *sequence->request;
  Account& account = AccountOf(*sequence);
  sequence->state = Sequence::State::kRunning;
  sequence->slot = free_slots_.back();
  free_slots_.pop_back();
  sequence->needs_init = true;
  ++request.num_running;
  if (oldest_ != nullptr && request.order < oldest_->order) oldest_ = &request;
  ++num_running_;
  ++account.load.running_sequences;
  account.running.insert(std::ranges::upper_bound(account.running, sequence, ComesBefore()), sequence);
}

// Of a request whose first sequence this is to run.
void Scheduler::Impl::CountAdmission(const Sequence& sequence, const Call& call) {
  LiveRequest& request = *sequence.request;
  Account& account = AccountOf(sequence);
  if (EarliestExpiry(request) <= next_expiry_) next_expiry_stale_ = true;
  request.admitted = true;
  request.admitted_at = call.now;
  --waiting_requests_;
  waiting_tokens_ -= request.prompt_size;
  // Several have a use for these: one that nobody has found since is taken before them.
  for (BlockId block : match_) pool_.SetValued(block);
  prompt_tokens_ += static_cast<uint64_t>(request.prompt_size);
  --account.load.waiting_requests;
  account.load.waiting_tokens -= request.prompt_size;
  account.load.prompt_tokens += static_cast<uint64_t>(request.prompt_size);
  cached_tokens_ += static_cast<uint64_t>(sequence.computed);
  Event& event = call.events->emplace_back();
  event.kind = Event::Kind::kAdmitted;
  event.request = request.key;
  event.cached_tokens = static_cast<uint32_t>(sequence.computed);
  event.timing.queued = call.now - request.request->arrival;
}

void Scheduler::Impl::ReserveAnswer(Sequence* sequence) {
  const LiveRequest& request = *sequence->request;
  const int32_t tokens = std::min(request.limit - request.prompt_size, kReservedTokens);
  sequence->generated.reserve(static_cast<size_t>(tokens));
  sequence->blocks.reserve(static_cast<size_t>(BlocksFor(request.prompt_size + tokens)));
  if (request.uses_cache) sequence->hashes.reserve(static_cast<size_t>(BlocksFor(tokens) + 1));
}

// Blocks that stay free at an admission, for the running sequences to grow into: a quarter of a block each. Without it
// an admission into a full pool would be preempted in the next step. Twice as many for each time that the sequence has
// been preempted: the steps between two preemptions double, and what is computed again stays a small part.
int32_t Scheduler::Impl::Headroom(const Sequence& sequence) const {
  return (num_running_ << std::min(sequence.preempted, kMostDoublings)) / 4;
}

// The leading blocks that are computed already: shared by a sibling or found in the cache, whichever reaches further.
// At least one token is left to compute, for its logits.
void Scheduler::Impl::MatchPrefix(Sequence* sequence, std::vector<BlockId>* blocks) {
  const LiveRequest& request = *sequence->request;
  blocks->clear();
  if (request.uses_cache && request.scoring_complete()) {
    const int32_t most = (sequence->known() - 1) / options_.block_size;
    for (int32_t i = 0; i < most; ++i) {
      const BlockHash& hash = HashOf(sequence, i);
      std::optional<BlockId> block =
          cache_.Find(hash, ParentOf(sequence, i), BlockTokens(*sequence, i, &token_scratch_));
      if (!block) break;
      blocks->push_back(*block);
    }
  }
  if (!sequence->admitted && request.shared.size() > blocks->size()) *blocks = request.shared;
}

// --- The plan --------------------------------------------------------------------------------------------------------

void Scheduler::Impl::AppendChunk(StepPlan* plan, Sequence* sequence, int32_t budget_left) {
  LiveRequest& request = *sequence->request;
  int32_t tokens = std::min(sequence->remaining(), budget_left);
  // Positions scored before a preemption are not scored twice: what wants scores starts with a chunk of its own.
  if (!request.scoring_complete() && sequence->scheduled < request.scored) {
    tokens = std::min(tokens, request.scored - sequence->scheduled);
  }
  CHECK(tokens > 0 && tokens <= budget_left_ && sequence->last_step != step_);
  const int32_t end = sequence->scheduled + tokens;

  const int32_t known_blocks = sequence->needs_init ? 0 : BlocksFor(sequence->scheduled);
  if (sequence->needs_init) AppendSlotInit(plan, sequence);
  PlannedSequence& planned = plan->sequences.emplace_back();
  planned.request = request.key;
  planned.sequence = sequence->index;
  planned.slot = sequence->slot;
  planned.first_position = sequence->scheduled;
  planned.num_tokens = tokens;
  planned.token_begin = static_cast<int32_t>(plan->tokens.size());
  planned.input_from_slot = end > sequence->known();
  const int32_t by_value = end - (planned.input_from_slot ? 1 : 0);
  for (int32_t i = sequence->scheduled; i < by_value; ++i) plan->tokens.push_back(sequence->TokenAt(i));
  if (planned.input_from_slot) plan->tokens.push_back(-1);
  planned.block_begin = static_cast<int32_t>(plan->block_ids.size());
  planned.num_blocks = BlocksFor(end);
  planned.known_blocks = known_blocks;
  CHECK(planned.num_blocks <= static_cast<int32_t>(sequence->blocks.size()));
  plan->block_ids.insert(plan->block_ids.end(), sequence->blocks.begin() + known_blocks,
                         sequence->blocks.begin() + planned.num_blocks);
  AppendPromptScores(plan, &planned, request);

  const int32_t generated = sequence->expected() - request.prompt_size;
  planned.sample = end == sequence->expected();
  planned.ban_stops = planned.sample && generated < request.min_new_tokens;
  const bool decode = tokens == 1 && planned.sample && generated > 0;
  if (!decode) plan->num_prefill_tokens += tokens;
  ++(decode ? streams_ : prefills_);
  in_flight_.back().work.Add(planned.first_position, tokens);

  Charge(sequence, end);
  sequence->scheduled = end;
  if (planned.sample) ++sequence->pending;
  sequence->last_step = step_;
  ++request.in_flight;
  in_flight_.back().sequences.push_back(sequence);
  budget_left_ -= tokens;
}

// Charges what is computed up to `end` and has not been charged before: neither what the prefix cache held, nor what a
// preemption makes to be computed again.
void Scheduler::Impl::Charge(Sequence* sequence, int32_t end) {
  const int32_t begin = std::max(sequence->charged, sequence->scheduled);
  if (end <= begin) return;
  sequence->charged = end;
  const int32_t answer = std::max(0, end - std::max(begin, sequence->request->prompt_size));
  share_.Charge(sequence->request->account, end - begin + (kAnswerService - 1) * answer);
}

void Scheduler::Impl::AppendPromptScores(StepPlan* plan, PlannedSequence* planned, LiveRequest& request) {
  planned->prompt_score_begin = static_cast<int32_t>(plan->prompt_score_ids.size());
  if (request.scoring_complete()) return;
  const int32_t first = planned->first_position;
  if (first < request.scored) return;
  CHECK(first == request.scored);
  planned->num_prompt_scores = std::min(first + planned->num_tokens, request.prompt_size - 1) - first;
  for (int32_t i = 1; i <= planned->num_prompt_scores; ++i) {
    plan->prompt_score_ids.push_back(request.request->prompt[static_cast<size_t>(first + i)]);
  }
  request.scored += planned->num_prompt_scores;
}

void Scheduler::Impl::AppendSlotInit(StepPlan* plan, Sequence* sequence) {
  SlotInit& init = plan->slot_inits.emplace_back();
  init.slot = sequence->slot;
  init.sequence = sequence->index;
  init.request = sequence->request->request;
  if (init.request->sampling.NeedsHistory()) init.output_history = sequence->generated;
  sequence->needs_init = false;
}

void Scheduler::Impl::CompactRunning() {
  for (Account& account : accounts_) {
    if (!account.running_dirty) continue;
    std::erase_if(account.running, [](const Sequence* s) { return s->state != Sequence::State::kRunning; });
    account.running_dirty = false;
  }
}

}  // namespace altiplano
