// Sample against distributions worked out in float64: token by token where the random bits decide clearly, and by
// chi-square, which knows nothing of how tokens are drawn. All seeds are fixed, so nothing here happens by chance.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "kernels/cpu/philox.h"
#include "kernels/ops.h"
#include "tests/kernels/kernels_testlib.h"
#include "tests/kernels/sample_testlib.h"

namespace altiplano {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Kept from test to test: a new one would allocate its scratch for each of many thousand draws.
Stream& OneThread() {
  static const std::unique_ptr<Stream> stream = Stream::Cpu(1);
  return *stream;
}

std::vector<SampleResult> SampleRows(const TensorView& logits, const std::vector<SampleParams>& params,
                                     Stream& stream = OneThread()) {
  std::vector<SampleResult> results(params.size());
  std::vector<char> scratch(SampleScratchBytes(logits.dim(0), logits.dim(1)) + 1);
  Sample(stream, {.results = results.data(), .params = params.data(), .logits = logits, .scratch = scratch.data()});
  return results;
}

SampleResult SampleOne(const std::vector<float>& logits, const SampleParams& params) {
  Matrix row(1, static_cast<int64_t>(logits.size()), DType::kF32);
  for (size_t i = 0; i < logits.size(); ++i) row.set(0, static_cast<int64_t>(i), logits[i]);
  return SampleRows(row.view(), {params})[0];
}

// Everything that a result says.
std::string Text(const SampleResult& r) {
  std::string text = std::to_string(r.token) + (r.finite ? " " : " not finite ");
  auto append_bits = [&](float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    text += " " + std::to_string(bits);
  };
  append_bits(r.logprob);
  text += " " + std::to_string(r.rank);
  for (int32_t i = 0; i < r.num_top; ++i) {
    text += ", " + std::to_string(r.top_ids[i]);
    append_bits(r.top_logprobs[i]);
  }
  return text;
}

// SampleParams and the memory that they point to.
struct Request {
  SampleParams params = {};
  std::vector<int32_t> bias_ids = {}, banned_ids = {};
  std::vector<float> bias_values = {};
  std::vector<uint16_t> output_counts = {};
  std::vector<uint8_t> in_prompt = {};

