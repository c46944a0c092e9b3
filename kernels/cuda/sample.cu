// Sample and Score. The token is the same as on the CPU to the bit: the same f32 operations in the same order, the same
// polynomial for e^x, and weights that are integers, so that no sum depends on the order of threads. Nothing is sorted:
// the least element that top_k or top_p keeps is found by its bits, eight at a time, in histograms.
//
// One block for each row. It goes over the row a dozen times, which lies in L2.
#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "kernels/cpu/philox.h"
#include "kernels/cuda/backend.h"
#include "kernels/cuda/elements.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/sample_plan.h"
#include "kernels/cuda/sample_weights.h"

namespace altiplano::cuda {

namespace {

constexpr int kThreads = static_cast<int>(kSampleThreads);
constexpr int kWarps = kSampleWarps;
constexpr float kLeast = 0x1p-149f;  // weighs nothing, but is above 0
constexpr unsigned kAllLanes = 0xFFFFFFFF;

struct RowParams {
  float temperature, top_p, min_p;
  float presence_penalty, frequency_penalty, repetition_penalty;
  int32_t top_k, top_logprobs;
  uint64_t seed;
  int64_t position;
  uint32_t sequence;
  int32_t token;  // Score: that is asked for; Sample: -1
  bool adjusted;  // the logits to sample from lie in scratch
  bool penalized;
  const uint16_t* output_counts;
  const uint8_t* in_prompt;
  uint16_t* counts_out;
};
struct RowBatch {
  RowParams rows[kSampleRowsPerLaunch];
};
struct BiasBatch {
  int32_t ids[kBiasPerLaunch];
  float values[kBiasPerLaunch];
};
struct SampleMemory {
  const float* logits;
  int64_t stride;
  float* adjusted;  // [R, V]
  float* weights;   // [R, V]
  SampleResult* results;
  int32_t* tokens;  // may be null
  int vocab;
};

// Integers in the order of floats, 0 and -0 being one.
PTX_FUNCTION uint32_t KeyOf(float x) {
  const uint32_t bits = ptx::BitsOfFloat(ptx::Add(x, 0.0f));
  return bits >> 31 ? ~bits : bits | 0x80000000;
}
PTX_FUNCTION float FloatOf(uint32_t key) {
  return ptx::FloatOfBits(key >> 31 ? key & 0x7FFFFFFF : ~key);
}

// ---- a block together. Every function leaves shared memory free to be written again.

struct Largest {
  float value;
  int index;
};
PTX_FUNCTION Largest LargerOf(Largest a, Largest b) {
  return b.value > a.value || (b.value == a.value && b.index < a.index) ? b : a;
}

PTX_FUNCTION uint64_t BlockSum(uint64_t x) {
  PTX_SHARED(uint64_t, sums, kWarps);
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
  if (threadIdx.x % 32 == 0) ptx::StShared(&sums[threadIdx.x / 32], x);
  __syncthreads();
  uint64_t total = 0;
  for (int warp = 0; warp < kWarps; ++warp) total += ptx::LdShared(&sums[warp]);
  __syncthreads();
  return total;
}

PTX_FUNCTION Largest BlockLargest(Largest own) {
  PTX_SHARED(float, values, kWarps);
  PTX_SHARED(int, indices, kWarps);
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    const float value = __shfl_xor_sync(kAllLanes, own.value, lanes);
    const int index = __shfl_xor_sync(kAllLanes, own.index, lanes);
    own = LargerOf(own, {value, index});
  }
  if (threadIdx.x % 32 == 0) {
    ptx::StShared(&values[threadIdx.x / 32], own.value);
    ptx::StShared(&indices[threadIdx.x / 32], own.index);
  }
  __syncthreads();
  for (int warp = 0; warp < kWarps; ++warp) {
    own = LargerOf(own, {ptx::LdShared(&values[warp]), ptx::LdShared(&indices[warp])});
  }
  __syncthreads();
  return own;
}

// The largest element and the lowest index that holds it. False when there is a NaN, a +inf, or nothing above -inf.
PTX_FUNCTION bool LargestOf(const float* x, int n, Largest* largest) {
  Largest own = {-kInf, n};
  uint64_t bad = 0;
  for (int i = static_cast<int>(threadIdx.x); i < n; i += kThreads) {
    const float value = ptx::LdGlobal(x + i);
    if (!(value < kInf)) bad = 1;
    own = LargerOf(own, {value, i});
  }
  *largest = BlockLargest(own);
  return BlockSum(bad) == 0 && largest->value > -kInf;
}

// The first index up to and including which the integers measure(i) sum up to more than `target`; n when they do not.
// Each warp sums a run of its own; the one that holds the index goes through its run again, 32 at a time.
template <typename Measure>
PTX_FUNCTION int FirstBeyond(int n, uint64_t target, const Measure& measure) {
  PTX_SHARED(uint64_t, sums, kWarps);
  PTX_SHARED(int, found, 1);
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int run = (n + 32 * kWarps - 1) / (32 * kWarps) * 32;
  uint64_t sum = 0;
  for (int i = warp * run + lane; i < (warp + 1) * run; i += 32) sum += i < n ? measure(i) : 0;
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kAllLanes, sum, lanes);
  if (lane == 0) ptx::StShared(&sums[warp], sum);
  if (threadIdx.x == 0) ptx::StShared(found, n);
  __syncthreads();
  int holder = 0;
  for (; holder < kWarps; ++holder) {
    const uint64_t of_warp = ptx::LdShared(&sums[holder]);
    if (target < of_warp) break;
    target -= of_warp;
  }
  if (warp == holder) {
    for (int begin = warp * run;; begin += 32) {
      uint64_t through = begin + lane < n ? measure(begin + lane) : 0;
      for (int lanes = 1; lanes < 32; lanes *= 2) {
        const uint64_t below = __shfl_sync(kAllLanes, through, lane - lanes);
        if (lane >= lanes) through += below;
      }
      int first = through > target ? lane : 32;
      for (int lanes = 16; lanes > 0; lanes /= 2) first = std::min(first, __shfl_xor_sync(kAllLanes, first, lanes));
      if (first < 32) {
        if (lane == 0) ptx::StShared(found, begin + first);
        break;
      }
      target -= __shfl_sync(kAllLanes, through, 31);
    }
  }
  __syncthreads();
  const int index = ptx::LdShared(found);
  __syncthreads();
  return index;
}

