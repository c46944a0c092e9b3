#include "server/engine/engine.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <future>
#include <random>
#include <thread>

#include "server/base/strings.h"
#include "tests/server/engine/engine_testlib.h"

namespace altiplano {
namespace {

using std::chrono::milliseconds;
using ::testing::ElementsAre;

EngineOptions SmallOptions() {
  EngineOptions options;
  options.scheduler.num_blocks = 64;
  options.scheduler.block_size = 4;
  options.scheduler.max_running = 8;
  options.scheduler.token_budget = 32;
  options.scheduler.max_context = 200;
  options.scheduler.eos_ids = {7};
  return options;
}

std::shared_ptr<Request> MakeRequest(int prompt_tokens, int max_new_tokens) {
  auto request = std::make_shared<Request>();
  request->id = "test";
  for (int i = 0; i < prompt_tokens; ++i) request->prompt.push_back(10 + i);
  request->stop.max_new_tokens = max_new_tokens;
  return request;
}

Status Broken() {
  return Status(Code::kInternal, "broken");
}

struct Submitted {
  RequestHandle handle;
  std::shared_ptr<CollectingSink> sink;
};

Submitted MustSubmit(Engine& engine, std::shared_ptr<const Request> request) {
  auto sink = std::make_shared<CollectingSink>();
  auto handle = engine.Submit(std::move(request), sink);
  EXPECT_TRUE(handle.ok()) << handle.status().ToString();
  return {std::move(handle).value(), sink};
}

// The engine has nothing left, and the pool is whole again.
void ExpectIdle(Engine& engine) {
  SchedulerLoad load;
  for (int i = 0; i < 1000; ++i) {
    load = engine.load().scheduler;
    if (load.running_requests == 0 && load.waiting_requests == 0 && load.blocks_used == 0) return;
    std::this_thread::sleep_for(milliseconds(2));
  }
  FAIL() << "running " << load.running_requests << ", waiting " << load.waiting_requests << ", blocks used "
         << load.blocks_used;
}

// Holds every step until released.
class Gate {
 public:
  CountingExecutor::Hook Hook() {
    return [this](const StepPlan&) {
      std::unique_lock lock(mutex_);
      ++arrived_;
      changed_.notify_all();
      changed_.wait(lock, [&] { return open_ || tickets_ > 0; });
      if (!open_) --tickets_;
      return OkStatus();
    };
  }
  void WaitForArrivals(int n) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return arrived_ >= n; });
  }
  void LetOnePass() {
    std::lock_guard lock(mutex_);
    ++tickets_;
    changed_.notify_all();
  }
  void Open() {
    std::lock_guard lock(mutex_);
    open_ = true;
    changed_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int arrived_ = 0, tickets_ = 0;
  bool open_ = false;
};

TEST(Engine, RunsARequestToItsLength) {
  auto engine = Engine::Start(SmallOptions(), std::make_unique<CountingExecutor>());
  ASSERT_TRUE(engine.ok());
  Submitted call = MustSubmit(**engine, MakeRequest(5, 4));
  std::vector<Event> events = call.sink->WaitForEnd();
  EXPECT_EQ(events.front().kind, Event::Kind::kAdmitted);
  EXPECT_THAT(TokensOf(events), ElementsAre(1005, 1006, 1007, 1008));
  EXPECT_EQ(FinishOf(events), FinishReason::kLength);
  EXPECT_TRUE(events.back().status.ok());
  ExpectIdle(**engine);
}

TEST(Engine, ManyClientsEachGetTheirOwnTokens) {
  auto engine = Engine::Start(SmallOptions(), std::make_unique<CountingExecutor>());
  ASSERT_TRUE(engine.ok());
  std::vector<std::thread> clients;
  for (int c = 0; c < 4; ++c) {
    clients.emplace_back([&, c] {
      for (int i = 0; i < 25; ++i) {
        int prompt = 1 + (7 * c + 3 * i) % 60, length = 1 + (c + i) % 20;
        Submitted call = MustSubmit(**engine, MakeRequest(prompt, length));
        std::vector<TokenId> tokens = TokensOf(call.sink->WaitForEnd());
        ASSERT_EQ(tokens.size(), static_cast<size_t>(length));
        for (int t = 0; t < length; ++t) EXPECT_EQ(tokens[static_cast<size_t>(t)], 1000 + prompt + t);
      }
    });
  }
  for (std::thread& client : clients) client.join();
  ExpectIdle(**engine);
}