  SampleParams Get() const {
    SampleParams p = params;
    p.bias_ids = bias_ids.data();
    p.bias_values = bias_values.data();
    p.num_bias = static_cast<int32_t>(bias_ids.size());
    p.banned_ids = banned_ids.data();
    p.num_banned = static_cast<int32_t>(banned_ids.size());
    if (!output_counts.empty()) p.output_counts = output_counts.data();
    if (!in_prompt.empty()) p.in_prompt = in_prompt.data();
    return p;
  }
};

// What kernels/ops.h says of SampleParams, in float64.
struct Distribution {
  std::vector<double> probability;
  std::vector<int32_t> kept;  // most probable first
  double crossing = 1;        // how far the mass kept by top_p, without and with its last token, is from top_p
  double threshold = 1;       // the least |p / (min_p * p_max) - 1|
};

std::vector<double> Adjusted(const std::vector<double>& logits, const Request& request) {
  std::vector<double> x = logits;
  const SampleParams& p = request.params;
  for (size_t i = 0; i < x.size() && !request.output_counts.empty(); ++i) {
    const double count = request.output_counts[i];
    if (count > 0 || request.in_prompt[i] != 0) {
      x[i] = x[i] > 0 ? x[i] / static_cast<double>(p.repetition_penalty)
                      : x[i] * static_cast<double>(p.repetition_penalty);
    }
    x[i] -= count * static_cast<double>(p.frequency_penalty);
    if (count > 0) x[i] -= static_cast<double>(p.presence_penalty);
  }
  for (size_t i = 0; i < request.bias_ids.size(); ++i) {
    x[static_cast<size_t>(request.bias_ids[i])] += static_cast<double>(request.bias_values[i]);
  }
  for (int32_t id : request.banned_ids) x[static_cast<size_t>(id)] = -std::numeric_limits<double>::infinity();
  return x;
}

Distribution Exact(const std::vector<double>& logits, const Request& request) {
  const SampleParams& p = request.params;
  const std::vector<double> x = Adjusted(logits, request);
  Distribution result;
  result.probability.assign(x.size(), 0);
  result.kept = MostProbableFirst(x);
  if (p.top_k > 0 && static_cast<size_t>(p.top_k) < x.size()) result.kept.resize(static_cast<size_t>(p.top_k));
  if (p.temperature <= 0) result.kept.resize(1);
  const double temperature = p.temperature > 0 ? static_cast<double>(p.temperature) : 1;
  const double max = x[static_cast<size_t>(result.kept[0])];
  std::vector<double> weight;
  double total = 0;
  for (int32_t id : result.kept) {
    weight.push_back(std::exp((x[static_cast<size_t>(id)] - max) / temperature));
    total += weight.back();
  }
  size_t count = weight.size();
  if (p.top_p < 1) {
    double before = 0;
    for (count = 0; count < weight.size(); ++count) {
      if (count > 0 && before >= static_cast<double>(p.top_p)) break;
      result.crossing = std::min(std::abs(before - static_cast<double>(p.top_p)), 1.0);
      before += weight[count] / total;
    }
    result.crossing = std::min(result.crossing, std::abs(before - static_cast<double>(p.top_p)));
  }
  if (p.min_p > 0) {
    size_t at_least = 0;
    for (double w : weight) {
      at_least += w >= static_cast<double>(p.min_p);
      result.threshold = std::min(result.threshold, std::abs(w / static_cast<double>(p.min_p) - 1));
    }
    count = std::min(count, at_least);
  }
  result.kept.resize(count);
  total = 0;
  for (size_t i = 0; i < count; ++i) total += weight[i];
  for (size_t i = 0; i < count; ++i) result.probability[static_cast<size_t>(result.kept[i])] = weight[i] / total;
  return result;
}

// The first id, in order, up to which the probabilities exceed u = bits / 2^64; -1 where u is so close to the boundary
// between two tokens that f32 may decide otherwise.
int32_t TokenOf(const Distribution& distribution, uint64_t bits) {
  const double u = static_cast<double>(bits) * 0x1p-64;
  double sum = 0;
  for (size_t i = 0; i < distribution.probability.size(); ++i) {
    const double p = distribution.probability[i];
    if (p > 0 && std::abs(u - sum) < 1e-5 && sum > 0) return -1;
    sum += p;
    if (u < sum) return sum - u < 1e-5 && sum < 1 - 1e-9 ? -1 : static_cast<int32_t>(i);
  }
  return -1;
}

// Pearson's statistic of the draws, tokens expected less than 5 times taken together; infinity when something
// impossible was drawn.
struct ChiSquare {
  double statistic = 0;
  int64_t freedom = -1;

  // Whether chance alone gets this far less than once in 10000 times (the quantile by Wilson and Hilferty's cube).
  bool Rejected() const {
    if (std::isinf(statistic) || freedom < 1) return statistic > 0;
    const double n = static_cast<double>(freedom), z = 3.719, part = 2 / (9 * n);
    return statistic > n * std::pow(1 - part + z * std::sqrt(part), 3);
  }
};

ChiSquare Compare(const std::vector<int32_t>& draws, const std::vector<double>& probability) {
  std::vector<double> seen(probability.size());
  for (int32_t token : draws) seen[static_cast<size_t>(token)] += 1;
  ChiSquare result;
  double rest_seen = 0, rest_expected = 0;
  auto add = [&](double observed, double expected) {
    result.statistic += (observed - expected) * (observed - expected) / expected;
    ++result.freedom;
  };
  for (size_t i = 0; i < seen.size(); ++i) {
    const double expected = probability[i] * static_cast<double>(draws.size());
    if (seen[i] > 0 && probability[i] == 0) return {std::numeric_limits<double>::infinity(), 1};
    if (expected >= 5) {
      add(seen[i], expected);
    } else {
      rest_seen += seen[i];
      rest_expected += expected;
    }
  }
  if (rest_expected > 1e-3) add(rest_seen, rest_expected);
  return result;
}

std::vector<float> NormalLogits(size_t vocab, uint32_t seed, float deviation = 2) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, deviation);
  std::vector<float> logits(vocab);
  for (float& x : logits) x = normal(random);
  return logits;
}

constexpr size_t kDraws = 20000;

// Tokens at kDraws successive positions, in rows of a few steps.
std::vector<int32_t> Draw(const std::vector<float>& logits, const Request& request) {
  constexpr int64_t kRows = 200;
  const auto vocab = static_cast<int64_t>(logits.size());
  Matrix rows(kRows, vocab, DType::kF32);
  for (int64_t r = 0; r < kRows; ++r) std::memcpy(rows.view().row<float>(r), logits.data(), logits.size() * 4);
  std::vector<int32_t> draws;
  std::vector<SampleParams> params(kRows, request.Get());
  while (draws.size() < kDraws) {
    for (size_t r = 0; r < params.size(); ++r) params[r].position = static_cast<int64_t>(draws.size() + r);
    for (const SampleResult& result : SampleRows(rows.view(), params)) draws.push_back(result.token);
  }
  return draws;
}

