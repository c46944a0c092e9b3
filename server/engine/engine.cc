#include "server/engine/engine.h"

#include <algorithm>
#include <condition_variable>
#include <future>
#include <mutex>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#include "server/base/check.h"
#include "server/base/crash.h"
#include "server/base/log.h"
#include "server/base/strings.h"
#include "server/scheduler/flight_recorder.h"
#include "server/scheduler/queue_bounds.h"
#include "server/scheduler/rate_meter.h"

namespace altiplano {

namespace {

constexpr Duration kMaxNap = std::chrono::milliseconds(100);
// A step that takes so many times as long as it was predicted to is overdue. Predictions are some ten per cent off, and
// more for steps of a kind that was not seen before.
constexpr int kPatienceFactor = 3;

Status Unavailable(std::string reason, std::string message) {
  ErrorDetail detail;
  detail.reason = std::move(reason);
  detail.retry_after = std::chrono::seconds(1);
  return Status(Code::kUnavailable, std::move(message), std::move(detail));
}

}  // namespace

class Engine::Impl final : private ExecutorObserver {
 public:
  Impl(EngineOptions options, std::unique_ptr<FlightRecorder> recorder, std::unique_ptr<Scheduler> scheduler,
       std::unique_ptr<Executor> executor, std::function<void()> on_step)
      : options_(std::move(options)),
        replica_(options_.replica.value_or(0)),
        recorder_(std::move(recorder)),
        clock_(*options_.clock),
        on_step_(std::move(on_step)),
        max_servable_tokens_(scheduler->max_servable_tokens()),
        tenants_(std::make_shared<const std::vector<TenantOptions>>(options_.scheduler.tenants)),
        scheduler_(std::move(scheduler)),
        executor_(std::move(executor)),
        queue_({.max_requests = options_.max_queued_requests,
                .max_tokens = options_.max_queued_tokens,
                .tenants = *tenants_}) {
    load_.tenants = tenants_;
    load_.scheduler = scheduler_->load();
    load_.block_size = options_.scheduler.block_size;
    thread_ = std::thread([this] { Loop(); });
  }

  ~Impl() override {
    {
      std::lock_guard lock(mutex_);
      stop_ = true;
    }
    wake_.notify_one();
    thread_.join();
    executor_.reset();  // while what it may still call is there
  }

  // --- Any thread --------------------------------------------------------------------------------------------------

  StatusOr<RequestKey> Submit(std::shared_ptr<const Request> request, std::shared_ptr<RequestSink> sink) {
    RETURN_IF_ERROR(CheckFits(*request));
    auto prompt_tokens = static_cast<int64_t>(request->prompt.size());
    const size_t tenant = TenantOf(*tenants_, request->tenant);
    RequestKey key;
    {
      std::lock_guard lock(mutex_);
      if (stop_) return Unavailable("ENGINE_DOWN", "the engine has stopped");
      if (down_) return Unavailable("ENGINE_DOWN", "the engine has failed");
      if (draining_) return Unavailable("DRAINING", "the server is draining");
      RETURN_IF_ERROR(queue_.Enter(tenant, prompt_tokens, clock_.Now()));
      key = ++last_key_;
      inbox_.arrivals.push_back({key, std::move(request), std::move(sink)});
    }
    wake_.notify_one();
    return key;
  }

  void Cancel(RequestKey key, Status why) {
    {
      std::lock_guard lock(mutex_);
      inbox_.cancels.emplace_back(key, std::move(why));
    }
    wake_.notify_one();
  }

  void StopSequence(RequestKey key, uint32_t sequence) {
    {
      std::lock_guard lock(mutex_);
      inbox_.stops.emplace_back(key, sequence);
    }
    wake_.notify_one();
  }

  void CancelAll(Status why) {
    {
      std::lock_guard lock(mutex_);
      inbox_.cancel_all = std::move(why);
    }
    wake_.notify_one();
  }

  void SetDraining(bool draining) {
    std::lock_guard lock(mutex_);
    draining_ = draining;
  }

  bool healthy() const {
    if (down_.load(std::memory_order_acquire) || silent_.load(std::memory_order_acquire)) return false;
    const Duration::rep started = step_started_.load(std::memory_order_acquire);
    if (started == 0) return true;
    const Duration since(std::max(started, step_got_on_.load(std::memory_order_acquire)));
    return clock_.Now().time_since_epoch() - since < Duration(step_patience_.load(std::memory_order_acquire));
  }

  uint64_t failures() const { return failures_.load(std::memory_order_acquire); }
  bool failed_for_good() const { return dead_.load(std::memory_order_acquire); }

