// Two nodes with two simulated GPUs each, as threads of this process: real gRPC and sockets between them, and a
// stand-in for NCCL (tests/kernels/cuda/nccl/fake_nccl.cc).
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <future>
#include <stdexcept>

#include "kernels/cuda/sim/sim.h"
#include "server/base/strings.h"
#include "server/cluster/group.h"
#include "tests/server/cluster/free_address.h"
#include "tests/server/engine/engine_testlib.h"
#include "tests/server/engine/parallel_testlib.h"

namespace altiplano::cluster {
namespace {

using ::testing::HasSubstr;

class GroupOnGpuTest : public ::testing::Test {
 protected:
  void SetUp() override { sim::SetGpus(4); }
  void TearDown() override { sim::SetGpus(1); }

  GroupOptions Options(int rank) const {
    GroupOptions options;
    options.place = {rank, 2, address_};
    options.terms = {{"model", "tiny"}};
    options.join_patience = std::chrono::minutes(1);
    return options;
  }
  // Of the node: two stages of one rank, or one of two.
  static LocalExecutorOptions Ranks(int node, int ranks) {
    LocalExecutorOptions options = TinyOptions(ranks);
    options.device = Device::kCuda;
    options.dtype = DType::kBF16;
    options.token_budget = 32;
    options.max_context = 64;
    options.stages = ranks == 1 ? 4 : 2;
    options.gpus = {2 * node, 2 * node + 1};
    options.patience = std::chrono::minutes(10);
    return options;
  }
  std::unique_ptr<Engine> StartEngine(Leader& leader, const LocalExecutorOptions& options) {
    auto formed = leader.Form(*checkpoint_, options);
    EXPECT_TRUE(formed.ok()) << formed.status().ToString();
    if (!formed.ok()) return nullptr;
    EngineOptions engine_options;
    engine_options.scheduler = formed->scheduler;
    return std::move(*Engine::Start(engine_options, std::move(formed->executor)));
  }
  std::future<Status> StartFollower(const LocalExecutorOptions& options) {
    return std::async(std::launch::async, [=, this] { return Follow(Options(1), *checkpoint_, options, [] {}); });
  }
  static std::vector<Event> Ask(Engine& engine, int max_new_tokens) {
    auto request = std::make_shared<Request>();
    request->id = "request";
    for (int i = 0; i < 40; ++i) request->prompt.push_back(i * 37 % 2048);  // in two chunks
    request->sampling.temperature = 0;
    request->stop.max_new_tokens = max_new_tokens;
    request->stop.ignore_eos = true;
    auto sink = std::make_shared<CollectingSink>();
    auto handle = engine.Submit(request, sink);
    EXPECT_TRUE(handle.ok()) << handle.status().ToString();
    return sink->WaitForEnd();
  }

  const std::string address_ = FreeAddress();
  const std::unique_ptr<Checkpoint> checkpoint_ =
      std::move(*Checkpoint::Open(StrCat(ALTIPLANO_SOURCE_DIR, "/tests/data/tiny")));
};

TEST_F(GroupOnGpuTest, NodesAnswerAsOneProcessDoes) {
  for (int ranks : {1, 2}) {
    SCOPED_TRACE(StrCat(ranks, " ranks a stage"));
    LocalExecutorOptions alone = Ranks(0, ranks);
    alone.stages = 1;
    auto executor = std::move(*LocalExecutor::Create(*checkpoint_, alone));
    EngineOptions engine_options;
    engine_options.scheduler = executor->scheduler_options();
    const auto expected = Ask(**Engine::Start(engine_options, std::move(executor)), 4);

    auto leader = std::move(*Leader::Start(Options(0)));
    auto follower = StartFollower(Ranks(1, ranks));
    {
      auto engine = StartEngine(*leader, Ranks(0, ranks));
      ASSERT_NE(engine, nullptr);
      const auto answer = Ask(*engine, 4);
      EXPECT_EQ(TokensOf(answer), TokensOf(expected));
      EXPECT_EQ(TokensOf(answer).size(), 4u);
    }
    EXPECT_TRUE(follower.get().ok()) << "the leader has stopped in order";
  }
}

TEST_F(GroupOnGpuTest, AnyNodesFailureEndsTheGroupOnAll) {
  LocalExecutorOptions failing = Ranks(1, 1);
  failing.before_step = [](int rank, uint64_t step) {
    if (rank == 3 && step == 3) throw std::runtime_error("rank 3 has caught fire");
  };
  auto leader = std::move(*Leader::Start(Options(0)));
  auto follower = StartFollower(failing);
  auto engine = StartEngine(*leader, Ranks(0, 1));
  ASSERT_NE(engine, nullptr);
  const Status end = Ask(*engine, 20).back().status;
  EXPECT_EQ(end.reason(), "ENGINE_DOWN");
  EXPECT_THAT(end.message(), HasSubstr("rank 3 has caught fire"));
  EXPECT_FALSE(engine->healthy());
  EXPECT_THAT(follower.get().message(), HasSubstr("rank 3 has caught fire"));
}

}  // namespace
}  // namespace altiplano::cluster