std::vector<double> Doubles(const std::vector<float>& x) {
  return {x.begin(), x.end()};
}

Request WithPenalties(size_t vocab) {
  Request request;
  for (size_t i = 0; i < vocab; ++i) {
    request.output_counts.push_back(static_cast<uint16_t>(i % 4 == 0 ? i % 3 : 0));
    request.in_prompt.push_back(i % 5 == 1);
  }
  return request;
}

TEST(SampleDistribution, IsTheOneAskedFor) {
  constexpr size_t kVocab = 60;
  const std::vector<float> logits = NormalLogits(kVocab, 1);
  std::vector<std::pair<std::string, Request>> cases;
  auto add = [&](const std::string& name, const Request& request) { cases.emplace_back(name, request); };
  for (float temperature : {0.3f, 0.7f, 1.0f, 1.9f, 100.0f}) {
    add("temperature " + std::to_string(temperature), {.params = {.temperature = temperature}});
  }
  for (int32_t k : {1, 2, 7, 59, 60, 1000}) add("top_k " + std::to_string(k), {.params = {.top_k = k}});
  for (float p : {0.0f, 0.2f, 0.5f, 0.9f, 0.99f, 0.9999f}) {
    add("top_p " + std::to_string(p), {.params = {.top_p = p}});
  }
  for (float p : {0.01f, 0.1f, 0.5f, 1.0f}) add("min_p " + std::to_string(p), {.params = {.min_p = p}});
  Request penalties = WithPenalties(kVocab);
  penalties.params.presence_penalty = 0.8f;
  add("presence", penalties);
  penalties.params.frequency_penalty = 0.6f;
  add("presence and frequency", penalties);
  penalties.params.repetition_penalty = 1.7f;
  add("all penalties", penalties);
  penalties.params.presence_penalty = penalties.params.frequency_penalty = 0;
  add("repetition", penalties);
  penalties.params.repetition_penalty = 0.8f;
  penalties.params.frequency_penalty = -0.5f;
  add("rewards", penalties);
  Request bias;
  bias.bias_ids = {3, 59, 20};
  bias.bias_values = {4, -3, 2.5f};
  add("bias", bias);
  Request banned;
  banned.banned_ids = {0, 17, 59};
  add("banned", banned);
  Request all = WithPenalties(kVocab);
  all.params = {.temperature = 0.8f,
                .top_k = 25,
                .top_p = 0.93f,
                .min_p = 0.01f,
                .presence_penalty = 0.3f,
                .frequency_penalty = 0.2f,
                .repetition_penalty = 1.1f};
  all.bias_ids = {30, 31};
  all.bias_values = {3, 3};
  all.banned_ids = {31};
  add("everything", all);
  all.params.min_p = 0.2f;
  add("everything, min_p deciding", all);
  all.params.min_p = 0;
  all.params.top_p = 1;
  add("everything, top_k deciding", all);

  for (auto& [name, request] : cases) {
    request.params.seed = 42;
    const std::vector<double> exact = Exact(Doubles(logits), request).probability;
    const ChiSquare result = Compare(Draw(logits, request), exact);
    EXPECT_FALSE(result.Rejected()) << name << ": " << result.statistic << " with " << result.freedom << " degrees";
  }
}

// More tokens are kept than are sorted, so the cut is found by bracketing.
TEST(SampleDistribution, IsTheOneAskedForInALargeVocabulary) {
  const std::vector<float> logits = NormalLogits(1601, 2, 0.5f);
  for (const SampleParams& params : {SampleParams{.top_k = 700}, SampleParams{.top_p = 0.6f},
                                     SampleParams{.min_p = 0.15f}, SampleParams{.top_k = 1000, .top_p = 0.7f}}) {
    const std::vector<double> exact = Exact(Doubles(logits), {.params = params}).probability;
    const ChiSquare result = Compare(Draw(logits, {.params = params}), exact);
    EXPECT_FALSE(result.Rejected()) << result.statistic << " with " << result.freedom << " degrees";
  }
}