TEST(Engine, CancelTakesEffectWithinTheRunningStep) {
  Gate gate;
  auto engine = Engine::Start(SmallOptions(), std::make_unique<CountingExecutor>(gate.Hook()));
  ASSERT_TRUE(engine.ok());
  Submitted call = MustSubmit(**engine, MakeRequest(3, 100));
  gate.WaitForArrivals(1);
  call.handle.Cancel(Status(Code::kCancelled, "the client went away"));
  gate.LetOnePass();  // the step that was running when the cancel came
  std::vector<Event> events = call.sink->WaitForEnd();
  EXPECT_EQ(events.back().status.code(), Code::kCancelled);
  EXPECT_LE(TokensOf(events).size(), 1u);
  gate.LetOnePass();  // the one already planned gives the blocks back
  ExpectIdle(**engine);
  gate.Open();
}

TEST(Engine, DroppingTheHandleCancels) {
  Gate gate;
  auto engine = Engine::Start(SmallOptions(), std::make_unique<CountingExecutor>(gate.Hook()));
  ASSERT_TRUE(engine.ok());
  std::shared_ptr<CollectingSink> sink;
  {
    Submitted call = MustSubmit(**engine, MakeRequest(3, 100));
    sink = call.sink;
    gate.WaitForArrivals(1);
  }
  gate.Open();
  EXPECT_EQ(sink->WaitForEnd().back().status.code(), Code::kCancelled);
  ExpectIdle(**engine);
}

TEST(Engine, StopSequenceFinishesWithStop) {
  auto engine = Engine::Start(SmallOptions(), std::make_unique<CountingExecutor>());
  ASSERT_TRUE(engine.ok());
  Submitted call = MustSubmit(**engine, MakeRequest(3, 190));
  call.sink->WaitFor(Event::Kind::kToken, 2);
  call.handle.StopSequence(0);
  std::vector<Event> events = call.sink->WaitForEnd();
  EXPECT_TRUE(events.back().status.ok());
  // It may have run to its length before the stop was seen; then that is the reason.
  if (TokensOf(events).size() < 190) {
    EXPECT_EQ(FinishOf(events), FinishReason::kStop);
  }
  ExpectIdle(**engine);
}

TEST(Engine, FullQueueRefusesWithARetryHint) {
  Gate gate;
  EngineOptions options = SmallOptions();
  options.max_queued_requests = 2;
  options.scheduler.max_running = 1;
  auto engine = Engine::Start(options, std::make_unique<CountingExecutor>(gate.Hook()));
  ASSERT_TRUE(engine.ok());
  std::vector<Submitted> calls;
  calls.push_back(MustSubmit(**engine, MakeRequest(3, 2)));
  gate.WaitForArrivals(1);  // admitted: no longer in the queue
  calls[0].sink->WaitFor(Event::Kind::kAdmitted, 1);
  calls.push_back(MustSubmit(**engine, MakeRequest(3, 2)));
  calls.push_back(MustSubmit(**engine, MakeRequest(3, 2)));
  auto refused = (*engine)->Submit(MakeRequest(3, 2), std::make_shared<CollectingSink>());
  ASSERT_FALSE(refused.ok());
  EXPECT_EQ(refused.status().code(), Code::kResourceExhausted);
  EXPECT_EQ(refused.status().reason(), "QUEUE_FULL");
  EXPECT_GE(refused.status().detail()->retry_after, milliseconds(100));
  gate.Open();
  for (Submitted& call : calls) EXPECT_TRUE(call.sink->WaitForEnd().back().status.ok());
  EXPECT_TRUE((*engine)->Submit(MakeRequest(3, 2), std::make_shared<CollectingSink>()).ok());
}

