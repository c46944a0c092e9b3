// Ranks that hang, at every meeting of a step and where they meet nobody: nobody waits for ever.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <future>
#include <memory>
#include <thread>
#include <tuple>
#include <utility>

#include "kernels/comm/forwarding.h"
#include "server/base/strings.h"
#include "server/engine/engine.h"
#include "server/engine/local_executor.h"
#include "tests/server/engine/engine_testlib.h"
#include "tests/server/engine/parallel_testlib.h"
#include "tests/server/model/stuck_checkpoint.h"

namespace altiplano {
namespace {

using std::chrono::milliseconds;
using ::testing::AnyOf;
using ::testing::HasSubstr;

// Counts one rank's calls to others once it is armed, and keeps it in the fatal one until it is released.
class Trap {
 public:
  explicit Trap(int fatal_call) : fatal_call_(fatal_call) {}
  void Arm() { armed_ = true; }
  void Release() { release_.set_value(); }
  void Call() {
    if (armed_ && calls_++ == fatal_call_) released_.wait();
  }

 private:
  const int fatal_call_;
  std::atomic<bool> armed_{false};
  std::atomic<int> calls_{0};
  std::promise<void> release_;
  const std::shared_future<void> released_ = release_.get_future().share();
};

// Calls `before` in each of its rank's calls.
class TrappedCommunicator : public ForwardingCommunicator {
 public:
  TrappedCommunicator(std::unique_ptr<Communicator> member, std::function<void()> before)
      : ForwardingCommunicator(std::move(member)), before_(std::move(before)) {}
  bool AllReduceSum(Stream& stream, const TensorView& x) override {
    before_();
    return member().AllReduceSum(stream, x);
  }
  bool AllReduceAddRmsNorm(Stream& stream, const AddRmsNormArgs& args) override {
    before_();
    return member().AllReduceAddRmsNorm(stream, args);
  }
  bool AllGather(Stream& stream, const TensorView& out, const TensorView& x) override {
    before_();
    return member().AllGather(stream, out, x);
  }
  bool Broadcast(Stream& stream, const TensorView& x) override {
    before_();
    return member().Broadcast(stream, x);
  }

 private:
  const std::function<void()> before_;
};

class TrappedLink : public Link {
 public:
  TrappedLink(std::shared_ptr<Link> end, std::function<void()> before)
      : end_(std::move(end)), before_(std::move(before)) {}
  bool Send(Stream& stream, const TensorView& x) override {
    before_();
    return end_->Send(stream, x);
  }
  bool Receive(Stream& stream, const TensorView& x) override {
    before_();
    return end_->Receive(stream, x);
  }
  void Abort(std::string_view reason) override { end_->Abort(reason); }
  std::string error() const override { return end_->error(); }

 private:
  const std::shared_ptr<Link> end_;
  const std::function<void()> before_;
};

// Lets `victim` hang in its first call to others, in its second and so on, each time in a new engine, until a request
// of two steps gets through. Returns how many calls that were.
int HangInEachCall(const Checkpoint& checkpoint, LocalExecutorOptions options, int victim) {
  options.patience = milliseconds(250);  // ranks that start on a busy machine need some of it
  for (int call = 0; call < 100; ++call) {
    SCOPED_TRACE(StrCat("call ", call, " of rank ", victim));
    Trap trap(call);
    options.wrap_communicator = [&](int rank, std::unique_ptr<Communicator> member) -> std::unique_ptr<Communicator> {
      if (rank != victim) return member;
      return std::make_unique<TrappedCommunicator>(std::move(member), [&] { trap.Call(); });
    };
    options.wrap_link = [&](int rank, std::shared_ptr<Link> end) -> std::shared_ptr<Link> {
      if (rank != victim || end == nullptr) return end;
      return std::make_shared<TrappedLink>(std::move(end), [&] { trap.Call(); });
    };
    auto engine = StartModel(checkpoint, options);
    trap.Arm();
    auto sink = std::make_shared<CollectingSink>();
    auto request = MakeRequest(0, 5, 2);
    auto handle = engine->Submit(request, sink);
    EXPECT_TRUE(handle.ok());
    const Status status = sink->WaitForEnd().back().status;
    if (status.ok()) return call;
    ExpectEngineDown(*engine, *sink, "");
    // Where nobody waits for what the rank sends last, the executor finds out.
    EXPECT_THAT(status.message(),
                AnyOf(HasSubstr("no word for 250 ms from rank"), HasSubstr(StrCat("rank ", victim, " hangs"))));
    trap.Release();
  }
  return -1;
}

class Hangs : public ::testing::Test {
 protected:
  const std::unique_ptr<Checkpoint> checkpoint_ =
      std::move(*Checkpoint::Open(StrCat(ALTIPLANO_SOURCE_DIR, "/tests/data/tiny")));
};

TEST_F(Hangs, InEachCallOfARankToTheOthers) {
  const auto layers = static_cast<int>(checkpoint_->config().layers);
  LocalExecutorOptions options = TinyOptions(2);
  auto weights = LocalExecutor::LoadShared(*checkpoint_, options);
  ASSERT_TRUE(weights.ok());
  options.weights = *weights;
  // In each step: the embedding, twice a layer, the logits and the sampled ids.
  const int calls = 2 * (1 + 2 * layers + 2);
  EXPECT_EQ(HangInEachCall(*checkpoint_, options, 1), calls);
}

TEST_F(Hangs, InEachCallOfAStageToTheOthers) {
  LocalExecutorOptions options = TinyOptions(1);
  options.stages = 2;
  auto weights = LocalExecutor::LoadShared(*checkpoint_, options);
  ASSERT_TRUE(weights.ok());
  options.weights = *weights;
  // The first stage sends the residual twice and receives at least the ids that the second step needs; the last one
  // receives and sends twice.
  EXPECT_GE(HangInEachCall(*checkpoint_, options, 0), 3);
  EXPECT_GE(HangInEachCall(*checkpoint_, options, 1), 4);
}

// A LocalExecutor that counts how often it tells of progress.
class Listening : public Executor, private ExecutorObserver {
 public:
  Listening(std::unique_ptr<LocalExecutor> executor, std::atomic<int>* told)
      : executor_(std::move(executor)), told_(*told) {}
  void Launch(std::shared_ptr<const StepPlan> plan) override { executor_->Launch(std::move(plan)); }
  StepResult Wait() override { return executor_->Wait(); }
  void Watch(ExecutorObserver* observer) override {
    observer_ = observer;
    executor_->Watch(this);
  }