// What is kept: the elements from `value` on below `boundary`, and those above it from there on. So ends a run of equal
// elements of which only the first are kept.
struct Kept {
  float value;
  int boundary;
};
PTX_FUNCTION bool IsKept(const Kept& kept, int i, float x) {
  return i < kept.boundary ? x >= kept.value : x > kept.value;
}

// Keeps the largest elements, the lower index first among equal ones, until what is kept reaches `target`: counted, or
// by weight, and then negative elements do not take part. All sum up to at least target.
template <bool kByWeight>
PTX_FUNCTION Kept KeepLargest(const float* x, int n, uint64_t target) {
  PTX_SHARED(unsigned long long, bins, 256);
  PTX_SHARED(unsigned, chosen_bin, 1);
  PTX_SHARED(uint64_t, above_bin, 1);
  uint32_t prefix = 0;
  uint64_t above = 0;  // what larger elements sum up to
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int bin = static_cast<int>(threadIdx.x); bin < 256; bin += kThreads) ptx::StShared(&bins[bin], 0ull);
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < n; i += kThreads) {
      const float value = ptx::LdGlobal(x + i);
      const uint32_t key = KeyOf(value);
      if ((kByWeight && value < 0) || (uint64_t{key} >> (shift + 8)) != (uint64_t{prefix} >> (shift + 8))) continue;
      ptx::AddShared(&bins[key >> shift & 255], static_cast<unsigned long long>(kByWeight ? WeightOf(value) : 1));
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      uint64_t sum = above;
      unsigned bin = 256;
      do sum += ptx::LdShared(&bins[--bin]);
      while (sum < target && bin > 0);
      ptx::StShared(chosen_bin, bin);
      ptx::StShared(above_bin, static_cast<uint64_t>(sum - ptx::LdShared(&bins[bin])));
    }
    __syncthreads();
    prefix |= ptx::LdShared(chosen_bin) << shift;
    above = ptx::LdShared(above_bin);
  }
  const float value = FloatOf(prefix);
  const uint64_t weight = kByWeight ? WeightOf(value) : 1, each = weight > 0 ? weight : 1;
  const uint64_t ties = (target - above + each - 1) / each;
  const int last_tie = FirstBeyond(n, ties - 1, [&](int i) { return uint64_t{ptx::LdGlobal(x + i) == value}; });
  return {value, last_tie < n ? last_tie + 1 : n};
}

