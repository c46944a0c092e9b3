// Drives a Scheduler by hand: plans and results step by step, tokens chosen by the test.
#pragma once

#include <gtest/gtest.h>

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#include "server/scheduler/scheduler.h"

namespace altiplano {

class Driver {
 public:
  explicit Driver(SchedulerOptions options) : scheduler_(std::move(*Scheduler::Create(std::move(options)))) {}

  Scheduler* operator->() { return scheduler_.get(); }

  // The next plan, which stays in flight until Apply. Null when there is none.
  std::shared_ptr<const StepPlan> Plan() {
    auto plan = scheduler_->Plan(now, &events);
    scheduler_->CheckInvariants();
    if (plan) in_flight_.push_back(plan);
    return plan;
  }
  // Applies the oldest plan: every sequence samples what `token` says.
  void Apply() {
    ASSERT_FALSE(in_flight_.empty());
    std::shared_ptr<const StepPlan> plan = in_flight_.front();
    in_flight_.pop_front();
    StepResult result;
    result.step = plan->step;
    result.device_time = device_time(*plan);
    for (const PlannedSequence& planned : plan->sequences) {
      if (planned.num_prompt_scores > 0) {
        std::vector<TokenScore>& scores = result.prompt_scores.emplace_back();
        for (int32_t i = 0; i < planned.num_prompt_scores; ++i) {
          scores.emplace_back().token = plan->prompt_score_ids[static_cast<size_t>(planned.prompt_score_begin + i)];
        }
      }
      if (!planned.sample) continue;
      TokenScore& score = result.sampled.emplace_back();
      score.token = token(planned);
      score.finite = finite(planned);
    }
    scheduler_->Apply(*plan, result, now, &events);
    scheduler_->CheckInvariants();
  }
  // One plan, applied; null when there was none.
  std::shared_ptr<const StepPlan> Step() {
    auto plan = Plan();
    if (plan) Apply();
    return plan;
  }
  // Until nothing is live, as the engine does it: the next plan is made before the last one is applied.
  void RunAll() {
    for (int steps = 0; num_in_flight() > 0 || Plan(); ++steps) {
      ASSERT_LT(steps, 10000) << "no end";
      if (num_in_flight() < 2) Plan();
      Apply();
    }
    EXPECT_TRUE(scheduler_->idle());
  }
  size_t num_in_flight() const { return in_flight_.size(); }

  std::vector<Event> EventsOf(RequestKey key) const {
    std::vector<Event> found;
    for (const Event& event : events) {
      if (event.request == key) found.push_back(event);
    }
    return found;
  }
  std::vector<TokenId> TokensOf(RequestKey key, uint32_t sequence = 0) const {
    std::vector<TokenId> tokens;
    for (const Event& event : EventsOf(key)) {
      if (event.kind == Event::Kind::kToken && event.sequence == sequence) tokens.push_back(event.score.token);
    }
    return tokens;
  }
  FinishReason FinishOf(RequestKey key, uint32_t sequence = 0) const {
    FinishReason finish = FinishReason::kNone;
    for (const Event& event : EventsOf(key)) {
      if (event.sequence == sequence && event.finish != FinishReason::kNone) finish = event.finish;
    }
    return finish;
  }
  // The kEnded event; fails the test when there is none.
  Event EndOf(RequestKey key) const {
    for (const Event& event : EventsOf(key)) {
      if (event.kind == Event::Kind::kEnded) return event;
    }
    ADD_FAILURE() << "request " << key << " has not ended";
    return Event();
  }
  bool Ended(RequestKey key) const {
    for (const Event& event : EventsOf(key)) {
      if (event.kind == Event::Kind::kEnded) return true;
    }
    return false;
  }
  uint32_t CachedTokensOf(RequestKey key) const {
    for (const Event& event : EventsOf(key)) {
      if (event.kind == Event::Kind::kAdmitted) return event.cached_tokens;
    }
    ADD_FAILURE() << "request " << key << " was not admitted";
    return 0;
  }

  TimePoint now{std::chrono::hours(1)};
  std::vector<Event> events;
  std::function<TokenId(const PlannedSequence&)> token = [](const PlannedSequence& planned) {
    return 1000 + planned.first_position + planned.num_tokens;  // its position
  };
  std::function<bool(const PlannedSequence&)> finite = [](const PlannedSequence&) { return true; };
  std::function<Duration(const StepPlan&)> device_time = [](const StepPlan&) { return Duration(0); };

 private:
  std::unique_ptr<Scheduler> scheduler_;
  std::deque<std::shared_ptr<const StepPlan>> in_flight_;
};

inline std::shared_ptr<Request> MakeRequest(int prompt, int max_new_tokens, TokenId first = 0) {
  auto request = std::make_shared<Request>();
  for (int i = 0; i < prompt; ++i) request->prompt.push_back(first + i);
  request->stop.max_new_tokens = max_new_tokens;
  request->arrival = TimePoint(std::chrono::hours(1));
  return request;
}

inline SchedulerOptions SmallOptions() {
  SchedulerOptions options;
  options.num_blocks = 32;
  options.block_size = 4;
  options.max_running = 8;
  options.token_budget = 16;
  options.max_context = 100;
  options.eos_ids = {7};
  return options;
}

}  // namespace altiplano
