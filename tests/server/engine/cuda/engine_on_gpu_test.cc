// The engine on a (simulated) GPU against the engine on the CPU: a random model of a few thousand weights, one set of
// requests, the same answers. And what only a GPU has: its memory, and errors that stick.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstddef>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "kernels/comm/forwarding.h"
#include "kernels/cuda/sim/sim.h"
#include "server/base/log.h"
#include "server/base/strings.h"
#include "server/engine/engine.h"
#include "server/engine/local_executor.h"
#include "server/engine/replica_set.h"
#include "server/model/checkpoint_tensors.h"
#include "server/model/random_checkpoint.h"
#include "tests/kernels/cuda/simulator_nccl_testlib.h"
#include "tests/server/engine/engine_testlib.h"
#include "tests/server/model/checkpoint_testlib.h"

namespace altiplano {
namespace {

using ::testing::AnyOf;
using ::testing::HasSubstr;
using ::testing::MatchesRegex;

constexpr int32_t kVocab = 97;  // odd: with two ranks the last shard of it is padded

// Two layers; heads of 64, which the tensor-core attention takes. Weights are normal, so that logits differ enough for
// greedy choices to be the same on both devices.
ModelFiles RandomModel() {
  ModelFiles files = SmallModel("BF16");
  files.config["vocab_size"] = kVocab;
  files.config["hidden_size"] = 64;
  files.config["num_attention_heads"] = 2;
  files.config["num_key_value_heads"] = 1;
  files.config["head_dim"] = 64;
  files.config["intermediate_size"] = 64;
  files.tensors.clear();
  std::mt19937 random(5);
  for (const WantedTensor& wanted : WantedTensors(*ParseModelConfig(files.config.dump()))) {
    const bool is_norm = wanted.shape.size() == 1;
    const int64_t columns = wanted.shape.back(), rows = is_norm ? 1 : wanted.shape[0];
    const float deviation = is_norm ? 0.1f : 2 / std::sqrt(static_cast<float>(columns));
    std::normal_distribution<float> normal(is_norm ? 1 : 0, deviation);
    std::string data;
    for (int64_t i = 0; i < rows * columns; ++i) {
      const BF16 x = ToBF16(normal(random));
      data.append(reinterpret_cast<const char*>(&x), sizeof(x));
    }
    files.tensors.push_back({wanted.name, "BF16", wanted.shape, data});
  }
  return files;
}

const Checkpoint& Model() {
  static const TempFolder folder;
  static const std::unique_ptr<Checkpoint> checkpoint = [] {
    RandomModel().WriteTo(folder);
    auto opened = Checkpoint::Open(folder.path());
    EXPECT_TRUE(opened.ok()) << opened.status().ToString();
    return std::move(*opened);
  }();
  return *checkpoint;
}

LocalExecutorOptions Options(Device device, DType dtype) {
  LocalExecutorOptions options;
  options.device = device;
  options.dtype = dtype;
  options.threads = 1;
  options.readers = 2;
  options.page_size = 4;
  options.token_budget = 24;
  options.max_running = 4;
  options.max_context = 64;
  return options;
}

std::unique_ptr<Engine> Start(LocalExecutorOptions options) {
  auto executor = LocalExecutor::Create(Model(), std::move(options));
  EXPECT_TRUE(executor.ok()) << executor.status().ToString();
  if (!executor.ok()) return nullptr;
  EngineOptions engine_options;
  engine_options.scheduler = (*executor)->scheduler_options();
  auto engine = Engine::Start(engine_options, std::move(*executor));
  EXPECT_TRUE(engine.ok()) << engine.status().ToString();
  return std::move(*engine);
}

std::shared_ptr<Request> MakeRequest(int index, int prompt_tokens, int max_new_tokens) {
  auto request = std::make_shared<Request>();
  request->id = StrCat("request-", index);
  for (int i = 0; i < prompt_tokens; ++i) request->prompt.push_back((index * 31 + i * 17 + 3) % kVocab);
  request->sampling.temperature = 0;
  request->stop.max_new_tokens = max_new_tokens;
  request->stop.ignore_eos = true;
  return request;
}

struct Call {
  RequestHandle handle;
  std::shared_ptr<CollectingSink> sink;
};

Call Submit(Engine& engine, std::shared_ptr<const Request> request) {
  Call call;
  call.sink = std::make_shared<CollectingSink>();
  auto handle = engine.Submit(std::move(request), call.sink);
  EXPECT_TRUE(handle.ok()) << handle.status().ToString();
  if (handle.ok()) call.handle = std::move(*handle);
  return call;
}

std::vector<std::vector<Event>> RunAll(Engine& engine, const std::vector<std::shared_ptr<Request>>& requests) {
  std::vector<Call> calls;
  for (const auto& request : requests) calls.push_back(Submit(engine, request));
  std::vector<std::vector<Event>> answers;
  for (const Call& call : calls) {
    answers.push_back(call.sink->WaitForEnd());
    EXPECT_TRUE(answers.back().back().status.ok()) << answers.back().back().status.ToString();
  }
  return answers;
}

std::vector<TokenScore> ScoresOf(const std::vector<Event>& events) {
  std::vector<TokenScore> scores;
  for (const Event& event : events) {
    scores.insert(scores.end(), event.prompt_scores.begin(), event.prompt_scores.end());
    if (event.kind == Event::Kind::kToken) scores.push_back(event.score);
  }
  return scores;
}

void ExpectSameBits(const std::vector<TokenScore>& a, const std::vector<TokenScore>& b) {
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i) {
    EXPECT_EQ(a[i].token, b[i].token) << i;
    EXPECT_EQ(a[i].logprob, b[i].logprob) << i;
    ASSERT_EQ(a[i].top.size(), b[i].top.size());
    for (size_t k = 0; k < a[i].top.size(); ++k) {
      EXPECT_EQ(a[i].top[k].token, b[i].top[k].token) << i;
      EXPECT_EQ(a[i].top[k].logprob, b[i].top[k].logprob) << i;
    }
  }
}

// Prompts in chunks beside decodes, in one batch: penalties, draws, bias, alternatives, prompt log-probabilities,
// siblings, EOS held back.
std::vector<std::shared_ptr<Request>> AllKinds() {
  std::vector<std::shared_ptr<Request>> requests;
  requests.push_back(MakeRequest(0, 40, 6));
  requests.push_back(MakeRequest(1, 7, 12));
  requests.back()->sampling.repetition_penalty = 1.3f;
  requests.back()->sampling.frequency_penalty = 0.7f;
  requests.back()->sampling.presence_penalty = 0.2f;
  requests.push_back(MakeRequest(2, 30, 3));
  requests.back()->sampling.prompt_top_logprobs = 2;
  requests.back()->sampling.top_logprobs = 3;
  requests.push_back(MakeRequest(3, 5, 8));
  requests.back()->sampling.temperature = 0.8f;
  requests.back()->sampling.top_p = 0.9f;
  requests.back()->sampling.top_k = 20;
  requests.back()->sampling.seed = 11;
  requests.back()->num_sequences = 2;
  requests.push_back(MakeRequest(4, 9, 6));
  requests.back()->sampling.logit_bias = {{50, 100.0f}};
  requests.push_back(MakeRequest(5, 3, 6));
  requests.back()->stop.ignore_eos = false;
  requests.back()->stop.min_new_tokens = 4;
  requests.back()->sampling.logit_bias = {{2, 100.0f}};  // EOS, as soon as it may
  return requests;
}

// Both add up in f32, in different orders; values are of the order of 10.
TEST(EngineOnGpu, AnswersAreThoseOfTheCpu) {
  const auto on_gpu = RunAll(*Start(Options(Device::kCuda, DType::kF32)), AllKinds());
  const auto on_cpu = RunAll(*Start(Options(Device::kCpu, DType::kF32)), AllKinds());
  for (size_t i = 0; i < on_gpu.size(); ++i) {
    SCOPED_TRACE(StrCat("request ", i));
    for (uint32_t sequence : {0, 1}) EXPECT_EQ(TokensOf(on_gpu[i], sequence), TokensOf(on_cpu[i], sequence));
    const std::vector<TokenScore> gpu = ScoresOf(on_gpu[i]), cpu = ScoresOf(on_cpu[i]);
    ASSERT_EQ(gpu.size(), cpu.size());
    if (i == 3) continue;  // its siblings' events come in any order
    for (size_t t = 0; t < gpu.size(); ++t) {
      EXPECT_NEAR(gpu[t].logprob, cpu[t].logprob, 1e-4) << t;
      ASSERT_EQ(gpu[t].top.size(), cpu[t].top.size());
      for (size_t k = 0; k < gpu[t].top.size(); ++k) EXPECT_EQ(gpu[t].top[k].token, cpu[t].top[k].token) << t;
    }
  }
  EXPECT_EQ(ScoresOf(on_gpu[2]).size(), 29u + 3u);
  EXPECT_EQ(TokensOf(on_gpu[4]), std::vector<TokenId>(6, 50));
  EXPECT_EQ(TokensOf(on_gpu[5]).size(), 5u);
  EXPECT_EQ(FinishOf(on_gpu[5]), FinishReason::kEos);
}

// With two ranks sums are split, and each rank has half of the heads and of the vocabulary, the latter padded. They
// share the GPU and are compared with each other.
TEST(EngineOnGpu, TwoRanksAnswerAsTwoOnTheCpu) {
  LocalExecutorOptions options = Options(Device::kCpu, DType::kF32);
  options.ranks = 2;
  const auto on_cpu = RunAll(*Start(options), AllKinds());
  options.device = Device::kCuda;
  options.patience = std::chrono::minutes(10);
  options.gpus = {0, 0};
  options.check_ranks = true;
  const auto on_gpu = RunAll(*Start(options), AllKinds());
  for (size_t i = 0; i < on_gpu.size(); ++i) {
    SCOPED_TRACE(StrCat("request ", i));
    for (uint32_t sequence : {0, 1}) EXPECT_EQ(TokensOf(on_gpu[i], sequence), TokensOf(on_cpu[i], sequence));
    const std::vector<TokenScore> gpu = ScoresOf(on_gpu[i]), cpu = ScoresOf(on_cpu[i]);
    ASSERT_EQ(gpu.size(), cpu.size());
    for (size_t t = 0; i != 3 && t < gpu.size(); ++t) EXPECT_NEAR(gpu[t].logprob, cpu[t].logprob, 1e-4) << t;
  }
}

// Stages split no sum: to the bit as without them. Each stage has a GPU of its own; its ranks share it, which keeps a
// real NCCL out.
TEST(EngineOnGpu, StagesChangeNoBitOfAnAnswer) {
  sim::SetGpus(2);
  for (int ranks : {1, 2}) {
    SCOPED_TRACE(StrCat("2 stages of ", ranks));
    LocalExecutorOptions options = Options(Device::kCuda, DType::kBF16);
    options.ranks = ranks;
    options.patience = std::chrono::minutes(10);
    options.gpus.assign(static_cast<size_t>(ranks), 0);
    const auto whole = RunAll(*Start(options), AllKinds());
    options.stages = 2;
    options.gpus.insert(options.gpus.end(), static_cast<size_t>(ranks), 1);
    const auto staged = RunAll(*Start(options), AllKinds());
    for (size_t i = 0; i < whole.size(); ++i) {
      SCOPED_TRACE(StrCat("request ", i));
      for (uint32_t sequence : {0, 1}) EXPECT_EQ(TokensOf(staged[i], sequence), TokensOf(whole[i], sequence));
      const std::vector<TokenScore> a = ScoresOf(staged[i]), b = ScoresOf(whole[i]);
      ASSERT_EQ(a.size(), b.size());
      if (i != 3) ExpectSameBits(a, b);  // its siblings' events come in any order
    }
  }
  sim::SetGpus(1);
}

TEST(EngineOnGpu, AStageThatIsLostOrDoesNotComeEndsEverything) {
  sim::SetGpus(2);
  LocalExecutorOptions options = Options(Device::kCuda, DType::kBF16);
  options.stages = 2;
  options.patience = std::chrono::seconds(3);
  std::atomic<bool> release = false;
  for (bool hangs : {true, false}) {
    options.before_step = [&](int rank, uint64_t step) {
      if (rank != 0 || step != 3) return;
      if (!hangs) sim::LoseGpu(0, "the GPU has fallen off the bus");
      while (hangs && !release) std::this_thread::sleep_for(std::chrono::milliseconds(5));
    };
    const auto engine = Start(options);
    ASSERT_NE(engine, nullptr);
    const Call call = Submit(*engine, MakeRequest(0, 5, 50));
    const Status end = call.sink->WaitForEnd().back().status;
    release = true;
    EXPECT_EQ(end.reason(), "ENGINE_DOWN");
    EXPECT_THAT(end.message(), HasSubstr(hangs ? "no word for 3000 ms from rank 0" : "fallen off the bus"));
  }
  sim::LoseGpu(0, "");
  sim::SetGpus(1);
}

TEST(EngineOnGpu, ARankThatDoesNotComeEndsEverything) {
  LocalExecutorOptions options = Options(Device::kCuda, DType::kF32);
  options.ranks = 2;
  options.gpus = {0, 0};
  options.patience = std::chrono::seconds(3);
  std::atomic<bool> release = false;
  options.before_step = [&](int rank, uint64_t step) {
    while (rank == 1 && step == 3 && !release) std::this_thread::sleep_for(std::chrono::milliseconds(5));
  };
  ::testing::internal::CaptureStderr();
  const auto engine = Start(options);
  ASSERT_NE(engine, nullptr);
  const Call call = Submit(*engine, MakeRequest(0, 5, 50));
  const Status end = call.sink->WaitForEnd().back().status;
  release = true;
  log::Flush();
  const std::string logged = ::testing::internal::GetCapturedStderr();
  EXPECT_EQ(end.reason(), "ENGINE_DOWN");
  EXPECT_THAT(logged, AllOf(HasSubstr("ranks on GPUs have failed"),
                            HasSubstr("0 (GPU 0, PCI simulated 0), 1 (GPU 0, PCI simulated 0)")));
  // The other rank's kernel says so, or the executor where the simulator takes long to come to that kernel.
  EXPECT_THAT(end.message(),
              AnyOf(HasSubstr("no word for 3000 ms from rank 1"), HasSubstr("rank 1 (GPU 0, PCI simulated 0) hangs")));
}

TEST(EngineOnGpu, RefusesMoreRanksThanThereAreGpus) {
  LocalExecutorOptions options = Options(Device::kCuda, DType::kF32);
  options.ranks = 2;
  const auto executor = LocalExecutor::Create(Model(), options);
  EXPECT_EQ(executor.status().code(), Code::kUnavailable);
  EXPECT_EQ(executor.status().message(), "device cuda with 2 ranks: no simulated GPU 1, only 0");
}

// A GPU that is lost takes the replica along that it belongs to, and no other.
TEST(EngineOnGpu, ReplicasHaveGpusOfTheirOwn) {
  sim::SetGpus(2);
  const size_t all = QueryMemory(Device::kCuda, 0).free_bytes;
  LocalExecutorOptions options = Options(Device::kCuda, DType::kBF16);
  const auto expected = TokensOf(RunAll(*Start(options), {MakeRequest(0, 9, 5)})[0]);
  {
    std::vector<std::unique_ptr<Engine>> engines;
    options.gpus = {0};
    engines.push_back(Start(options));
    EXPECT_LT(QueryMemory(Device::kCuda, 0).free_bytes, all);
    EXPECT_EQ(QueryMemory(Device::kCuda, 1).free_bytes, all);
    options.gpus = {1};
    options.kv_bytes = 40 * 2 * 2 * 4 * 64 * sizeof(BF16);  // 40 blocks
    engines.push_back(Start(options));
    EXPECT_LT(QueryMemory(Device::kCuda, 1).free_bytes, all);
    ReplicaSet replicas(std::move(engines), true);
    EXPECT_GT(replicas.loads()[0].scheduler.blocks_total, 40);
    EXPECT_EQ(replicas.loads()[1].scheduler.blocks_total, 40);

    const auto submit = [&](int index) {
      auto sink = std::make_shared<CollectingSink>();
      auto handle = replicas.Submit(MakeRequest(index, 9, index == 0 ? 5 : 50), sink);
      EXPECT_TRUE(handle.ok()) << handle.status().ToString();
      return std::pair(std::move(*handle), sink);
    };
    auto first = submit(0), second = submit(1);
    second.second->WaitFor(Event::Kind::kToken, 1);
    sim::LoseGpu(1, "the GPU has fallen off the bus");
    EXPECT_EQ(second.second->WaitForEnd().back().status.reason(), "ENGINE_DOWN");
    EXPECT_EQ(TokensOf(first.second->WaitForEnd()), expected);
    EXPECT_TRUE(replicas.loads()[0].healthy);
    EXPECT_FALSE(replicas.loads()[1].healthy);
    EXPECT_TRUE(replicas.healthy());
    EXPECT_EQ(TokensOf(submit(0).second->WaitForEnd()), expected);
  }
  sim::LoseGpu(1, "");
  sim::SetGpus(1);
}

// Alone and undisturbed, then all at once in a pool for half of them.
TEST(EngineOnGpu, BatchingAndPreemptionChangeNoToken) {
  LocalExecutorOptions options = Options(Device::kCuda, DType::kBF16);
  std::vector<std::vector<TokenId>> alone;
  {
    const auto engine = Start(options);
    for (int i = 0; i < 4; ++i) alone.push_back(TokensOf(RunAll(*engine, {MakeRequest(i, 9, 20)})[0]));
  }
  options.kv_bytes = 16 * 2 * 2 * 4 * 64 * sizeof(BF16);  // 16 blocks; four sequences grow to 32
  const auto engine = Start(options);
  std::vector<std::shared_ptr<Request>> requests;
  for (int i = 0; i < 4; ++i) {
    requests.push_back(MakeRequest(i, 9, 20));
    if (i == 3) requests.back()->sampling.frequency_penalty = 1e-6f;  // its counts are made anew too
  }
  const auto answers = RunAll(*engine, requests);
  uint32_t preemptions = 0;
  for (size_t i = 0; i < answers.size(); ++i) {
    EXPECT_EQ(TokensOf(answers[i]), alone[i]) << i;
    preemptions += answers[i].back().timing.preemptions;
  }
  EXPECT_GT(preemptions, 0u);
}

// One sequence after the other ends, the last one first, so that steps decode 6, 5, 4, 3, 2 and 1 of them, in graphs of
// 6, 4, 2 and 1.
std::vector<std::shared_ptr<Request>> EndingInTurn() {
  std::vector<std::shared_ptr<Request>> requests;
  for (int i = 0; i < 6; ++i) {
    requests.push_back(MakeRequest(i, 2 + i, 19 - 3 * i));
    requests.back()->sampling.top_logprobs = 3;
    if (i % 2 == 1) requests.back()->sampling.frequency_penalty = 0.5f;
  }
  return requests;
}

TEST(EngineOnGpu, GraphsChangeNoBit) {
  LocalExecutorOptions options = Options(Device::kCuda, DType::kBF16);
  options.max_running = 6;
  std::vector<std::vector<Event>> answers[2];
  size_t live_bytes[2];
  for (const bool graphs : {false, true}) {
    options.cuda_graphs = graphs;
    const uint64_t replays = sim::GraphLaunches();
    const auto engine = Start(options);
    live_bytes[graphs] = sim::LiveDeviceBytes();
    answers[graphs] = RunAll(*engine, EndingInTurn());
    // The longest answer has 19 tokens, and beside some of the first ones prompts of the others are computed.
    EXPECT_EQ(sim::GraphLaunches() - replays >= 10, graphs);
  }
  EXPECT_EQ(live_bytes[0], live_bytes[1]) << "graphs work in the memory that steps have anyway";
  for (size_t i = 0; i < answers[0].size(); ++i) {
    SCOPED_TRACE(StrCat("request ", i));
    ExpectSameBits(ScoresOf(answers[1][i]), ScoresOf(answers[0][i]));
  }
}

// The simulated GPU's time is the host's, which is no measure of anything; what is told must fit together.
TEST(EngineOnGpu, TellsOfEachStepsTimes) {
  for (const Device device : {Device::kCpu, Device::kCuda}) {
    LocalExecutorOptions options = Options(device, DType::kBF16);
    std::vector<StepTimes> steps;
    options.on_step_times = [&](const StepTimes& times) { steps.push_back(times); };
    TimePoint begin{}, end{};
    {
      const auto engine = Start(options);
      const size_t before = steps.size();
      EXPECT_EQ(before, 0u) << "the warm-up is no step";
      begin = Clock::Real().Now();
      RunAll(*engine, {MakeRequest(0, 40, 6)});  // in two chunks
    }
    end = Clock::Real().Now();
    ASSERT_GE(steps.size(), 7u);
    Duration of_device{};
    for (size_t i = 0; i < steps.size(); ++i) {
      SCOPED_TRACE(StrCat("step ", i));
      const StepTimes& times = steps[i];
      EXPECT_EQ(times.sequences, 1);
      EXPECT_EQ(times.decodes, i >= 2);
      EXPECT_EQ(times.from_graph, device == Device::kCuda && times.decodes);
      EXPECT_GT(times.issue, Duration(0));
      EXPECT_GT(times.device, Duration(0));
      EXPECT_GT(times.idle, Duration(0));
      // What was issued ran at once.
      EXPECT_LE(times.device, times.issue);
      if (i > 0) of_device += times.idle;
      of_device += times.device;
    }
    EXPECT_LE(of_device, end - begin);
  }
}

// The kernels between ranks are in the graphs too, and count their calls for themselves.
TEST(EngineOnGpu, GraphsOfTwoRanksChangeNoBit) {
  LocalExecutorOptions options = Options(Device::kCuda, DType::kBF16);
  options.ranks = 2;
  options.gpus = {0, 0};
  options.patience = std::chrono::minutes(10);
  std::vector<std::vector<Event>> answers[2];
  for (const bool graphs : {false, true}) {
    options.cuda_graphs = graphs;
    const uint64_t replays = sim::GraphLaunches();
    const auto requests = EndingInTurn();
    answers[graphs] = RunAll(*Start(options), {requests[0], requests[1], requests[2]});
    EXPECT_EQ(sim::GraphLaunches() > replays, graphs);
  }
  for (size_t i = 0; i < answers[0].size(); ++i) {
    SCOPED_TRACE(StrCat("request ", i));
    ExpectSameBits(ScoresOf(answers[1][i]), ScoresOf(answers[0][i]));
  }
}

// All of whose messages go by a stand-in for NCCL.
LocalExecutorOptions OptionsWithNccl() {
  LocalExecutorOptions options = Options(Device::kCuda, DType::kBF16);
  options.ranks = 2;
  options.patience = std::chrono::minutes(10);
  options.nccl_in_graphs = true;
  options.adjust_group = [](CudaGroupOptions& group) {
    group.nccl = &nccl_stand_in::Api();
    group.most_own_bytes = 0;
  };
  return options;
}

TEST(EngineOnGpu, GraphsWithNcclChangeNoBit) {
  sim::SetGpus(2);
  std::vector<std::vector<Event>> answers[3];
  for (const int graphs : {0, 1, 2}) {  // off, without NCCL's calls, with them
    LocalExecutorOptions options = OptionsWithNccl();
    options.cuda_graphs = graphs > 0;
    options.nccl_in_graphs = graphs == 2;
    const uint64_t replays = sim::GraphLaunches();
    const nccl_stand_in::Counts before = nccl_stand_in::Count();
    const auto requests = EndingInTurn();
    answers[graphs] = RunAll(*Start(options), {requests[0], requests[1], requests[2]});
    const nccl_stand_in::Counts after = nccl_stand_in::Count();
    EXPECT_EQ(sim::GraphLaunches() > replays, graphs == 2);
    EXPECT_EQ(after.captured_calls > before.captured_calls, graphs == 2);
    EXPECT_GT(after.calls - after.captured_calls, before.calls - before.captured_calls);
    EXPECT_EQ(after.communicators + after.memories, 0);
  }
  for (const int graphs : {1, 2}) {
    for (size_t i = 0; i < answers[0].size(); ++i) {
      SCOPED_TRACE(StrCat("request ", i));
      ExpectSameBits(ScoresOf(answers[graphs][i]), ScoresOf(answers[0][i]));
    }
  }
  sim::SetGpus(1);
}

// The other rank waits in a graph for NCCL's call. Nobody may wait for NCCL's abort until the graphs are gone.
TEST(EngineOnGpu, ARankThatFailsBesideGraphsWithNcclEndsEverythingAndAnotherEngineStarts) {
  sim::SetGpus(2);
  LocalExecutorOptions options = OptionsWithNccl();
  const auto expected = TokensOf(RunAll(*Start(options), {MakeRequest(0, 5, 8)})[0]);
  {
    LocalExecutorOptions failing = options;
    failing.before_step = [](int rank, uint64_t step) {
      if (rank != 1 || step != 5) return;
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
      throw std::runtime_error("rank 1 has caught fire");
    };
    const auto engine = Start(failing);
    ASSERT_NE(engine, nullptr);
    const Call call = Submit(*engine, MakeRequest(0, 5, 50));
    const Status end = call.sink->WaitForEnd().back().status;
    EXPECT_EQ(end.reason(), "ENGINE_DOWN");
    EXPECT_THAT(end.message(), HasSubstr("rank 1 has caught fire"));
  }
  EXPECT_EQ(nccl_stand_in::Count().communicators, 0);
  EXPECT_EQ(TokensOf(RunAll(*Start(options), {MakeRequest(0, 5, 8)})[0]), expected);
  sim::SetGpus(1);
}

// Notes the rows of each tensor that is summed alone: in each pass, the embedding's and the last block's.
class NotingCommunicator : public ForwardingCommunicator {
 public:
  NotingCommunicator(std::unique_ptr<Communicator> member, std::vector<int64_t>* rows)
      : ForwardingCommunicator(std::move(member)), rows_(*rows) {}
  bool AllReduceSum(Stream& stream, const TensorView& x) override {
    rows_.push_back(x.dim(0));
    return member().AllReduceSum(stream, x);
  }
  bool AllReduceAddRmsNorm(Stream& stream, const AddRmsNormArgs& args) override {
    return member().AllReduceAddRmsNorm(stream, args);
  }
  size_t most_captured_bytes() const override { return member().most_captured_bytes(); }