// ---- the parts of sampling

// Draws among what top_p and min_p keep of the weights. `total`: all of them; those below 0 stand for no token.
PTX_FUNCTION int Draw(const RowParams& params, const float* weights, int n, uint64_t total) {
  Kept kept = {kLeast, n};
  if (params.top_p < 1) {
    const double mass = ceil(static_cast<double>(params.top_p) * static_cast<double>(total));
    uint64_t target = mass >= 1 ? static_cast<uint64_t>(mass) : 1;
    if (target > total) target = total;
    kept = KeepLargest<true>(weights, n, target);
  }
  const float min_p = params.min_p < 1 ? params.min_p : 1.0f;
  if (min_p > kept.value) kept = {min_p, n};
  const auto measure = [&](int i) {
    const float weight = ptx::LdGlobal(weights + i);
    return IsKept(kept, i, weight) ? WeightOf(weight) : uint64_t{0};
  };
  uint64_t mass = 0;
  for (int i = static_cast<int>(threadIdx.x); i < n; i += kThreads) mass += measure(i);
  mass = BlockSum(mass);
  const uint64_t bits = SampleBits(params.seed, params.position, params.sequence);
  return FirstBeyond(n, ptx::MultiplyHigh(bits, mass), measure);
}

PTX_FUNCTION uint64_t TotalWeight(const float* x, int n, float largest) {
  uint64_t total = 0;
  for (int i = static_cast<int>(threadIdx.x); i < n; i += kThreads) {
    total += WeightOf(Exp(ptx::Add(ptx::LdGlobal(x + i), -largest)));
  }
  return BlockSum(total);
}

// Of the raw logits: the token's log-probability and rank, and the most probable, one after the other.
PTX_FUNCTION void FillLogprobs(const float* row, int n, float largest, int token, int num_top, SampleResult* result) {
  const double log_total = log(static_cast<double>(TotalWeight(row, n, largest)) * 0x1p-40);
  const auto logprob = [&](float logit) {
    return static_cast<float>(static_cast<double>(logit) - static_cast<double>(largest) - log_total);
  };
  const float own = ptx::LdGlobal(row + token);
  uint64_t larger = 0;
  for (int i = static_cast<int>(threadIdx.x); i < n; i += kThreads) larger += ptx::LdGlobal(row + i) > own;
  larger = BlockSum(larger);
  if (threadIdx.x == 0) {
    ptx::StGlobal(&result->logprob, logprob(own));
    ptx::StGlobal(&result->rank, static_cast<int32_t>(1 + larger));
  }
  Largest last = {kInf, -1};
  num_top = num_top < kMaxTopLogprobs ? num_top : kMaxTopLogprobs;
  num_top = num_top < n ? num_top : n;
  for (int top = 0; top < num_top; ++top) {
    Largest next = {-kInf, n};
    for (int i = static_cast<int>(threadIdx.x); i < n; i += kThreads) {
      const float value = ptx::LdGlobal(row + i);
      if (value < last.value || (value == last.value && i > last.index)) next = LargerOf(next, {value, i});
    }
    last = BlockLargest(next);
    if (threadIdx.x != 0) continue;
    ptx::StGlobal(&result->top_ids[top], last.index);
    ptx::StGlobal(&result->top_logprobs[top], logprob(last.value));
  }
  if (threadIdx.x == 0) ptx::StGlobal(&result->num_top, num_top > 0 ? num_top : 0);
}

// Penalties of each logit, whatever the order. Copies also what has none.
__global__ void __launch_bounds__(kAdjustThreads) AdjustKernel(SampleMemory memory, RowBatch batch, int first_row) {
  const RowParams& params = batch.rows[blockIdx.y];
  const int i = static_cast<int>(blockIdx.x * kAdjustThreads + threadIdx.x);
  if (!params.adjusted || i >= memory.vocab) return;
  const int64_t row = first_row + static_cast<int>(blockIdx.y);
  float x = ptx::LdGlobal(memory.logits + row * memory.stride + i);
  if (params.penalized) {
    const uint16_t count = ptx::LdGlobal(params.output_counts + i);
    if (count > 0 || ptx::LdGlobal(params.in_prompt + i) != 0) {
      x = x > 0 ? ptx::Divide(x, params.repetition_penalty) : ptx::Multiply(x, params.repetition_penalty);
    }
    if (count > 0) {
      x = ptx::Add(x, -ptx::Multiply(static_cast<float>(count), params.frequency_penalty));
      x = ptx::Add(x, -params.presence_penalty);
    }
  }
  ptx::StGlobal(memory.adjusted + row * memory.vocab + i, x);
}

