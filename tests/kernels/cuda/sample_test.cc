// Sample and Score in CUDA. That the CPU's tokens are right is proved against float64 in tests/kernels/sample_test.cc;
// here, that a GPU draws the same token from the same logits, and that log-probabilities are near those in float64.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <set>
#include <vector>

#include "kernels/cpu/sample_kernels.h"
#include "kernels/cuda/sample_plan.h"
#include "tests/kernels/cuda/cuda_testlib.h"
#include "tests/kernels/sample_testlib.h"
#ifdef ALTIPLANO_IN_SIMULATOR
#include "kernels/cuda/sample_weights.h"
#endif

namespace altiplano {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

// SampleParams with the memory that they point to.
struct Request {
  SampleParams params;
  std::vector<int32_t> bias_ids, banned_ids;
  std::vector<float> bias_values;
  std::vector<uint16_t> output_counts;
  std::vector<uint8_t> in_prompt;

  SampleParams Get() const {
    SampleParams p = params;
    p.bias_ids = bias_ids.data();
    p.bias_values = bias_values.data();
    p.num_bias = static_cast<int32_t>(bias_ids.size());
    p.banned_ids = banned_ids.data();
    p.num_banned = static_cast<int32_t>(banned_ids.size());
    if (!output_counts.empty()) {
      p.output_counts = output_counts.data();
      p.in_prompt = in_prompt.data();
    }
    return p;
  }
};

Request RandomRequest(std::mt19937& random, size_t vocab) {
  auto chance = [&](double p) { return std::uniform_real_distribution<double>()(random) < p; };
  auto between = [&](float low, float high) { return std::uniform_real_distribution<float>(low, high)(random); };
  Request request;
  SampleParams& p = request.params;
  p.temperature = chance(0.15) ? 0 : between(0.2f, 2);
  if (chance(0.4)) p.top_k = 1 + static_cast<int32_t>(random() % (vocab + 3));
  if (chance(0.4)) p.top_p = between(0.05f, 1);
  if (chance(0.3)) p.min_p = between(0.0001f, 0.5f);
  p.seed = random();
  p.sequence = random() % 4;
  p.position = random() % 100000;
  p.top_logprobs = static_cast<int32_t>(random() % 7) - 1;
  if (chance(0.3)) {
    for (size_t i = 0; i < vocab; ++i) {
      request.output_counts.push_back(static_cast<uint16_t>(chance(0.1) ? random() % 4 : 0));
      request.in_prompt.push_back(chance(0.1) ? 1 : 0);
    }
    p.presence_penalty = between(-2, 2);
    p.frequency_penalty = between(-2, 2);
    p.repetition_penalty = between(0.5f, 2);
  }
  const size_t biases = chance(0.3) ? (chance(0.1) ? 300 : 3) : 0;  // 300: more than one launch carries
  for (size_t i = 0; i < biases; ++i) {
    request.bias_ids.push_back(static_cast<int32_t>(random() % (vocab + 2)) - 1);  // also outside of the vocabulary
    request.bias_values.push_back(between(-5, 5));
  }
  if (vocab > 1 && chance(0.2)) request.banned_ids.push_back(static_cast<int32_t>(random() % vocab));
  return request;
}

class CudaSampleTest : public CudaTest {
 protected:
  std::vector<SampleResult> SampleOnGpu(const Matrix& logits, const std::vector<Request>& requests) {
    const OnDevice d_logits(stream(), logits);
    std::vector<SampleParams> params;
    std::vector<Buffer> counts, prompts;
    for (const Request& request : requests) {
      params.push_back(request.Get());
      if (request.output_counts.empty()) continue;
      params.back().output_counts = Upload(request.output_counts, &counts);
      params.back().in_prompt = Upload(request.in_prompt, &prompts);
    }
    std::vector<SampleResult> results(requests.size());
    const Buffer scratch = Scratch(logits);
    Sample(stream(),
           {.results = results.data(), .params = params.data(), .logits = d_logits.view(), .scratch = scratch.data()});
    EXPECT_EQ(stream().Synchronize(), "");
    return results;
  }
  static std::vector<SampleResult> SampleOnCpu(const Matrix& logits, const std::vector<Request>& requests) {
    std::vector<SampleParams> params;
    for (const Request& request : requests) params.push_back(request.Get());
    std::vector<SampleResult> results(requests.size());
    std::vector<char> scratch(SampleScratchBytes(logits.rows(), logits.columns()) + 1);
    Sample(*Stream::Cpu(1),
           {.results = results.data(), .params = params.data(), .logits = logits.view(), .scratch = scratch.data()});
    return results;
  }
  static Buffer Scratch(const Matrix& logits) {
    return Buffer::Allocate(kDevice, SampleScratchBytes(logits.rows(), logits.columns(), kDevice));
  }