 private:
  std::vector<int64_t>& rows_;
};

// A driver that makes a graph may wait for the whole GPU: no rank on it may still have to run a step then.
TEST(EngineOnGpu, StepsOfAllSizesRunBeforeTheFirstGraphIsMade) {
  LocalExecutorOptions options = Options(Device::kCuda, DType::kBF16);
  options.ranks = 2;
  options.gpus = {0, 0};
  options.patience = std::chrono::minutes(10);
  std::vector<int64_t> rows;
  options.wrap_communicator = [&rows](int rank, std::unique_ptr<Communicator> member) -> std::unique_ptr<Communicator> {
    if (rank != 0) return member;
    return std::make_unique<NotingCommunicator>(std::move(member), &rows);
  };
  ASSERT_TRUE(LocalExecutor::Create(Model(), options).ok());
  constexpr size_t kWarmUp = 2 * 2;  // steps of one token and of the most
  std::vector<int64_t> passes;       // that ran or were captured
  for (size_t i = kWarmUp; i < rows.size(); i += 2) passes.push_back(rows[i]);
  const std::set<int64_t> sizes(passes.begin(), passes.end());
  ASSERT_GT(sizes.size(), 1u);
  ASSERT_GE(passes.size(), 2 * sizes.size());
  EXPECT_EQ(std::set<int64_t>(passes.begin(), passes.begin() + static_cast<std::ptrdiff_t>(sizes.size())), sizes);
}

// How much of the GPU's memory is free and how many allocations there were, whenever a rank comes to a collective.
struct MemoryNotes {
  std::mutex mutex;  // guards what follows
  std::condition_variable changed;
  std::vector<std::pair<size_t, uint64_t>> of[2];
};

class MemoryNotingCommunicator : public ForwardingCommunicator {
 public:
  MemoryNotingCommunicator(std::unique_ptr<Communicator> member, MemoryNotes* notes)
      : ForwardingCommunicator(std::move(member)), notes_(*notes) {}
  bool AllReduceSum(Stream& stream, const TensorView& x) override {
    Note();
    return member().AllReduceSum(stream, x);
  }
  bool AllGather(Stream& stream, const TensorView& out, const TensorView& x) override {
    Note();
    return member().AllGather(stream, out, x);
  }
  bool Broadcast(Stream& stream, const TensorView& x) override {
    Note();
    return member().Broadcast(stream, x);
  }

