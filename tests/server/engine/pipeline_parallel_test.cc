// The engine on a pipeline of stages: the same bits as without, steps that overlap, and an end for everybody when a
// rank of any stage fails.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <condition_variable>
#include <mutex>
#include <random>
#include <stdexcept>

#include "server/base/strings.h"
#include "server/engine/engine.h"
#include "server/engine/local_executor.h"
#include "server/model/random_checkpoint.h"
#include "tests/server/engine/engine_testlib.h"
#include "tests/server/engine/parallel_testlib.h"

namespace altiplano {
namespace {

using ::testing::HasSubstr;

LocalExecutorOptions StageOptions(int stages, int ranks) {
  LocalExecutorOptions options = TinyOptions(ranks);
  options.stages = stages;
  return options;
}

void ExpectSameAnswers(const Answers& a, const Answers& b, float tolerance) {
  ASSERT_EQ(a.tokens.size(), b.tokens.size());
  for (size_t i = 0; i < a.tokens.size(); ++i) {
    SCOPED_TRACE(StrCat("request ", i));
    ExpectSame(a.tokens[i], b.tokens[i], tolerance);
    ExpectSame(a.prompt_scores[i], b.prompt_scores[i], tolerance);
  }
}

TEST(PipelineParallel, StagesChangeNoBit) {
  for (int ranks : {1, 2}) {
    const Answers whole = Ask(*StartTiny(StageOptions(1, ranks)));
    ASSERT_EQ(whole.tokens[4].size(), 40u);
    for (int stages : {2, 3, 4}) {  // 4 layers: of 3 stages one has two
      SCOPED_TRACE(StrCat(stages, " stages of ", ranks, " ranks"));
      ExpectSameAnswers(whole, Ask(*StartTiny(StageOptions(stages, ranks))), 0);
    }
  }
}

TEST(PipelineParallel, StagesChangeNoBitOfModelsOfAnyShape) {
  std::mt19937 random(20);
  auto between = [&](int low, int high) {
    return low + static_cast<int>(random() % static_cast<unsigned>(high - low + 1));
  };
  for (int i = 0; i < 8; ++i) {
    const int ranks = 1 + i % 2;
    RandomModel model = ParseRandomModel("random:1b").value();
    model.seed = random();
    ModelConfig& c = model.config;
    c.layers = between(2, 7);
    c.head_dim = 16 * between(1, 4);
    c.kv_heads = ranks * between(1, 2);
    c.q_heads = c.kv_heads * between(1, 3);
    c.hidden = 16 * between(2, 8);
    c.ffn = 16 * ranks * between(1, 8);
    c.vocab = 512 + between(0, 99);
    c.max_position = 512;
    c.tied_embeddings = random() % 2 == 0;
    SCOPED_TRACE(StrCat(c.layers, " layers, hidden ", c.hidden, c.tied_embeddings ? ", tied" : ""));
    const auto checkpoint = MakeRandomCheckpoint(model);
    LocalExecutorOptions options = StageOptions(1, ranks);
    options.dtype = i % 3 == 0 ? DType::kBF16 : DType::kF32;
    const Answers whole = Ask(*StartModel(*checkpoint, options), 500);
    for (int stages : {2, static_cast<int>(c.layers)}) {
      options.stages = stages;
      ExpectSameAnswers(whole, Ask(*StartModel(*checkpoint, options), 500), 0);
    }
  }
}

TEST(PipelineParallel, RefusesMoreStagesThanLayers) {
  auto checkpoint = Checkpoint::Open(StrCat(ALTIPLANO_SOURCE_DIR, "/tests/data/tiny"));
  ASSERT_TRUE(checkpoint.ok());
  auto executor = LocalExecutor::Create(**checkpoint, StageOptions(5, 1));
  EXPECT_EQ(executor.status().code(), Code::kOutOfRange);
  EXPECT_THAT(executor.status().message(), HasSubstr("5 stages: it has 4 layers"));
}

// Stage 1 does not begin its first step before stage 0 has begun the second: that works only if a step is launched
// while the one before it is still in the pipeline.
TEST(PipelineParallel, AStageBeginsTheNextStepWhileALaterOneHasTheStepBefore) {
  std::mutex mutex;
  std::condition_variable changed;
  bool second_began = false, in_time = false;
  LocalExecutorOptions options = StageOptions(2, 1);
  options.before_step = [&](int rank, uint64_t step) {
    std::unique_lock lock(mutex);
    if (rank == 0 && step == 2) {
      second_began = true;
      changed.notify_all();
    }
    if (rank == 1 && step == 1) {
      in_time = changed.wait_for(lock, std::chrono::seconds(60), [&] { return second_began; });
    }
  };
  auto engine = StartTiny(options);
  auto sink = std::make_shared<CollectingSink>();
  auto handle = engine->Submit(MakeRequest(0, 200, 3), sink);  // five chunks
  ASSERT_TRUE(handle.ok());
  EXPECT_TRUE(sink->WaitForEnd().back().status.ok());
  EXPECT_TRUE(in_time);
}

// One token each: no step needs what the one before sampled, and still no id is left behind.
TEST(PipelineParallel, ManyRequestsOfOneTokenAndReusedSlots) {
  auto alone = StartTiny(StageOptions(1, 1)), engine = StartTiny(StageOptions(4, 1));
  std::vector<std::vector<TokenId>> expected, got;
  for (auto [target, tokens] : {std::pair{alone.get(), &expected}, {engine.get(), &got}}) {
    std::vector<std::shared_ptr<CollectingSink>> sinks;
    std::vector<RequestHandle> handles;
    for (int i = 0; i < 60; ++i) {
      sinks.push_back(std::make_shared<CollectingSink>());
      auto handle = target->Submit(MakeRequest(i, 3 + i % 40, i % 4 == 3 ? 5 : 1), sinks.back());
      ASSERT_TRUE(handle.ok()) << handle.status().ToString();
      handles.push_back(std::move(*handle));
    }
    for (auto& sink : sinks) tokens->push_back(TokensOf(sink->WaitForEnd()));
  }
  EXPECT_EQ(got, expected);
}

TEST(PipelineParallel, ARankThatThrowsEndsEveryStage) {
  for (int victim : {0, 1, 2, 5}) {  // 3 stages of 2
    SCOPED_TRACE(victim);
    LocalExecutorOptions options = StageOptions(3, 2);
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

// Whoever ends an executor from outside ends its collectives, and the links to the processes before and after it.
TEST(PipelineParallel, AnAbortReachesTheProcessesAroundThisOne) {
  LocalExecutorOptions options = StageOptions(2, 1);
  options.local_stages = 1;
  auto [before, previous] = MakeInProcessLink("rank 1", "rank 0", std::chrono::minutes(10));
  auto [next, after] = MakeInProcessLink("rank 0", "rank 1", std::chrono::minutes(10));
  options.outer_previous = {std::move(previous)};
  options.outer_next = {std::move(next)};
  auto checkpoint = Checkpoint::Open(StrCat(ALTIPLANO_SOURCE_DIR, "/tests/data/tiny"));
  ASSERT_TRUE(checkpoint.ok());
  auto executor = LocalExecutor::Create(**checkpoint, options);
  ASSERT_TRUE(executor.ok()) << executor.status().ToString();
  (*executor)->Abort("enough");
  EXPECT_EQ(before->error(), "enough");
  EXPECT_EQ(after->error(), "enough");
}

TEST(PipelineParallel, AnAbortReachesAllRanksOfThisProcess) {
  LocalExecutorOptions options = StageOptions(3, 2);
  Meetings meetings;
  meetings.Watch(&options);
  auto checkpoint = Checkpoint::Open(StrCat(ALTIPLANO_SOURCE_DIR, "/tests/data/tiny"));
  ASSERT_TRUE(checkpoint.ok());
  auto executor = LocalExecutor::Create(**checkpoint, options);
  ASSERT_TRUE(executor.ok()) << executor.status().ToString();
  (*executor)->Abort("enough");
  meetings.ExpectEnded("enough");
}

TEST(PipelineParallel, ARankThatHangsIsNotWaitedForForEver) {
  for (int victim : {0, 3, 5}) ExpectHangIsNoticed(StageOptions(3, 2), victim, "rank");
}

}  // namespace
}  // namespace altiplano