 private:
  void OnFailure(Status why) override { observer_->OnFailure(std::move(why)); }
  void OnProgress() override {
    observer_->OnProgress();
    ++told_;
  }
  void OnSilence(bool silent) override { observer_->OnSilence(silent); }

  ExecutorObserver* observer_ = nullptr;
  const std::unique_ptr<LocalExecutor> executor_;
  std::atomic<int>& told_;
};

// Between any two of the calls in its layers three seconds pass.
TEST_F(Hangs, ASlowStepInWhichRanksGetOnIsHealthy) {
  FakeClock clock;
  std::unique_ptr<Engine> engine;
  std::atomic<bool> armed{false};
  std::atomic<int> told{0}, calls{0};
  const auto calls_in_layers = static_cast<int>(2 * checkpoint_->config().layers);
  const auto take_time = [&, seen = 0]() mutable {
    if (!armed || calls == calls_in_layers) return;
    while (told == seen) std::this_thread::sleep_for(milliseconds(1));  // of what was computed since the last call
    clock.Advance(std::chrono::seconds(3));
    EXPECT_TRUE(engine->healthy()) << "call " << calls;
    seen = told;
    ++calls;
  };
  LocalExecutorOptions options = TinyOptions(2);
  options.wrap_communicator = [&](int rank, std::unique_ptr<Communicator> member) -> std::unique_ptr<Communicator> {
    if (rank == 0) return member;
    return std::make_unique<TrappedCommunicator>(std::move(member), take_time);
  };
  auto executor = LocalExecutor::Create(*checkpoint_, options);
  ASSERT_TRUE(executor.ok()) << executor.status().ToString();
  EngineOptions engine_options;
  engine_options.scheduler = (*executor)->scheduler_options();
  engine_options.clock = &clock;
  engine = std::move(*Engine::Start(engine_options, std::make_unique<Listening>(std::move(*executor), &told)));
  armed = true;
  auto sink = std::make_shared<CollectingSink>();
  auto handle = engine->Submit(MakeRequest(0, 5, 1), sink);
  ASSERT_TRUE(handle.ok());
  EXPECT_TRUE(sink->WaitForEnd().back().status.ok());
  EXPECT_EQ(calls, calls_in_layers);
}

// A rank that hangs is seen in health long before the step is given up, and not any more when it has come after all.
TEST_F(Hangs, AreUnhealthyBeforeTheyEndAnything) {
  for (const auto& [ranks, stages] : {std::pair{1, 1}, {2, 1}, {1, 2}}) {
    SCOPED_TRACE(StrCat(ranks, " ranks, ", stages, " stages"));
    std::promise<void> release;
    LocalExecutorOptions options = TinyOptions(ranks);
    options.stages = stages;
    options.before_step = [released = release.get_future().share(), last = ranks * stages - 1](int rank,
                                                                                               uint64_t step) {
      if (rank == last && step == 3) released.wait();
    };
    auto executor = LocalExecutor::Create(*checkpoint_, options);
    ASSERT_TRUE(executor.ok()) << executor.status().ToString();
    EngineOptions engine_options;
    engine_options.scheduler = (*executor)->scheduler_options();
    engine_options.health_deadline = milliseconds(100);
    auto engine = std::move(*Engine::Start(engine_options, std::move(*executor)));
    auto sink = std::make_shared<CollectingSink>();
    auto handle = engine->Submit(MakeRequest(0, 10, 20), sink);
    ASSERT_TRUE(handle.ok());
    while (engine->healthy()) std::this_thread::sleep_for(milliseconds(1));
    release.set_value();
    EXPECT_TRUE(sink->WaitForEnd().back().status.ok());
    EXPECT_TRUE(engine->healthy());
  }
}

// Loading tells of its progress ten times a second, on a busy machine less often.
constexpr milliseconds kStartPatience{500};

// Makes an executor whose start hangs until what hangs in it has been told of. Returns what was told.
Status StartThatHangs(const Checkpoint& checkpoint, LocalExecutorOptions options, std::promise<void>* release) {
  Status told = OkStatus();
  options.start_patience = kStartPatience;
  options.on_start_hang = [&](const Status& status) {
    told = status;
    release->set_value();
  };
  (void)LocalExecutor::Create(checkpoint, options);
  return told;
}

TEST_F(Hangs, InTheWarmUpAreToldOfByRank) {
  for (const auto& [ranks, stages, victim] : {std::tuple{1, 1, 0}, {2, 1, 1}, {2, 2, 0}, {2, 2, 3}}) {
    SCOPED_TRACE(StrCat("rank ", victim, " of ", ranks, " ranks, ", stages, " stages"));
    std::promise<void> release;
    LocalExecutorOptions options = TinyOptions(ranks);
    options.stages = stages;
    auto weights = LocalExecutor::LoadShared(*checkpoint_, options);  // slow with a sanitizer, and not what is to hang
    ASSERT_TRUE(weights.ok()) << weights.status().ToString();
    options.weights = *std::move(weights);
    options.patience = milliseconds(100);  // the others give up first
    options.before_step = [released = release.get_future().share(), victim = victim](int rank, uint64_t step) {
      if (rank == victim && step == 0) released.wait();
    };
    const Status told = StartThatHangs(*checkpoint_, options, &release);
    EXPECT_EQ(told.code(), Code::kDeadlineExceeded);
    EXPECT_THAT(told.message(), HasSubstr(StrCat("rank ", victim, " hangs in the warm-up")));
  }
}

TEST_F(Hangs, OfTheFileSystemAreToldOfByRank) {
  LocalExecutorOptions options = TinyOptions(1);
  options.stages = 2;
  std::promise<void> release;
  // Of the last layer, which the second stage has.
  const StuckCheckpoint stuck(*checkpoint_, "model.layers.3.mlp.down_proj.weight", release.get_future().share());
  EXPECT_THAT(StartThatHangs(stuck, options, &release).message(), HasSubstr("rank 1 hangs in loading the weights"));

  std::promise<void> release_shared;
  const StuckCheckpoint again(*checkpoint_, "model.norm.weight", release_shared.get_future().share());
  options.start_patience = kStartPatience;
  Status told = OkStatus();
  options.on_start_hang = [&](const Status& status) {
    told = status;
    release_shared.set_value();
  };
  EXPECT_TRUE(LocalExecutor::LoadShared(again, options).ok()) << "it answers after all";
  EXPECT_THAT(told.message(), HasSubstr("rank 1 hangs in loading the weights"));
}

// There is nobody who could miss the only rank but the executor.
TEST_F(Hangs, OfTheOnlyRankAreNoticedAndAnotherTakesItsPlace) {
  std::promise<void> release;
  LocalExecutorOptions options = TinyOptions(1);
  options.patience = milliseconds(100);
  options.before_step = [released = release.get_future().share(), hung = std::make_shared<std::atomic<bool>>(false)](
                            int, uint64_t step) {
    if (step == 3 && !hung->exchange(true)) released.wait();
  };
  auto executor = LocalExecutor::Create(*checkpoint_, options);
  ASSERT_TRUE(executor.ok());
  EngineOptions engine_options;
  engine_options.scheduler = (*executor)->scheduler_options();
  engine_options.restart = [&](const auto&) -> StatusOr<std::unique_ptr<Executor>> {
    return std::unique_ptr<Executor>(std::move(*LocalExecutor::Create(*checkpoint_, options)));
  };
  auto engine = Engine::Start(engine_options, std::move(*executor));
  ASSERT_TRUE(engine.ok());
  auto sink = std::make_shared<CollectingSink>();
  auto handle = (*engine)->Submit(MakeRequest(0, 10, 100), sink);
  ASSERT_TRUE(handle.ok());
  const Status status = sink->WaitForEnd().back().status;
  EXPECT_EQ(status.reason(), "ENGINE_DOWN") << status.ToString();
  EXPECT_THAT(status.message(), HasSubstr("rank 0 hangs"));
  while (!(*engine)->healthy()) std::this_thread::sleep_for(milliseconds(5));
  auto again = std::make_shared<CollectingSink>();
  auto second = (*engine)->Submit(MakeRequest(1, 10, 10), again);
  ASSERT_TRUE(second.ok()) << second.status().ToString();
  EXPECT_TRUE(again->WaitForEnd().back().status.ok());
  release.set_value();  // the thread that was left behind ends, too
}

}  // namespace
}  // namespace altiplano
