// What engine tests share: a sink that collects a request's events, and an executor that needs no model.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "server/engine/engine.h"

namespace altiplano {

// Collects events; any thread may wait for the end.
class CollectingSink : public RequestSink {
 public:
  void OnEvent(Event event) override {
    std::lock_guard lock(mutex_);
    if (event.kind == Event::Kind::kEnded) ended_ = true;
    events_.push_back(std::move(event));
    changed_.notify_all();
  }

  // All events, once the request is over.
  std::vector<Event> WaitForEnd() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return ended_; });
    return events_;
  }
  bool ended() {
    std::lock_guard lock(mutex_);
    return ended_;
  }
  // Until `count` events of `kind` (or the end) have come.
  void WaitFor(Event::Kind kind, size_t count) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] {
      size_t seen = 0;
      for (const Event& event : events_) seen += event.kind == kind;
      return ended_ || seen >= count;
    });
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<Event> events_;
  bool ended_ = false;
};

inline std::vector<TokenId> TokensOf(const std::vector<Event>& events, uint32_t sequence = 0) {
  std::vector<TokenId> tokens;
  for (const Event& event : events) {
    if (event.kind == Event::Kind::kToken && event.sequence == sequence) tokens.push_back(event.score.token);
  }
  return tokens;
}

inline FinishReason FinishOf(const std::vector<Event>& events, uint32_t sequence = 0) {
  for (const Event& event : events) {
    if (event.sequence == sequence && event.finish != FinishReason::kNone) return event.finish;
  }
  return FinishReason::kNone;
}

// Samples position + 1000 for every sequence, on a thread of its own. `hook` runs before each step and may sleep, fail
// the step (return an error) or turn a step's scores bad.
class CountingExecutor : public Executor {
 public:
  using Hook = std::function<Status(const StepPlan&)>;
  explicit CountingExecutor(Hook hook = {}) : hook_(std::move(hook)), thread_([this] { Loop(); }) {}
  ~CountingExecutor() override {
    {
      std::lock_guard lock(mutex_);
      stop_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }
  void Launch(std::shared_ptr<const StepPlan> plan) override {
    std::lock_guard lock(mutex_);
    plans_.push_back(std::move(plan));
    changed_.notify_all();
  }
  StepResult Wait() override {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return !results_.empty(); });
    StepResult result = std::move(results_.front());
    results_.pop_front();
    return result;
  }

 private:
  void Loop() {
    for (;;) {
      std::shared_ptr<const StepPlan> plan;
      {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [&] { return stop_ || !plans_.empty(); });
        if (stop_) return;
        plan = std::move(plans_.front());
        plans_.pop_front();
      }
      StepResult result;
      result.step = plan->step;
      if (hook_) result.status = hook_(*plan);
      for (const PlannedSequence& sequence : plan->sequences) {
        if (sequence.num_prompt_scores > 0) {
          result.prompt_scores.emplace_back(static_cast<size_t>(sequence.num_prompt_scores));
        }
        if (!sequence.sample) continue;
        TokenScore score;
        score.token = 1000 + sequence.first_position + sequence.num_tokens;
        result.sampled.push_back(score);
      }
      std::lock_guard lock(mutex_);
      results_.push_back(std::move(result));
      changed_.notify_all();
    }
  }

  const Hook hook_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::shared_ptr<const StepPlan>> plans_;
  std::deque<StepResult> results_;
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace altiplano