// The draws of a sampler that is slightly wrong would not pass for right.
TEST(SampleDistribution, TheTestNoticesWrongSamplers) {
  const std::vector<float> logits = NormalLogits(60, 1);
  auto looks_like = [&](const SampleParams& drawn, const SampleParams& expected) {
    return !Compare(Draw(logits, {.params = drawn}), Exact(Doubles(logits), {.params = expected}).probability)
                .Rejected();
  };
  EXPECT_TRUE(looks_like({.temperature = 1}, {.temperature = 1}));
  EXPECT_FALSE(looks_like({.temperature = 1.05f}, {.temperature = 1}));
  EXPECT_FALSE(looks_like({.top_k = 8}, {.top_k = 7}));
  EXPECT_FALSE(looks_like({.top_k = 6}, {.top_k = 7}));
  EXPECT_FALSE(looks_like({.min_p = 0.02f}, {.min_p = 0.1f}));
  // top_p without the crossing token: what a top_k of one less keeps.
  const SampleParams nucleus = {.top_p = 0.9f};
  const auto kept = static_cast<int32_t>(Exact(Doubles(logits), {.params = nucleus}).kept.size());
  EXPECT_TRUE(looks_like({.top_k = kept}, nucleus));
  EXPECT_FALSE(looks_like({.top_k = kept - 1}, nucleus));
  EXPECT_FALSE(looks_like({.top_k = kept + 1}, nucleus));
}

// Draws differ by position, by seed and by sequence alike.
TEST(SampleDistribution, HoldsAlongSeedsAndSequences) {
  const std::vector<float> logits = NormalLogits(40, 3);
  const std::vector<double> exact = Exact(Doubles(logits), {}).probability;
  Matrix row(1, 40, DType::kF32);
  std::memcpy(row.view().data, logits.data(), logits.size() * sizeof(float));
  std::vector<int32_t> by_seed, by_sequence;
  for (size_t i = 0; i < kDraws; ++i) {
    by_seed.push_back(SampleRows(row.view(), {{.seed = i}})[0].token);
    by_sequence.push_back(SampleRows(row.view(), {{.sequence = static_cast<uint32_t>(i)}})[0].token);
  }
  EXPECT_FALSE(Compare(by_seed, exact).Rejected());
  EXPECT_FALSE(Compare(by_sequence, exact).Rejected());
  // And pairs of sequences are independent: both draws of a position, as one of 3 x 3 outcomes.
  const std::vector<float> three = {0.5f, 0, -1};
  const std::vector<double> p = Exact(Doubles(three), {}).probability;
  std::vector<double> pairs;
  for (double a : p) {
    for (double b : p) pairs.push_back(a * b);
  }
  std::vector<int32_t> drawn;
  for (int64_t position = 0; position < 10000; ++position) {
    const int32_t a = SampleOne(three, {.sequence = 0, .position = position}).token;
    drawn.push_back(3 * a + SampleOne(three, {.sequence = 1, .position = position}).token);
  }
  EXPECT_FALSE(Compare(drawn, pairs).Rejected());
}

class SampleTest : public IsaTest {};

Request RandomRequest(std::mt19937& random, size_t vocab) {
  auto chance = [&](double p) { return std::uniform_real_distribution<double>()(random) < p; };
  auto between = [&](float low, float high) { return std::uniform_real_distribution<float>(low, high)(random); };
  auto id = [&] { return static_cast<int32_t>(random() % vocab); };
  Request request;
  SampleParams& p = request.params;
  p.temperature = chance(0.1) ? 0 : between(0.2f, 2);
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
    if (chance(0.5)) p.presence_penalty = between(-2, 2);
    if (chance(0.5)) p.frequency_penalty = between(-2, 2);
    if (chance(0.5)) p.repetition_penalty = between(0.5f, 2);
  }
  std::set<int32_t> biased;
  for (int i = 0; i < 5 && chance(0.3); ++i) biased.insert(id());
  for (int32_t i : biased) {
    request.bias_ids.push_back(i);
    request.bias_values.push_back(between(-5, 5));
  }
  if (vocab > 1 && chance(0.2)) request.banned_ids.push_back(id());
  return request;
}

