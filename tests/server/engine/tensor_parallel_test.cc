// The engine on several ranks: the same answers at every number of ranks, and an end for everybody when one fails.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <random>
#include <stdexcept>
#include <thread>
#include <utility>

#include "kernels/comm/forwarding.h"
#include "server/base/strings.h"
#include "server/engine/engine.h"
#include "server/engine/local_executor.h"
#include "server/model/llama.h"
#include "server/model/random_checkpoint.h"
#include "tests/server/engine/engine_testlib.h"
#include "tests/server/engine/parallel_testlib.h"

namespace altiplano {
namespace {

using std::chrono::milliseconds;
using ::testing::HasSubstr;

TEST(TensorParallel, EveryNumberOfRanksAnswersAlike) {
  const Answers one = Ask(*StartTiny(TinyOptions(1)));
  ASSERT_EQ(one.tokens[4].size(), 40u);
  ASSERT_EQ(one.prompt_scores[2].size(), 50u);
  for (int ranks : {2, 4, 8}) {  // 4 KV heads: at 8 ranks each is held twice
    SCOPED_TRACE(StrCat(ranks, " ranks"));
    const Answers many = Ask(*StartTiny(TinyOptions(ranks)));
    for (size_t i = 0; i < one.tokens.size(); ++i) {
      SCOPED_TRACE(StrCat("request ", i));
      ExpectSame(one.tokens[i], many.tokens[i], 1e-3f);  // sums are split differently
      ExpectSame(one.prompt_scores[i], many.prompt_scores[i], 1e-3f);
    }
  }
}

// Ranks that share KV heads, vocabularies of which the last rank has less than the others, heads of odd numbers.
TEST(TensorParallel, EveryNumberOfRanksAnswersAlikeForModelsOfAnyShape) {
  std::mt19937 random(7);
  auto between = [&](int low, int high) {
    return low + static_cast<int>(random() % static_cast<unsigned>(high - low + 1));
  };
  for (const auto& [ranks, kv_heads] : {std::pair{2, 2}, {2, 1}, {3, 3}, {3, 1}, {4, 2}, {5, 5}, {6, 2}, {8, 1}}) {
    RandomModel model = ParseRandomModel("random:1b").value();
    model.seed = random();
    ModelConfig& c = model.config;
    c.layers = between(1, 3);
    c.head_dim = 16 * between(1, 4);
    c.kv_heads = kv_heads;
    c.q_heads = ranks * between(1, 3);
    c.hidden = 16 * between(2, 8);
    c.ffn = 16 * ranks * between(1, 4);
    do c.vocab = 512 + between(0, 99);
    while (c.vocab % ranks == 0);
    c.max_position = 512;
    c.tied_embeddings = random() % 2 == 0;
    SCOPED_TRACE(StrCat(ranks, " ranks, ", kv_heads, " KV heads, vocabulary ", c.vocab));
    const auto checkpoint = MakeRandomCheckpoint(model);
    const Answers one = Ask(*StartModel(*checkpoint, TinyOptions(1)), 500);
    const Answers many = Ask(*StartModel(*checkpoint, TinyOptions(ranks)), 500);
    for (size_t i = 0; i < one.tokens.size(); ++i) {
      ExpectSame(one.tokens[i], many.tokens[i], 1e-3f);
      ExpectSame(one.prompt_scores[i], many.prompt_scores[i], 1e-3f);
    }
  }
}

TEST(TensorParallel, SameLayoutSameBits) {
  LocalExecutorOptions options = TinyOptions(4);
  options.dtype = DType::kBF16;
  const Answers first = Ask(*StartTiny(options));
  const Answers second = Ask(*StartTiny(options));
  for (size_t i = 0; i < first.tokens.size(); ++i) ExpectSame(first.tokens[i], second.tokens[i], 0);
}

// Counts what a rank sums with the others once it is armed.
class MeteredCommunicator : public ForwardingCommunicator {
 public:
  struct Meter {
    std::atomic<bool> armed{false};
    std::atomic<int64_t> calls{0};
    std::atomic<uint64_t> bytes{0};
    void Count(const TensorView& x) {
      if (!armed) return;
      ++calls;
      bytes += static_cast<uint64_t>(x.elements()) * SizeOf(x.dtype);
    }
  };
  MeteredCommunicator(std::unique_ptr<Communicator> member, Meter* meter)
      : ForwardingCommunicator(std::move(member)), meter_(*meter) {}
  bool AllReduceSum(Stream& stream, const TensorView& x) override {
    meter_.Count(x);
    return member().AllReduceSum(stream, x);
  }
  bool AllReduceAddRmsNorm(Stream& stream, const AddRmsNormArgs& args) override {
    meter_.Count(args.x);
    return member().AllReduceAddRmsNorm(stream, args);
  }