  EngineLoad load() const {
    std::scoped_lock lock(load_mutex_, mutex_);
    EngineLoad load = load_;
    TimePoint now = clock_.Now();
    load.draining = draining_;
    load.refused = queue_.refused();
    load.healthy = healthy();
    load.tokens_per_second = tokens_.PerSecond(now);
    if (last_step_end_ != TimePoint{}) load.last_step_age = now - last_step_end_;
    // What the engine thread has not seen yet waits too.
    load.scheduler.waiting_requests += static_cast<int32_t>(inbox_.arrivals.size());
    for (const Arrival& arrival : inbox_.arrivals) {
      const auto tokens = static_cast<int64_t>(arrival.request->prompt.size());
      load.scheduler.waiting_tokens += tokens;
      TenantLoad& tenant = load.scheduler.tenants[TenantOf(*tenants_, arrival.request->tenant)];
      ++tenant.waiting_requests;
      tenant.waiting_tokens += tokens;
    }
    return load;
  }

  int32_t ResetPrefixCache() {
    std::future<int32_t> answer;
    {
      std::lock_guard lock(mutex_);
      if (stop_ || down_) return 0;  // a restart begins with an empty cache
      inbox_.cache_resets.emplace_back();
      answer = inbox_.cache_resets.back().get_future();
    }
    wake_.notify_one();
    return answer.get();
  }

  StatusOr<std::string> FlightRecord() const {
    if (recorder_ == nullptr)
      return Status(Code::kFailedPrecondition, "no flight record is kept here: --flight-record-memory is 0");
    return recorder_->Write(clock_.Now(), std::chrono::system_clock::now().time_since_epoch() / Duration(1));
  }

  int32_t max_servable_tokens() const { return max_servable_tokens_; }

 private:
  struct Arrival {
    RequestKey key;
    std::shared_ptr<const Request> request;
    std::shared_ptr<RequestSink> sink;
  };
  struct Inbox {
    std::vector<Arrival> arrivals;
    std::vector<std::pair<RequestKey, Status>> cancels;
    std::vector<std::pair<RequestKey, uint32_t>> stops;
    std::vector<std::promise<int32_t>> cache_resets;
    Status cancel_all;  // not OK: end everything
    Status lost;        // not OK: the executor failed while no step ran

    bool empty() const {
      return arrivals.empty() && cancels.empty() && stops.empty() && cache_resets.empty() && cancel_all.ok() &&
             lost.ok();
    }
  };
  struct Live {
    std::shared_ptr<RequestSink> sink;
    size_t tenant = 0;
    int64_t queued_tokens = 0;  // counted in queue_ until admission
    bool queued = true;
  };

  struct LeftQueue {
    size_t tenant;
    int64_t tokens;
    bool admitted;
  };

  Status CheckFits(const Request& request) const {
    CHECK(!request.prompt.empty());
    auto prompt_tokens = static_cast<int64_t>(request.prompt.size());
    ErrorDetail detail;
    detail.reason = "REQUEST_TOO_LARGE_FOR_SERVER";
    if (prompt_tokens + 1 > max_servable_tokens_) {
      detail.metadata = {{"limit", StrCat(max_servable_tokens_)}, {"actual", StrCat(prompt_tokens + 1)}};
      return Status(Code::kFailedPrecondition,
                    StrCat("the prompt's ", prompt_tokens, " tokens and one more do not fit this server's KV cache of ",
                           max_servable_tokens_, " tokens for one sequence"),
                    std::move(detail));
    }
    if (request.num_sequences > options_.scheduler.max_running) {
      detail.metadata = {{"limit", StrCat(options_.scheduler.max_running)}, {"actual", StrCat(request.num_sequences)}};
      return Status(Code::kFailedPrecondition,
                    StrCat(request.num_sequences, " sequences were asked for, this server runs ",
                           options_.scheduler.max_running, " at once"),
                    std::move(detail));
    }
    return OkStatus();
  }

  // --- Engine thread -----------------------------------------------------------------------------------------------

