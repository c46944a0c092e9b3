#include "server/bench/simulation.h"

#include <algorithm>
#include <memory>

#include "server/base/check.h"
#include "server/base/strings.h"
#include "server/scheduler/queue_bounds.h"

namespace altiplano::bench {

namespace {

// Any one will do: a fake answer is never read, and prompts only have to be told apart.
constexpr int32_t kVocabulary = 128000;
constexpr TimePoint kBegin{std::chrono::hours(1)};

class Simulation {
 public:
  Simulation(const Dataset& dataset, const std::vector<Duration>& arrivals, const SimulationOptions& options,
             std::unique_ptr<Scheduler> scheduler, BenchReport* report)
      : dataset_(dataset),
        arrivals_(arrivals),
        options_(options),
        scheduler_(std::move(scheduler)),
        queue_({.max_requests = options.max_queued_requests,
                .max_tokens = options.max_queued_tokens,
                .tenants = options.scheduler.tenants}),
        report_(*report) {
    queued_.resize(dataset.requests.size());
    report_.requests.assign(dataset.requests.size(), {});
    last_token_.resize(dataset.requests.size());
  }

  // Engine::Loop, with time that passes only between the start and the end of a step.
  SimulationTotals Run() {
    std::shared_ptr<const StepPlan> running;
    TimePoint running_end{};
    for (;;) {
      if (options_.interrupted && options_.interrupted()) {
        CutOff();
        break;
      }
      Send();
      std::shared_ptr<const StepPlan> next = scheduler_->Plan(now_, &events_);
      totals_.peak_blocks = std::max(totals_.peak_blocks, scheduler_->load().blocks_used);
      Deliver();
      if (running == nullptr && next == nullptr) {
        CHECK(scheduler_->idle());
        if (CanSend()) continue;  // what has just ended made room
        if (next_to_send_ == dataset_.requests.size()) break;
        now_ = std::max(now_, kBegin + arrivals_[next_to_send_]);
        continue;
      }
      if (running == nullptr) {
        running = std::move(next);
        running_end = now_ + Launch(*running);
        continue;
      }
      now_ = running_end;
      if (next != nullptr) running_end = now_ + Launch(*next);
      Send();
      scheduler_->Apply(*running, Sample(*running), now_, &events_);
      running = std::move(next);
      Deliver();
    }
    report_.duration = last_end_ - kBegin;
    report_.EndAfter(next_to_send_);
    totals_.load = scheduler_->load();
    return totals_;
  }

 private:
  bool CanSend() const {
    return next_to_send_ < dataset_.requests.size() && kBegin + arrivals_[next_to_send_] <= now_ &&
           (report_.max_concurrency == 0 || running_ < report_.max_concurrency);
  }

  void Send() {
    for (; CanSend(); ++next_to_send_) {
      const LoadRequest& load = dataset_.requests[next_to_send_];
      // Steps end at their own times: what came while one ran was sent at its time, not at the step's.
      const TimePoint due = kBegin + arrivals_[next_to_send_];
      const TimePoint sent = report_.max_concurrency == 0 ? due : std::max(due, last_full_);
      RequestRecord& record = report_.requests[next_to_send_];
      record.input_tokens = static_cast<uint64_t>(load.input_tokens);
      record.start = sent - kBegin;
      record.held = sent - due;
      const size_t tenant = TenantOf(options_.scheduler.tenants, load.tenant);
      if (Status room = queue_.Enter(tenant, load.input_tokens, sent); !room.ok()) {
        Fail(room, &record);
        last_end_ = std::max(last_end_, sent);
        continue;
      }
      auto request = std::make_shared<Request>();
      request->prompt = PromptOf(load, {.size = kVocabulary, .excluded = {}});
      request->stop.max_new_tokens = load.output_tokens;
      request->stop.ignore_eos = true;
      request->arrival = sent;
      request->ttft_target = load.ttft_target;
      if (load.deadline > Duration(0)) request->deadline = sent + load.deadline;
      request->priority = load.priority;
      request->tenant = load.tenant;
      ++running_;
      queued_[next_to_send_] = true;
      scheduler_->Add(next_to_send_, std::move(request));
    }
  }

