#include "server/scheduler/scheduler.h"

#include <algorithm>
#include <bit>
#include <utility>

#include "server/base/check.h"
#include "server/base/strings.h"
#include "server/scheduler/flight_recorder.h"
#include "server/scheduler/scheduler_impl.h"

namespace altiplano {

namespace {

Status CheckOptions(const SchedulerOptions& options) {
  auto invalid = [](auto... parts) { return Status(Code::kInvalidArgument, StrCat(parts...)); };
  const int32_t block_size = options.block_size;
  if (block_size < 1 || (block_size & (block_size - 1)) != 0) {
    return invalid("block_size is ", block_size, ", must be a power of two");
  }
  if (options.num_blocks < 1) return invalid("num_blocks is ", options.num_blocks, ", must be at least 1");
  if (int64_t{options.num_blocks} * block_size > INT32_MAX) {
    return invalid("num_blocks times block_size is ", int64_t{options.num_blocks} * block_size, ", must be below 2^31");
  }
  if (options.max_running < 1) return invalid("max_running is ", options.max_running, ", must be at least 1");
  if (options.token_budget < 1) return invalid("token_budget is ", options.token_budget, ", must be at least 1");
  if (options.max_context < 2) {
    return invalid("max_context is ", options.max_context, ", must hold a prompt token and an answer token at least");
  }
  const StepCost& cost = options.step_cost;
  for (double us :
       {cost.step_us, cost.weights_us, cost.token_us, cost.sequence_us, cost.kv_token_us, cost.attention_us}) {
    if (!(us >= 0 && us <= 1e9)) return invalid("step_cost has a coefficient of ", us, " us, must be from 0 to 1e9");
  }
  const Duration least = StepTime(options.step_cost, {.sequences = 1, .tokens = 1, .decode_context = 1});
  if (options.max_itl < Duration(0)) return invalid("max_itl is negative");
  if (options.max_itl > Duration(0) && least == Duration(0) && !options.learn_step_cost) {
    return invalid("max_itl needs a step_cost to predict with, or learn_step_cost");
  }
  if (options.max_itl > Duration(0) && options.max_itl < least) {
    return invalid(StrFormat("max_itl is %.4g ms, but by step_cost a step of one token takes %.4g ms; raise max_itl",
                             Milliseconds(options.max_itl), Milliseconds(least)));
  }
  if (options.default_ttft_target < Duration(0)) return invalid("default_ttft_target is negative");
  if (options.priority_ageing < Duration(0)) return invalid("priority_ageing is negative");
  if (options.num_blocks * block_size < 2) {
    return invalid("a pool of one block of one token holds no request: raise num_blocks or block_size");
  }
  return OkStatus();
}

Status DeadlineExceeded(std::string reason, std::string message) {
  ErrorDetail detail;
  detail.reason = std::move(reason);
  return Status(Code::kDeadlineExceeded, std::move(message), std::move(detail));
}

}  // namespace

// --- The public class ------------------------------------------------------------------------------------------------

StatusOr<std::unique_ptr<Scheduler>> Scheduler::Create(SchedulerOptions options) {
  RETURN_IF_ERROR(CheckOptions(options));
  ASSIGN_OR_RETURN(options.tenants, CompleteTenants(std::move(options.tenants), options.max_running));
  return std::unique_ptr<Scheduler>(new Scheduler(std::make_unique<Impl>(std::move(options))));
}

StatusOr<std::unique_ptr<Scheduler>> Scheduler::Restore(SchedulerOptions options, const FlightCheckpoint& checkpoint,
                                                        const std::vector<std::shared_ptr<const Request>>& requests,
                                                        std::shared_ptr<const StepPlan>* in_flight) {
  ASSIGN_OR_RETURN(std::unique_ptr<Scheduler> scheduler, Create(std::move(options)));
  ASSIGN_OR_RETURN(*in_flight, scheduler->impl_->Restore(checkpoint, requests));
  return scheduler;
}

Scheduler::Scheduler(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Scheduler::~Scheduler() = default;

int32_t Scheduler::max_servable_tokens() const {
  return impl_->max_servable_tokens();
}
void Scheduler::Add(RequestKey key, std::shared_ptr<const Request> request) {
  if (auto* recorder = impl_->recorder()) recorder->OnArrival(key, *request);
  impl_->Add(key, std::move(request));
}
void Scheduler::Cancel(RequestKey key, Status why) {
  if (auto* recorder = impl_->recorder()) recorder->OnCancel(key, why.code());
  impl_->Cancel(key, std::move(why));
}
void Scheduler::StopSequence(RequestKey key, uint32_t sequence) {
  if (auto* recorder = impl_->recorder()) recorder->OnStop(key, sequence);
  impl_->StopSequence(key, sequence);
}
std::shared_ptr<const StepPlan> Scheduler::Plan(TimePoint now, std::vector<Event>* events) {
  const size_t before = events->size();
  if (auto* recorder = impl_->recorder()) {
    // Here, since the device computes the step before meanwhile.
    impl_->SayBeforeCheckpoint();
    if (recorder->checkpoint_due() && impl_->CanCheckpoint()) {
      recorder->EndCheckpoint(impl_->WriteCheckpoint(now, recorder->BeginCheckpoint()));
    }
  }
  std::shared_ptr<const StepPlan> plan = impl_->Plan(now, events);
  if (auto* recorder = impl_->recorder()) {
    recorder->OnPlan(now, plan.get(), impl_->Notes(plan.get()), std::span(*events).subspan(before));
  }
  return plan;
}
void Scheduler::Apply(const StepPlan& plan, const StepResult& result, TimePoint now, std::vector<Event>* events) {
  const size_t before = events->size();
  impl_->Apply(plan, result, now, events);
  if (auto* recorder = impl_->recorder()) {
    recorder->OnResult(now, plan, result, std::span(*events).subspan(before));
  }
}
void Scheduler::Abort(const Status& why, TimePoint now, std::vector<Event>* events) {
  if (auto* recorder = impl_->recorder()) recorder->OnAbort(now);
  impl_->Abort(why, now, events);
}
bool Scheduler::idle() const {
  return impl_->idle();
}
TimePoint Scheduler::next_deadline() const {
  return impl_->next_deadline();
}
SchedulerLoad Scheduler::load() const {
  return impl_->load();
}
int32_t Scheduler::ResetPrefixCache() {
  if (auto* recorder = impl_->recorder()) recorder->OnCacheReset();
  return impl_->ResetPrefixCache();
}
void Scheduler::CheckInvariants() const {
  impl_->CheckInvariants();
}

namespace {
std::vector<int32_t> WeightsOf(const std::vector<TenantOptions>& tenants) {
  std::vector<int32_t> weights;
  for (const TenantOptions& tenant : tenants) weights.push_back(tenant.weight);
  return weights;
}
}  // namespace

// --- Life of requests ------------------------------------------------------------------------------------------------

Scheduler::Impl::Impl(SchedulerOptions options)
    : options_(std::move(options)),
      block_shift_(std::countr_zero(static_cast<uint32_t>(options_.block_size))),
      pool_(options_.num_blocks),
      cache_(&pool_, options_.block_size),
      learner_(options_.step_cost),
      accounts_(options_.tenants.size()),
      share_(WeightsOf(options_.tenants)) {
  for (int32_t slot = options_.max_running - 1; slot >= 0; --slot) free_slots_.push_back(slot);
  for (size_t i = 0; i < accounts_.size(); ++i) {
    const int32_t own = options_.tenants[i].max_running;
    accounts_[i].max_running = own > 0 ? own : options_.max_running;
    accounts_[i].running.reserve(static_cast<size_t>(accounts_[i].max_running));
    order_.push_back(i);
  }
  in_flight_.reserve(2);
}

void Scheduler::Impl::Prefetch(std::span<Sequence* const> sequences, size_t i) {
  constexpr size_t kSequencesAhead = 8, kRequestsAhead = 4;
  if (i + kSequencesAhead >= sequences.size()) return;
  const auto* sequence = reinterpret_cast<const char*>(sequences[i + kSequencesAhead]);
  __builtin_prefetch(sequence, 1);
  __builtin_prefetch(sequence + 64, 1);
  __builtin_prefetch(sequences[i + kRequestsAhead]->request, 1);
}

int32_t Scheduler::Impl::max_servable_tokens() const {
  return std::min(options_.max_context, options_.num_blocks * options_.block_size);
}

void Scheduler::Impl::Add(RequestKey key, std::shared_ptr<const Request> request) {
  const auto prompt_size = static_cast<int64_t>(request->prompt.size());
  CHECK(prompt_size >= 1 && prompt_size + 1 <= max_servable_tokens());
  CHECK(request->num_sequences >= 1 && request->stop.max_new_tokens >= 1);

  std::unique_ptr<LiveRequest> live = MakeLive(key, ++arrivals_, std::move(request));
  Account& account = accounts_[live->account];
  if (++account.live == 1) share_.Join(live->account);
  ++account.load.waiting_requests;
  account.load.waiting_tokens += prompt_size;
  SetOrder(live.get());
  live->leader = &live->sequences[0];
  MakeWaiting(live->leader);
  ++waiting_requests_;
  waiting_tokens_ += prompt_size;
  next_expiry_ = std::min(next_expiry_, EarliestExpiry(*live));
  CHECK(Insert(std::move(live)));
}

bool Scheduler::Impl::Insert(std::unique_ptr<LiveRequest> request) {
  request->at = all_live_.size();
  all_live_.push_back(request.get());
  const RequestKey key = request->key;
  return live_.emplace(key, std::move(request)).second;
}

// What follows from the request alone; where it stands in the queue is still open.
std::unique_ptr<LiveRequest> Scheduler::Impl::MakeLive(RequestKey key, uint64_t order,
                                                       std::shared_ptr<const Request> request) const {
  const auto prompt_size = static_cast<int64_t>(request->prompt.size());
  auto live = std::make_unique<LiveRequest>();
  live->key = key;
  live->order = order;
  live->level = options_.priority_ageing > Duration(0) ? 0 : -int64_t{request->priority};
  live->prompt_size = static_cast<int32_t>(prompt_size);
  live->limit =
      static_cast<int32_t>(std::min<int64_t>(prompt_size + request->stop.max_new_tokens, max_servable_tokens()));
  live->num_live = live->num_unadmitted = request->num_sequences;
  if (options_.prefix_cache && !request->bypass_prefix_cache) {
    live->uses_cache = true;
    live->root = RootHash(request->tenant, request->cache_salt);
  }
  live->min_new_tokens = request->stop.min_new_tokens;
  live->ends_at_eos = !request->stop.ignore_eos;
  live->has_stop_ids = !request->stop.token_ids.empty();
  live->scores_prompt = request->sampling.prompt_top_logprobs >= 0;
  live->account = static_cast<uint32_t>(TenantOf(options_.tenants, request->tenant));
  if (options_.recorder != nullptr) {
    FlightFrameWriter arrival;
    PutArrival(key, *request, &arrival);
    live->arrival.assign(arrival.bytes().begin(), arrival.bytes().end());
  }
  live->request = std::move(request);
  live->sequences.resize(static_cast<size_t>(live->num_live));
  for (size_t i = 0; i < live->sequences.size(); ++i) {
    live->sequences[i].request = live.get();
    live->sequences[i].index = static_cast<uint32_t>(i);
  }
  return live;
}

// Where the request stands in the queue, and from when on it is hopeless. The former is predicted beside what decodes
// now; what is hopeless would be so on an idle server, too.
void Scheduler::Impl::SetOrder(LiveRequest* live) const {
  const Request& request = *live->request;
  const Duration prefill = PrefillTime(0, live->prompt_size, decodes_);
  live->start_by = request.arrival + options_.default_ttft_target;
  if (request.ttft_target > Duration(0)) {
    live->hurries = true;
    live->start_by = request.arrival + request.ttft_target - prefill;
  }
  live->start_by = std::min(live->start_by, request.deadline - prefill);
  // Never before its arrival: so whoever has waited past its own start_by is not overtaken by newcomers.
  live->start_by = std::max(live->start_by, request.arrival) - Aged(request);
  live->hopeless_at = request.deadline - CertainPrefillTime(0, live->prompt_size);
}

// Priority as the time that it is worth. A century at most, so that sums stay in range.
Duration Scheduler::Impl::Aged(const Request& request) const {
  constexpr double kMost = 100.0 * 365 * 24 * 3600 * 1e9;
  const double worth = static_cast<double>(request.priority) * static_cast<double>(options_.priority_ageing.count());
  return Duration(static_cast<int64_t>(std::clamp(worth, -kMost, kMost)));
}

void Scheduler::Impl::TakeCommands(const Call& call) {
  for (const auto& [key, index] : stops_) {
    auto it = live_.find(key);
    if (it == live_.end() || index >= it->second->sequences.size()) continue;
    Sequence* sequence = &it->second->sequences[index];
    if (sequence->state != Sequence::State::kEnded) FinishWithoutToken(call, sequence, FinishReason::kStop);
  }
  stops_.clear();
  for (auto& [key, why] : cancels_) {
    auto it = live_.find(key);
    if (it == live_.end()) continue;
    LiveRequest& request = *it->second;
    for (const Sequence& sequence : request.sequences) {
      if (!request.admitted || sequence.state == Sequence::State::kEnded) continue;
      Event& event = call.events->emplace_back();
      event.kind = Event::Kind::kFinished;
      event.request = key;
      event.sequence = sequence.index;
      event.finish = FinishReason::kCancelled;
    }
    EndRequest(call, request, std::move(why));
  }
  cancels_.clear();
}

TimePoint Scheduler::Impl::EarliestExpiry(const LiveRequest& request) const {
  TimePoint earliest = std::min(request.request->deadline, request.request->time_limit);
  return request.admitted ? earliest : std::min({earliest, request.request->queue_deadline, request.hopeless_at});
}

TimePoint Scheduler::Impl::next_deadline() const {
  if (next_expiry_stale_) {
    next_expiry_ = kNever;
    for (const auto& [key, request] : live_) next_expiry_ = std::min(next_expiry_, EarliestExpiry(*request));
    next_expiry_stale_ = false;
  }
  return next_expiry_;
}

void Scheduler::Impl::Expire(const Call& call) {
  if (call.now < next_expiry_) return;
  std::vector<LiveRequest*> expired;
  for (const auto& [key, request] : live_) {
    if (call.now >= EarliestExpiry(*request)) expired.push_back(request.get());
  }
  std::ranges::sort(expired, {}, &LiveRequest::order);
  for (LiveRequest* request : expired) ExpireOne(call, *request);
  next_expiry_stale_ = true;
  next_deadline();
}

// Whatever came first decides; what has been generated by the time limit is an answer, so it wins a tie.
void Scheduler::Impl::ExpireOne(const Call& call, LiveRequest& request) {
  const TimePoint at = EarliestExpiry(request);
  if (at == request.request->time_limit) {
    for (Sequence& sequence : request.sequences) {
      if (sequence.state != Sequence::State::kEnded) FinishWithoutToken(call, &sequence, FinishReason::kTimeLimit);
    }
  } else if (at == request.request->deadline || (at == request.hopeless_at && call.now >= request.request->deadline)) {
    EndRequest(call, request, DeadlineExceeded("DEADLINE", "the deadline passed before the request was done"));
  } else if (at == request.request->queue_deadline) {
    EndRequest(call, request,
               DeadlineExceeded("QUEUE_TIMEOUT", "the request was not admitted within its queue timeout"));
  } else {
    RefuseIfHopeless(call, request);
  }
}

// Its deadline leaves less time than its whole prompt takes. What the prefix cache holds need not be computed, and what
// steps take may have been learned better since.
void Scheduler::Impl::RefuseIfHopeless(const Call& call, LiveRequest& request) {
  MatchPrefix(request.leader, &match_);
  const auto cached = static_cast<int32_t>(match_.size()) * options_.block_size;
  const Duration prefill = CertainPrefillTime(cached, request.prompt_size - cached);
  request.hopeless_at = request.request->deadline - prefill;
  if (call.now < request.hopeless_at) {
    if (call.now >= EarliestExpiry(request)) ExpireOne(call, request);  // it had another reason to end
    return;
  }
  ++hopeless_;
  ErrorDetail detail;
  detail.reason = "HOPELESS";
  const std::string left_ms = StrFormat("%.9g", Milliseconds(request.request->deadline - call.now));
  const std::string prefill_ms = StrFormat("%.9g", Milliseconds(prefill));
  detail.metadata = {{"left_ms", left_ms}, {"prefill_ms", prefill_ms}};
  EndRequest(call, request,
             Status(Code::kDeadlineExceeded,
                    StrCat("the deadline in ", left_ms, " ms cannot be met: ", request.prompt_size - cached,
                           " tokens of the prompt are to be computed, which alone takes ", prefill_ms, " ms"),
                    std::move(detail)));
}

// Of a request that has just got its first token, or ends without one.
void Scheduler::Impl::CountTarget(const LiveRequest& request, TimePoint now) {
  const Request& asked = *request.request;
  if (asked.ttft_target == Duration(0)) return;
  ++(now - asked.arrival <= asked.ttft_target ? targets_met_ : targets_missed_);
}

void Scheduler::Impl::MakeWaiting(Sequence* sequence) {
  sequence->state = Sequence::State::kWaiting;
  AccountOf(*sequence).waiting.insert(sequence);
}

void Scheduler::Impl::FinishWithoutToken(const Call& call, Sequence* sequence, FinishReason reason) {
  Event& event = call.events->emplace_back();
  event.kind = Event::Kind::kFinished;
  event.request = sequence->request->key;
  event.sequence = sequence->index;
  event.finish = reason;
  EndSequence(call, sequence);
}

void Scheduler::Impl::EndSequence(const Call& call, Sequence* sequence) {
  LiveRequest& request = *sequence->request;
  LeaveQueueOrSlot(sequence);
  ReleaseBlocks(sequence);
  sequence->state = Sequence::State::kEnded;
  --request.num_live;
  if (!sequence->admitted) --request.num_unadmitted;
  if (request.leader == sequence) {  // the prompt is not computed: the next sibling has to
    auto held = [](const Sequence& s) { return s.state == Sequence::State::kHeld; };
    auto next = std::ranges::find_if(request.sequences, held);
    request.leader = next == request.sequences.end() ? nullptr : &*next;
    if (request.leader != nullptr) MakeWaiting(request.leader);
  }
  DropShareIfUnused(request);
  if (request.num_live == 0) EndRequest(call, request, OkStatus());
}

void Scheduler::Impl::EndRequest(const Call& call, LiveRequest& request, Status status) {
  for (Sequence& sequence : request.sequences) {
    if (sequence.state == Sequence::State::kEnded) continue;
    LeaveQueueOrSlot(&sequence);
    ReleaseBlocks(&sequence);
    sequence.state = Sequence::State::kEnded;
  }
  DropShare(request);
  request.ended = true;
  Account& account = accounts_[request.account];
  if (!request.admitted) {
    --waiting_requests_;
    waiting_tokens_ -= request.prompt_size;
    --account.load.waiting_requests;
    account.load.waiting_tokens -= request.prompt_size;
  }
  if (--account.live == 0) share_.Leave(request.account);
  if (EarliestExpiry(request) <= next_expiry_) next_expiry_stale_ = true;

  Event& event = call.events->emplace_back();
  event.kind = Event::Kind::kEnded;
  event.request = request.key;
  event.status = std::move(status);
  const TimePoint arrival = request.request->arrival;
  event.timing.queued = request.admitted_at.value_or(call.now) - arrival;
  if (request.first_token_at) event.timing.first_token = *request.first_token_at - arrival;
  event.timing.total = call.now - arrival;
  event.timing.preemptions = request.preemptions;

  const bool due = call.now - arrival > request.request->ttft_target;
  if (!request.first_token_at && due) CountTarget(request, call.now);

  all_live_.back()->at = request.at;
  std::swap(all_live_[request.at], all_live_.back());
  all_live_.pop_back();
  ended_.push_back(std::move(live_.extract(request.key).mapped()));
}

void Scheduler::Impl::LeaveQueueOrSlot(Sequence* sequence) {
  if (sequence == blocked_) blocked_ = nullptr;
  Account& account = AccountOf(*sequence);
  if (sequence->state == Sequence::State::kWaiting) account.waiting.erase(sequence);
  if (sequence->state != Sequence::State::kRunning) return;
  free_slots_.push_back(sequence->slot);
  sequence->slot = -1;
  --sequence->request->num_running;
  if (sequence->request == oldest_ && oldest_->num_running == 0) oldest_ = nullptr;
  --num_running_;
  --account.load.running_sequences;
  account.running_dirty = true;
}

// Blocks that a step in flight may still read or write go to that step; it gives them back when it has been applied.
// From the end backwards, so that the cache forgets the ends of prefixes before their beginnings.
void Scheduler::Impl::ReleaseBlocks(Sequence* sequence) {
  sequence->request->said_in = 0;
  InFlight* in_flight = FindInFlight(sequence->last_step);
  for (auto block = sequence->blocks.rbegin(); block != sequence->blocks.rend(); ++block) {
    if (in_flight != nullptr) {
      pool_.Retire(*block);
      in_flight->retired.push_back(*block);
    } else {
      pool_.Unref(*block);
    }
  }
  sequence->blocks.clear();
  sequence->published = sequence->scheduled = sequence->computed = 0;
}

void Scheduler::Impl::DropShare(LiveRequest& request) {
  if (request.shared.empty()) return;
  for (auto block = request.shared.rbegin(); block != request.shared.rend(); ++block) pool_.Unref(*block);
  request.shared.clear();
  std::erase(sharing_, &request);
}

void Scheduler::Impl::DropShareIfUnused(LiveRequest& request) {
  if (request.num_unadmitted == 0) DropShare(request);
}

void Scheduler::Impl::ForgetEnded() {
  CompactRunning();
  std::erase_if(ended_, [](const auto& request) { return request->in_flight == 0; });
}

Scheduler::Impl::InFlight* Scheduler::Impl::FindInFlight(uint64_t step) {
  for (InFlight& in_flight : in_flight_) {
    if (in_flight.step == step) return &in_flight;
  }
  return nullptr;
}

void Scheduler::Impl::Abort(const Status& why, TimePoint now, std::vector<Event>* events) {
  std::vector<LiveRequest*> requests;
  for (const auto& [key, request] : live_) requests.push_back(request.get());
  std::ranges::sort(requests, {}, &LiveRequest::order);
  for (LiveRequest* request : requests) EndRequest({now, events}, *request, why);
  for (InFlight& in_flight : in_flight_) {
    for (BlockId block : in_flight.retired) pool_.Unretire(block);
  }
  in_flight_.clear();
  CompactRunning();
  ended_.clear();
  cancels_.clear();
  stops_.clear();
  cache_.Reset();  // nobody knows what the failed step left in the blocks
}

SchedulerLoad Scheduler::Impl::load() const {
  SchedulerLoad load;
  load.waiting_requests = waiting_requests_;
  load.running_requests = static_cast<int32_t>(live_.size()) - waiting_requests_;
  load.waiting_tokens = waiting_tokens_;
  load.blocks_total = pool_.size();
  load.blocks_used = pool_.num_held();
  load.blocks_cached = pool_.num_cached();
  load.steps = step_;
  load.preemptions = preemptions_;
  load.prompt_tokens = prompt_tokens_;
  load.cached_tokens = cached_tokens_;
  load.generated_tokens = generated_tokens_;
  load.late_tokens = late_tokens_;
  load.late_total = late_total_;
  load.late_most = late_most_;
  for (const Account& account : accounts_) load.tenants.push_back(account.load);
  load.targets_met = targets_met_;
  load.targets_missed = targets_missed_;
  load.hopeless = hopeless_;
  load.step_cost = learner_.cost();
  load.measured_steps = learner_.steps();
  load.step_cost_error = learner_.error();
  return load;
}

}  // namespace altiplano
