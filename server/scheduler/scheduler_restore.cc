// A scheduler from a checkpoint, for replays. What a file says is believed in nothing: a state that no scheduler comes
// to is refused, so that no CHECK can be met later.
#include <algorithm>
#include <cstring>
#include <utility>

#include "server/base/strings.h"
#include "server/scheduler/flight_record.h"
#include "server/scheduler/scheduler_impl.h"

namespace altiplano {

namespace {

using State = FlightCheckpoint::State;

Status Bad(auto... parts) {
  return Status(Code::kInvalidArgument, StrCat("the checkpoint: ", parts...));
}

BlockHash HashOfName(uint64_t name) {
  BlockHash hash{};
  std::memcpy(hash.data(), &name, sizeof name);
  return hash;
}

std::vector<BlockHash> HashesOf(const std::vector<uint64_t>& names) {
  std::vector<BlockHash> hashes(names.size());
  std::ranges::transform(names, hashes.begin(), HashOfName);
  return hashes;
}

// By block.
StatusOr<std::vector<int32_t>> ReferencesOf(const FlightCheckpoint& checkpoint, int32_t num_blocks) {
  std::vector<int32_t> refs(static_cast<size_t>(num_blocks));
  bool known = true;
  auto count = [&](const std::vector<BlockId>& blocks) {
    for (BlockId block : blocks) {
      known &= block < num_blocks;
      if (known) ++refs[static_cast<size_t>(block)];
    }
  };
  count(checkpoint.retired);
  for (const FlightCheckpoint::Request& request : checkpoint.requests) {
    count(request.shared);
    for (const FlightCheckpoint::Sequence& sequence : request.sequences) count(sequence.blocks);
  }
  if (!known) return Bad("it has blocks that the pool has not");
  return refs;
}

}  // namespace

StatusOr<std::shared_ptr<const StepPlan>> Scheduler::Impl::Restore(
    const FlightCheckpoint& checkpoint, const std::vector<std::shared_ptr<const Request>>& requests) {
  step_ = checkpoint.step;
  arrivals_ = checkpoint.orders;
  if (checkpoint.learner.has_value() != options_.learn_step_cost) return Bad("is the step cost learned or not?");
  if (checkpoint.learner) learner_ = *checkpoint.learner;
  for (int32_t slot : checkpoint.free_slots) {
    if (slot >= options_.max_running) return Bad("there is no slot ", slot);
  }
  free_slots_ = checkpoint.free_slots;
  num_running_ = options_.max_running - static_cast<int32_t>(free_slots_.size());
  if (checkpoint.accounts.size() != accounts_.size()) return Bad("it has ", checkpoint.accounts.size(), " accounts");

  RETURN_IF_ERROR(RestoreBlocks(checkpoint));
  for (size_t i = 0; i < requests.size(); ++i) RETURN_IF_ERROR(RestoreRequest(checkpoint.requests[i], requests[i]));
  RETURN_IF_ERROR(RestoreQueues(checkpoint));
  ASSIGN_OR_RETURN(std::shared_ptr<const StepPlan> in_flight, RestoreInFlight(checkpoint));
  for (const FlightCancel& cancel : checkpoint.cancels) Cancel(cancel.key, Status(cancel.code, "recorded"));
  for (const FlightStop& stop : checkpoint.stops) StopSequence(stop.key, stop.sequence);
  next_expiry_stale_ = true;
  next_deadline();
  const char* broken = BrokenInvariant();
  if (broken == nullptr) broken = BrokenBeforePlan();
  if (broken != nullptr) return Bad("this does not hold: ", broken);
  return in_flight;
}

// Every block is taken first; those in use get their references, those in the cache are let go oldest first, and the
// others become free.
Status Scheduler::Impl::RestoreBlocks(const FlightCheckpoint& checkpoint) {
  ASSIGN_OR_RETURN(const std::vector<int32_t> refs, ReferencesOf(checkpoint, pool_.size()));
  while (pool_.available() > 0) pool_.Take();
  RETURN_IF_ERROR(RestoreHeld(checkpoint.held, refs));
  if (checkpoint.held.size() + checkpoint.cached.size() + checkpoint.cached_valued.size() > refs.size()) {
    return Bad("it has more blocks than the pool");
  }
  BlockId block = 0;
  auto next = [&] {
    while (refs[static_cast<size_t>(block)] > 0) ++block;
    return block++;
  };
  for (bool valued : {false, true}) {
    for (uint64_t name : valued ? checkpoint.cached_valued : checkpoint.cached) {
      const BlockId cached = next();
      RETURN_IF_ERROR(RestoreName(cached, name));
      if (valued) pool_.SetValued(cached);
      pool_.Unref(cached);
    }
  }
  for (; block < pool_.size(); ++block) {
    if (refs[static_cast<size_t>(block)] == 0) pool_.Unref(block);
  }
  return OkStatus();
}

Status Scheduler::Impl::RestoreHeld(const std::vector<FlightCheckpoint::Held>& held, const std::vector<int32_t>& refs) {
  BlockId last = -1;
  for (const FlightCheckpoint::Held& one : held) {
    if (one.block <= last || one.block >= pool_.size() || refs[static_cast<size_t>(one.block)] == 0) {
      return Bad("nobody holds block ", one.block);
    }
    last = one.block;
    for (int32_t i = 1; i < refs[static_cast<size_t>(one.block)]; ++i) pool_.Ref(one.block);
    if (one.valued) {  // without a name: it had one, which was withdrawn
      pool_.SetKept(one.block, true);
      pool_.SetValued(one.block);
      pool_.SetKept(one.block, false);
    }
    if (one.name) RETURN_IF_ERROR(RestoreName(one.block, *one.name));
  }
  if (static_cast<int64_t>(held.size()) == std::ranges::count_if(refs, [](int32_t n) { return n > 0; })) {
    return OkStatus();
  }
  return Bad("not all blocks that are held are said to be");
}

Status Scheduler::Impl::RestoreName(BlockId block, uint64_t name) {
  const std::vector<TokenId> tokens(static_cast<size_t>(options_.block_size));
  if (cache_.Publish(block, HashOfName(name), BlockHash{}, tokens)) return OkStatus();
  return Bad("two blocks have the same name");
}

Status Scheduler::Impl::RestoreRequest(const FlightCheckpoint::Request& from, std::shared_ptr<const Request> request) {
  std::unique_ptr<LiveRequest> live = MakeLive(from.arrival.key, from.order, std::move(request));
  live->start_by = from.start_by;
  live->hurries = from.hurries;
  live->hopeless_at = live->request->deadline - from.hopeless_before;
  live->scored = from.scored;
  live->admitted = from.admitted;
  live->shared = from.shared;
  live->prompt_hashes = HashesOf(from.names);
  live->num_live = live->num_unadmitted = 0;
  if (from.order > arrivals_) return Bad("an order that has not been given yet");
  if (from.leader >= static_cast<int32_t>(live->sequences.size())) return Bad("there is no leader ", from.leader);
  if (from.leader >= 0) live->leader = &live->sequences[static_cast<size_t>(from.leader)];
  for (size_t i = 0; i < live->sequences.size(); ++i) {
    RETURN_IF_ERROR(RestoreSequence(from.sequences[i], &live->sequences[i]));
  }
  Account& account = accounts_[live->account];
  ++account.live;
  if (!live->admitted) {
    ++waiting_requests_;
    waiting_tokens_ += live->prompt_size;
    ++account.load.waiting_requests;
    account.load.waiting_tokens += live->prompt_size;
  }
  return Insert(std::move(live)) ? OkStatus() : Bad("a request is live twice");
}

Status Scheduler::Impl::RestoreSequence(const FlightCheckpoint::Sequence& from, Sequence* sequence) {
  LiveRequest& request = *sequence->request;
  sequence->admitted = from.admitted;
  sequence->state = static_cast<Sequence::State>(from.state);  // the same words
  if (from.state == State::kEnded) return OkStatus();
  if (from.generated >= request.limit - request.prompt_size) return Bad("an answer goes on beyond its limit");
  sequence->generated.resize(static_cast<size_t>(from.generated));
  sequence->charged = from.charged;
  sequence->preempted = from.preempted;
  sequence->slot = from.slot;
  sequence->scheduled = from.scheduled;
  sequence->computed = from.computed;
  sequence->published = from.published;
  sequence->blocks = from.blocks;
  sequence->hashes = HashesOf(from.names);
  ++request.num_live;
  request.num_unadmitted += !from.admitted;
  if (from.state != State::kRunning) return OkStatus();
  if (from.slot >= options_.max_running) return Bad("there is no slot ", from.slot);
  ++request.num_running;
  return OkStatus();
}

Status Scheduler::Impl::RestoreQueues(const FlightCheckpoint& checkpoint) {
  for (const auto& [key, request] : live_) {
    Account& account = accounts_[request->account];
    for (Sequence& sequence : request->sequences) {
      if (sequence.state == Sequence::State::kWaiting) account.waiting.insert(&sequence);
      if (sequence.state == Sequence::State::kRunning) account.running.push_back(&sequence);
    }
  }
  for (size_t i = 0; i < accounts_.size(); ++i) {
    std::ranges::sort(accounts_[i].running, ComesBefore());
    accounts_[i].load.running_sequences = static_cast<int32_t>(accounts_[i].running.size());
    if (checkpoint.accounts[i].remainder >= options_.tenants[i].weight) return Bad("an account's remainder");
    share_.Restore(i, checkpoint.accounts[i], accounts_[i].live > 0);
  }
  share_.RestoreFloor(checkpoint.floor);
  auto live = [this](RequestKey key) {
    const auto it = live_.find(key);
    return it == live_.end() ? nullptr : it->second.get();
  };
  for (RequestKey key : checkpoint.sharing) {
    if (live(key) == nullptr) return Bad("request ", key, " shares and is not live");
    sharing_.push_back(live(key));
  }
  if (!checkpoint.blocked) return OkStatus();
  const LiveRequest* head = live(checkpoint.blocked->key);
  if (head == nullptr || checkpoint.blocked->sequence >= head->sequences.size()) return Bad("who is blocked?");
  blocked_ = &head->sequences[checkpoint.blocked->sequence];
  blocked_until_available_ = checkpoint.blocked->until_available;
  blocked_until_step_ = checkpoint.blocked->until_step;
  return OkStatus();
}

StatusOr<std::shared_ptr<const StepPlan>> Scheduler::Impl::RestoreInFlight(const FlightCheckpoint& checkpoint) {
  if (checkpoint.in_flight.empty()) return std::shared_ptr<const StepPlan>();
  auto plan = std::make_shared<StepPlan>();
  plan->step = step_;
  InFlight in_flight;
  in_flight.step = step_;
  for (const FlightPlanned& planned : checkpoint.in_flight) {
    ASSIGN_OR_RETURN(Sequence * sequence, PlannedOf(planned));
    sequence->last_step = step_;
    sequence->pending = planned.sample;
    ++sequence->request->in_flight;
    in_flight.sequences.push_back(sequence);
    plan->sequences.push_back({.request = planned.key,
                               .sequence = planned.sequence,
                               .slot = planned.slot,
                               .first_position = planned.first_position,
                               .num_tokens = planned.num_tokens,
                               .sample = planned.sample,
                               .num_prompt_scores = planned.scores ? 1 : 0});
  }
  for (BlockId block : checkpoint.retired) {
    pool_.Retire(block);
    in_flight.retired.push_back(block);
  }
  in_flight.work = WorkOf(*plan);
  in_flight.plan = plan;
  in_flight_.push_back(std::move(in_flight));
  return std::shared_ptr<const StepPlan>(std::move(plan));
}

// The sequence that is part of the step in flight. It may have ended since, and its request with it.
StatusOr<Sequence*> Scheduler::Impl::PlannedOf(const FlightPlanned& planned) {
  const int64_t end = int64_t{planned.first_position} + planned.num_tokens;
  if (step_ == 0 || planned.num_tokens == 0 || end > max_servable_tokens()) return Bad("a step that never was");
  const auto it = live_.find(planned.key);
  if (it == live_.end()) {
    LiveRequest& ended = *ended_.emplace_back(std::make_unique<LiveRequest>());
    ended.key = planned.key;
    ended.ended = true;
    Sequence& sequence = ended.sequences.emplace_back();
    sequence.request = &ended;
    sequence.index = planned.sequence;
    sequence.state = Sequence::State::kEnded;
    return &sequence;
  }
  LiveRequest& request = *it->second;
  if (planned.sequence >= request.sequences.size()) return Bad("there is no sequence ", planned.sequence);
  Sequence& sequence = request.sequences[planned.sequence];
  const bool running = sequence.state == Sequence::State::kRunning;
  const bool as_planned = planned.first_position == sequence.computed && end == sequence.scheduled &&
                          planned.sample == (end == sequence.known());
  if (sequence.last_step == step_ || (running ? !as_planned : sequence.state != Sequence::State::kEnded)) {
    return Bad("the step in flight is not what its sequences say");
  }
  return &sequence;
}

}  // namespace altiplano