// The token is the one that the bits of Philox at (seed, position, sequence) choose among the kept tokens in order of
// ids. Where float64 cannot tell what f32 should decide, nothing is said; that is seldom.
TEST_P(SampleTest, ChoosesTheTokenThatTheBitsSay) {
  std::mt19937 random(4);
  int clear = 0, unclear = 0;
  for (size_t vocab : {1, 2, 3, 15, 16, 17, 100, 511, 513, 2500}) {
    for (int i = 0; i < 150; ++i) {
      const std::vector<float> logits = NormalLogits(vocab, random(), i % 2 ? 1 : 4);
      const Request request = RandomRequest(random, vocab);
      const Distribution exact = Exact(Doubles(logits), request);
      const SampleParams p = request.Get();
      const SampleResult result = SampleOne(logits, p);
      ASSERT_TRUE(result.finite);
      if (p.top_logprobs >= 0) ExpectLogprobs(Doubles(logits), p.top_logprobs, result);
      const int32_t token = exact.crossing < 1e-5 || exact.threshold < 1e-4
                                ? -1
                                : TokenOf(exact, SampleBits(p.seed, p.position, p.sequence));
      token < 0 ? ++unclear : ++clear;
      if (token >= 0) {
        ASSERT_EQ(result.token, token) << "request " << i << ", vocabulary " << vocab << ", temperature "
                                       << p.temperature << ", top_k " << p.top_k << ", top_p " << p.top_p << ", min_p "
                                       << p.min_p;
      }
    }
  }
  EXPECT_LT(unclear * 20, clear);
}

TEST_P(SampleTest, ATokenDoesNotDependOnBatchOrThreads) {
  constexpr int64_t kVocab = 777, kRows = 41;
  std::mt19937 random(5);
  Matrix logits(kRows, kVocab, DType::kF32, 11);
  logits.FillNormal(6, 3);
  logits.set(7, 500, NAN);
  std::vector<Request> requests;
  std::vector<SampleParams> params;
  for (int64_t r = 0; r < kRows; ++r) requests.push_back(RandomRequest(random, kVocab));
  for (const Request& request : requests) params.push_back(request.Get());
  std::vector<std::string> alone;
  for (int64_t r = 0; r < kRows; ++r) {
    TensorView row = logits.view().first(1);
    row.data = logits.view().row<float>(r);
    alone.push_back(Text(SampleRows(row, {params[static_cast<size_t>(r)]})[0]));
  }
  for (int threads : {1, 2, 3}) {
    const auto stream = Stream::Cpu(threads);
    const std::vector<SampleResult> together = SampleRows(logits.view(), params, *stream);
    for (size_t r = 0; r < together.size(); ++r) EXPECT_EQ(Text(together[r]), alone[r]) << r;
  }
  EXPECT_TRUE(logits.GapsUntouched());
}

TEST_P(SampleTest, LeavesTheLogitsAlone) {
  Matrix logits(2, 600, DType::kF32), before(2, 600, DType::kF32);
  logits.FillNormal(7);
  before.Fill(logits);
  Request request = WithPenalties(600);
  request.params = {.top_k = 40, .top_p = 0.9f, .presence_penalty = 1, .repetition_penalty = 1.5f, .top_logprobs = 5};
  request.banned_ids = {3};
  SampleRows(logits.view(), {request.Get(), request.Get()});
  for (int64_t r = 0; r < 2; ++r) EXPECT_EQ(logits.RowBytes(r), before.RowBytes(r));
}

TEST_P(SampleTest, GreedyTakesTheLowestOfEqualIds) {
  for (float temperature : {0.0f, -1.0f}) {
    EXPECT_EQ(SampleOne({1, 3, 2, 3, 3}, {.temperature = temperature}).token, 1);
    EXPECT_EQ(SampleOne({-0.0f, 0, -1}, {.temperature = temperature}).token, 0);
    std::vector<float> logits(6000, -3);
    for (size_t first : {5999, 4096, 2049, 2048, 2047, 17, 16, 0}) {
      logits[first] = 2;
      EXPECT_EQ(SampleOne(logits, {.temperature = temperature}).token, static_cast<int32_t>(first));
    }
  }
  // Penalties and bias come before: 4 - 1.5 - 2 * 0.5 = 1.5 is all that is left of token 0.
  Request request;
  request.params = {.temperature = 0, .presence_penalty = 1.5f, .frequency_penalty = 0.5f};
  request.output_counts = {2, 0, 0};
  request.in_prompt = {0, 0, 0};
  EXPECT_EQ(SampleOne({4, 1.5f, 1}, request.Get()).token, 0);
  EXPECT_EQ(SampleOne({4, 1.625f, 1}, request.Get()).token, 1);
  request.bias_ids = {2};
  request.bias_values = {1};
  EXPECT_EQ(SampleOne({4, 1.625f, 1}, request.Get()).token, 2);
}