// What the engine thread has taken from its inbox while a step runs that does not end.
TEST(Engine, LoadCountsWhatWaitsBehindARunningStep) {
  Gate gate;
  EngineOptions options = SmallOptions();
  options.scheduler.max_running = 1;
  auto engine = Engine::Start(options, std::make_unique<CountingExecutor>(gate.Hook()));
  ASSERT_TRUE(engine.ok());
  auto behind = std::make_shared<CollectingSink>();
  // Comes between the first plan and the second, for which the inbox is emptied.
  struct SubmitAtAdmission : RequestSink {
    std::function<void()> submit;
    void OnEvent(Event event) override {
      if (event.kind == Event::Kind::kAdmitted) submit();
    }
  };
  auto first = std::make_shared<SubmitAtAdmission>();
  RequestHandle second_handle;
  std::promise<void> submitted;
  first->submit = [&] {
    auto handle = (*engine)->Submit(MakeRequest(5, 2), behind);
    ASSERT_TRUE(handle.ok());
    second_handle = *std::move(handle);
    submitted.set_value();
  };
  auto first_handle = (*engine)->Submit(MakeRequest(3, 20), first);
  ASSERT_TRUE(first_handle.ok());
  submitted.get_future().wait();
  gate.WaitForArrivals(1);
  std::this_thread::sleep_for(milliseconds(50));  // until the engine thread waits for the step, the inbox empty
  SchedulerLoad load = (*engine)->load().scheduler;
  for (int i = 0; i < 2000 && load.waiting_requests != 1; ++i) {
    std::this_thread::sleep_for(milliseconds(5));
    load = (*engine)->load().scheduler;
  }
  EXPECT_EQ(load.waiting_requests, 1);
  EXPECT_EQ(load.waiting_tokens, 5);
  gate.Open();
  EXPECT_TRUE(behind->WaitForEnd().back().status.ok());
}

TEST(Engine, QueueIsBoundedByTokensToo) {
  Gate gate;
  EngineOptions options = SmallOptions();
  options.max_queued_tokens = 50;
  options.scheduler.max_running = 1;
  auto engine = Engine::Start(options, std::make_unique<CountingExecutor>(gate.Hook()));
  ASSERT_TRUE(engine.ok());
  Submitted first = MustSubmit(**engine, MakeRequest(3, 50));
  first.sink->WaitFor(Event::Kind::kAdmitted, 1);
  Submitted second = MustSubmit(**engine, MakeRequest(30, 1));
  EXPECT_EQ((*engine)->Submit(MakeRequest(30, 1), std::make_shared<CollectingSink>()).status().reason(), "QUEUE_FULL");
  EXPECT_TRUE((*engine)->Submit(MakeRequest(20, 1), std::make_shared<CollectingSink>()).ok());
  gate.Open();
}

TEST(Engine, RefusesWhatCanNeverFit) {
  auto engine = Engine::Start(SmallOptions(), std::make_unique<CountingExecutor>());
  ASSERT_TRUE(engine.ok());
  int most = (*engine)->max_servable_tokens();
  auto refused = (*engine)->Submit(MakeRequest(most, 1), std::make_shared<CollectingSink>());
  EXPECT_EQ(refused.status().code(), Code::kFailedPrecondition);
  EXPECT_EQ(refused.status().reason(), "REQUEST_TOO_LARGE_FOR_SERVER");
  Submitted call = MustSubmit(**engine, MakeRequest(most - 1, 1));
  EXPECT_TRUE(call.sink->WaitForEnd().back().status.ok());
}

