// Sample and Score. The token is the same as on the CPU to the bit: the same f32 operations in the same order, the same
// polynomial for e^x, and weights that are integers, so that no sum depends on the order of threads or blocks. Nothing
// is sorted but the few most probable: the least element that top_k, top_p or they keep is found by its bits, eleven at
// a time, in histograms.
//
// A row is several blocks' work (sample_plan.h), each with a slice of it. What they find meets in device memory: the
// last one to come draws the conclusion for the next kernel, so that nobody waits. Which kernels a row goes through
// depends on its parameters; greedy sampling is over after the first.
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
constexpr int kLevels = 3;  // of a histogram: 11 bits of a key, 11 more, the last 10
constexpr int kBins = static_cast<int>(kSampleBins);

struct RowParams {
  float temperature, top_p, min_p;
  float presence_penalty, frequency_penalty, repetition_penalty;
  int32_t top_k;
  int32_t num_top;  // most probable; -1: no log-probabilities at all
  uint64_t seed;
  int64_t position;
  uint32_t sequence;
  int32_t token;  // Score: that is asked for; Sample: -1
  bool samples, keeps_top_k, keeps_top_p;
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

struct alignas(8) Largest {
  float value;
  int index;
};
// What is kept: the elements from `value` on below `boundary`, and those above it from there on. So ends a run of equal
// elements of which only the first are kept.
struct alignas(8) Kept {
  float value;
  int boundary;
};
// For the element up to and including which the larger ones sum up to more than a target: so many bits of its key are
// known, and among the elements that begin with them so much is left of the target.
struct alignas(16) Search {
  uint64_t target;
  uint32_t known;
};

// Of a row, from one kernel to the next. Written by one thread of the last block.
struct RowState {
  Search search;
  Largest largest;  // of what is sampled from
  Kept top_k, top_p, top_n;
  double log_total;
  float raw_largest;
  int token;  // once it is known
  uint32_t finite;
  uint32_t blocks_ended, gathered;
};
// Of a block, for the last one of its row.
struct Partial {
  Largest raw, adjusted;
  uint64_t weight;
  uint32_t bad_raw, bad_adjusted;  // elements that are no number
  uint32_t larger;
};
struct RowMemory {
  RowState state;
  Partial partials[kMostSampleBlocks];
  unsigned long long bins[kBins];
  Largest top[kMaxTopLogprobs];
};
static_assert(sizeof(RowMemory) <= kSampleRowBytes);

struct SampleMemory {
  const float* logits;
  int64_t stride;
  float* adjusted;  // [R, V]
  SampleResult* results;
  int32_t* tokens;  // may be null
  char* rows;       // RowMemory of each row of a launch, kSampleRowBytes apart
  int vocab, slice;
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
static_assert(kWarps == 16);  // so that each half of a warp merges what the warps have found

PTX_FUNCTION Largest LargerOf(Largest a, Largest b) {
  return b.value > a.value || (b.value == a.value && b.index < a.index) ? b : a;
}

PTX_FUNCTION uint64_t BlockSum(uint64_t x) {
  PTX_SHARED(uint64_t, sums, kWarps);
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
  if (threadIdx.x % 32 == 0) ptx::StShared(&sums[threadIdx.x / 32], x);
  __syncthreads();
  x = ptx::LdShared(&sums[threadIdx.x % kWarps]);
  for (int lanes = kWarps / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
  __syncthreads();
  return x;
}

PTX_FUNCTION Largest BlockLargest(Largest own) {
  PTX_SHARED(float, values, kWarps);
  PTX_SHARED(int, indices, kWarps);
  const auto among = [&](int lanes) {
    for (; lanes > 0; lanes /= 2) {
      const float value = __shfl_xor_sync(kAllLanes, own.value, lanes);
      const int index = __shfl_xor_sync(kAllLanes, own.index, lanes);
      own = LargerOf(own, {value, index});
    }
  };
  among(16);
  if (threadIdx.x % 32 == 0) {
    ptx::StShared(&values[threadIdx.x / 32], own.value);
    ptx::StShared(&indices[threadIdx.x / 32], own.index);
  }
  __syncthreads();
  own = {ptx::LdShared(&values[threadIdx.x % kWarps]), ptx::LdShared(&indices[threadIdx.x % kWarps])};
  among(kWarps / 2);
  __syncthreads();
  return own;
}

// Of [begin, end), each once and a thread's in order; several are under way to a thread at a time.
template <typename Use>
PTX_FUNCTION void ForEach(const float* x, int begin, int end, const Use& use) {
  constexpr int kAtOnce = 8;
  for (; begin < end; begin += kAtOnce * kThreads) {
    const int first = begin + static_cast<int>(threadIdx.x);
    const auto run = [&]<bool kAll>() {
      float values[kAtOnce];
      PTX_UNROLL
      for (int j = 0; j < kAtOnce; ++j) {
        if (kAll || first + j * kThreads < end) values[j] = ptx::LdGlobal(x + first + j * kThreads);
      }
      PTX_UNROLL
      for (int j = 0; j < kAtOnce; ++j) {
        if (kAll || first + j * kThreads < end) use(first + j * kThreads, values[j]);
      }
    };
    // Without checks where all are inside, which is the same for the block.
    if (begin + kAtOnce * kThreads <= end) {
      run.template operator()<true>();
    } else {
      run.template operator()<false>();
    }
  }
}

// The first index up to and including which the integers measure(i) sum up to more than `target`, and what the target
// exceeds the sum before it by; `end` when they do not. Each warp sums a run of its own; the one that holds the index
// goes through its run again, 32 at a time.
struct Found {
  int index;
  uint64_t rest;
};
template <typename Measure>
PTX_FUNCTION Found FirstBeyond(int begin, int end, uint64_t target, const Measure& measure) {
  PTX_SHARED(uint64_t, sums, kWarps);
  PTX_SHARED(int, found_index, 1);
  PTX_SHARED(uint64_t, found_rest, 1);
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int run = (end - begin + 32 * kWarps - 1) / (32 * kWarps) * 32;
  uint64_t sum = 0;
  for (int i = begin + warp * run + lane; i < begin + (warp + 1) * run; i += 32) sum += i < end ? measure(i) : 0;
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kAllLanes, sum, lanes);
  if (lane == 0) ptx::StShared(&sums[warp], sum);
  if (threadIdx.x == 0) {
    ptx::StShared(found_index, end);
    ptx::StShared(found_rest, uint64_t{0});
  }
  __syncthreads();
  int holder = 0;
  for (; holder < kWarps; ++holder) {
    const uint64_t of_warp = ptx::LdShared(&sums[holder]);
    if (target < of_warp) break;
    target -= of_warp;
  }
  if (warp == holder) {
    for (int first = begin + warp * run;; first += 32) {
      const uint64_t own = first + lane < end ? measure(first + lane) : 0;
      uint64_t through = own;
      for (int lanes = 1; lanes < 32; lanes *= 2) {
        const uint64_t below = __shfl_sync(kAllLanes, through, lane - lanes);
        if (lane >= lanes) through += below;
      }
      int holding = through > target ? lane : 32;
      for (int lanes = 16; lanes > 0; lanes /= 2) {
        holding = std::min(holding, __shfl_xor_sync(kAllLanes, holding, lanes));
      }
      if (holding < 32) {
        if (lane == holding) {
          ptx::StShared(found_index, first + lane);
          ptx::StShared(found_rest, target - (through - own));
        }
        break;
      }
      target -= __shfl_sync(kAllLanes, through, 31);
    }
  }
  __syncthreads();
  const Found found = {ptx::LdShared(found_index), ptx::LdShared(found_rest)};
  __syncthreads();
  return found;
}

PTX_FUNCTION bool IsKept(const Kept& kept, int i, float x) {
  return i < kept.boundary ? x >= kept.value : x > kept.value;
}

// ---- the blocks of a row together

struct Row {
  const RowParams& params;
  RowMemory& memory;
  SampleResult* result;
  int32_t* token;     // may be null
  const float* raw;   // [n]
  const float* x;     // [n]: to sample from
  int n, begin, end;  // [begin, end): this block's
};
PTX_FUNCTION Row RowOf(const SampleMemory& memory, const RowBatch& batch, int first_row) {
  const int r = static_cast<int>(blockIdx.y), begin = static_cast<int>(blockIdx.x) * memory.slice;
  const int64_t row = first_row + r;
  const RowParams& params = batch.rows[r];
  const float* raw = memory.logits + row * memory.stride;
  return {params,
          *reinterpret_cast<RowMemory*>(memory.rows + r * kSampleRowBytes),
          memory.results + row,
          memory.tokens == nullptr ? nullptr : memory.tokens + row,
          raw,
          params.adjusted ? memory.adjusted + row * memory.vocab : raw,
          memory.vocab,
          begin,
          begin + memory.slice < memory.vocab ? begin + memory.slice : memory.vocab};
}

// Whether all other blocks of the row have come here, whose stores are then seen. Of one block it is true.
PTX_FUNCTION bool IsLastBlock(const Row& row) {
  PTX_SHARED(unsigned, is_last, 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    const bool last = ptx::AddGlobal(&row.memory.state.blocks_ended, 1u) == gridDim.x - 1;
    if (last) ptx::StGlobal(&row.memory.state.blocks_ended, 0u);
    ptx::StShared(is_last, last ? 1u : 0u);
  }
  __syncthreads();
  return ptx::LdShared(is_last) != 0;
}

PTX_FUNCTION int ShiftOf(int level) {
  return level == 0 ? 21 : level == 1 ? 10 : 0;
}
PTX_FUNCTION int BinsOf(int level) {
  return level < 2 ? kBins : kBins / 2;
}

// Adds the block's elements to the row's bins, as far as they begin with what is known of the key. `item` gives what
// stands for element i: a number, and how much of it there is: 0 or 1 (kCounts), or a weight.
//
// Shared memory adds words of 32 bits by itself. An addition of 64 would be a loop that begins again when another
// thread was faster, and most logits fall into few bins: so sums of weights are kept in three words.
struct Item {
  float value;
  uint64_t amount;
};
constexpr int kCounts = 1, kWeights = 3;  // words of a bin
constexpr int kBitsOfWord = 14;           // of an amount of at most 2^40; the last word has the rest
static_assert(kMostSampleSlice <= 1 << (32 - kBitsOfWord));
template <int kWords, typename ItemOf>
PTX_FUNCTION void AddToBins(const Row& row, const float* x, int level, uint32_t known, const ItemOf& item_of) {
  PTX_SHARED(uint32_t, bins, kWords * kBins);
  PTX_UNROLL
  for (int word = 0; word < kWords; ++word) {
    for (int bin = static_cast<int>(threadIdx.x); bin < BinsOf(level); bin += kThreads) {
      ptx::StShared(&bins[word * kBins + bin], 0u);
    }
  }
  __syncthreads();
  const int shift = ShiftOf(level);
  ForEach(x, row.begin, row.end, [&](int i, float element) {
    const Item item = item_of(i, element);
    const uint32_t key = KeyOf(item.value);
    if ((level > 0 && (key ^ known) >> ShiftOf(level - 1) != 0) || item.amount == 0) return;
    uint32_t* const bin = &bins[(key >> shift) & static_cast<uint32_t>(BinsOf(level) - 1)];
    if constexpr (kWords == kCounts) {
      ptx::AddShared(bin, 1u);
    } else {
      constexpr uint32_t kMask = (1 << kBitsOfWord) - 1;
      const auto low = static_cast<uint32_t>(item.amount) & kMask;
      const auto middle = static_cast<uint32_t>(item.amount >> kBitsOfWord) & kMask;
      const auto high = static_cast<uint32_t>(item.amount >> (2 * kBitsOfWord));
      ptx::AddShared(bin, low);
      if (middle > 0) ptx::AddShared(bin + kBins, middle);
      if (high > 0) ptx::AddShared(bin + 2 * kBins, high);
    }
  });
  __syncthreads();
  for (int bin = static_cast<int>(threadIdx.x); bin < BinsOf(level); bin += kThreads) {
    unsigned long long amount = 0;
    PTX_UNROLL
    for (int word = 0; word < kWords; ++word) {
      amount += static_cast<unsigned long long>(ptx::LdShared(&bins[word * kBins + bin])) << (word * kBitsOfWord);
    }
    if (amount > 0) ptx::AddGlobalInAnyOrder(&row.memory.bins[bin], amount);
  }
}

// Of the last block: goes on to the bin in which the target lies, and leaves them all empty. What the bin held.
PTX_FUNCTION uint64_t ChooseBin(const Row& row, int level, Search* search) {
  const int bins = BinsOf(level);
  const auto amount = [&](int i) { return uint64_t{ptx::LdGlobal(&row.memory.bins[bins - 1 - i])}; };
  const Found found = FirstBeyond(0, bins, search->target, amount);
  const uint64_t held = amount(found.index);
  __syncthreads();
  for (int bin = static_cast<int>(threadIdx.x); bin < bins; bin += kThreads) {
    ptx::StGlobal(&row.memory.bins[bin], 0ull);
  }
  search->known |= static_cast<uint32_t>(bins - 1 - found.index) << ShiftOf(level);
  search->target = found.rest;
  return held;
}

// Then, where all bits are known: of the elements that equal what was found only the first are kept, up to the target.
template <typename ValueOf>
PTX_FUNCTION Kept KeptBy(const Row& row, const Search& search, uint64_t held, uint64_t each, const ValueOf& value_of) {
  const float value = FloatOf(search.known);
  const uint64_t before_last = search.target / each;
  if (before_last + 1 >= held / each) return {value, row.n};
  return {value, FirstBeyond(0, row.n, before_last, [&](int i) { return uint64_t{value_of(i) == value}; }).index + 1};
}

// ---- what decides

// e^((x - largest) / temperature) of what top_k keeps, less than 0 for the rest.
struct Weigh {
  Kept top_k;
  float largest, factor;