TEST_P(SampleTest, RepetitionIsPenalizedInPromptAndOutputWhateverTheSign) {
  Request request;
  request.params = {.temperature = 0, .repetition_penalty = 2};
  request.in_prompt = {1, 0, 0};
  request.output_counts = {0, 5, 0};
  EXPECT_EQ(SampleOne({3, 3, 1.25f}, request.Get()).token, 0);
  EXPECT_EQ(SampleOne({3, 3, 1.75f}, request.Get()).token, 2);
  EXPECT_EQ(SampleOne({-1, -1, -2.25f}, request.Get()).token, 0);
  EXPECT_EQ(SampleOne({-1, -1, -1.75f}, request.Get()).token, 2);
  // Presence and frequency are of the output alone.
  request.params = {.temperature = 0, .presence_penalty = 1, .frequency_penalty = 1};
  EXPECT_EQ(SampleOne({3, 4, 1}, request.Get()).token, 0);
}

TEST_P(SampleTest, HandsTokensAndCountsOnToTheNextStep) {
  Matrix logits(3, 50, DType::kF32);
  logits.FillNormal(1);
  logits.set(0, 17, 9);
  logits.set(1, 5, std::numeric_limits<float>::quiet_NaN());
  logits.set(2, 49, 9);
  SampleParams params[3];
  std::vector<uint16_t> counts[3];
  for (size_t r = 0; r < 3; ++r) {
    counts[r].assign(50, 3);
    params[r].temperature = 0;
    params[r].counts_out = counts[r].data();
  }
  counts[2][49] = 0xFFFF;
  std::vector<int32_t> tokens(3, -7);
  SampleResult results[3];
  Sample(*Stream::Cpu(2), {.results = results, .tokens = VectorOf(tokens), .params = params, .logits = logits.view()});
  EXPECT_EQ(tokens, (std::vector<int32_t>{17, 0, 49}));
  EXPECT_EQ(counts[0][17], 4);
  EXPECT_EQ(counts[0][16], 3);
  EXPECT_EQ(counts[1], std::vector<uint16_t>(50, 3));
  EXPECT_EQ(counts[2][49], 0xFFFF) << "as many as it can hold";
}

std::set<int32_t> DrawnTokens(const std::vector<float>& logits, SampleParams params, int64_t draws = 2000) {
  Matrix row(1, static_cast<int64_t>(logits.size()), DType::kF32);
  std::memcpy(row.view().data, logits.data(), logits.size() * sizeof(float));
  std::set<int32_t> tokens;
  for (params.position = 0; params.position < draws; ++params.position) {
    tokens.insert(SampleRows(row.view(), {params})[0].token);
  }
  return tokens;
}

std::set<int32_t> FirstIds(int32_t n) {
  std::set<int32_t> ids;
  for (int32_t i = 0; i < n; ++i) ids.insert(i);
  return ids;
}

TEST_P(SampleTest, TopKKeepsTheLowestOfEqualIds) {
  const std::vector<float> logits = {1, 2, 2, 2, 0, 2};
  EXPECT_EQ(DrawnTokens(logits, {.top_k = 1}), (std::set<int32_t>{1}));
  EXPECT_EQ(DrawnTokens(logits, {.top_k = 2}), (std::set<int32_t>{1, 2}));
  EXPECT_EQ(DrawnTokens(logits, {.top_k = 4}), (std::set<int32_t>{1, 2, 3, 5}));
  EXPECT_EQ(DrawnTokens(logits, {.top_k = 5}), (std::set<int32_t>{0, 1, 2, 3, 5}));
  EXPECT_EQ(DrawnTokens(logits, {.top_k = 6}), FirstIds(6));
  EXPECT_EQ(DrawnTokens({-0.0f, -1, -2}, {.top_k = 1}), FirstIds(1));
  EXPECT_EQ(DrawnTokens({-1, 0, -0.0f, 0}, {.top_k = 2}), (std::set<int32_t>{1, 2}));
  EXPECT_EQ(DrawnTokens({-1, -0.0f, 0, -0.0f}, {.top_k = 2}), (std::set<int32_t>{1, 2}));
  EXPECT_EQ(DrawnTokens(std::vector<float>(1500, 0.5f), {.top_k = 700}, 12000), FirstIds(700));
}

