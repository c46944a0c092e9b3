#include "tests/sim/simulator_testlib.h"

#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "server/base/check.h"
#include "server/base/strings.h"
#include "server/scheduler/flight_replay.h"

namespace altiplano::sim {

namespace {

using std::chrono::milliseconds;

char g_replay[200];

void PrintReplay(int) {
  [[maybe_unused]] auto written = write(STDERR_FILENO, g_replay, std::strlen(g_replay));
  std::signal(SIGABRT, SIG_DFL);
}

std::vector<TokenId> RandomTokens(Random random, int32_t count, int32_t vocab) {
  std::vector<TokenId> tokens;
  for (int32_t i = 0; i < count; ++i) tokens.push_back(random.Below(vocab));
  return tokens;
}

}  // namespace

const std::vector<std::string> kParts = {
    "tenants",   "tenant-limits", "flood",  "priorities", "ageing", "targets",  "deadlines",    "ceiling",
    "step-cost", "learning",      "pauses", "siblings",   "salts",  "scores",   "penalties",    "stop-ids",
    "cancels",   "stops",         "nan",    "aborts",     "resets", "lockstep", "prefix-cache", "queue-bounds"};

std::string ReplayCommand(uint64_t seed, const Omitted& omitted) {
  std::string parts;
  for (const std::string& part : omitted) parts += StrCat(parts.empty() ? " ALTIPLANO_SIM_OMIT=" : ",", part);
  return StrCat("replay: ALTIPLANO_SIM_SEED=", seed, parts,
                " ALTIPLANO_SIM_TRACE=1 tests/sim_test --gtest_filter=Simulator.Seeds");
}

Omitted Shrink(const std::vector<std::string>& all, const std::function<bool(const Omitted&)>& fails) {
  Omitted omitted;
  for (bool changed = true; changed;) {
    changed = false;
    for (const std::string& part : all) {
      if (!omitted.insert(part).second) continue;
      const bool still = fails(omitted);
      if (!still) omitted.erase(part);
      changed |= still;
    }
  }
  return omitted;
}

void AnnounceSeedOnAbort(uint64_t seed) {
  std::snprintf(g_replay, sizeof g_replay, "%s\n", ReplayCommand(seed).c_str());
  std::signal(SIGABRT, PrintReplay);
}

Simulator::Simulator(uint64_t seed, Coverage* coverage, Omitted omitted)
    : seed_(seed),
      trace_(std::getenv("ALTIPLANO_SIM_TRACE") != nullptr),
      omitted_(std::move(omitted)),
      coverage_(*coverage),
      random_{Mix(seed, 42)} {}

template <typename... Parts>
void Simulator::Trace(const Parts&... parts) {
  if (trace_) std::fprintf(stderr, "%6d  %s\n", ticks_, StrCat(parts...).c_str());
}

void Simulator::Fail(std::string what) {
  if (!error_.empty() || what.empty()) return;
  error_ = StrCat("tick ", ticks_, ": ", what);
  Trace("FAIL ", what);
}

// --- The world -------------------------------------------------------------------------------------------------------

void Simulator::MakeOptions() {
  options_.block_size = 1 << random_.Below(5);
  options_.num_blocks = random_.Chance(0.3) ? random_.Between(1, 6) : random_.Between(1, 64);
  if (options_.block_size * options_.num_blocks < 2) options_.num_blocks = 2;
  options_.max_running = random_.Between(1, 12);
  options_.token_budget = random_.Chance(0.3) ? random_.Between(1, 4) : random_.Between(1, 64);
  options_.max_context = random_.Between(2, 160);
  options_.prefix_cache = random_.Chance(0.8);
  model_.vocab = random_.Chance(0.3) ? random_.Between(6, 12) : 60;
  model_.eos_ids = {1};
  if (random_.Chance(0.5)) model_.eos_ids.push_back(2);
  options_.eos_ids = model_.eos_ids;
  auto sometimes = [&](double p, double rate) { return random_.Chance(p) ? rate : 0; };
  cancel_rate_ = sometimes(0.4, 0.1);
  stop_rate_ = sometimes(0.3, 0.1);
  nan_rate_ = sometimes(0.15, 0.02);
  abort_rate_ = sometimes(0.05, 0.02);
  reset_rate_ = sometimes(0.1, 0.05);
  lockstep_rate_ = sometimes(0.5, 0.3);
  deadline_rate_ = sometimes(0.3, 0.4);
  pause_rate_ = sometimes(0.2, 0.05);
  step_milliseconds_ = random_.Between(1, 10);
  MakeCosts();
  options_.default_ttft_target = milliseconds(random_.Below(200));
  if (random_.Chance(0.3)) options_.priority_ageing = milliseconds(random_.Between(1, 100));
  target_rate_ = sometimes(0.4, 0.5);
  salt_rate_ = random_.Chance(0.3) ? 0.6 : 0.1;
  MakeTenants();
  Simplify();
  MakeQueue();
}

// In half of the worlds the sums are true, at least where nobody knows them in advance. They need not be: neither a
// ceiling nor what is learned may ever keep anybody from progress.
void Simulator::MakeCosts() {
  if (random_.Chance(0.3)) {
    options_.step_cost = {.step_us = 500, .token_us = 100.0 * random_.Below(20), .kv_token_us = 10, .attention_us = 5};
    options_.max_itl = milliseconds(random_.Between(3, 20));
    if (random_.Chance(0.3)) {  // one token may cost more than many of a prompt
      options_.step_cost.kv_token_us = 3000;
      options_.max_itl += milliseconds(3);
    }
  } else if (random_.Chance(0.4)) {
    options_.step_cost = {.step_us = 1000.0 * random_.Below(10), .token_us = 1000.0 * random_.Below(4)};
  }
  options_.learn_step_cost = random_.Chance(0.5);
  if (!random_.Chance(0.5)) return;
  true_cost_ = options_.step_cost;
  for (double* us : {&true_cost_->step_us, &true_cost_->token_us}) *us = *us * random_.Between(80, 120) / 100 + 50;
}

void Simulator::MakeTenants() {
  options_.tenants = {{.name = "*"}};
  if (!random_.Chance(0.5)) return;
  options_.tenants.clear();
  tenant_rate_ = 0.8;
  const int32_t most = random_.Chance(0.2) ? 50 : 5;
  const double limited = random_.Chance(0.4) ? 0.5 : 0;
  for (const char* name : {"a", "b", "*"}) {
    TenantOptions& tenant = options_.tenants.emplace_back();
    tenant.name = name;
    tenant.weight = random_.Between(1, most);
    if (random_.Chance(limited)) tenant.max_running = random_.Between(1, std::min(3, options_.max_running));
  }
  if (random_.Chance(0.25)) flood_ = random_.Between(4, 16);
}

void Simulator::MakeQueue() {
  QueueBounds::Options options;
  options.max_requests = random_.Between(1, 12);
  options.max_tokens = random_.Between(10, 300);
  options.tenants = options_.tenants;
  for (TenantOptions& tenant : options.tenants) {
    if (random_.Chance(0.3)) tenant.max_queued_requests = random_.Between(1, 4);
    if (random_.Chance(0.3)) tenant.max_queued_tokens = random_.Between(5, 100);
  }
  if (!random_.Chance(0.2) || Without("queue-bounds")) return;
  queue_ = std::make_unique<QueueBounds>(options);
  queue_oracle_ = std::make_unique<QueueOracle>(options, &coverage_.queue);
  if (random_.Chance(0.5)) step_milliseconds_ *= 100;  // the rate of admissions is one of some seconds
}

// Takes out what is omitted, after all has been drawn: the rest of the world stays as it is.
void Simulator::Simplify() {
  if (Without("tenants")) options_.tenants = {{.name = "*"}};
  if (Without("tenant-limits")) {
    for (TenantOptions& tenant : options_.tenants) tenant.max_running = 0;
  }
  if (Without("flood")) flood_ = 0;
  if (Without("ageing")) options_.priority_ageing = {};
  if (Without("ceiling") || Without("step-cost")) options_.max_itl = {};
  if (Without("step-cost")) options_.step_cost = {};
  if (Without("learning")) options_.learn_step_cost = false;
  if (Without("prefix-cache")) options_.prefix_cache = false;
  for (const auto& [part, rate] : {std::pair("pauses", &pause_rate_),
                                   {"cancels", &cancel_rate_},
                                   {"stops", &stop_rate_},
                                   {"nan", &nan_rate_},
                                   {"aborts", &abort_rate_},
                                   {"resets", &reset_rate_},
                                   {"lockstep", &lockstep_rate_}}) {
    if (Without(part)) *rate = 0;
  }
}

std::shared_ptr<Request> Simulator::MakeRequest(RequestKey key, bool in_flood) {
  const int32_t most = scheduler_->max_servable_tokens() - 1;
  auto request = std::make_shared<Request>();
  request->id = StrCat(key);
  const int32_t length = random_.Between(1, !in_flood && random_.Chance(0.5) ? most : std::min(most, 20));
  // A few families of prefixes, so that requests share some of their blocks.
  request->prompt = RandomTokens({Mix(seed_, static_cast<uint64_t>(random_.Below(3)))}, length, model_.vocab);
  if (random_.Chance(0.7)) {
    const int32_t own = random_.Below(length);
    for (int32_t i = own; i < length; ++i) request->prompt[static_cast<size_t>(i)] = random_.Below(model_.vocab);
  }
  if (random_.Chance(0.25)) request->num_sequences = random_.Between(2, 5);
  request->sampling.seed = random_.Next();
  if (random_.Chance(0.2)) request->sampling.presence_penalty = 1;
  if (random_.Chance(0.15)) request->sampling.prompt_top_logprobs = random_.Below(2);
  request->stop.max_new_tokens = random_.Between(1, 40);
  request->stop.min_new_tokens = random_.Chance(0.3) ? random_.Between(0, 6) : 0;
  request->stop.ignore_eos = random_.Chance(0.4);
  if (random_.Chance(0.2)) request->stop.token_ids = {random_.Below(model_.vocab), random_.Below(3)};
  if (random_.Chance(0.3)) request->priority = random_.Between(-1, 2);
  // Two that have accounts of their own where there are any, and two that have not.
  if (random_.Chance(tenant_rate_)) request->tenant = std::string(1, "aabbcd"[random_.Below(6)]);
  if (in_flood) request->tenant = "a";
  if (random_.Chance(salt_rate_)) request->cache_salt = random_.Chance(0.5) ? "salt" : "pepper";
  request->bypass_prefix_cache = random_.Chance(0.1);
  if (Without("siblings")) request->num_sequences = 1;
  if (Without("penalties")) request->sampling.presence_penalty = 0;
  if (Without("scores")) request->sampling.prompt_top_logprobs = -1;
  if (Without("stop-ids")) request->stop.token_ids.clear();
  if (Without("priorities")) request->priority = 0;
  if (Without("salts")) request->cache_salt.clear();
  return request;
}

// Deadlines are any, or about what the prompt takes on an idle machine: some tight, some hopeless.
void Simulator::SetTimes(Request* request) {
  StepWork prompt;
  prompt.Add(0, static_cast<int64_t>(request->prompt.size()));
  const Duration alone = StepTime(options_.step_cost, prompt);
  auto soon = [&] { return request->arrival + milliseconds(step_milliseconds_ * random_.Below(80)); };
  if (random_.Chance(deadline_rate_)) request->queue_deadline = soon();
  if (random_.Chance(deadline_rate_)) {
    request->deadline = random_.Chance(0.5) ? soon() : request->arrival + alone * random_.Between(5, 40) / 10;
  }
  if (random_.Chance(deadline_rate_)) request->time_limit = soon();
  if (random_.Chance(target_rate_)) request->ttft_target = milliseconds(step_milliseconds_ * random_.Between(1, 60));
  if (Without("deadlines")) request->queue_deadline = request->deadline = request->time_limit = kNever;
  if (Without("targets")) request->ttft_target = {};
}

void Simulator::MakeWorkload() {
  const int32_t count = random_.Chance(0.1) ? random_.Between(20, 40) : random_.Between(1, 16);
  const int32_t spread = random_.Chance(0.4) ? 1 : random_.Between(1, 120);
  for (int32_t i = 0; i < count; ++i) {
    AddToWorkload(static_cast<RequestKey>(i + 1), random_.Below(spread), /*in_flood=*/false);
  }
  // All at once, and of one tenant.
  const int32_t begin = random_.Below(spread);
  for (int32_t i = count; i < std::min(count + flood_, kMostRequests); ++i) {
    AddToWorkload(static_cast<RequestKey>(i + 1), begin, /*in_flood=*/true);
  }
  std::erase_if(requests_, [&](const auto& each) { return requests_.size() > 1 && Without(StrCat(each.first)); });
  coverage_.requests += requests_.size();
}

void Simulator::AddToWorkload(RequestKey key, int32_t arrival_step, bool in_flood) {
  std::shared_ptr<Request> request = MakeRequest(key, in_flood);
  SimRequest sim;
  sim.arrival_step = arrival_step;
  request->arrival = now_ + milliseconds(step_milliseconds_ * arrival_step);
  SetTimes(request.get());
  sim.request = request;
  sim.account = TenantOf(options_.tenants, request->tenant);
  const int32_t limit = std::min(static_cast<int32_t>(request->prompt.size()) + request->stop.max_new_tokens,
                                 scheduler_->max_servable_tokens());
  for (int32_t s = 0; s < request->num_sequences; ++s) {
    sim.sequences.push_back({SequenceOracle(model_, *request, static_cast<uint32_t>(s), limit)});
  }
  const uint64_t root = FakeModel::Root(*request);
  sim.score_attention = FakeModel::Attend(root, FakeModel::Value(request->prompt[0], 0, root));
  requests_.emplace(key, std::move(sim));
}

// --- The engine's loop -----------------------------------------------------------------------------------------------

std::string Simulator::Run() {
  AnnounceSeedOnAbort(seed_);
  MakeOptions();
  if (seed_ % 4 == 0) {
    recorder_ = std::make_unique<FlightRecorder>(options_, /*bytes=*/1 << 20, /*between=*/1 << 10);
    options_.recorder = recorder_.get();
  }
  auto scheduler = Scheduler::Create(options_);
  if (!scheduler.ok()) return scheduler.status().ToString();
  scheduler_ = std::move(*scheduler);
  executor_ = std::make_unique<FakeExecutor>(model_, options_, scheduler_->max_servable_tokens());
  plan_check_.emplace(options_, model_.vocab);
  policies_ = std::make_unique<PolicyOracle>(options_, scheduler_->max_servable_tokens(), &coverage_.policies);
  MakeWorkload();
  Trace(requests_.size(), " requests, ", options_.num_blocks, " blocks of ", options_.block_size, ", ",
        options_.max_running, " slots, budget ", options_.token_budget, ", context ", scheduler_->max_servable_tokens(),
        ", prefix cache ", options_.prefix_cache, ", tenants ", options_.tenants.size(), ", ageing ",
        options_.priority_ageing.count(), " ns, ceiling ", options_.max_itl.count(), " ns, default target ",
        options_.default_ttft_target.count(), " ns, learning ", options_.learn_step_cost);
  Loop();
  if (error_.empty() && recorder_ != nullptr) JudgeRecord();
  if (error_.empty()) JudgeRest();
  std::signal(SIGABRT, SIG_DFL);
  return error_;
}

void Simulator::Loop() {
  std::optional<Running> running;
  while (error_.empty()) {
    ++ticks_;
    now_ += milliseconds(step_milliseconds_) * (random_.Chance(pause_rate_) ? 10 : 1);
    Inject();
    std::shared_ptr<const StepPlan> next;
    const bool lockstep = running && random_.Chance(lockstep_rate_);
    if (!lockstep) {
      next = Plan(running ? running->plan.get() : nullptr);
      if (!error_.empty()) return;
    }
    if (!running) {
      if (next) {
        running = Launch(std::move(next));
      } else if (!scheduler_->idle()) {
        Fail("requests are live, nothing is under way, and nothing was planned");
      } else if (std::ranges::all_of(requests_, [](const auto& r) { return r.second.added; })) {
        return;
      }
      continue;
    }
    std::optional<Running> launched;
    if (next) launched = Launch(std::move(next));
    if (random_.Chance(0.5)) Inject();
    if (random_.Chance(abort_rate_)) {
      AbortAll();
      running.reset();
      continue;
    }
    Apply(std::move(*running));
    running = std::move(launched);
  }
}

// What other threads do at any time: requests, cancels, stops.
void Simulator::Inject() {
  for (auto& [key, request] : requests_) {
    if (request.added || request.arrival_step > ticks_) continue;
    request.added = true;
    if (!Enter(key, request)) {
      request.ended = true;
      continue;
    }
    scheduler_->Add(key, request.request);
    policies_->Add(key, *request.request);
    Trace("add ", key, ": prompt ", request.request->prompt.size(), ", new ", request.request->stop.max_new_tokens,
          ", n ", request.request->num_sequences, ", priority ", request.request->priority, ", tenant ",
          request.account);
  }
  if (random_.Chance(cancel_rate_)) CancelOne();
  if (random_.Chance(stop_rate_)) {
    auto it = requests_.begin();
    std::advance(it, random_.Below(static_cast<int32_t>(requests_.size())));
    const auto index = static_cast<uint32_t>(random_.Below(6));
    scheduler_->StopSequence(it->first, index);
    Trace("stop ", it->first, " sequence ", index);
    SimRequest& request = it->second;
    if (request.added && index < request.sequences.size()) request.sequences[index].stop_requested = true;
  }
  if (random_.Chance(reset_rate_)) {
    scheduler_->ResetPrefixCache();
    policies_->ResetPrefixCache();
  }
}

// Whether the queue takes it.
bool Simulator::Enter(RequestKey key, const SimRequest& request) {
  if (queue_ == nullptr) return true;
  const auto tokens = static_cast<int64_t>(request.request->prompt.size());
  const Status said = queue_->Enter(request.account, tokens, now_);
  Fail(queue_oracle_->JudgeEntry(request.account, tokens, said, now_));
  if (!said.ok()) Trace("no room for ", key, ": ", said.ToString());
  return said.ok();
}

void Simulator::LeaveQueue(const SimRequest& request, bool admitted) {
  if (queue_ == nullptr) return;
  const auto tokens = static_cast<int64_t>(request.request->prompt.size());
  queue_->Leave(request.account, tokens, admitted, now_);
  queue_oracle_->Leave(request.account, tokens, admitted, now_);
}

void Simulator::CancelOne() {
  auto it = requests_.begin();
  std::advance(it, random_.Below(static_cast<int32_t>(requests_.size())));
  SimRequest& request = it->second;
  const Code code = random_.Chance(0.5) ? Code::kCancelled : Code::kUnavailable;
  scheduler_->Cancel(it->first, Status(code, "cancelled by the simulator"));
  Trace("cancel ", it->first);
  if (request.added && !request.ended && !request.cancel) request.cancel = code;
}

std::shared_ptr<const StepPlan> Simulator::Plan(const StepPlan* running) {
  events_.clear();
  std::shared_ptr<const StepPlan> plan = scheduler_->Plan(now_, &events_);
  scheduler_->CheckInvariants();
  JudgeEvents(/*after_plan=*/true);
  if (plan != nullptr) Fail(executor_->Judge(*plan, running));
  if (plan != nullptr) Fail(plan_check_->Check(*plan));
  if (error_.empty()) Fail(policies_->JudgePlan(plan.get(), now_, events_, scheduler_->load()));
  if (plan == nullptr) return plan;
  ++plans_without_progress_;
  Count(*plan);
  if (trace_) {
    for (const PlannedSequence& s : plan->sequences) {
      Trace("plan ", plan->step, ": request ", s.request, ".", s.sequence, " slot ", s.slot, " [", s.first_position,
            ", ", s.first_position + s.num_tokens, ")", s.input_from_slot ? " from slot" : "",
            s.sample ? " sample" : "");
    }
  }
  return plan;
}

void Simulator::Count(const StepPlan& plan) {
  ++coverage_.steps;
  for (const PlannedSequence& planned : plan.sequences) {
    coverage_.from_slot += planned.input_from_slot;
    coverage_.chunked += !planned.sample;
    coverage_.prompt_scores += static_cast<uint64_t>(planned.num_prompt_scores);
    coverage_.siblings += planned.sequence > 0;
  }
}

Simulator::Running Simulator::Launch(std::shared_ptr<const StepPlan> plan) {
  Running running;
  for (size_t i = 0; i < plan->sequences.size(); ++i) {
    const PlannedSequence& planned = plan->sequences[i];
    if ((planned.sample || planned.num_prompt_scores > 0) && random_.Chance(nan_rate_)) running.nan.push_back(i);
  }
  running.result = executor_->Execute(*plan, running.nan);
  running.result.device_time =
      true_cost_ ? StepTime(*true_cost_, WorkOf(*plan)) : std::chrono::microseconds(Mix(seed_, plan->step) % 20'000);
  if (!executor_->error().empty()) Fail(executor_->error());
  running.plan = std::move(plan);
  return running;
}

void Simulator::Apply(Running running) {
  for (size_t i : running.nan) {
    const PlannedSequence& planned = running.plan->sequences[i];
    SimRequest& request = requests_.at(planned.request);
    const SimSequence& sequence = request.sequences[planned.sequence];
    request.nan = true;
    if (!request.ended && !request.cancel && !sequence.finished && !sequence.stop_requested) request.must_fail = true;
    Trace("NaN for ", planned.request, ".", planned.sequence);
  }
  for (const PlannedSequence& planned : running.plan->sequences) {
    coverage_.dropped_results += requests_.at(planned.request).sequences[planned.sequence].finished;
  }
  events_.clear();
  scheduler_->Apply(*running.plan, running.result, now_, &events_);
  scheduler_->CheckInvariants();
  JudgeEvents(/*after_plan=*/false);
  if (error_.empty()) Fail(policies_->JudgeApply(*running.plan, events_, scheduler_->load()));
}

void Simulator::AbortAll() {
  Trace("abort");
  ++coverage_.aborts;
  for (auto& [key, request] : requests_) {
    if (request.added && !request.ended) request.cancel = Code::kInternal;
  }
  events_.clear();
  policies_->Abort();
  scheduler_->Abort(Status(Code::kInternal, "aborted by the simulator"), now_, &events_);
  scheduler_->CheckInvariants();
  JudgeEvents(/*after_plan=*/false);
  const SchedulerLoad load = scheduler_->load();
  if (!scheduler_->idle() || load.blocks_used != 0 || load.blocks_cached != 0) Fail("something is left after Abort");
}

// --- Judging what came out -------------------------------------------------------------------------------------------

void Simulator::JudgeEvents(bool after_plan) {
  for (const Event& event : events_) JudgeEvent(event);
  JudgePromises(after_plan);
  if (after_plan) JudgeProgress();
}

void Simulator::JudgeEvent(const Event& event) {
  auto it = requests_.find(event.request);
  if (it == requests_.end() || !it->second.added) return Fail("an event of an unknown request");
  SimRequest& request = it->second;
  if (request.ended) return Fail(StrCat("request ", event.request, " has ended and still gets events"));
  if (event.sequence >= request.sequences.size()) return Fail("an event of an unknown sequence");
  switch (event.kind) {
    case Event::Kind::kAdmitted: {
      const auto cached = static_cast<int32_t>(event.cached_tokens);
      if (request.admitted) Fail(StrCat("request ", event.request, " is admitted twice"));
      request.admitted = true;
      LeaveQueue(request, /*admitted=*/true);
      request.cached_tokens = event.cached_tokens;
      coverage_.cached_tokens += event.cached_tokens;
      JudgeOrder(event.request, request);
      if (cached >= static_cast<int32_t>(request.request->prompt.size()) || cached % options_.block_size != 0) {
        Fail(StrCat("request ", event.request, " claims ", cached, " cached tokens"));
      }
      const bool no_reads = !options_.prefix_cache || request.request->bypass_prefix_cache ||
                            request.request->sampling.prompt_top_logprobs >= 0;
      if (no_reads && cached > 0) Fail(StrCat("request ", event.request, " must not read the prefix cache"));
      break;
    }
    case Event::Kind::kPromptScores:
      return JudgeScores(event, request);
    case Event::Kind::kToken:
      return JudgeToken(event, request);
    case Event::Kind::kFinished:
      return JudgeFinished(event, request);
    case Event::Kind::kEnded:
      return JudgeEnd(event, request);
  }
}

// Nobody is overtaken by who came later than its own latest start, nor, without targets, by who came later at all.
void Simulator::JudgeOrder(RequestKey key, const SimRequest& admitted) {
  const Request& first = *admitted.request;
  auto named = [](const Request& r) { return r.ttft_target > Duration(0) || r.deadline != kNever; };
  for (const auto& [other, waiting] : requests_) {
    if (!waiting.added || waiting.admitted || waiting.ended || waiting.account != admitted.account) continue;
    const Request& second = *waiting.request;
    Duration ahead{};  // by priority
    if (options_.priority_ageing > Duration(0)) {
      ahead = (first.priority - second.priority) * options_.priority_ageing;
    } else if (first.priority != second.priority) {
      if (first.priority < second.priority)
        Fail(StrCat(key, " is admitted before ", other, ", whose priority is higher"));
      continue;
    }
    const bool both_plain = !named(first) && !named(second);
    const TimePoint start_by = second.arrival + second.ttft_target + options_.default_ttft_target;
    coverage_.overtaken += first.arrival > second.arrival + ahead;
    if (first.arrival - ahead > (both_plain ? second.arrival : start_by)) {
      Fail(StrCat("request ", key, " overtakes ", other, ", which came too long before it"));
    }
  }
}

void Simulator::JudgeToken(const Event& event, SimRequest& request) {
  plans_without_progress_ = 0;
  if (request.tokens == 0) JudgeTarget(request);
  ++coverage_.tokens;
  ++request.tokens;
  SimSequence& sequence = request.sequences[event.sequence];
  auto who = [&] { return StrCat("request ", event.request, " sequence ", event.sequence); };
  if (trace_) Trace("token ", event.score.token, " for ", who());
  if (!request.admitted || sequence.finished)
    return Fail(StrCat(who(), " gets a token before admission or after its end"));
  const SequenceOracle::Step expected = sequence.oracle.Next();
  if (event.score.token != expected.token) {
    return Fail(StrCat(who(), ": token ", event.score.token, ", alone it would have been ", expected.token));
  }
  if (event.finish != expected.finish) return Fail(StrCat(who(), ": wrong finish reason"));
  const bool named = expected.finish == FinishReason::kEos || expected.finish == FinishReason::kStop;
  if (event.stop_token != (named ? expected.token : -1)) return Fail(StrCat(who(), ": wrong stop token"));
  const auto wanted = static_cast<int32_t>(request.request->prompt.size()) - 1;
  if (request.request->sampling.prompt_top_logprobs >= 0 && request.scores != wanted) {
    return Fail(StrCat(who(), ": a token before all prompt scores"));
  }
  sequence.finished = expected.finish != FinishReason::kNone;
  JudgeLateness(&sequence);
}

void Simulator::JudgeScores(const Event& event, SimRequest& request) {
  plans_without_progress_ = 0;
  const std::vector<TokenId>& prompt = request.request->prompt;
  if (!request.admitted || request.request->sampling.prompt_top_logprobs < 0) return Fail("prompt scores unasked");
  for (const TokenScore& score : event.prompt_scores) {
    const int32_t position = ++request.scores;
    if (position >= static_cast<int32_t>(prompt.size())) return Fail("more prompt scores than tokens");
    const TokenId token = prompt[static_cast<size_t>(position)];
    if (score.token != token || score.logprob != FakeModel::Score(request.score_attention, token)) {
      return Fail(StrCat("request ", event.request, ": wrong prompt score at ", position));
    }
    request.score_attention =
        FakeModel::Attend(request.score_attention, FakeModel::Value(token, position, request.score_attention));
  }
}

void Simulator::JudgeFinished(const Event& event, SimRequest& request) {
  SimSequence& sequence = request.sequences[event.sequence];
  if (sequence.finished) return Fail(StrCat("request ", event.request, " finishes a sequence twice"));
  sequence.finished = true;
  bool justified = false;
  switch (event.finish) {
    case FinishReason::kStop:
      justified = sequence.stop_requested, ++coverage_.stopped;
      break;
    case FinishReason::kTimeLimit:
      justified = now_ >= request.request->time_limit && request.request->time_limit <= request.request->deadline;
      ++coverage_.time_limits;
      break;
    case FinishReason::kCancelled:
      justified = request.cancel.has_value();
      break;
    default:
      break;
  }
  if (!justified) Fail(StrCat("request ", event.request, " finishes for no reason"));
}

void Simulator::JudgeEnd(const Event& event, SimRequest& request) {
  plans_without_progress_ = 0;
  request.ended = true;
  if (!request.admitted) LeaveQueue(request, /*admitted=*/false);
  coverage_.preemptions += event.timing.preemptions;
  const Request& r = *request.request;
  const Status& status = event.status;
  Trace("end of ", event.request, ": ", status.ToString());
  bool justified = false;
  if (status.ok()) {
    justified = std::ranges::all_of(request.sequences, &SimSequence::finished);
  } else if (status.reason() == "QUEUE_TIMEOUT") {
    const bool first = r.queue_deadline < std::min(r.deadline, r.time_limit);
    justified = !request.admitted && now_ >= r.queue_deadline && first && ++coverage_.queue_timeouts;
  } else if (status.reason() == "HOPELESS") {
    justified = !request.admitted && now_ < r.deadline;
  } else if (status.reason() == "DEADLINE") {
    const bool first = r.deadline < r.time_limit || !request.admitted;  // else hopeless before it
    justified = now_ >= r.deadline && first && ++coverage_.deadlines;
  } else if (status.reason() == "NON_FINITE_LOGITS") {
    justified = request.nan && status.code() == Code::kInternal && ++coverage_.non_finite;
  } else if (request.cancel) {
    justified = status.code() == *request.cancel && ++coverage_.cancelled;
  }
  if (!justified) Fail(StrCat("request ", event.request, " ends for no reason: ", status.ToString()));
  if (event.timing.total != now_ - r.arrival) Fail("wrong total time");
  if (request.tokens == 0 && now_ - r.arrival > r.ttft_target) JudgeTarget(request);
}

void Simulator::JudgeTarget(const SimRequest& request) {
  const Request& r = *request.request;
  if (r.ttft_target > Duration(0)) ++(now_ - r.arrival <= r.ttft_target ? targets_met_ : targets_missed_);
}

// By the clock, whatever the step was predicted to take.
void Simulator::JudgeLateness(SimSequence* sequence) {
  const std::optional<TimePoint> before = std::exchange(sequence->last_token_at, now_);
  if (!before || options_.max_itl == Duration(0) || now_ - *before <= options_.max_itl) return;
  const Duration late = now_ - *before - options_.max_itl;
  ++late_tokens_;
  late_total_ += late;
  late_most_ = std::max(late_most_, late);
}

// What must have happened by now.
void Simulator::JudgePromises(bool after_plan) {
  for (auto& [key, request] : requests_) {
    if (!request.added || request.ended) continue;
    if (request.must_fail) Fail(StrCat("request ", key, " goes on after NaN"));
    if (request.cancel) Fail(StrCat("request ", key, " goes on after it was cancelled"));
    for (const SimSequence& sequence : request.sequences) {
      if (sequence.stop_requested && !sequence.finished) Fail(StrCat("request ", key, " goes on after a stop"));
    }
    if (!after_plan) continue;
    const Request& r = *request.request;
    if (now_ >= r.deadline || now_ >= r.time_limit) Fail(StrCat("request ", key, " outlives its deadline"));
    if (!request.admitted && now_ >= r.queue_deadline)
      Fail(StrCat("request ", key, " waits beyond its queue deadline"));
  }
}

// Whatever is in the pool can be computed this often without one token coming out; more is thrashing.
void Simulator::JudgeProgress() {
  const int32_t tokens = options_.num_blocks * options_.block_size;
  if (plans_without_progress_ > 64 + 4 * tokens / options_.token_budget) Fail("many steps, and not one token");
}

namespace {

// From the checkpoint at that place on, as a ring does that is too short for the world.
FlightRecord EndOf(const FlightRecord& record, size_t checkpoint) {
  FlightRecord end = record;
  end.dropped_frames = checkpoint;
  end.frames.erase(end.frames.begin(), end.frames.begin() + static_cast<ptrdiff_t>(checkpoint));
  return end;
}

}  // namespace

// Whoever replays the record decides as the scheduler did, without having seen a token. So does who begins at some
// checkpoint, and at any with a head that is not tried yet: that it is forgotten shows within a few steps or never.
void Simulator::JudgeRecord() {
  const auto record = ParseFlightRecord(recorder_->Write(now_, 0));
  if (!record.ok()) return Fail(StrCat("the flight record ", record.status().message()));
  JudgeNotes(*record);
  if (seed_ % 8 != 0) return JudgeReplay(*record);
  std::vector<size_t> checkpoints, blocked;
  for (size_t i = 0; i < record->frames.size(); ++i) {
    const auto* checkpoint = std::get_if<FlightCheckpoint>(&record->frames[i]);
    if (checkpoint == nullptr) continue;
    checkpoints.push_back(i);
    if (checkpoint->blocked) blocked.push_back(i);
  }
  if (checkpoints.empty()) return JudgeReplay(*record);
  JudgeReplay(EndOf(*record, checkpoints[seed_ / 8 % checkpoints.size()]));
  for (size_t checkpoint : blocked) JudgeReplay(EndOf(*record, checkpoint));
}

void Simulator::JudgeReplay(const FlightRecord& record) {
  const auto replay = ReplayFlightRecord(record);
  if (!replay.ok()) return Fail(StrCat("the flight record cannot be replayed: ", replay.status().message()));
  coverage_.restored += replay->from.has_value();
  if (!replay->difference.empty()) return Fail(StrCat("the replay parts: ", replay->difference));
  coverage_.replayed += replay->steps;
}

// What is said of each plan: who is next and why it waits.
void Simulator::JudgeNotes(const FlightRecord& record) {
  if (record.dropped_frames > 0) return Fail("the world is too long for its flight record");
  size_t plans = 0;
  for (const FlightFrame& frame : record.frames) {
    const auto* plan = std::get_if<FlightPlan>(&frame);
    if (plan == nullptr) continue;
    if (plans == policies_->notes().size()) return Fail("a plan was recorded that nobody made");
    const PlanNotes& said = plan->notes;
    const PlanNotes& true_ones = policies_->notes()[plans++];
    if (said == true_ones) continue;
    auto describe = [](const PlanNotes& notes) {
      return StrCat(notes.waiting, " wait, ", notes.head, ".", notes.head_sequence, " first: ", WhyWaits(notes.why),
                    "; ", notes.blocks_held, " blocks held, ", notes.blocks_cached, " cached");
    };
    return Fail(StrCat("plan ", plans, " of step ", plan->step, " says that ", describe(said), "; true is that ",
                       describe(true_ones)));
  }
  if (plans != policies_->notes().size()) Fail("a plan was not recorded");
}

// Of all requests and of each tenant's.
void Simulator::JudgeTotals(const SchedulerLoad& load) {
  uint64_t prompts = 0, cached = 0, generated = 0;
  std::vector<TenantLoad> tenants(options_.tenants.size());
  for (const auto& [key, request] : requests_) {
    const uint64_t prompt = request.admitted ? request.request->prompt.size() : 0;
    prompts += prompt;
    cached += request.cached_tokens;
    generated += request.tokens;
    tenants[request.account].prompt_tokens += prompt;
    tenants[request.account].generated_tokens += request.tokens;
  }
  if (load.prompt_tokens != prompts || load.cached_tokens != cached) Fail("prompt or cached tokens are miscounted");
  if (load.generated_tokens != generated) Fail("generated tokens are miscounted");
  if (load.tenants != tenants) Fail("a tenant's requests or tokens are miscounted");
}

void Simulator::JudgeRest() {
  for (const auto& [key, request] : requests_) {
    if (!request.ended) Fail(StrCat("request ", key, " never ended"));
  }
  SchedulerLoad load = scheduler_->load();
  if (load.blocks_used != 0) Fail(StrCat(load.blocks_used, " blocks are still held"));
  if (load.running_requests != 0 || load.waiting_requests != 0 || load.waiting_tokens != 0) Fail("load is not zero");
  JudgeTotals(load);
  if (load.targets_met != targets_met_ || load.targets_missed != targets_missed_) Fail("targets are miscounted");
  if (load.late_tokens != late_tokens_ || load.late_total != late_total_ || load.late_most != late_most_) {
    Fail("late tokens are miscounted");
  }
  coverage_.late_tokens += late_tokens_;
  coverage_.targets_met += targets_met_;
  coverage_.targets_missed += targets_missed_;
  if (scheduler_->next_deadline() != kNever) Fail("a deadline is left");
  if (scheduler_->ResetPrefixCache() != load.blocks_cached) Fail("cached blocks are miscounted");
  scheduler_->CheckInvariants();
}

}  // namespace altiplano::sim