// One thread, in order: an id may occur twice. A value of -inf bans.
__global__ void __launch_bounds__(32) BiasKernel(float* x, int vocab, BiasBatch bias, int count) {
  if (threadIdx.x != 0) return;
  for (int i = 0; i < count; ++i) {
    const int id = bias.ids[i];
    if (id < 0 || id >= vocab) continue;
    const float value = bias.values[i];
    ptx::StGlobal(x + id, value == -kInf ? value : ptx::Add(ptx::LdGlobal(x + id), value));
  }
}

// A 1 in launch bounds, here and elsewhere: ptxas then takes the registers that it needs, where it else might spill.
__global__ void __launch_bounds__(kSampleThreads, 1) SampleKernel(SampleMemory memory, RowBatch batch, int first_row) {
  const RowParams& params = batch.rows[blockIdx.x];
  const int64_t r = first_row + static_cast<int>(blockIdx.x);
  const int n = memory.vocab;
  const float* row = memory.logits + r * memory.stride;
  SampleResult* result = memory.results + r;

  Largest raw, largest;
  bool finite = LargestOf(row, n, &raw);
  largest = raw;
  const float* x = row;
  if (finite && params.adjusted) {
    x = memory.adjusted + r * n;
    finite = LargestOf(x, n, &largest);
  }
  int token = params.token;
  if (finite && token < 0) {
    token = largest.index;
    if (params.temperature > 0) {
      const float inverse = ptx::Divide(1.0f, params.temperature);
      const float factor = inverse < 0x1.fffffep127f ? inverse : 0x1.fffffep127f;
      Kept kept = {-kInf, n};
      if (params.top_k > 0 && params.top_k < n) kept = KeepLargest<false>(x, n, static_cast<uint64_t>(params.top_k));
      float* weights = memory.weights + r * n;
      uint64_t total = 0;
      for (int i = static_cast<int>(threadIdx.x); i < n; i += kThreads) {
        const float logit = ptx::LdGlobal(x + i);
        float weight = -1;
        if (IsKept(kept, i, logit)) {
          weight = Exp(ptx::Multiply(ptx::Add(logit, -largest.value), factor));
          total += WeightOf(weight);
        }
        ptx::StGlobal(weights + i, weight);
      }
      total = BlockSum(total);  // whose barrier also lets every thread read all weights
      token = Draw(params, weights, n, total);
    }
  }
  if (threadIdx.x == 0) {
    ptx::StGlobal(&result->finite, finite);
    ptx::StGlobal(&result->token, finite || params.token >= 0 ? token : -1);
    ptx::StGlobal(&result->logprob, 0.0f);
    ptx::StGlobal(&result->rank, 0);
    ptx::StGlobal(&result->num_top, 0);
    if (memory.tokens != nullptr) ptx::StGlobal(memory.tokens + r, finite ? token : 0);
    if (params.counts_out != nullptr && finite) {
      const uint16_t count = ptx::LdGlobal(params.counts_out + token);
      if (count < 0xFFFF) ptx::StGlobal(params.counts_out + token, static_cast<uint16_t>(count + 1));
    }
  }
  if (finite && params.top_logprobs >= 0) FillLogprobs(row, n, raw.value, token, params.top_logprobs, result);
}

RowParams ParamsOf(const SampleParams& p) {
  RowParams params = {};
  params.temperature = p.temperature;
  params.top_p = p.top_p;
  params.min_p = p.min_p;
  params.presence_penalty = p.presence_penalty;
  params.frequency_penalty = p.frequency_penalty;
  params.repetition_penalty = p.repetition_penalty;
  params.top_k = p.top_k;
  params.top_logprobs = p.top_logprobs;
  params.seed = p.seed;
  params.position = p.position;
  params.sequence = p.sequence;
  params.token = -1;
  params.penalized = p.output_counts != nullptr && p.in_prompt != nullptr &&
                     (p.repetition_penalty != 1 || p.presence_penalty != 0 || p.frequency_penalty != 0);
  params.adjusted = params.penalized || p.num_bias > 0 || p.num_banned > 0;
  params.output_counts = p.output_counts;
  params.in_prompt = p.in_prompt;
  params.counts_out = p.counts_out;
  return params;
}