TEST(Engine, DrainRefusesNewAndFinishesLive) {
  Gate gate;
  auto engine = Engine::Start(SmallOptions(), std::make_unique<CountingExecutor>(gate.Hook()));
  ASSERT_TRUE(engine.ok());
  Submitted call = MustSubmit(**engine, MakeRequest(3, 5));
  gate.WaitForArrivals(1);
  (*engine)->Drain();
  EXPECT_TRUE((*engine)->load().draining);
  EXPECT_EQ((*engine)->Submit(MakeRequest(1, 1), std::make_shared<CollectingSink>()).status().reason(), "DRAINING");
  gate.Open();
  EXPECT_EQ(TokensOf(call.sink->WaitForEnd()).size(), 5u);
  (*engine)->Resume();
  EXPECT_TRUE((*engine)->Submit(MakeRequest(1, 1), std::make_shared<CollectingSink>()).ok());
}

TEST(Engine, FailedStepEndsEverythingAndTurnsHealth) {
  std::atomic<bool> fail{false};
  auto engine = Engine::Start(SmallOptions(), std::make_unique<CountingExecutor>([&](const StepPlan& plan) {
                                if (plan.step < 10) return OkStatus();
                                while (!fail) std::this_thread::yield();
                                return Status(Code::kInternal, "device lost");
                              }));
  ASSERT_TRUE(engine.ok());
  Submitted call = MustSubmit(**engine, MakeRequest(3, 190));
  call.sink->WaitFor(Event::Kind::kToken, 1);
  EXPECT_TRUE((*engine)->healthy());
  fail = true;
  Status end = call.sink->WaitForEnd().back().status;
  EXPECT_EQ(end.code(), Code::kUnavailable);
  EXPECT_EQ(end.reason(), "ENGINE_DOWN");
  EXPECT_FALSE((*engine)->healthy());
  EXPECT_EQ((*engine)->Submit(MakeRequest(1, 1), std::make_shared<CollectingSink>()).status().reason(), "ENGINE_DOWN");
}

// Tells what it is told to.
class TellingExecutor : public CountingExecutor {
 public:
  using CountingExecutor::CountingExecutor;
  void Watch(ExecutorObserver* observer) override { observer_ = observer; }
  ExecutorObserver& observer() { return *observer_; }  // once a step has been launched

 private:
  ExecutorObserver* observer_ = nullptr;
};

// An engine whose first step waits at a gate, and whose time stands still.
class OverdueStep : public ::testing::Test {
 protected:
  void Begin() {
    options_.clock = &clock_;
    clock_.Advance(std::chrono::hours(1));  // 0 is no time to begin at
    auto executor = std::make_unique<TellingExecutor>(gate_.Hook());
    executor_ = executor.get();
    engine_ = std::move(*Engine::Start(options_, std::move(executor)));
    call_ = MustSubmit(*engine_, MakeRequest(3, 5));
    gate_.WaitForArrivals(1);
    EXPECT_TRUE(engine_->healthy());
  }
  bool HealthyAfter(Duration more) {
    clock_.Advance(more);
    EXPECT_EQ(engine_->load().healthy, engine_->healthy());
    return engine_->healthy();
  }
  void Finish() {
    gate_.Open();
    EXPECT_TRUE(call_.sink->WaitForEnd().back().status.ok());
    EXPECT_TRUE(engine_->healthy()) << "the step has ended";
  }

  Gate gate_;
  FakeClock clock_;
  EngineOptions options_ = SmallOptions();
  TellingExecutor* executor_ = nullptr;
  std::unique_ptr<Engine> engine_;
  Submitted call_;
};

TEST_F(OverdueStep, IsUnhealthyUntilItEnds) {
  Begin();
  EXPECT_TRUE(HealthyAfter(milliseconds(3999)));
  EXPECT_FALSE(HealthyAfter(milliseconds(1))) << "so that a prober hears of it within five seconds";
  Finish();
}