  void Loop() {
    const crash::SignalStack signal_stack;
    // The oldest step launched and not yet waited for; while it runs, the one after it is planned and launched behind
    // it.
    std::shared_ptr<const StepPlan> running;
    bool idle = true;  // nothing runs and nothing could be planned
    executor_->Watch(this);
    for (;;) {
      if (!TakeInbox(/*may_sleep=*/idle)) break;
      if (running == nullptr && !lost_.ok()) {
        Fail(lost_);
        if (!Restart()) break;
        idle = true;
        continue;
      }
      std::shared_ptr<const StepPlan> next = scheduler_->Plan(clock_.Now(), &events_);
      Deliver();
      idle = running == nullptr && next == nullptr;
      if (idle) continue;
      if (next != nullptr) Launch(next);
      if (running == nullptr) {
        running = std::move(next);
        continue;
      }
      StepResult result = executor_->Wait();
      if (!result.status.ok()) {
        Fail(result.status);
        running.reset();
        if (!Restart()) break;
        idle = true;
        continue;
      }
      restarted_ = false;
      SetRunning(next.get());
      // Cancels that came while the step ran take effect now, not a step later.
      if (!TakeInbox(/*may_sleep=*/false)) {
        running = std::move(next);
        break;
      }
      TimePoint now = clock_.Now();
      scheduler_->Apply(*running, result, now, &events_);
      running = std::move(next);
      FinishStep(now);
    }
    Stop(running != nullptr);
  }

  void Launch(std::shared_ptr<const StepPlan> plan) {
    if (step_started_.load(std::memory_order_relaxed) == 0) SetRunning(plan.get());
    executor_->Launch(std::move(plan));
  }

  // The oldest step that has been launched and not ended, from now on; null: there is none.
  void SetRunning(const StepPlan* plan) {
    if (plan == nullptr) return step_started_.store(0, std::memory_order_release);
    const Duration predicted = StepTime(load_.scheduler.step_cost, WorkOf(*plan));
    const Duration patience = std::max(options_.health_deadline, kPatienceFactor * predicted);
    step_patience_.store(patience.count(), std::memory_order_release);
    step_started_.store(Now(), std::memory_order_release);
  }

  // Moves what other threads left into the scheduler. False: stop. may_sleep: no step runs, so wait for something to
  // do.
  bool TakeInbox(bool may_sleep) {
    Inbox inbox;
    {
      std::unique_lock lock(mutex_);
      if (may_sleep) {
        auto ready = [&] { return stop_ || !inbox_.empty(); };
        if (scheduler_->idle()) {
          wake_.wait(lock, ready);
        } else {
          // Live requests that wait for their deadline. The clock may be a fake one: never sleep long.
          Duration left = kMaxNap;
          if (TimePoint until = scheduler_->next_deadline(); until != kNever) {
            left = std::clamp<Duration>(until - clock_.Now(), std::chrono::milliseconds(1), kMaxNap);
          }
          wake_.wait_for(lock, left, ready);
        }
      }
      if (stop_) return false;
      std::swap(inbox, inbox_);
    }
    AddArrivals(&inbox);
    if (!inbox.arrivals.empty()) {
      // A step may take long, or never end: whoever asks meanwhile finds them among those that wait.
      std::lock_guard lock(load_mutex_);
      load_.scheduler = scheduler_->load();
    }
    for (auto& [key, sequence] : inbox.stops) scheduler_->StopSequence(key, sequence);
    for (auto& [key, why] : inbox.cancels) scheduler_->Cancel(key, std::move(why));
    if (!inbox.cancel_all.ok()) {
      for (const auto& [key, live] : live_) scheduler_->Cancel(key, inbox.cancel_all);
    }
    for (std::promise<int32_t>& reset : inbox.cache_resets) reset.set_value(scheduler_->ResetPrefixCache());
    if (!inbox.lost.ok()) lost_ = std::move(inbox.lost);
    return true;
  }

  void AddArrivals(Inbox* inbox) {
    for (Arrival& arrival : inbox->arrivals) {
      auto tokens = static_cast<int64_t>(arrival.request->prompt.size());
      live_.emplace(arrival.key, Live{std::move(arrival.sink), TenantOf(*tenants_, arrival.request->tenant), tokens});
      scheduler_->Add(arrival.key, std::move(arrival.request));
    }
  }

  // Hands events to their owners.
  void Deliver() {
    if (events_.empty()) return;
    Account();
    for (Event& event : events_) {
      auto it = live_.find(event.request);
      bool ended = event.kind == Event::Kind::kEnded;
      it->second.sink->OnEvent(std::move(event));
      if (ended) live_.erase(it);
    }
    events_.clear();
    if (on_step_) on_step_();
  }