  PTX_FUNCTION explicit Weigh(const Row& row)
      : top_k(ptx::LdGlobal(&row.memory.state.top_k)), largest(ptx::LdGlobal(&row.memory.state.largest).value) {
    const float inverse = ptx::Divide(1.0f, row.params.temperature);
    factor = inverse < 0x1.fffffep127f ? inverse : 0x1.fffffep127f;
  }
  PTX_FUNCTION float operator()(int i, float x) const {
    return IsKept(top_k, i, x) ? Exp(ptx::Multiply(ptx::Add(x, -largest), factor)) : -1.0f;
  }
};

// Of one thread, when the row's token is known.
PTX_FUNCTION void Finish(const Row& row, bool finite, int token) {
  ptx::StGlobal(&row.memory.state.token, token);
  ptx::StGlobal(&row.result->finite, finite);
  ptx::StGlobal(&row.result->token, finite || row.params.token >= 0 ? token : -1);
  ptx::StGlobal(&row.result->logprob, 0.0f);
  ptx::StGlobal(&row.result->rank, 0);
  ptx::StGlobal(&row.result->num_top, 0);
  if (row.token != nullptr) ptx::StGlobal(row.token, finite ? token : 0);
  if (row.params.counts_out != nullptr && finite) {
    const uint16_t count = ptx::LdGlobal(row.params.counts_out + token);
    if (count < 0xFFFF) ptx::StGlobal(row.params.counts_out + token, static_cast<uint16_t>(count + 1));
  }
}

PTX_FUNCTION float LogprobOf(const Row& row, float logit, double log_total) {
  return static_cast<float>(static_cast<double>(logit) -
                            static_cast<double>(ptx::LdGlobal(&row.memory.state.raw_largest)) - log_total);
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

// The largest element of a slice and the lowest index that holds it, and how many are NaN or +inf.
struct LargestOfSlice {
  Largest largest;
  uint32_t bad;
};
PTX_FUNCTION LargestOfSlice FindLargest(const Row& row, const float* x) {
  LargestOfSlice own = {{-kInf, row.n}, 0};
  ForEach(x, row.begin, row.end, [&](int i, float value) {
    own.bad += !(value < kInf);
    if (value > own.largest.value) own.largest = {value, i};  // of equal ones the first stays
  });
  return {BlockLargest(own.largest), static_cast<uint32_t>(BlockSum(own.bad))};
}
// Of all slices. False when there is anything bad, or nothing above -inf.
PTX_FUNCTION bool MergeLargest(const Row& row, bool adjusted, Largest* merged) {
  Largest own = {-kInf, row.n};
  uint64_t bad = 0;
  if (threadIdx.x < gridDim.x) {
    const Partial& partial = row.memory.partials[threadIdx.x];
    own = ptx::LdGlobal(adjusted ? &partial.adjusted : &partial.raw);
    bad = ptx::LdGlobal(adjusted ? &partial.bad_adjusted : &partial.bad_raw);
  }
  *merged = BlockLargest(own);
  return BlockSum(bad) == 0 && merged->value > -kInf;
}

// The first kernel of every row. Two blocks of a multiprocessor, here and below, have 32 KiB under way.
__global__ void __launch_bounds__(kSampleThreads, 2) LargestKernel(SampleMemory memory, RowBatch batch, int first_row) {
  ptx::WaitForKernelsBefore();
  ptx::LetNextKernelStart();
  const Row row = RowOf(memory, batch, first_row);
  const bool adjusted = row.params.adjusted;
  const LargestOfSlice raw = FindLargest(row, row.raw);
  const LargestOfSlice own = adjusted ? FindLargest(row, row.x) : raw;
  if (threadIdx.x == 0) {
    Partial& partial = row.memory.partials[blockIdx.x];
    ptx::StGlobal(&partial.raw, raw.largest);
    ptx::StGlobal(&partial.bad_raw, raw.bad);
    ptx::StGlobal(&partial.adjusted, own.largest);
    ptx::StGlobal(&partial.bad_adjusted, own.bad);
  }
  if (!IsLastBlock(row)) return;
  Largest raw_largest, largest;
  bool finite = MergeLargest(row, false, &raw_largest);
  finite = MergeLargest(row, true, &largest) && finite;
  if (threadIdx.x != 0) return;
  RowState& state = row.memory.state;
  ptx::StGlobal(&state.finite, finite ? 1u : 0u);
  ptx::StGlobal(&state.raw_largest, raw_largest.value);
  ptx::StGlobal(&state.largest, largest);
  ptx::StGlobal(&state.top_k, Kept{-kInf, row.n});
  ptx::StGlobal(&state.top_p, Kept{kLeast, row.n});
  ptx::StGlobal(&state.gathered, 0u);
  ptx::StGlobal(&state.search.known, 0u);
  ptx::StGlobal(&state.search.target, static_cast<uint64_t>(row.params.keeps_top_k ? row.params.top_k - 1 : 0));
  if (!finite || !row.params.samples) Finish(row, finite, row.params.token >= 0 ? row.params.token : largest.index);
}
PTX_FUNCTION bool IsFinite(const Row& row) {
  return ptx::LdGlobal(&row.memory.state.finite) != 0;
}
PTX_FUNCTION Search SearchOf(const Row& row) {
  return {ptx::LdGlobal(&row.memory.state.search.target), ptx::LdGlobal(&row.memory.state.search.known)};
}
// Of one thread.
PTX_FUNCTION void SetSearch(const Row& row, const Search& search) {
  ptx::StGlobal(&row.memory.state.search.target, search.target);
  ptx::StGlobal(&row.memory.state.search.known, search.known);
}

// One level of the search for the last of the `top_k` largest, or of the most probable.
__global__ void __launch_bounds__(kSampleThreads, 2)
    CountKernel(SampleMemory memory, RowBatch batch, int first_row, int level, bool most_probable) {
  ptx::WaitForKernelsBefore();
  ptx::LetNextKernelStart();
  const Row row = RowOf(memory, batch, first_row);
  if (!(most_probable ? row.params.num_top > 0 : row.params.keeps_top_k) || !IsFinite(row)) return;
  const float* x = most_probable ? row.raw : row.x;
  Search search = SearchOf(row);
  AddToBins<kCounts>(row, x, level, search.known, [](int, float value) { return Item{value, 1}; });
  if (!IsLastBlock(row)) return;
  const uint64_t held = ChooseBin(row, level, &search);
  Kept kept = {};
  if (level == kLevels - 1) {
    kept = KeptBy(row, search, held, 1, [&](int i) { return ptx::LdGlobal(x + i); });
    search = {};  // for another one
  }
  if (threadIdx.x != 0) return;
  SetSearch(row, search);
  if (level == kLevels - 1) ptx::StGlobal(most_probable ? &row.memory.state.top_n : &row.memory.state.top_k, kept);
}

// One level of the search for the last of what top_p keeps.
__global__ void __launch_bounds__(kSampleThreads, 2)
    WeighKernel(SampleMemory memory, RowBatch batch, int first_row, int level) {
  ptx::WaitForKernelsBefore();
  ptx::LetNextKernelStart();
  const Row row = RowOf(memory, batch, first_row);
  if (!row.params.keeps_top_p || !IsFinite(row)) return;
  const Weigh weigh(row);
  Search search = SearchOf(row);
  AddToBins<kWeights>(row, row.x, level, search.known, [&](int i, float x) {
    const float weight = weigh(i, x);
    return Item{weight, weight < 0 ? 0 : WeightOf(weight)};
  });
  if (!IsLastBlock(row)) return;
  if (level == 0) {
    uint64_t total = 0;
    for (int bin = static_cast<int>(threadIdx.x); bin < kBins; bin += kThreads) {
      total += ptx::LdGlobal(&row.memory.bins[bin]);
    }
    total = BlockSum(total);
    const double mass = ceil(static_cast<double>(row.params.top_p) * static_cast<double>(total));
    const uint64_t wanted = mass >= 1 ? static_cast<uint64_t>(mass) : 1;
    search.target = (wanted < total ? wanted : total) - 1;
  }
  const uint64_t held = ChooseBin(row, level, &search);
  Kept kept = {};
  if (level == kLevels - 1) {
    kept = KeptBy(row, search, held, WeightOf(FloatOf(search.known)),
                  [&](int i) { return weigh(i, ptx::LdGlobal(row.x + i)); });
    search = {};
  }
  if (threadIdx.x != 0) return;
  SetSearch(row, search);
  if (level == kLevels - 1) ptx::StGlobal(&row.memory.state.top_p, kept);
}

// Draws among what is kept.
__global__ void __launch_bounds__(kSampleThreads, 2) DrawKernel(SampleMemory memory, RowBatch batch, int first_row) {
  ptx::WaitForKernelsBefore();
  ptx::LetNextKernelStart();
  const Row row = RowOf(memory, batch, first_row);
  if (!row.params.samples || !IsFinite(row)) return;
  const Weigh weigh(row);
  Kept kept = ptx::LdGlobal(&row.memory.state.top_p);
  const float min_p = row.params.min_p < 1 ? row.params.min_p : 1.0f;
  if (min_p > kept.value) kept = {min_p, row.n};
  const auto weight_of = [&](int i, float x) {
    const float weight = weigh(i, x);
    return IsKept(kept, i, weight) ? WeightOf(weight) : uint64_t{0};
  };
  uint64_t own = 0;
  ForEach(row.x, row.begin, row.end, [&](int i, float x) { own += weight_of(i, x); });
  own = BlockSum(own);
  if (threadIdx.x == 0) ptx::StGlobal(&row.memory.partials[blockIdx.x].weight, own);
  if (!IsLastBlock(row)) return;
  PTX_SHARED(uint64_t, weights, kMostSampleBlocks);
  const int blocks = static_cast<int>(gridDim.x), thread = static_cast<int>(threadIdx.x);
  if (thread < blocks) ptx::StShared(&weights[thread], ptx::LdGlobal(&row.memory.partials[thread].weight));
  __syncthreads();
  uint64_t mass = 0;
  for (int block = 0; block < blocks; ++block) mass += ptx::LdShared(&weights[block]);
  const uint64_t bits = SampleBits(row.params.seed, row.params.position, row.params.sequence);
  uint64_t target = ptx::MultiplyHigh(bits, mass);
  int holder = 0;
  for (; target >= ptx::LdShared(&weights[holder]); ++holder) target -= ptx::LdShared(&weights[holder]);
  const int begin = holder * memory.slice, end = begin + memory.slice < row.n ? begin + memory.slice : row.n;
  const Found drawn = FirstBeyond(begin, end, target, [&](int i) { return weight_of(i, ptx::LdGlobal(row.x + i)); });
  if (threadIdx.x == 0) Finish(row, true, drawn.index);
}

// The token's log-probability and rank among the raw logits, and the first level of the search for the most probable.
__global__ void __launch_bounds__(kSampleThreads, 2) LogprobKernel(SampleMemory memory, RowBatch batch, int first_row) {
  ptx::WaitForKernelsBefore();
  ptx::LetNextKernelStart();
  const Row row = RowOf(memory, batch, first_row);
  if (row.params.num_top < 0 || !IsFinite(row)) return;
  const float largest = ptx::LdGlobal(&row.memory.state.raw_largest);
  const float logit = ptx::LdGlobal(row.raw + ptx::LdGlobal(&row.memory.state.token));
  uint64_t weight = 0, larger = 0;
  AddToBins<kCounts>(row, row.raw, 0, 0, [&](int, float x) {
    weight += WeightOf(Exp(ptx::Add(x, -largest)));
    larger += x > logit;
    return Item{x, row.params.num_top > 0 ? uint64_t{1} : uint64_t{0}};
  });
  weight = BlockSum(weight);
  larger = BlockSum(larger);
  Partial& partial = row.memory.partials[blockIdx.x];
  if (threadIdx.x == 0) {
    ptx::StGlobal(&partial.weight, weight);
    ptx::StGlobal(&partial.larger, static_cast<uint32_t>(larger));
  }
  if (!IsLastBlock(row)) return;
  const bool has_partial = threadIdx.x < gridDim.x;
  const Partial& other = row.memory.partials[has_partial ? threadIdx.x : 0];
  weight = BlockSum(has_partial ? ptx::LdGlobal(&other.weight) : 0);
  larger = BlockSum(has_partial ? ptx::LdGlobal(&other.larger) : 0);
  Search search = {static_cast<uint64_t>(row.params.num_top - 1), 0};
  if (row.params.num_top > 0) ChooseBin(row, 0, &search);
  if (threadIdx.x != 0) return;
  SetSearch(row, search);
  const double log_total = log(static_cast<double>(weight) * 0x1p-40);
  ptx::StGlobal(&row.memory.state.log_total, log_total);
  ptx::StGlobal(&row.result->logprob, LogprobOf(row, logit, log_total));
  ptx::StGlobal(&row.result->rank, static_cast<int32_t>(1 + larger));
}

// The most probable: gathered as they come, then in order.
__global__ void __launch_bounds__(kSampleThreads, 2)
    GatherTopKernel(SampleMemory memory, RowBatch batch, int first_row) {
  PTX_SHARED(Largest, top, kMaxTopLogprobs);
  ptx::WaitForKernelsBefore();
  ptx::LetNextKernelStart();
  const Row row = RowOf(memory, batch, first_row);
  if (row.params.num_top <= 0 || !IsFinite(row)) return;
  RowState& state = row.memory.state;
  const Kept kept = ptx::LdGlobal(&state.top_n);
  ForEach(row.raw, row.begin, row.end, [&](int i, float x) {
    if (IsKept(kept, i, x)) ptx::StGlobal(&row.memory.top[ptx::AddGlobal(&state.gathered, 1u)], Largest{x, i});
  });
  if (!IsLastBlock(row)) return;
  const int own = static_cast<int>(threadIdx.x), num_top = row.params.num_top;
  if (own < num_top) ptx::StShared(&top[own], ptx::LdGlobal(&row.memory.top[own]));
  __syncthreads();
  if (own == 0) ptx::StGlobal(&row.result->num_top, num_top);
  if (own >= num_top) return;
  const Largest mine = ptx::LdShared(&top[own]);
  int before = 0;
  for (int i = 0; i < num_top; ++i) {
    const Largest other = ptx::LdShared(&top[i]);
    before += other.value > mine.value || (other.value == mine.value && other.index < mine.index);
  }
  ptx::StGlobal(&row.result->top_ids[before], mine.index);
  ptx::StGlobal(&row.result->top_logprobs[before], LogprobOf(row, mine.value, ptx::LdGlobal(&state.log_total)));
}

int32_t NumTop(int32_t wanted, int vocab) {
  return std::min({wanted, kMaxTopLogprobs, vocab});
}

RowParams ParamsOf(const SampleParams& p, int vocab) {
  RowParams params = {};
  params.temperature = p.temperature;
  params.top_p = p.top_p;
  params.min_p = p.min_p;
  params.presence_penalty = p.presence_penalty;
  params.frequency_penalty = p.frequency_penalty;
  params.repetition_penalty = p.repetition_penalty;
  params.top_k = p.top_k;
  params.num_top = NumTop(p.top_logprobs, vocab);
  params.seed = p.seed;
  params.position = p.position;
  params.sequence = p.sequence;
  params.token = -1;
  params.samples = p.temperature > 0;
  params.keeps_top_k = params.samples && p.top_k > 0 && p.top_k < vocab;
  params.keeps_top_p = params.samples && p.top_p < 1;
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
  char* of_rows = bytes + SampleResultBytes(rows);
  return {.logits = logits.as<float>(),
          .stride = logits.stride0,
          .adjusted = reinterpret_cast<float*>(of_rows + SampleRowsBytes(rows)),
          .results = reinterpret_cast<SampleResult*>(bytes),
          .tokens = tokens.as<int32_t>(),
          .rows = of_rows,
          .vocab = static_cast<int>(vocab),
          .slice = static_cast<int>(SampleSlice(vocab))};
}

// The kernels of `n` rows from `first` on, as far as any of them has a use for them.
void SampleRows(Stream& stream, const SampleMemory& memory, const RowBatch& batch, int64_t first, int64_t n) {
  const auto any = [&](auto uses) { return std::any_of(batch.rows, batch.rows + n, uses); };
  const LaunchShape shape = SamplePlan(n, memory.vocab);
  const auto launch = [&](const char* name, auto kernel, auto... more) {
    LaunchOverlapping(stream, name, shape, kernel, memory, batch, static_cast<int>(first), more...);
  };
  launch("SampleLargest", LargestKernel);
  if (any([](const RowParams& row) { return row.keeps_top_k; })) {
    for (int level = 0; level < kLevels; ++level) launch("SampleCount", CountKernel, level, false);
  }
  if (any([](const RowParams& row) { return row.keeps_top_p; })) {
    for (int level = 0; level < kLevels; ++level) launch("SampleWeigh", WeighKernel, level);
  }
  if (any([](const RowParams& row) { return row.samples; })) launch("SampleDraw", DrawKernel);
  if (any([](const RowParams& row) { return row.num_top >= 0; })) launch("SampleLogprob", LogprobKernel);
  if (any([](const RowParams& row) { return row.num_top > 0; })) {
    for (int level = 1; level < kLevels; ++level) launch("SampleCount", CountKernel, level, true);
    launch("SampleGatherTop", GatherTopKernel);
  }
}

}  // namespace

void Sample(Stream& stream, const SampleArgs& args) {
  const int64_t rows = args.logits.dim(0);
  const SampleMemory memory = MemoryOf(args.logits, args.tokens, args.scratch);
  Zero(stream, memory.rows, SampleRowsBytes(rows));  // every kernel leaves counts and bins at zero
  for (int64_t first = 0; first < rows; first += kSampleRowsPerLaunch) {
    const int64_t n = std::min(kSampleRowsPerLaunch, rows - first);
    RowBatch batch = {};
    bool adjusted = false;
    for (int64_t i = 0; i < n; ++i) {
      batch.rows[i] = ParamsOf(args.params[first + i], memory.vocab);
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
    SampleRows(stream, memory, batch, first, n);
  }
  Copy(stream, args.results, Device::kCpu, memory.results, Device::kCuda,
       static_cast<size_t>(rows) * sizeof(SampleResult));
}

void Score(Stream& stream, const ScoreArgs& args) {
  const int64_t rows = args.logits.dim(0);
  const SampleMemory memory = MemoryOf(args.logits, {}, args.scratch);
  Zero(stream, memory.rows, SampleRowsBytes(rows));  // every kernel leaves counts and bins at zero
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
      batch.rows[i].num_top = NumTop(std::max(0, args.num_top[first + i]), memory.vocab);
    }
    SampleRows(stream, memory, batch, first, n);
  }
  Copy(stream, args.results, Device::kCpu, memory.results, Device::kCuda,
       static_cast<size_t>(rows) * sizeof(SampleResult));
}

}  // namespace altiplano::cuda