TEST_P(SampleTest, TopPKeepsTheCrossingTokenAndTheLowestOfEqualIds) {
  const std::vector<float> logits = {std::log(0.2f), std::log(0.5f), std::log(0.3f)};
  EXPECT_EQ(DrawnTokens(logits, {.top_p = 0}), (std::set<int32_t>{1}));
  EXPECT_EQ(DrawnTokens(logits, {.top_p = 0.499f}), (std::set<int32_t>{1}));
  EXPECT_EQ(DrawnTokens(logits, {.top_p = 0.501f}), (std::set<int32_t>{1, 2}));
  EXPECT_EQ(DrawnTokens(logits, {.top_p = 0.799f}), (std::set<int32_t>{1, 2}));
  EXPECT_EQ(DrawnTokens(logits, {.top_p = 0.801f}), FirstIds(3));
  const std::vector<float> equal(8, 1);
  EXPECT_EQ(DrawnTokens(equal, {.top_p = 0.5f}), FirstIds(4));
  EXPECT_EQ(DrawnTokens(equal, {.top_p = 0.51f}), FirstIds(5));
  EXPECT_EQ(DrawnTokens(std::vector<float>(2048, -2), {.top_p = 0.25f}, 10000), FirstIds(512));
  // Mass is what top_k left: of {0.5, 0.3} renormalized, 0.5 is 0.625.
  EXPECT_EQ(DrawnTokens(logits, {.top_k = 2, .top_p = 0.62f}), (std::set<int32_t>{1}));
}

TEST_P(SampleTest, MinPIsRelativeToTheMostProbable) {
  const std::vector<float> logits = {std::log(0.2f), std::log(0.5f), std::log(0.3f)};
  EXPECT_EQ(DrawnTokens(logits, {.min_p = 0.399f}), FirstIds(3));
  EXPECT_EQ(DrawnTokens(logits, {.min_p = 0.401f}), (std::set<int32_t>{1, 2}));
  EXPECT_EQ(DrawnTokens(logits, {.min_p = 0.601f}), (std::set<int32_t>{1}));
  EXPECT_EQ(DrawnTokens({3, 1, 3}, {.min_p = 1}), (std::set<int32_t>{0, 2}));
  // The larger cut of the two decides.
  EXPECT_EQ(DrawnTokens(logits, {.top_p = 0.9f, .min_p = 0.5f}), (std::set<int32_t>{1, 2}));
  EXPECT_EQ(DrawnTokens(logits, {.top_p = 0.4f, .min_p = 0.5f}), (std::set<int32_t>{1}));
}

TEST_P(SampleTest, ExtremeTemperaturesStayDefined) {
  const std::vector<float> logits = {1, 5, 4.999f, 5, -kInfinity};
  for (float temperature : {1e-45f, 1e-38f, 1e-6f}) {
    EXPECT_EQ(DrawnTokens(logits, {.temperature = temperature}), (std::set<int32_t>{1, 3})) << temperature;
  }
  EXPECT_EQ(DrawnTokens(logits, {.temperature = 3e38f}), FirstIds(4));
}

TEST_P(SampleTest, ASeedRepeatsAndSequencesDiffer) {
  const std::vector<float> logits = NormalLogits(1000, 8, 1);
  Matrix row(1, 1000, DType::kF32);
  std::memcpy(row.view().data, logits.data(), logits.size() * sizeof(float));
  auto stream_of = [&](uint64_t seed, uint32_t sequence) {
    std::vector<int32_t> tokens;
    for (int64_t position = 0; position < 30; ++position) {
      tokens.push_back(SampleRows(row.view(), {{.seed = seed, .sequence = sequence, .position = position}})[0].token);
    }
    return tokens;
  };
  std::set<std::vector<int32_t>> streams;
  for (uint64_t seed : {uint64_t{0}, uint64_t{1}, uint64_t{1} << 32, uint64_t{1} << 63}) {
    for (uint32_t sequence = 0; sequence < 8; ++sequence) {
      EXPECT_EQ(stream_of(seed, sequence), stream_of(seed, sequence));
      EXPECT_TRUE(streams.insert(stream_of(seed, sequence)).second) << seed << ", " << sequence;
    }
  }
}