 private:
  template <typename T>
  const T* Upload(const std::vector<T>& values, std::vector<Buffer>* buffers) {
    buffers->push_back(Buffer::Allocate(kDevice, values.size() * sizeof(T)));
    Copy(stream(), buffers->back().data(), kDevice, values.data(), Device::kCpu, buffers->back().bytes());
    return static_cast<const T*>(buffers->back().data());
  }
};

void ExpectSame(const SampleResult& gpu, const SampleResult& cpu) {
  EXPECT_EQ(gpu.token, cpu.token);
  EXPECT_EQ(gpu.finite, cpu.finite);
  EXPECT_EQ(gpu.rank, cpu.rank);
  EXPECT_FLOAT_EQ(gpu.logprob, cpu.logprob);
  ASSERT_EQ(gpu.num_top, cpu.num_top);
  for (int32_t i = 0; i < gpu.num_top; ++i) {
    EXPECT_EQ(gpu.top_ids[i], cpu.top_ids[i]);
    EXPECT_FLOAT_EQ(gpu.top_logprobs[i], cpu.top_logprobs[i]);
  }
}

TEST_F(CudaSampleTest, DrawsTheTokenOfTheCpu) {
  std::mt19937 random(4);
  for (int64_t vocab : {1, 2, 33, 511, 1000, 2500}) {
    if (kUnderTsan && vocab != 1000) continue;
    constexpr int64_t kRows = 37;  // more than one launch carries
    Matrix logits(kRows, vocab, DType::kF32, vocab % 5);
    logits.FillNormal(random(), 3);
    std::vector<Request> requests;
    for (int64_t r = 0; r < kRows; ++r) requests.push_back(RandomRequest(random, static_cast<size_t>(vocab)));
    const auto gpu = SampleOnGpu(logits, requests), cpu = SampleOnCpu(logits, requests);
    for (int64_t r = 0; r < kRows; ++r) {
      const auto row = static_cast<size_t>(r);
      SCOPED_TRACE("row " + std::to_string(r) + ", vocabulary " + std::to_string(vocab));
      ExpectSame(gpu[row], cpu[row]);
      const int32_t top = requests[row].params.top_logprobs;
      if (top >= 0 && gpu[row].finite) ExpectLogprobs(RowOf(logits, r), top, gpu[row]);
      if (HasFailure()) return;
    }
  }
}

// Logits of few values, -0 and -inf among them: every filter has to cut among equal ones.
TEST_F(CudaSampleTest, CutsAmongEqualLogitsLikeTheCpu) {
  std::mt19937 random(5);
  constexpr float kValues[] = {-1, -0.0f, 0, 1, 2, -kInf};
  constexpr int64_t kRows = kUnderTsan ? 8 : 60, kVocab = 1100;  // three blocks' work
  Matrix logits(kRows, kVocab, DType::kF32);
  std::vector<Request> requests;
  for (int64_t r = 0; r < kRows; ++r) {
    for (int64_t i = 0; i < kVocab; ++i) logits.set(r, i, kValues[random() % 6]);
    Request request;
    request.params.top_k = r % 3 == 0 ? 0 : 1 + static_cast<int32_t>(random() % kVocab);
    request.params.top_p = r % 2 == 0 ? 1 : std::uniform_real_distribution<float>(0, 1)(random);
    request.params.temperature = r % 7 == 0 ? 0.0f : 0.8f;
    request.params.seed = random();
    request.params.top_logprobs = 20;
    requests.push_back(request);
  }
  const auto gpu = SampleOnGpu(logits, requests), cpu = SampleOnCpu(logits, requests);
  for (size_t r = 0; r < requests.size(); ++r) ExpectSame(gpu[r], cpu[r]);
}

TEST_F(CudaSampleTest, GreedyTakesTheLowestOfEqualIds) {
  struct {
    int64_t vocab;
    std::vector<int64_t> largest;
    int32_t token;
  } cases[] = {{1500, {1499, 700, 1021}, 700},  // in several slices, and two in one
               {16 * 1024, {1500, 5200 + 512, 5200}, 1500},
               {16 * 1024, {5200 + 512, 5200}, 5200}};  // of one thread, which goes on by 512
  for (const auto& [vocab, largest, token] : cases) {
    Matrix logits(1, vocab, DType::kF32);
    for (int64_t i = 0; i < vocab; ++i) logits.set(0, i, 0);
    for (int64_t i : largest) logits.set(0, i, 3);
    Request greedy;
    greedy.params.temperature = 0;
    EXPECT_EQ(SampleOnGpu(logits, {greedy})[0].token, token);
  }
}

TEST_F(CudaSampleTest, ReportsRowsThatAreNotFinite) {
  for (float bad : {kInf, std::numeric_limits<float>::quiet_NaN()}) {
    Matrix logits(3, 600, DType::kF32);
    logits.FillNormal(1);
    logits.set(1, 599, bad);
    for (int64_t i = 0; i < 600; ++i) logits.set(2, i, -kInf);
    Request request;
    request.params.top_logprobs = 2;
    const auto results = SampleOnGpu(logits, {request, request, request});
    EXPECT_TRUE(results[0].finite);
    for (size_t r : {1, 2}) {
      EXPECT_FALSE(results[r].finite);
      EXPECT_EQ(results[r].token, -1);
      EXPECT_EQ(results[r].num_top, 0);
    }
  }
}

TEST_F(CudaSampleTest, HandsTokensAndCountsOnToTheNextStep) {
  Matrix logits(3, 600, DType::kF32);
  logits.FillNormal(1);
  logits.set(0, 77, 50);
  logits.set(1, 5, std::numeric_limits<float>::quiet_NaN());
  logits.set(2, 599, 50);
  SampleParams params[3];
  std::vector<int32_t> counts[3];  // two to a word
  std::vector<OnDevice> on_device;
  for (size_t r = 0; r < 3; ++r) counts[r].assign(300, 0);
  counts[0][38] = 3 << 16;         // of token 77
  counts[2][299] = 0xFFFFu << 16;  // of token 599
  for (size_t r = 0; r < 3; ++r) {
    on_device.emplace_back(stream(), counts[r]);
    params[r].temperature = 0;
    params[r].counts_out = on_device[r].view().as<uint16_t>();
  }
  const OnDevice d_logits(stream(), logits), d_tokens(stream(), std::vector<int32_t>{-7, -7, -7});
  const Buffer scratch = Scratch(logits);
  SampleResult results[3];
  Sample(stream(), {.results = results,
                    .tokens = d_tokens.view(),
                    .params = params,
                    .logits = d_logits.view(),
                    .scratch = scratch.data()});
  EXPECT_EQ(stream().Synchronize(), "");
  EXPECT_EQ(d_tokens.Values(), (std::vector<int32_t>{77, 0, 599}));
  counts[0][38] = 4 << 16;
  for (size_t r = 0; r < 3; ++r) EXPECT_EQ(on_device[r].Values(), counts[r]) << r;
}

TEST_F(CudaSampleTest, ScoresTheTokensAskedFor) {
  constexpr int64_t kRows = 40, kVocab = 700;
  Matrix logits(kRows, kVocab, DType::kF32, 3);
  logits.FillNormal(2, 4);
  const OnDevice d_logits(stream(), logits);
  std::vector<SampleResult> results(kRows);
  std::vector<int32_t> num_top;
  for (int64_t r = 0; r < kRows; ++r) {
    results[static_cast<size_t>(r)].token = static_cast<int32_t>(r * 17);
    num_top.push_back(static_cast<int32_t>(r % 4));
  }
  const Buffer scratch = Scratch(logits);
  Score(stream(),
        {.results = results.data(), .num_top = num_top.data(), .logits = d_logits.view(), .scratch = scratch.data()});
  EXPECT_EQ(stream().Synchronize(), "");
  for (int64_t r = 0; r < kRows; ++r) {
    EXPECT_EQ(results[static_cast<size_t>(r)].token, r * 17);
    ExpectLogprobs(RowOf(logits, r), num_top[static_cast<size_t>(r)], results[static_cast<size_t>(r)]);
  }
}

#ifdef ALTIPLANO_IN_SIMULATOR
// Weights decide tokens, so that e^x has to be the CPU's to the bit: every 1009th float from -88 to 0.
TEST_F(CudaSampleTest, ExpIsThatOfTheCpu) {
  std::vector<float> x;
  for (uint32_t bits = 0x80000000; bits < 0xC2B00000; bits += 1009) x.push_back(__builtin_bit_cast(float, bits));
  if (kUnderTsan) x.resize(1000);
  std::vector<float> e(x.size());
  cpu::CurrentSampleKernels().exponentials(x.data(), static_cast<int64_t>(x.size()), 0, 1, e.data());
  for (size_t i = 0; i < x.size(); ++i) ASSERT_EQ(cuda::Exp(x[i]), e[i]) << x[i];
}
#endif

#ifdef ALTIPLANO_IN_SIMULATOR
// The sectors of global memory that all kernels touch, in rows of logits: one for the largest, one for each of three
// levels of a search, one to draw or to gather, and a sixteenth where the last block looks for what was drawn in its
// slice.
TEST_F(CudaSampleTest, TrafficIsAFewReadsOfTheRow) {
  if (kUnderTsan) GTEST_SKIP() << "a row of 128256 logits";
  constexpr int64_t kVocab = 128256;
  Matrix logits(1, kVocab, DType::kF32);
  logits.FillNormal(3, 3);
  struct Case {
    const char* name;
    SampleParams params;
    double reads;
  };
  const Case cases[] = {
      {"greedy", {.temperature = 0}, 1.02},
      {"greedy, the token's log-probability", {.temperature = 0, .top_logprobs = 0}, 2.1},
      {"greedy, 20 most probable", {.temperature = 0, .top_logprobs = 20}, 5.5},
      {"temperature", {.temperature = 0.8f}, 2.2},
      {"top_p", {.temperature = 0.8f, .top_p = 0.95f}, 5.8},
      {"top_k, top_p", {.temperature = 0.8f, .top_k = 50, .top_p = 0.95f}, 9.1},
  };
  for (const Case& c : cases) {
    SCOPED_TRACE(c.name);
    Request request;
    request.params = c.params;
    sim::CountTraffic(true);
    SampleOnGpu(logits, {request});
    sim::Traffic sum;
    for (const char* kernel :
         {"SampleLargest", "SampleCount", "SampleWeigh", "SampleDraw", "SampleLogprob", "SampleGatherTop"}) {
      const sim::Traffic traffic = sim::TrafficOf(kernel);
      sum.sectors += traffic.sectors;
      sum.ideal_sectors += traffic.ideal_sectors;
    }
    sim::CountTraffic(false);
    const double reads = 32 * static_cast<double>(sum.sectors) / (4.0 * kVocab);
    EXPECT_GE(reads, 1);
    EXPECT_LE(reads, c.reads);
    EXPECT_LE(static_cast<double>(sum.sectors), 1.02 * static_cast<double>(sum.ideal_sectors));
  }
}
#endif

TEST(CudaSamplePlan, DealsARowOutToBlocks) {
  for (int64_t vocab : {1, 511, 512, 513, 2500, 32000, 128256, 152064, 262144}) {
    SCOPED_TRACE(vocab);
    const int64_t slice = cuda::SampleSlice(vocab);
    const cuda::LaunchShape shape = cuda::SamplePlan(7, vocab);
    EXPECT_EQ(slice % cuda::kSampleThreads, 0);
    EXPECT_GE(shape.grid_x * slice, vocab);
    EXPECT_LT((shape.grid_x - 1) * slice, vocab) << "every block has something to do";
    EXPECT_LE(shape.grid_x, cuda::kMostSampleBlocks);
    EXPECT_EQ(shape.grid_y, 7u);
  }
  EXPECT_EQ(cuda::SamplePlan(1, 128256).grid_x, 16u);
}

TEST(CudaSamplePlan, ScratchHoldsResultsAndARowOfFloats) {
  EXPECT_EQ(cuda::SampleResultBytes(1) % 256, 0u);
  EXPECT_GE(cuda::SampleResultBytes(5), 5 * sizeof(SampleResult));
  EXPECT_EQ(cuda::SampleScratchBytes(3, 1000), cuda::SampleResultBytes(3) + 3 * cuda::kSampleRowBytes + 3 * 1000 * 4);
  // Launches take turns.
  EXPECT_EQ(cuda::SampleRowsBytes(1000), cuda::SampleRowsBytes(cuda::kSampleRowsPerLaunch));
  EXPECT_EQ(cuda::AdjustPlan(3, 257), (cuda::LaunchShape{.grid_x = 2, .grid_y = 3, .threads = 256}));
}

}  // namespace
}  // namespace altiplano