TEST_F(OverdueStep, HasTheTimeThatItWasPredictedToTakeThreeTimes) {
  options_.scheduler.step_cost.step_us = 10e6;
  Begin();
  EXPECT_TRUE(HealthyAfter(milliseconds(29'999)));
  EXPECT_FALSE(HealthyAfter(milliseconds(1)));
  Finish();
}

TEST_F(OverdueStep, PredictedToBeShortHasTheDeadlineAllTheSame) {
  options_.scheduler.step_cost.step_us = 10;
  Begin();
  EXPECT_TRUE(HealthyAfter(milliseconds(3999)));
  EXPECT_FALSE(HealthyAfter(milliseconds(1)));
  Finish();
}

TEST_F(OverdueStep, IsNoneWhileItGetsOn) {
  Begin();
  for (int i = 0; i < 5; ++i) {
    EXPECT_TRUE(HealthyAfter(std::chrono::seconds(3)));
    executor_->observer().OnProgress();
  }
  EXPECT_FALSE(HealthyAfter(std::chrono::seconds(4)));
  executor_->observer().OnProgress();
  EXPECT_TRUE(engine_->healthy());
  Finish();
  EXPECT_TRUE(HealthyAfter(std::chrono::hours(1))) << "progress in a step that has ended is no step";
}

TEST_F(OverdueStep, APartOfTheExecutorThatIsSilentIsUnhealthyUntilItIsHeardOf) {
  Begin();
  executor_->observer().OnSilence(true);
  EXPECT_FALSE(engine_->healthy());
  EXPECT_TRUE(engine_->Submit(MakeRequest(3, 1), std::make_shared<CollectingSink>()).ok()) << "nothing has failed";
  executor_->observer().OnSilence(false);
  EXPECT_TRUE(engine_->healthy());
  Finish();
}

TEST(Engine, QueueDeadlineFiresWhileNothingElseHappens) {
  Gate gate;
  FakeClock clock;
  EngineOptions options = SmallOptions();
  options.clock = &clock;
  options.scheduler.max_running = 1;
  auto engine = Engine::Start(options, std::make_unique<CountingExecutor>(gate.Hook()));
  ASSERT_TRUE(engine.ok());
  Submitted running = MustSubmit(**engine, MakeRequest(3, 100));
  running.sink->WaitFor(Event::Kind::kAdmitted, 1);
  auto request = MakeRequest(3, 1);
  request->queue_deadline = clock.Now() + std::chrono::seconds(1);
  Submitted waiting = MustSubmit(**engine, request);
  clock.Advance(std::chrono::seconds(2));
  gate.LetOnePass();
  gate.LetOnePass();
  Status end = waiting.sink->WaitForEnd().back().status;
  EXPECT_EQ(end.code(), Code::kDeadlineExceeded);
  EXPECT_EQ(end.reason(), "QUEUE_TIMEOUT");
  gate.Open();
}

TEST(Engine, DestructionEndsLiveRequests) {
  Gate gate;
  auto engine = Engine::Start(SmallOptions(), std::make_unique<CountingExecutor>(gate.Hook()));
  ASSERT_TRUE(engine.ok());
  auto sink = std::make_shared<CollectingSink>();
  {
    auto handle = (*engine)->Submit(MakeRequest(3, 100), sink);
    ASSERT_TRUE(handle.ok());
    gate.WaitForArrivals(1);
  }  // handles must not outlive the engine; the step is still held, so the request is live
  gate.Open();
  *engine = nullptr;
  EXPECT_FALSE(sink->WaitForEnd().back().status.ok());
}

// Of two failures in a row without a step between them the second is final.
TEST(Engine, StartsAgainButNotForEver) {
  int started = 0;
  EngineOptions options = SmallOptions();
  options.restart = [&](const auto&) -> StatusOr<std::unique_ptr<Executor>> {
    ++started;
    auto hook = [n = 0, bad = started == 2](const StepPlan&) mutable {
      return bad || ++n == 3 ? Broken() : OkStatus();
    };
    return std::unique_ptr<Executor>(std::make_unique<CountingExecutor>(hook));
  };
  auto engine = Engine::Start(options, std::make_unique<CountingExecutor>([](const StepPlan&) { return Broken(); }));
  ASSERT_TRUE(engine.ok());
  for (int failure = 1; failure <= 3; ++failure) {
    Submitted call = MustSubmit(**engine, MakeRequest(3, 20));
    std::vector<Event> events = call.sink->WaitForEnd();
    EXPECT_EQ(events.back().status.reason(), "ENGINE_DOWN");
    EXPECT_EQ(TokensOf(events).size(), failure == 2 ? 2u : 0u);
    while (!(*engine)->healthy() && !(*engine)->failed_for_good()) std::this_thread::sleep_for(milliseconds(1));
    EXPECT_EQ((*engine)->failed_for_good(), failure == 3);
  }
  EXPECT_EQ(started, 2);
  EXPECT_EQ((*engine)->Submit(MakeRequest(3, 2), std::make_shared<CollectingSink>()).status().reason(), "ENGINE_DOWN");
}

TEST(Engine, ARestartThatFailsIsFinal) {
  EngineOptions options = SmallOptions();
  options.restart = [](const auto&) -> StatusOr<std::unique_ptr<Executor>> { return Broken(); };
  auto engine = Engine::Start(options, std::make_unique<CountingExecutor>([](const StepPlan&) { return Broken(); }));
  ASSERT_TRUE(engine.ok());
  MustSubmit(**engine, MakeRequest(3, 20)).sink->WaitForEnd();
  while (!(*engine)->failed_for_good()) std::this_thread::sleep_for(milliseconds(1));
  EXPECT_FALSE((*engine)->healthy());
}

// It may come to an end after all: that is too late.
TEST(Engine, ARestartThatHangsIsFinal) {
  std::promise<void> told, release;
  std::atomic<int> given_up{0};
  EngineOptions options = SmallOptions();
  options.on_failed_for_good = [&] { ++given_up; };
  options.restart = [&](const EngineOptions::Hung& hung) -> StatusOr<std::unique_ptr<Executor>> {
    hung(Status(Code::kDeadlineExceeded, "rank 1 hangs"));
    told.set_value();
    release.get_future().wait();
    return std::unique_ptr<Executor>(new CountingExecutor());
  };
  auto engine = Engine::Start(options, std::make_unique<CountingExecutor>([](const StepPlan&) { return Broken(); }));
  ASSERT_TRUE(engine.ok());
  MustSubmit(**engine, MakeRequest(3, 20)).sink->WaitForEnd();
  told.get_future().wait();
  EXPECT_EQ(given_up, 1);
  EXPECT_TRUE((*engine)->failed_for_good());
  release.set_value();
  EXPECT_EQ((*engine)->ResetPrefixCache(), 0);
  EXPECT_FALSE((*engine)->healthy());
  engine->reset();
  EXPECT_EQ(given_up, 1) << "it was told once";
}

TEST(Engine, RandomCancelsLeaveThePoolFull) {
  auto engine = Engine::Start(SmallOptions(), std::make_unique<CountingExecutor>());
  ASSERT_TRUE(engine.ok());
  std::mt19937 rng(1);
  for (int i = 0; i < 200; ++i) {
    Submitted a = MustSubmit(**engine, MakeRequest(1 + static_cast<int>(rng() % 50), 100));
    Submitted b = MustSubmit(**engine, MakeRequest(1 + static_cast<int>(rng() % 50), 100));
    a.sink->WaitFor(Event::Kind::kToken, rng() % 20);
    a.handle.Cancel(Status(Code::kCancelled, "test"));
    b.handle.Cancel(Status(Code::kCancelled, "test"));
    a.sink->WaitForEnd();
    b.sink->WaitForEnd();
  }
  ExpectIdle(**engine);
}

TEST(Engine, ResetPrefixCacheFreesWhatIsUnreferenced) {
  auto engine = Engine::Start(SmallOptions(), std::make_unique<CountingExecutor>());
  ASSERT_TRUE(engine.ok());
  MustSubmit(**engine, MakeRequest(40, 2)).sink->WaitForEnd();
  ExpectIdle(**engine);
  int cached = (*engine)->load().scheduler.blocks_cached;
  EXPECT_GT(cached, 0);
  EXPECT_EQ((*engine)->ResetPrefixCache(), cached);
  Submitted call = MustSubmit(**engine, MakeRequest(40, 2));
  EXPECT_EQ(call.sink->WaitForEnd().front().cached_tokens, 0u);
}

}  // namespace
}  // namespace altiplano
