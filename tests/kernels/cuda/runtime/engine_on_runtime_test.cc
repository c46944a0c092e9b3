// The engine down to the runtime: whatever it asks, of whichever GPU and thread, the runtime grants. Kernels do nothing
// there, so answers say nothing.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "server/engine/engine.h"
#include "server/engine/local_executor.h"
#include "server/model/random_checkpoint.h"
#include "tests/kernels/cuda/runtime/fake_cudart_testlib.h"
#include "tests/server/engine/engine_testlib.h"

namespace altiplano {
namespace {

using testing::IsEmpty;

const Checkpoint& Model() {
  static const std::unique_ptr<Checkpoint> checkpoint = [] {
    ModelConfig config;
    config.vocab = 515;  // odd: with two ranks the last shard of it is padded
    config.hidden = 128;
    config.layers = 2;
    config.q_heads = 4;
    config.kv_heads = 2;
    config.head_dim = 64;
    config.ffn = 192;
    config.max_position = 2048;
    return MakeRandomCheckpoint({.config = config});
  }();
  return *checkpoint;
}

class EngineOnRuntimeTest : public testing::TestWithParam<int> {
 protected:
  void SetUp() override { Reset(fake_cudart::AllArchitectures()); }
  static void Reset(const fake_cudart::Machine& machine) {
    fake_cudart::Reset(machine);
    // What kernels would have left: any token.
    fake_cudart::AfterCopiesToHost([](void* data, size_t bytes) {
      if (bytes % sizeof(SampleResult) != 0) return;
      auto* results = static_cast<SampleResult*>(data);
      for (size_t i = 0; i < bytes / sizeof(SampleResult); ++i) {
        results[i].token = 1;
        results[i].finite = true;
        results[i].num_top = 0;
      }
    });
  }
  void TearDown() override {
    std::vector<std::string> refusals = fake_cudart::Refusals();
    std::erase(refusals, "cudaDeviceEnablePeerAccess: cudaErrorPeerAccessAlreadyEnabled");  // and no harm done
    EXPECT_THAT(refusals, IsEmpty());
    EXPECT_EQ(fake_cudart::Left(), 0);
  }