 private:
  void Note() {
    std::lock_guard lock(notes_.mutex);
    notes_.of[rank()].emplace_back(QueryMemory(Device::kCuda).free_bytes, Buffer::DeviceAllocations());
    notes_.changed.notify_all();
  }
  MemoryNotes& notes_;
};

// A driver that allocates or frees may wait for a peer's all-reduce, which waits for this rank. Here rank 1 begins each
// step when rank 0 waits for it already.
TEST(EngineOnGpu, NoRankTakesMemoryInTheWarmUpWhileAnotherWaitsForIt) {
  LocalExecutorOptions options = Options(Device::kCuda, DType::kBF16);
  options.ranks = 2;
  options.gpus = {0, 0};
  options.patience = std::chrono::minutes(10);
  MemoryNotes notes;
  options.wrap_communicator = [&](int, std::unique_ptr<Communicator> member) {
    return std::make_unique<MemoryNotingCommunicator>(std::move(member), &notes);
  };
  std::vector<size_t> begins;  // of each step: how many notes there were before
  options.before_step = [&](int rank, uint64_t) {
    if (rank == 0) return;
    std::unique_lock lock(notes.mutex);
    begins.push_back(notes.of[1].size());
    notes.changed.wait(lock, [&] { return notes.of[0].size() > begins.back(); });
  };
  ASSERT_TRUE(LocalExecutor::Create(Model(), options).ok());
  ASSERT_EQ(begins.size(), 2u);
  begins.push_back(notes.of[1].size());
  ASSERT_EQ(notes.of[0].size(), begins.back());
  for (size_t step = 0; step < 2; ++step) {
    ASSERT_GT(begins[step + 1], begins[step]);
    for (size_t i = begins[step]; i < begins[step + 1]; ++i) {
      for (const auto& of_rank : notes.of) EXPECT_EQ(of_rank[i], notes.of[0][begins[step]]) << "step " << step;
    }
  }
}

TEST(EngineOnGpu, APrefixHitChangesNoToken) {
  const auto engine = Start(Options(Device::kCuda, DType::kBF16));
  const auto cold = RunAll(*engine, {MakeRequest(1, 30, 5)})[0];
  const auto warm = RunAll(*engine, {MakeRequest(1, 30, 5)})[0];
  EXPECT_EQ(cold.front().cached_tokens, 0u);
  EXPECT_EQ(warm.front().cached_tokens, 28u);
  EXPECT_EQ(TokensOf(warm), TokensOf(cold));
}

TEST(EngineOnGpu, CancelsFreeTheirBlocks) {
  const auto engine = Start(Options(Device::kCuda, DType::kBF16));
  Call cancelled = Submit(*engine, MakeRequest(0, 5, 50)), other = Submit(*engine, MakeRequest(1, 5, 10));
  cancelled.sink->WaitFor(Event::Kind::kToken, 2);
  cancelled.handle.Cancel(Status(Code::kCancelled, "the client went away"));
  EXPECT_EQ(cancelled.sink->WaitForEnd().back().status.code(), Code::kCancelled);
  EXPECT_EQ(TokensOf(other.sink->WaitForEnd()).size(), 10u);
  while (engine->load().scheduler.blocks_used > 0) std::this_thread::yield();
}

TEST(EngineOnGpu, TakesNoDeviceMemoryOnceItServes) {
  const auto engine = Start(Options(Device::kCuda, DType::kBF16));
  const uint64_t allocations = Buffer::DeviceAllocations();
  const size_t free_bytes = QueryMemory(Device::kCuda).free_bytes;
  RunAll(*engine, AllKinds());
  EXPECT_EQ(Buffer::DeviceAllocations(), allocations);
  EXPECT_EQ(QueryMemory(Device::kCuda).free_bytes, free_bytes);
}

// Neither uploads nor launches nor graphs make it wait.
TEST(EngineOnGpu, TheHostWaitsOnceForEachStep) {
  for (const bool graphs : {false, true}) {
    LocalExecutorOptions options = Options(Device::kCuda, DType::kBF16);
    options.cuda_graphs = graphs;
    std::atomic<uint64_t> issued = 0;
    options.before_step = [&](int, uint64_t) { ++issued; };
    const auto engine = Start(options);
    const uint64_t before = sim::HostWaits();
    issued = 0;
    RunAll(*engine, {MakeRequest(0, 5, 20)});
    while (engine->load().scheduler.blocks_used > 0) std::this_thread::yield();
    EXPECT_GE(issued, 20u);
    EXPECT_LE(sim::HostWaits() - before, issued);
  }
}

TEST(EngineOnGpu, AnErrorThatSticksEndsEverything) {
  LocalExecutorOptions options = Options(Device::kCuda, DType::kBF16);
  options.before_step = [](int, uint64_t step) {
    if (step == 4) sim::Stick("the GPU has fallen off the bus");
  };
  {
    const auto engine = Start(options);
    const Call first = Submit(*engine, MakeRequest(0, 5, 50)), second = Submit(*engine, MakeRequest(1, 30, 50));
    for (const Call* call : {&first, &second}) {
      const Status end = call->sink->WaitForEnd().back().status;
      EXPECT_EQ(end.code(), Code::kUnavailable);
      EXPECT_EQ(end.reason(), "ENGINE_DOWN");
      EXPECT_THAT(end.message(), HasSubstr("the GPU has fallen off the bus"));
    }
    EXPECT_FALSE(engine->healthy());
    const auto refused = engine->Submit(MakeRequest(2, 5, 5), std::make_shared<CollectingSink>());
    EXPECT_EQ(refused.status().code(), Code::kUnavailable);
  }
  EXPECT_EQ(sim::TakeError(), "the GPU has fallen off the bus");
}

TEST(EngineOnGpu, RefusesACacheThatDoesNotFitWithNumbers) {
  LocalExecutorOptions options = Options(Device::kCuda, DType::kBF16);
  options.kv_bytes = uint64_t{1} << 30;  // all that a simulated GPU has
  const auto executor = LocalExecutor::Create(Model(), options);
  EXPECT_EQ(executor.status().code(), Code::kResourceExhausted);
  EXPECT_THAT(executor.status().message(),
              MatchesRegex("--kv-memory is too large: 1.00 GiB of it would be here, but GPU 0 has room for [0-9.]+ MiB "
                           "\\([0-9.]+ MiB of its 1.00 GiB are free beside the model, and 16.00 MiB stay free for the "
                           "driver\\); lower it, or leave it out .*"));
  options.kv_bytes = 1;
  const Status small = LocalExecutor::Create(Model(), options).status();
  EXPECT_THAT(small.message(),
              MatchesRegex("--kv-memory is too small: its 1 B for a replica hold 0 blocks of 4 tokens, "
                           "of which at least 2 are needed, [0-9.]+ KiB; raise it"));
  options.kv_bytes = 0;
  options.gpus = {1};
  EXPECT_EQ(LocalExecutor::Create(Model(), options).status().code(), Code::kUnavailable);
}

// What of a pool would lie on the GPU that has no room for it, not the whole pool.
TEST(EngineOnGpu, ACacheForTwoGpusIsRefusedByTheHalf) {
  sim::SetGpus(2);
  LocalExecutorOptions options = Options(Device::kCuda, DType::kBF16);
  options.ranks = 2;
  options.adjust_group = [](CudaGroupOptions& group) { group.nccl = nullptr; };
  options.kv_bytes = uint64_t{3} << 30;
  const Status status = LocalExecutor::Create(Model(), options).status();
  EXPECT_THAT(status.message(), HasSubstr("1.50 GiB of it would be here, but GPU 0 has room for "));
  sim::SetGpus(1);
}

// A checkpoint whose weights nobody may ask for.
class Unread : public Checkpoint {
 public:
  explicit Unread(std::string_view name) : of_(MakeRandomCheckpoint(ParseRandomModel(name).value())) {}
  const std::string& path() const override { return of_->path(); }
  std::string_view format() const override { return of_->format(); }
  const ModelConfig& config() const override { return of_->config(); }
  const GenerationDefaults& generation_defaults() const override { return of_->generation_defaults(); }
  const TextAssets& text_assets() const override { return of_->text_assets(); }
  const std::vector<TensorInfo>& tensors() const override { return of_->tensors(); }
  uint64_t total_bytes() const override { return of_->total_bytes(); }
  Status Read(std::string_view tensor, int64_t, int64_t, int64_t, int64_t, DType, void*, int64_t,
              uint64_t*) const override {
    return Status(Code::kInternal, StrCat(tensor, " was asked for"));
  }