  // Before the events are seen: whoever learns that a request was admitted or ended finds its place in the queue free.
  void Account() {
    left_queue_.clear();
    uint64_t generated = 0;
    for (const Event& event : events_) {
      auto it = live_.find(event.request);
      CHECK(it != live_.end());
      Live& live = it->second;
      const bool admitted = event.kind == Event::Kind::kAdmitted;
      if (live.queued && (admitted || event.kind == Event::Kind::kEnded)) {
        live.queued = false;
        left_queue_.push_back({live.tenant, live.queued_tokens, admitted});
      }
      generated += event.kind == Event::Kind::kToken;
    }
    TimePoint now = clock_.Now();
    std::scoped_lock lock(load_mutex_, mutex_);
    for (const LeftQueue& left : left_queue_) queue_.Leave(left.tenant, left.tokens, left.admitted, now);
    tokens_.Add(now, generated);
    load_.scheduler = scheduler_->load();
  }

  void FinishStep(TimePoint now) {
    {
      std::lock_guard lock(load_mutex_);
      last_step_end_ = now;
      load_.scheduler = scheduler_->load();
    }
    Deliver();
#ifndef NDEBUG
    if (scheduler_->idle()) scheduler_->CheckInvariants();
#endif
  }

  // The device failed: everything ends, nothing new is taken, health turns.
  void Fail(const Status& status) {
    log::Error("engine failed", {{"replica", replica_}, {"error", status.ToString()}});
    down_.store(true, std::memory_order_release);
    failures_.fetch_add(1, std::memory_order_release);
    if (options_.on_failure) options_.on_failure(recorder_ == nullptr ? "" : FlightRecord().value());
    const std::string what = options_.replica ? StrCat("replica ", replica_) : "the engine";
    scheduler_->Abort(Unavailable("ENGINE_DOWN", StrCat(what, " failed: ", status.message())), clock_.Now(), &events_);
    Deliver();
  }

  // Makes the ranks again. False: down for good.
  bool Restart() {
    if (options_.restart && !restarted_ && executor_->replaceable()) {
      log::Warn("the engine starts again", {{"replica", replica_}});
      executor_.reset();  // first: there may be no room for two
      StatusOr<std::unique_ptr<Executor>> executor = options_.restart([this](const Status& why) {
        log::Error("the engine cannot start again", {{"replica", replica_}, {"error", why.ToString()}});
        GiveUp();
      });
      if (executor.ok() && !failed_for_good()) {
        executor_ = std::move(executor).value();
        {
          std::lock_guard lock(mutex_);
          inbox_.lost = OkStatus();  // of the one that is gone
        }
        lost_ = OkStatus();
        silent_.store(false, std::memory_order_release);
        executor_->Watch(this);
        restarted_ = true;
        SetRunning(nullptr);
        down_.store(false, std::memory_order_release);
        log::Info("the engine serves again", {{"replica", replica_}});
        return true;
      }
      if (!executor.ok()) {
        log::Error("the engine cannot start again", {{"replica", replica_}, {"error", executor.status().ToString()}});
      }
    }
    GiveUp();
    return false;
  }

  // Any thread.
  void GiveUp() {
    if (!dead_.exchange(true) && options_.on_failed_for_good) options_.on_failed_for_good();
  }

  // Ends what is live and whatever still comes in until the destructor is called.
  void Stop(bool step_in_flight) {
    if (step_in_flight) executor_->Wait();
    Status why = Unavailable("ENGINE_DOWN", "the engine has stopped");
    for (;;) {
      Inbox inbox;
      {
        std::unique_lock lock(mutex_);
        wake_.wait(lock, [&] { return stop_ || !inbox_.empty(); });
        std::swap(inbox, inbox_);
        if (inbox.empty()) break;  // stop_, and nothing left
      }
      AddArrivals(&inbox);
      for (std::promise<int32_t>& reset : inbox.cache_resets) reset.set_value(0);
      scheduler_->Abort(why, clock_.Now(), &events_);
      Deliver();
    }
    scheduler_->Abort(why, clock_.Now(), &events_);
    Deliver();
    CHECK(live_.empty());
  }

  // --- ExecutorObserver: any thread --------------------------------------------------------------------------------

  void OnFailure(Status why) override {
    {
      std::lock_guard lock(mutex_);
      inbox_.lost = std::move(why);
    }
    wake_.notify_one();
  }
  void OnProgress() override {
    step_got_on_.store(Now(), std::memory_order_release);
  }
  void OnSilence(bool silent) override {
    silent_.store(silent, std::memory_order_release);
  }

  // Never 0.
  Duration::rep Now() const {
    return std::max<Duration::rep>(1, clock_.Now().time_since_epoch().count());
  }

  // Constant after construction.
  const EngineOptions options_;
  const int replica_;                               // 0 when there is one
  const std::unique_ptr<FlightRecorder> recorder_;  // null: none is kept
  const Clock& clock_;
  const std::function<void()> on_step_;
  const int32_t max_servable_tokens_;
  const std::shared_ptr<const std::vector<TenantOptions>> tenants_;