  // The second and the third GPU of the kind, so that who forgets to choose takes another.
  static int first() { return fake_cudart::FirstOf(GetParam()) + 1; }
  static int second() { return first() + 1; }
  static LocalExecutorOptions Options(std::vector<int> gpus) {
    LocalExecutorOptions options;
    options.device = Device::kCuda;
    options.gpus = std::move(gpus);
    options.threads = 1;
    options.readers = 2;
    options.page_size = 64;
    options.token_budget = 128;  // beyond what our own kernels take
    options.max_running = 96;    // likewise
    options.max_context = 1024;
    options.kv_bytes = 16 << 20;
    options.on_step_times = [](const StepTimes&) {};
    options.adjust_group = [](CudaGroupOptions& group) { group.nccl = nullptr; };
    return options;
  }
  // On a thread that has chosen no GPU yet.
  static void Serve(const LocalExecutorOptions& options) {
    std::thread([&] { ServeHere(options); }).join();
  }
  // Prompts of all lengths, penalties, log-probabilities, biases: all kernels there are.
  static void ServeHere(const LocalExecutorOptions& options) {
    auto executor = LocalExecutor::Create(Model(), options);
    ASSERT_TRUE(executor.ok()) << executor.status().ToString();
    EngineOptions engine_options;
    engine_options.scheduler = (*executor)->scheduler_options();
    auto engine = Engine::Start(engine_options, std::move(*executor));
    ASSERT_TRUE(engine.ok()) << engine.status().ToString();
    std::vector<RequestHandle> handles;
    std::vector<std::shared_ptr<CollectingSink>> sinks;
    for (int i = 0; i < 40; ++i) {
      auto request = std::make_shared<Request>();
      request->id = std::to_string(i);
      for (int token = 0; token < 1 + i * 37 % 200; ++token) request->prompt.push_back(token % 500);
      request->sampling.temperature = static_cast<float>(i % 2);
      if (i % 3 == 1) request->sampling.top_p = 0.9f;
      if (i % 5 == 1) request->sampling.top_k = 20;
      if (i % 7 == 1) request->sampling.repetition_penalty = 1.1f;
      if (i % 4 == 1) request->sampling.top_logprobs = 5;
      if (i % 6 == 1) request->sampling.logit_bias.emplace_back(3, 1.0f);
      if (i % 11 == 1) request->sampling.prompt_top_logprobs = 2;
      request->stop.max_new_tokens = 5;
      request->stop.ignore_eos = true;
      sinks.push_back(std::make_shared<CollectingSink>());
      auto handle = (*engine)->Submit(request, sinks.back());
      ASSERT_TRUE(handle.ok()) << handle.status().ToString();
      handles.push_back(std::move(*handle));
    }
    for (const auto& sink : sinks) {
      const std::vector<Event> events = sink->WaitForEnd();
      EXPECT_TRUE(events.back().status.ok()) << events.back().status.ToString();
      EXPECT_EQ(TokensOf(events).size(), 5u);
    }
  }
};

TEST_P(EngineOnRuntimeTest, OneGpu) {
  Serve(Options({first()}));
  EXPECT_EQ(fake_cudart::Contexts(), std::set<int>{first()});
  const fake_cudart::Counts counts = fake_cudart::Count(first());
  EXPECT_GT(counts.launches, 500);
  EXPECT_EQ(counts.overlapping > 0, GetParam() >= 90);
  EXPECT_GT(counts.captured, 100);
  EXPECT_GT(counts.graph_launches, 0);
  EXPECT_EQ(counts.tensor_maps > 0, GetParam() >= 90);
}

TEST_P(EngineOnRuntimeTest, RanksWithAGpuEach) {
  LocalExecutorOptions options = Options({second(), first()});
  options.ranks = 2;
  Serve(options);
  EXPECT_EQ(fake_cudart::Contexts(), (std::set<int>{first(), second()}));
  for (const int gpu : {first(), second()}) {
    EXPECT_GT(fake_cudart::Count(gpu).launches, 500);
    EXPECT_GT(fake_cudart::Count(gpu).graph_launches, 0);
  }
}

// A rank's GPU is half another's: it has fewer graphs, and so have the others.
TEST_P(EngineOnRuntimeTest, AsManyGraphsAsThereIsMemoryForOnAllRanks) {
  fake_cudart::Machine machine = fake_cudart::AllArchitectures();
  machine.graph_bytes = 4 << 20;
  machine.crowded = first();
  Reset(machine);
  LocalExecutorOptions options = Options({second(), first()});
  options.ranks = 2;
  std::thread([&] {
    const auto executor = LocalExecutor::Create(Model(), options);
    ASSERT_TRUE(executor.ok()) << executor.status().ToString();
    EXPECT_EQ(fake_cudart::Graphs(first()), fake_cudart::Graphs(second()));
    EXPECT_GT(fake_cudart::Graphs(first()), 2);
    EXPECT_LT(fake_cudart::Graphs(first()), 9);
  }).join();
  Serve(options);
  EXPECT_EQ(fake_cudart::Count(first()).graph_launches, fake_cudart::Count(second()).graph_launches);
}

TEST_P(EngineOnRuntimeTest, StagesWithAGpuEach) {
  LocalExecutorOptions options = Options({second(), first()});
  options.stages = 2;
  Serve(options);
  EXPECT_EQ(fake_cudart::Contexts(), (std::set<int>{first(), second()}));
  for (const int gpu : {first(), second()}) EXPECT_GT(fake_cudart::Count(gpu).graph_launches, 0);
}

INSTANTIATE_TEST_SUITE_P(Architectures, EngineOnRuntimeTest, testing::Values(80, 89, 90),
                         [](const auto& test) { return "Sm" + std::to_string(test.param); });

}  // namespace
}  // namespace altiplano
