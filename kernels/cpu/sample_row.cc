// One row, step by step. What makes the token the same on every machine: f32 operations in the order written here, Exp
// of math_vec.h, and integer weights.
#include "kernels/cpu/sample_row.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/cpu/philox.h"

namespace altiplano::cpu {

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

bool HasPenalties(const SampleParams& p) {
  return p.output_counts != nullptr && p.in_prompt != nullptr &&
         (p.repetition_penalty != 1 || p.presence_penalty != 0 || p.frequency_penalty != 0);
}

float Penalized(const SampleParams& p, float logit, uint16_t count, bool in_prompt) {
  if (count > 0 || in_prompt) logit = logit > 0 ? logit / p.repetition_penalty : logit * p.repetition_penalty;
  if (count > 0) {
    logit -= static_cast<float>(count) * p.frequency_penalty;
    logit -= p.presence_penalty;
  }
  return logit;
}

// Most tokens never occurred: looked at eight at a time.
void ApplyPenalties(const SampleParams& p, int64_t vocab, float* x) {
  constexpr int64_t kChunk = 8;
  for (int64_t begin = 0; begin < vocab; begin += kChunk) {
    const int64_t end = std::min(vocab, begin + kChunk);
    if (end - begin == kChunk) {
      uint64_t counts[2], prompt;
      std::memcpy(counts, p.output_counts + begin, sizeof(counts));
      std::memcpy(&prompt, p.in_prompt + begin, sizeof(prompt));
      if ((counts[0] | counts[1] | prompt) == 0) continue;
    }
    for (int64_t i = begin; i < end; ++i) x[i] = Penalized(p, x[i], p.output_counts[i], p.in_prompt[i] != 0);
  }
}

// Penalties, then bias, then bans. Ids outside of the vocabulary are passed over.
void Adjust(const SampleParams& p, const float* row, int64_t vocab, float* x) {
  std::memcpy(x, row, static_cast<size_t>(vocab) * sizeof(float));
  if (HasPenalties(p)) ApplyPenalties(p, vocab, x);
  for (int32_t i = 0; i < p.num_bias; ++i) {
    if (const int32_t id = p.bias_ids[i]; id >= 0 && id < vocab) x[id] += p.bias_values[i];
  }
  for (int32_t i = 0; i < p.num_banned; ++i) {
    if (const int32_t id = p.banned_ids[i]; id >= 0 && id < vocab) x[id] = -kInf;
  }
}

float NextAbove(float x) {
  return std::nextafterf(x, kInf);
}

// Elements [0, boundary) are kept from `value` on, those after it only above: that is where the last kept tie lies.
int64_t TieBoundary(const float* x, int64_t n, const Cut& cut) {
  if (cut.ties >= cut.equal) return n;
  int64_t left = cut.ties, i = 0;
  for (; i < n && left > 0; ++i) left -= x[i] == cut.value;
  return i;
}

// The x[i] that top_k keeps, and their ids, moved to the front. Returns how many.
int64_t KeepTopK(const SampleKernels& kernels, int32_t k, const float* x, int64_t vocab, float max,
                 const SampleWorkspace& work) {
  const Cut cut = FindCut(kernels, x, vocab, max, Measure::kCount, static_cast<uint64_t>(k));
  const int64_t boundary = TieBoundary(x, vocab, cut);
  const float above = NextAbove(cut.value);
  int64_t n = kernels.indices_between(x, boundary, cut.value, kInf, work.ids, vocab);
  const int64_t before = n;
  n += kernels.indices_between(x + boundary, vocab - boundary, above, kInf, work.ids + n, vocab - n);
  for (int64_t i = before; i < n; ++i) work.ids[i] += static_cast<int32_t>(boundary);
  for (int64_t i = 0; i < n; ++i) work.x[i] = x[work.ids[i]];  // ids ascend, so this may be in place
  return n;
}

// The first i, in order, where the kept weights up to and including it exceed r.
int64_t InverseCdf(const SampleKernels& kernels, const float* e, int64_t n, float threshold, uint64_t* r) {
  constexpr int64_t kBlock = 512;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t count = std::min(kBlock, n - begin);
    const uint64_t block = kernels.weight_at_least(e + begin, count, threshold);
    if (*r >= block) {
      *r -= block;
      continue;
    }
    for (int64_t i = begin;; ++i) {
      if (e[i] < threshold) continue;
      const auto weight = static_cast<uint64_t>(std::llrint(static_cast<double>(e[i]) * 0x1p40));
      if (*r < weight) return i;
      *r -= weight;
    }
  }
  return n;
}