 private:
  const std::unique_ptr<Checkpoint> of_;
};

TEST(EngineOnGpu, AModelThatDoesNotFitIsRefusedBeforeItIsRead) {
  sim::SetGpus(2);
  const Unread model("random:1b");
  const uint64_t allocations = Buffer::DeviceAllocations();
  LocalExecutorOptions options = Options(Device::kCuda, DType::kF32);
  const Status status = LocalExecutor::Create(model, options).status();
  EXPECT_EQ(status.code(), Code::kResourceExhausted);
  EXPECT_THAT(status.message(),
              MatchesRegex("the model does not fit: 4.60 GiB of weights and [0-9.]+ MiB of activations "
                           "\\(--max-num-batched-tokens 24\\) are for GPU 0, which has [0-9.]+ GiB free of 1.00 GiB; "
                           "--dtype bf16 takes half; split it with a larger --tensor-parallel .*"));
  EXPECT_EQ(Buffer::DeviceAllocations(), allocations);
  // One that has a GPU's memory, but no rank for itself.
  options.ranks = 8;
  options.dtype = DType::kBF16;
  options.gpus = {0, 1, 0, 1, 0, 1, 0, 1};
  options.adjust_group = [](CudaGroupOptions& group) { group.nccl = nullptr; };
  EXPECT_THAT(LocalExecutor::Create(model, options).status().message(),
              HasSubstr("the model does not fit: 1.15 GiB of weights"));
  sim::SetGpus(1);
}

TEST(EngineOnGpu, AStartThatIsCancelledInItsWarmUpEndsThere) {
  LocalExecutorOptions options = Options(Device::kCuda, DType::kBF16);
  std::atomic<int> steps = 0;
  options.before_step = [&](int, uint64_t) { ++steps; };
  options.cancelled = [&] { return steps > 0; };
  EXPECT_EQ(LocalExecutor::Create(Model(), options).status().code(), Code::kCancelled);
  EXPECT_EQ(steps, 1) << "and not the largest step, nor the graphs' steps";
}

TEST(EngineOnGpu, ALoadThatIsCancelledTakesNoMoreMemory) {
  const uint64_t allocations = Buffer::DeviceAllocations();
  LoadOptions load;
  load.device = Device::kCuda;
  load.cancelled = [] { return true; };
  EXPECT_EQ(LoadWeights(Model(), load).status().code(), Code::kCancelled);
  EXPECT_EQ(Buffer::DeviceAllocations(), allocations + 1) << "the embedding and the head, and no layer";
}

TEST(EngineOnGpu, SaysWhatLiesOnWhichGpu) {
  sim::SetGpus(2);
  LocalExecutorOptions options = Options(Device::kCuda, DType::kBF16);
  options.ranks = 2;
  options.gpus = {1, 0};
  options.adjust_group = [](CudaGroupOptions& group) { group.nccl = nullptr; };
  ::testing::internal::CaptureStderr();
  const auto executor = LocalExecutor::Create(Model(), options);
  log::Flush();
  const std::string logged = ::testing::internal::GetCapturedStderr();
  ASSERT_TRUE(executor.ok()) << executor.status().ToString();
  for (const char* what : {"GPU 0: simulated GPU", "GPU 1: simulated GPU", "weights", "activations", "kv_cache",
                           " of 1.00 GiB", "the ranks are ready", "prompts are computed without cuBLASLt",
                           "a simulated GPU has no libraries", "kv_blocks", "warm_up_seconds"}) {
    EXPECT_THAT(logged, HasSubstr(what));
  }
  ASSERT_EQ((*executor)->devices().size(), 2u);
  for (const int gpu : {0, 1}) {
    const DeviceMemory& held = (*executor)->devices()[static_cast<size_t>(gpu)];
    EXPECT_EQ(held.device, StrCat("GPU ", gpu, ": simulated GPU, PCI simulated ", gpu));
    EXPECT_EQ(held.ranks, std::vector<int>{1 - gpu});
    EXPECT_EQ(2 * held.kv_cache_bytes, (*executor)->kv_bytes());
    EXPECT_GT(held.activation_bytes, 0u);
    EXPECT_EQ(held.total_bytes, size_t{1} << 30);
    EXPECT_LE(held.free_bytes, held.total_bytes - held.weight_bytes - held.activation_bytes - held.kv_cache_bytes);
  }
  sim::SetGpus(1);
}

TEST(EngineOnGpu, WeightsOfAShardAreThoseOfTheCpu) {
  for (int rank : {0, 1}) {
    LoadOptions options;
    options.shard = *Shard::Make(Model().config(), rank, 1 + rank);  // alone, and the padded one of two
    const auto on_cpu = LoadWeights(Model(), options);
    options.device = Device::kCuda;
    const auto on_gpu = LoadWeights(Model(), options);
    ASSERT_TRUE(on_cpu.ok() && on_gpu.ok());
    std::string error;
    const auto stream = Stream::Cuda(0, &error);
    auto expect_same = [&](const Buffer& gpu, const Buffer& cpu) {
      ASSERT_EQ(gpu.device(), Device::kCuda);
      ASSERT_EQ(gpu.bytes(), cpu.bytes());
      std::string fetched(gpu.bytes(), '\0');
      Copy(*stream, fetched.data(), Device::kCpu, gpu.data(), Device::kCuda, gpu.bytes());
      EXPECT_EQ(stream->Synchronize(), "");
      EXPECT_EQ(std::memcmp(fetched.data(), cpu.data(), cpu.bytes()), 0);
    };
    expect_same(on_gpu->memory, on_cpu->memory);
    for (size_t i = 0; i < on_cpu->layers.size(); ++i) expect_same(on_gpu->layers[i].memory, on_cpu->layers[i].memory);
  }
}

}  // namespace
}  // namespace altiplano