  // Engine thread only.
  const std::unique_ptr<Scheduler> scheduler_;
  std::unique_ptr<Executor> executor_;  // null after a restart that failed
  bool restarted_ = false;              // and no step has ended since
  Status lost_;                         // what the executor said while no step ran
  std::unordered_map<RequestKey, Live> live_;
  std::vector<Event> events_;
  std::vector<LeftQueue> left_queue_;  // scratch of Account

  // Guarded by mutex_.
  mutable std::mutex mutex_;
  std::condition_variable wake_;
  Inbox inbox_;
  bool stop_ = false;
  bool draining_ = false;
  RequestKey last_key_ = 0;
  QueueBounds queue_;

  // Guarded by load_mutex_ (taken before mutex_ where both are held).
  mutable std::mutex load_mutex_;
  EngineLoad load_;
  RateMeter tokens_;
  TimePoint last_step_end_{};

  // Engine thread writes.
  std::atomic<Duration::rep> step_started_{0};   // the oldest one; 0: no step runs
  std::atomic<Duration::rep> step_patience_{0};  // with it: how long it may get nowhere
  std::atomic<uint64_t> failures_{0};
  std::atomic<bool> down_{false};
  std::atomic<bool> dead_{false};  // down for good
  // The executor's threads write.
  std::atomic<Duration::rep> step_got_on_{0};  // when last, this step or one before it
  std::atomic<bool> silent_{false};            // a part of the executor

  std::thread thread_;
};

RequestHandle::~RequestHandle() {
  if (engine_ != nullptr) engine_->impl_->Cancel(key_, Status(Code::kCancelled, "the request was dropped"));
}
void RequestHandle::Cancel(Status why) {
  if (engine_ != nullptr) engine_->impl_->Cancel(key_, std::move(why));
}
void RequestHandle::StopSequence(uint32_t sequence) {
  if (engine_ != nullptr) engine_->impl_->StopSequence(key_, sequence);
}

StatusOr<std::unique_ptr<Engine>> Engine::Start(EngineOptions options, std::unique_ptr<Executor> executor,
                                                std::function<void()> on_step) {
  if (options.max_queued_requests < 1 || options.max_queued_tokens < 1 || options.health_deadline <= Duration(0)) {
    return Status(Code::kInvalidArgument,
                  "max_queued_requests, max_queued_tokens and health_deadline must be positive");
  }
  std::unique_ptr<FlightRecorder> recorder;
  if (options.flight_record_bytes > 0) {
    recorder = std::make_unique<FlightRecorder>(options.scheduler, options.flight_record_bytes);
    if (!options.crash_record_path.empty()) recorder->WriteAtCrash(options.crash_record_path);
    options.scheduler.recorder = recorder.get();
  }
  ASSIGN_OR_RETURN(std::unique_ptr<Scheduler> scheduler, Scheduler::Create(options.scheduler));
  ASSIGN_OR_RETURN(options.scheduler.tenants,
                   CompleteTenants(std::move(options.scheduler.tenants), options.scheduler.max_running));
  return std::unique_ptr<Engine>(new Engine(std::make_unique<Impl>(
      std::move(options), std::move(recorder), std::move(scheduler), std::move(executor), std::move(on_step))));
}

Engine::Engine(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Engine::~Engine() = default;

StatusOr<RequestHandle> Engine::Submit(std::shared_ptr<const Request> request, std::shared_ptr<RequestSink> sink) {
  ASSIGN_OR_RETURN(RequestKey key, impl_->Submit(std::move(request), std::move(sink)));
  return RequestHandle(this, key);
}
void Engine::Drain() {
  impl_->SetDraining(true);
}
void Engine::Resume() {
  impl_->SetDraining(false);
}
void Engine::CancelAll(Status why) {
  impl_->CancelAll(std::move(why));
}
bool Engine::healthy() const {
  return impl_->healthy();
}
uint64_t Engine::failures() const {
  return impl_->failures();
}
bool Engine::failed_for_good() const {
  return impl_->failed_for_good();
}
EngineLoad Engine::load() const {
  return impl_->load();
}
int32_t Engine::ResetPrefixCache() {
  return impl_->ResetPrefixCache();
}
StatusOr<std::string> Engine::FlightRecord(int replica) const {
  if (replica != 0) {
    return Status(Code::kOutOfRange,
                  StrCat("there is no replica ", replica, ": this server has one, which is number 0"));
  }
  return impl_->FlightRecord();
}
int32_t Engine::max_servable_tokens() const {
  return impl_->max_servable_tokens();
}

}  // namespace altiplano