// Draws among e[0, n), of which `total` is the weight. Returns an index.
int64_t Draw(const SampleKernels& kernels, const SampleParams& params, const float* e, int64_t n, uint64_t total) {
  Cut cut = {std::numeric_limits<float>::denorm_min(), n, n};  // all that weigh anything
  if (params.top_p < 1) {
    const double mass = std::ceil(static_cast<double>(params.top_p) * static_cast<double>(total));
    const uint64_t target = mass >= 1 ? std::min(total, static_cast<uint64_t>(mass)) : 1;
    cut = FindCut(kernels, e, n, 1.0f, Measure::kWeight, target);
  }
  if (const float min_p = std::min(params.min_p, 1.0f); min_p > cut.value) cut = {min_p, n, n};
  const int64_t boundary = TieBoundary(e, n, cut);
  const float above = NextAbove(cut.value);
  const uint64_t first = kernels.weight_at_least(e, boundary, cut.value);
  const uint64_t kept = first + kernels.weight_at_least(e + boundary, n - boundary, above);
  const uint64_t bits = SampleBits(params.seed, params.position, params.sequence);
  auto r =
      static_cast<uint64_t>(static_cast<unsigned __int128>(bits) * kept >> 64);  // floor(u * kept), u = bits / 2^64
  if (r < first) return InverseCdf(kernels, e, boundary, cut.value, &r);
  r -= first;
  return boundary + InverseCdf(kernels, e + boundary, n - boundary, above, &r);
}

}  // namespace

void SampleRow(const SampleKernels& kernels, const SampleParams& params, const float* row, int64_t vocab,
               const SampleWorkspace& work, SampleResult* result) {
  *result = SampleResult();
  float raw_max, max;
  int64_t argmax;
  result->finite = kernels.max_of(row, vocab, &raw_max, &argmax) && raw_max > -kInf;
  if (!result->finite) return;

  const float* x = row;
  max = raw_max;
  if (HasPenalties(params) || params.num_bias > 0 || params.num_banned > 0) {
    Adjust(params, row, vocab, work.x);
    x = work.x;
    result->finite = kernels.max_of(x, vocab, &max, &argmax) && max > -kInf;
    if (!result->finite) return;
  }

  uint64_t raw_total = 0;
  if (params.temperature <= 0) {
    result->token = static_cast<int32_t>(argmax);
  } else {
    const float factor = std::min(1 / params.temperature, std::numeric_limits<float>::max());
    int64_t n = vocab;
    const bool filtered = params.top_k > 0 && params.top_k < vocab;
    if (filtered) {
      n = KeepTopK(kernels, params.top_k, x, vocab, max, work);
      x = work.x;
    }
    const uint64_t total = kernels.exponentials(x, n, max, factor, work.e);
    const int64_t drawn = Draw(kernels, params, work.e, n, total);
    result->token = filtered ? work.ids[drawn] : static_cast<int32_t>(drawn);
    if (x == row && factor == 1) raw_total = total;
  }
  if (params.top_logprobs < 0) return;
  if (raw_total == 0) raw_total = kernels.exponentials(row, vocab, raw_max, 1, nullptr);
  FillLogprobs(kernels, row, vocab, raw_max, raw_total, params.top_logprobs, result);
}

// The threshold rises with each element found, so that few are looked at more than once.
void FillLogprobs(const SampleKernels& kernels, const float* row, int64_t vocab, float max, uint64_t total,
                  int32_t num_top, SampleResult* result) {
  const double log_total = std::log(static_cast<double>(total) * 0x1p-40);
  auto logprob = [&](float logit) {
    return static_cast<float>(static_cast<double>(logit) - static_cast<double>(max) - log_total);
  };
  const float own = row[result->token];
  result->logprob = logprob(own);
  result->rank = 1 + static_cast<int32_t>(kernels.count_at_least(row, vocab, NextAbove(own)));

  const int64_t wanted = std::min<int64_t>({num_top, kMaxTopLogprobs, vocab});
  int32_t* ids = result->top_ids;
  result->num_top = 0;
  float threshold = -kInf;
  for (int64_t i = 0; wanted > 0 && (i = kernels.find_at_least(row, i, vocab, threshold)) < vocab; ++i) {
    int64_t at = result->num_top < wanted ? result->num_top++ : wanted - 1;
    for (; at > 0 && row[ids[at - 1]] < row[i]; --at) ids[at] = ids[at - 1];
    ids[at] = static_cast<int32_t>(i);
    if (result->num_top == wanted) threshold = NextAbove(row[ids[wanted - 1]]);
  }
  for (int32_t i = 0; i < result->num_top; ++i) result->top_logprobs[i] = logprob(row[ids[i]]);
}

}  // namespace altiplano::cpu