// `value(i)` is added to logit `id(i)` of the row.
template <typename Id, typename Value>
void AddBias(Stream& stream, float* x, int vocab, int32_t count, const Id& id, const Value& value) {
  for (int32_t first = 0; first < count; first += kBiasPerLaunch) {
    BiasBatch batch = {};
    const int32_t n = std::min(count - first, kBiasPerLaunch);
    for (int32_t i = 0; i < n; ++i) {
      batch.ids[i] = id(first + i);
      batch.values[i] = value(first + i);
    }
    Launch(stream, "Bias", {.threads = 32}, BiasKernel, x, vocab, batch, n);
  }
}

SampleMemory MemoryOf(const TensorView& logits, const TensorView& tokens, void* scratch) {
  const int64_t rows = logits.dim(0), vocab = logits.dim(1);
  auto* bytes = static_cast<char*>(scratch);
  auto* floats = reinterpret_cast<float*>(bytes + SampleResultBytes(rows));
  return {.logits = logits.as<float>(),
          .stride = logits.stride0,
          .adjusted = floats,
          .weights = floats + rows * vocab,
          .results = reinterpret_cast<SampleResult*>(bytes),
          .tokens = tokens.as<int32_t>(),
          .vocab = static_cast<int>(vocab)};
}

}  // namespace

void Sample(Stream& stream, const SampleArgs& args) {
  const int64_t rows = args.logits.dim(0);
  const SampleMemory memory = MemoryOf(args.logits, args.tokens, args.scratch);
  for (int64_t first = 0; first < rows; first += kSampleRowsPerLaunch) {
    const int64_t n = std::min(kSampleRowsPerLaunch, rows - first);
    RowBatch batch = {};
    bool adjusted = false;
    for (int64_t i = 0; i < n; ++i) {
      batch.rows[i] = ParamsOf(args.params[first + i]);
      adjusted = adjusted || batch.rows[i].adjusted;
    }
    if (adjusted) {
      Launch(stream, "Adjust", AdjustPlan(n, memory.vocab), AdjustKernel, memory, batch, static_cast<int>(first));
      for (int64_t i = first; i < first + n; ++i) {
        const SampleParams& p = args.params[i];
        float* x = memory.adjusted + i * memory.vocab;
        AddBias(
            stream, x, memory.vocab, p.num_bias, [&](int32_t j) { return p.bias_ids[j]; },
            [&](int32_t j) { return p.bias_values[j]; });
        AddBias(
            stream, x, memory.vocab, p.num_banned, [&](int32_t j) { return p.banned_ids[j]; },
            [](int32_t) { return -kInf; });
      }
    }
    Launch(stream, "Sample", SamplePlan(n), SampleKernel, memory, batch, static_cast<int>(first));
  }
  Copy(stream, args.results, Device::kCpu, memory.results, Device::kCuda,
       static_cast<size_t>(rows) * sizeof(SampleResult));
}

void Score(Stream& stream, const ScoreArgs& args) {
  const int64_t rows = args.logits.dim(0);
  const SampleMemory memory = MemoryOf(args.logits, {}, args.scratch);
  for (int64_t first = 0; first < rows; first += kSampleRowsPerLaunch) {
    const int64_t n = std::min(kSampleRowsPerLaunch, rows - first);
    RowBatch batch = {};
    for (int64_t i = 0; i < n; ++i) {
      const int32_t token = args.results[first + i].token;
      if (token < 0 || token >= memory.vocab) {
        std::fprintf(stderr, "Score: token %d is outside of the vocabulary\n", token);
        std::abort();
      }
      batch.rows[i].token = token;
      batch.rows[i].top_logprobs = std::max(0, args.num_top[first + i]);
    }
    Launch(stream, "Sample", SamplePlan(n), SampleKernel, memory, batch, static_cast<int>(first));
  }
  Copy(stream, args.results, Device::kCpu, memory.results, Device::kCuda,
       static_cast<size_t>(rows) * sizeof(SampleResult));
}

}  // namespace altiplano::cuda