TEST_P(SampleTest, ReportsRowsThatAreNotFinite) {
  Request banned;
  for (float temperature : {0.0f, 1.0f}) {
    for (size_t vocab : {1, 9, 71, 4099}) {
      for (size_t at = 0; at < vocab; at += 1 + vocab / 71) {
        for (float bad : {NAN, kInfinity}) {
          std::vector<float> logits = NormalLogits(vocab, 9);
          logits[at] = bad;
          banned.params = {.temperature = temperature, .top_k = 3, .top_p = 0.5f, .top_logprobs = 2};
          SampleResult result = SampleOne(logits, banned.Get());
          ASSERT_FALSE(result.finite) << bad << " at " << at << " of " << vocab;
          ASSERT_EQ(result.token, -1);
          // A row that went wrong is reported even where the token could not be drawn.
          banned.banned_ids = {static_cast<int32_t>(at)};
          result = SampleOne(logits, banned.Get());
          ASSERT_FALSE(result.finite);
          ASSERT_EQ(result.token, -1);
          banned.banned_ids.clear();
        }
      }
      const SampleResult nothing = SampleOne(std::vector<float>(vocab, -kInfinity), {.temperature = temperature});
      EXPECT_FALSE(nothing.finite);
      EXPECT_EQ(nothing.token, -1);
    }
  }
}

TEST_P(SampleTest, NeverDrawsWhatIsBannedOrImpossible) {
  std::vector<float> logits = NormalLogits(20, 10);
  logits[4] = 30;
  logits[5] = -kInfinity;
  Request request;
  request.banned_ids = {4, 19};
  request.bias_ids = {19};
  request.bias_values = {1000};  // bans come last
  std::set<int32_t> allowed = FirstIds(19);
  allowed.erase(4);
  allowed.erase(5);
  EXPECT_EQ(DrawnTokens(logits, request.Get(), 5000), allowed);
  request.params.top_k = 18;  // room for the impossible ones, too
  EXPECT_EQ(DrawnTokens(logits, request.Get(), 5000), allowed);
  request.params.temperature = 0;
  EXPECT_TRUE(allowed.contains(SampleOne(logits, request.Get()).token));
  // Ids outside of the vocabulary mean nothing.
  request.banned_ids = {-1, 20, 1 << 30};
  request.bias_ids = {-7, 20};
  request.bias_values = {5, 5};
  EXPECT_EQ(SampleOne(logits, request.Get()).token, 4);
  // Whatever is left is drawn; when nothing is, the row says so.
  for (float temperature : {0.0f, 1.0f}) {
    Request most;
    most.params.temperature = temperature;
    for (int32_t id = 0; id < 20; ++id) {
      if (id != 11) most.banned_ids.push_back(id);
    }
    EXPECT_EQ(SampleOne(logits, most.Get()).token, 11);
    most.banned_ids.push_back(11);
    const SampleResult result = SampleOne(logits, most.Get());
    EXPECT_EQ(result.token, -1);
    EXPECT_FALSE(result.finite);
  }
}

// Log-probabilities are those of the model, whatever was done to the logits before the draw.
TEST_P(SampleTest, LogprobsAreOfTheRawLogits) {
  for (size_t vocab : {1, 2, 20, 21, 300, 5000}) {
    for (int32_t num_top : {0, 1, 5, 20, 100}) {
      std::vector<float> logits = NormalLogits(vocab, 11, 3);
      for (size_t i = 0; i < vocab && num_top == 5; ++i) logits[i] = std::round(logits[i]);  // many equal
      Request request = WithPenalties(vocab);
      request.params = {
          .temperature = 0.6f, .top_k = 50, .top_p = 0.9f, .presence_penalty = 1, .top_logprobs = num_top};
      request.bias_ids = {0};
      request.bias_values = {2};
      for (request.params.position = 0; request.params.position < 5; ++request.params.position) {
        ExpectLogprobs(Doubles(logits), num_top, SampleOne(logits, request.Get()));
        ExpectLogprobs(Doubles(logits), num_top, SampleOne(logits, {.top_logprobs = num_top}));
        ExpectLogprobs(Doubles(logits), num_top, SampleOne(logits, {.temperature = 0, .top_logprobs = num_top}));
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Levels, SampleTest, testing::Values(Isa::kAvx2, Isa::kAvx512), IsaTestName);

TEST(Sample, EveryInstructionSetGivesTheSameBits) {
  std::mt19937 random(12);
  for (int i = 0; i < 400; ++i) {
    const size_t vocab = 1 + random() % 4000;
    const std::vector<float> logits = NormalLogits(vocab, random(), i % 2 ? 1 : 5);
    const Request request = RandomRequest(random, vocab);
    std::set<std::string> results;
    for (Isa isa : {Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16, Isa::kAmxBf16}) {
      ScopedIsa scope(isa);
      if (scope.available()) results.insert(Text(SampleOne(logits, request.Get())));
    }
    EXPECT_EQ(results.size(), 1u) << testing::PrintToString(results);
  }
}

}  // namespace
}  // namespace altiplano