  static void Fail(const Status& status, RequestRecord* record) {
    record->error_code = StrCat(CodeName(status.code()), status.reason().empty() ? "" : " ", status.reason());
    record->error = status.ToString();
  }
  // What is live ends here.
  void CutOff() {
    for (size_t i = 0; i < next_to_send_; ++i) {
      RequestRecord& record = report_.requests[i];
      const bool ended = record.ok || !record.error_code.empty();
      if (ended) continue;
      Fail(Status(Code::kCancelled, "interrupted"), &record);
      record.cancelled = true;
      record.latency = now_ - kBegin - record.start;
    }
    last_end_ = std::max(last_end_, now_);
  }
  void LeaveQueue(RequestKey key, bool admitted) {
    if (!queued_[key]) return;
    queued_[key] = false;
    const LoadRequest& load = dataset_.requests[key];
    queue_.Leave(TenantOf(options_.scheduler.tenants, load.tenant), load.input_tokens, admitted, now_);
  }

  Duration Launch(const StepPlan& plan) {
    const StepWork work = WorkOf(plan);
    const Duration time = StepTime(options_.cost, work);
    ++totals_.steps;
    totals_.busy += time;
    totals_.longest_step = std::max(totals_.longest_step, time);
    totals_.sequences += static_cast<uint64_t>(work.sequences);
    totals_.tokens += static_cast<uint64_t>(work.tokens);
    return time;
  }

  // Tokens that make every answer differ, so that no block of one is another's.
  StepResult Sample(const StepPlan& plan) {
    StepResult result;
    result.step = plan.step;
    result.device_time = StepTime(options_.cost, WorkOf(plan));
    for (const PlannedSequence& planned : plan.sequences) {
      if (!planned.sample) continue;
      const uint64_t position = static_cast<uint64_t>(planned.first_position + planned.num_tokens);
      result.sampled.emplace_back().token = static_cast<TokenId>((planned.request * 7919 + position) % kVocabulary);
    }
    return result;
  }

  void Deliver() {
    for (const Event& event : events_) {
      RequestRecord& record = report_.requests[event.request];
      const TimePoint sent = kBegin + record.start;
      switch (event.kind) {
        case Event::Kind::kAdmitted:
          record.cached_tokens = event.cached_tokens;
          LeaveQueue(event.request, /*admitted=*/true);
          break;
        case Event::Kind::kToken:
          if (record.output_tokens++ == 0) {
            record.ttft = now_ - sent;
          } else {
            record.itl.push_back(now_ - last_token_[event.request]);
          }
          last_token_[event.request] = now_;
          break;
        case Event::Kind::kEnded:
          record.ok = event.status.ok();
          if (!record.ok) Fail(event.status, &record);
          LeaveQueue(event.request, /*admitted=*/false);
          record.queued = event.timing.queued;
          record.preemptions = event.timing.preemptions;
          record.latency = now_ - sent;
          if (running_-- == report_.max_concurrency) last_full_ = now_;
          last_end_ = now_;
          break;
        default:
          break;
      }
    }
    events_.clear();
  }

  const Dataset& dataset_;
  const std::vector<Duration>& arrivals_;
  const SimulationOptions& options_;
  const std::unique_ptr<Scheduler> scheduler_;
  QueueBounds queue_;
  std::vector<char> queued_;  // by request: it was never admitted so far
  BenchReport& report_;

  SimulationTotals totals_;
  TimePoint now_ = kBegin;
  TimePoint last_full_ = kBegin;  // when max_concurrency requests last stopped running
  TimePoint last_end_ = kBegin;
  size_t next_to_send_ = 0;
  int64_t running_ = 0;
  std::vector<Event> events_;
  std::vector<TimePoint> last_token_;
};

}  // namespace

StatusOr<SimulationTotals> Simulate(const Dataset& dataset, const std::vector<Duration>& arrivals,
                                    const SimulationOptions& options, BenchReport* report) {
  CHECK(arrivals.size() == dataset.requests.size());
  SimulationOptions complete = options;
  ASSIGN_OR_RETURN(complete.scheduler.tenants,
                   CompleteTenants(options.scheduler.tenants, options.scheduler.max_running));
  ASSIGN_OR_RETURN(std::unique_ptr<Scheduler> scheduler, Scheduler::Create(complete.scheduler));
  const int32_t most = scheduler->max_servable_tokens();
  for (const LoadRequest& request : dataset.requests) CHECK(request.input_tokens + request.output_tokens <= most);
  return Simulation(dataset, arrivals, complete, std::move(scheduler), report).Run();
}

}  // namespace altiplano::bench
