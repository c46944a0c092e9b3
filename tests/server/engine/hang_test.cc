// Ranks that hang, at every meeting of a step and where they meet nobody: nobody waits for ever.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <future>
#include <memory>
#include <thread>
#include <utility>

#include "server/base/strings.h"
#include "server/engine/engine.h"
#include "server/engine/local_executor.h"
#include "tests/server/engine/engine_testlib.h"
#include "tests/server/engine/parallel_testlib.h"

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

class TrappedCommunicator : public Communicator {
 public:
  TrappedCommunicator(std::unique_ptr<Communicator> member, Trap* trap) : member_(std::move(member)), trap_(*trap) {}
  int rank() const override { return member_->rank(); }
  int size() const override { return member_->size(); }
  bool AllReduceSum(Stream& stream, const TensorView& x) override {
    trap_.Call();
    return member_->AllReduceSum(stream, x);
  }
  bool AllReduceAddRmsNorm(Stream& stream, const AddRmsNormArgs& args) override {
    trap_.Call();
    return member_->AllReduceAddRmsNorm(stream, args);
  }
  bool AllGather(Stream& stream, const TensorView& out, const TensorView& x) override {
    trap_.Call();
    return member_->AllGather(stream, out, x);
  }
  bool Broadcast(Stream& stream, const TensorView& x) override {
    trap_.Call();
    return member_->Broadcast(stream, x);
  }
  void Abort(std::string_view reason) override { member_->Abort(reason); }
  std::string error() const override { return member_->error(); }

 private:
  const std::unique_ptr<Communicator> member_;
  Trap& trap_;
};

class TrappedLink : public Link {
 public:
  TrappedLink(std::shared_ptr<Link> end, Trap* trap) : end_(std::move(end)), trap_(*trap) {}
  bool Send(Stream& stream, const TensorView& x) override {
    trap_.Call();
    return end_->Send(stream, x);
  }
  bool Receive(Stream& stream, const TensorView& x) override {
    trap_.Call();
    return end_->Receive(stream, x);
  }
  void Abort(std::string_view reason) override { end_->Abort(reason); }
  std::string error() const override { return end_->error(); }

 private:
  const std::shared_ptr<Link> end_;
  Trap& trap_;
};

// Lets `victim` hang in its first call to others, in its second and so on, each time in a new engine, until a request
// of two steps gets through. Returns how many calls that were.
int HangInEachCall(const Checkpoint& checkpoint, LocalExecutorOptions options, int victim) {
  options.patience = milliseconds(100);
  for (int call = 0; call < 100; ++call) {
    SCOPED_TRACE(StrCat("call ", call, " of rank ", victim));
    Trap trap(call);
    options.wrap_communicator = [&](int rank, std::unique_ptr<Communicator> member) -> std::unique_ptr<Communicator> {
      if (rank != victim) return member;
      return std::make_unique<TrappedCommunicator>(std::move(member), &trap);
    };
    options.wrap_link = [&](int rank, std::shared_ptr<Link> end) -> std::shared_ptr<Link> {
      if (rank != victim || end == nullptr) return end;
      return std::make_shared<TrappedLink>(std::move(end), &trap);
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
                AnyOf(HasSubstr("no word for 100 ms from rank"), HasSubstr(StrCat("rank ", victim, " hangs"))));
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
  engine_options.restart = [&]() -> StatusOr<std::unique_ptr<Executor>> {
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