 private:
  Meter& meter_;
};

// What `plan` and the projections count with is what is sent.
TEST(TensorParallel, SumsAsOftenAndAsMuchAsIsCounted) {
  const auto checkpoint = std::move(*Checkpoint::Open(StrCat(ALTIPLANO_SOURCE_DIR, "/tests/data/tiny")));
  for (int stages : {1, 2}) {
    SCOPED_TRACE(StrCat(stages, " stages"));
    std::array<MeteredCommunicator::Meter, 4> meters;  // [stages * 2 ranks]
    LocalExecutorOptions options = TinyOptions(2);
    options.stages = stages;
    options.dtype = DType::kBF16;  // of which sums are not
    options.wrap_communicator = [&](int rank, std::unique_ptr<Communicator> member) -> std::unique_ptr<Communicator> {
      return std::make_unique<MeteredCommunicator>(std::move(member), &meters.at(static_cast<size_t>(rank)));
    };
    auto engine = StartModel(*checkpoint, options);
    for (auto& meter : meters) meter.armed = true;
    auto sink = std::make_shared<CollectingSink>();
    auto handle = engine->Submit(MakeRequest(0, 5, 3), sink);
    ASSERT_TRUE(handle.ok());
    ASSERT_TRUE(sink->WaitForEnd().back().status.ok());
    constexpr int kSteps = 3, kTokens = 5 + 1 + 1;  // the last token that is sampled is computed no further
    for (int rank = 0; rank < 2 * stages; ++rank) {
      SCOPED_TRACE(StrCat("rank ", rank));
      const MeteredCommunicator::Meter& meter = meters.at(static_cast<size_t>(rank));
      const Shard shard = Shard::Make(checkpoint->config(), rank % 2, 2, rank / 2, stages).value();
      const int64_t calls = Llama::AllReduces(checkpoint->config(), shard);
      EXPECT_EQ(meter.calls, kSteps * calls);
      EXPECT_EQ(meter.bytes, static_cast<uint64_t>(calls) * Llama::ResidualBytes(checkpoint->config(), kTokens));
    }
  }
}

TEST(TensorParallel, RefusesWhatDoesNotDivide) {
  auto checkpoint = Checkpoint::Open(StrCat(ALTIPLANO_SOURCE_DIR, "/tests/data/tiny"));
  ASSERT_TRUE(checkpoint.ok());
  auto executor = LocalExecutor::Create(**checkpoint, TinyOptions(3));
  EXPECT_EQ(executor.status().code(), Code::kOutOfRange);
  EXPECT_THAT(executor.status().message(), HasSubstr("3 ranks"));
}

TEST(TensorParallel, ARankThatThrowsEndsEverything) {
  for (int victim : {0, 1, 3}) {
    SCOPED_TRACE(victim);
    LocalExecutorOptions options = TinyOptions(4);
    options.before_step = [victim](int rank, uint64_t step) {
      if (rank == victim && step == 5) throw std::runtime_error("injected");
    };
    Meetings meetings;
    meetings.Watch(&options);
    auto engine = StartTiny(options);
    auto sink = std::make_shared<CollectingSink>();
    auto handle = engine->Submit(MakeRequest(0, 10, 100), sink);
    ASSERT_TRUE(handle.ok());
    ExpectEngineDown(*engine, *sink, StrCat("rank ", victim, ": injected"));
    meetings.ExpectEnded(StrCat("rank ", victim, ": injected"));
    if (::testing::Test::HasFailure()) break;  // whoever lost patience has taken its time
  }
}

// The others wait for it in their first sums, and not for as long as their patience lasts.
TEST(TensorParallel, ARankThatThrowsInItsWarmUpEndsTheStart) {
  class Recording : public ForwardingCommunicator {
   public:
    Recording(std::unique_ptr<Communicator> member, std::string* error)
        : ForwardingCommunicator(std::move(member)), error_(*error) {}
    bool AllReduceSum(Stream& stream, const TensorView& x) override {
      const bool summed = member().AllReduceSum(stream, x);
      if (!summed) error_ = error();
      return summed;
    }

   private:
    std::string& error_;
  };
  LocalExecutorOptions options = TinyOptions(4);
  std::array<std::string, 4> errors;
  options.before_step = [](int rank, uint64_t) {
    if (rank == 1) throw std::runtime_error("injected");
  };
  options.wrap_communicator = [&](int rank, std::unique_ptr<Communicator> member) {
    return std::make_unique<Recording>(std::move(member), &errors[static_cast<size_t>(rank)]);
  };
  auto checkpoint = Checkpoint::Open(StrCat(ALTIPLANO_SOURCE_DIR, "/tests/data/tiny"));
  ASSERT_TRUE(checkpoint.ok());
  EXPECT_EQ(LocalExecutor::Create(**checkpoint, options).status().message(), "rank 1: injected");
  for (int rank : {0, 2, 3}) EXPECT_EQ(errors[static_cast<size_t>(rank)], "rank 1: injected") << rank;
}

TEST(TensorParallel, ARankThatHangsIsNotWaitedForForEver) {
  for (int victim : {0, 2}) ExpectHangIsNoticed(TinyOptions(4), victim, StrCat("rank ", victim));
}

TEST(TensorParallel, ChecksNameTheRankThatComputesSomethingElse) {
  auto checkpoint = Checkpoint::Open(StrCat(ALTIPLANO_SOURCE_DIR, "/tests/data/tiny"));
  ASSERT_TRUE(checkpoint.ok());
  LocalExecutorOptions options = TinyOptions(4);
  auto weights = LocalExecutor::LoadShared(**checkpoint, options);
  ASSERT_TRUE(weights.ok());
  options.weights = *weights;
  const Answers unchecked = Ask(*StartTiny(options));
  options.check_ranks = true;
  auto engine = StartTiny(options);
  const Answers checked = Ask(*engine);
  for (size_t i = 0; i < unchecked.tokens.size(); ++i) ExpectSame(unchecked.tokens[i], checked.tokens[i], 0);

  // A number of which each rank has a copy is damaged in one of them.
  (**weights)[2]->layers[1].ffn_norm.as<float>()[3] *= 1.001f;
  auto sink = std::make_shared<CollectingSink>();
  auto handle = engine->Submit(MakeRequest(0, 10, 100), sink);
  ASSERT_TRUE(handle.ok());
  ExpectEngineDown(*engine, *sink, "rank 2 differs from the others in the norm of call ");
  const auto again = LocalExecutor::Create(**checkpoint, options);
  EXPECT_THAT(again.status().message(), HasSubstr("rank 2 differs from the others in the norm of call 4"));
}

// A failed group is made again from the checkpoint and answers as before; cached blocks of the failed one are not used.
TEST(TensorParallel, AFailedGroupIsMadeAgain) {
  auto checkpoint = Checkpoint::Open(StrCat(ALTIPLANO_SOURCE_DIR, "/tests/data/tiny"));
  ASSERT_TRUE(checkpoint.ok());
  LocalExecutorOptions options = TinyOptions(2);
  options.before_step = [failed = std::make_shared<std::atomic<bool>>(false)](int rank, uint64_t step) {
    if (rank == 1 && step >= 30 && !failed->exchange(true)) throw std::runtime_error("injected");
  };
  auto executor = LocalExecutor::Create(**checkpoint, options);
  ASSERT_TRUE(executor.ok());
  EngineOptions engine_options;
  engine_options.scheduler = (*executor)->scheduler_options();
  engine_options.restart = [&](const auto&) -> StatusOr<std::unique_ptr<Executor>> {
    return std::unique_ptr<Executor>(std::move(*LocalExecutor::Create(**checkpoint, options)));
  };
  auto engine = Engine::Start(engine_options, std::move(*executor));
  ASSERT_TRUE(engine.ok());
  auto ask = [&](int max_new_tokens) {
    auto sink = std::make_shared<CollectingSink>();
    auto handle = (*engine)->Submit(MakeRequest(0, 40, max_new_tokens), sink);
    EXPECT_TRUE(handle.ok()) << handle.status().ToString();
    return sink->WaitForEnd();
  };
  const std::vector<Event> before = ask(20);
  ASSERT_TRUE(before.back().status.ok());
  EXPECT_EQ(ask(100).back().status.code(), Code::kUnavailable);
  while (!(*engine)->healthy()) std::this_thread::sleep_for(milliseconds(5));
  EXPECT_FALSE((*engine)->failed_for_good());
  const std::vector<Event> after = ask(20);
  ASSERT_TRUE(after.back().status.ok()) << after.back().status.ToString();
  EXPECT_EQ(after.front().cached_tokens, 0u);
  EXPECT_EQ(TokensOf(after), TokensOf(before));
}

}  // namespace
}  // namespace altiplano
