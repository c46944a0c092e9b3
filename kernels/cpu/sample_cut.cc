// FindCut: selection without sorting. The threshold is bracketed between two floats by passes that measure all elements
// at least as large, until few enough lie between to be sorted.
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>

#include "kernels/cpu/sample_row.h"

namespace altiplano::cpu {

namespace {

constexpr int64_t kFew = 512;  // sorted in the time of about two passes over a large vocabulary

// Floats as integers in the same order; the next larger float is the next integer.
int64_t KeyOf(float x) {
  const int32_t bits = std::bit_cast<int32_t>(x);
  return bits < 0 ? bits ^ 0x7FFFFFFF : bits;
}
float FloatOf(int64_t key) {
  const auto bits = static_cast<int32_t>(key);
  return std::bit_cast<float>(bits < 0 ? bits ^ 0x7FFFFFFF : bits);
}

uint64_t WeightOf(float e) {
  return static_cast<uint64_t>(std::llrint(static_cast<double>(e) * 0x1p40));
}

}  // namespace

Cut FindCut(const SampleKernels& kernels, const float* x, int64_t n, float max, Measure measure, uint64_t target) {
  // Elements at least as large as `low` reach the target, those at least as large as `high` do not.
  struct Bound {
    int64_t key;
    int64_t count;
    uint64_t reached;
  };
  const bool weigh = measure == Measure::kWeight;
  Bound low = {KeyOf(weigh ? 0.0f : -std::numeric_limits<float>::infinity()), n, target};
  Bound high = {KeyOf(max + 0.0f) + 1, 0, 0};  // -0 becomes 0: the float above -0 is 0, which is no larger
  // First guesses: where e^x, or a logit below the largest, usually has it.
  const std::array<float, 4> weights = {0x1p-4f, 0x1p-8f, 0x1p-14f, 0x1p-22f};
  const std::array<float, 4> logits = {max - 2, max - 6, max - 10, max - 16};
  size_t guesses = 0;
  while (low.count - high.count > kFew && high.key - low.key > 1) {
    int64_t key = low.key + (high.key - low.key) / 2;
    if (guesses < weights.size()) {
      key = KeyOf(weigh ? weights[guesses] : logits[guesses]);
      ++guesses;
      if (key <= low.key || key >= high.key) continue;
    }
    const float threshold = FloatOf(key);
    Bound bound = {key, kernels.count_at_least(x, n, threshold), 0};
    bound.reached = weigh ? kernels.weight_at_least(x, n, threshold) : static_cast<uint64_t>(bound.count);
    if (bound.reached >= target) {
      low = bound;
      guesses = weights.size();  // the others lie lower
    } else {
      high = bound;
    }
  }

  const float value = FloatOf(low.key);
  const uint64_t missing = target - high.reached;
  if (high.key - low.key == 1) {  // only elements equal to `value` lie between
    const uint64_t each = weigh ? std::max<uint64_t>(1, WeightOf(value)) : 1;
    const int64_t equal = low.count - high.count;
    return {value, std::min(equal, static_cast<int64_t>((missing + each - 1) / each)), equal};
  }
  std::array<int32_t, kFew> few;
  const int64_t found = kernels.indices_between(x, n, value, FloatOf(high.key), few.data(), kFew);
  std::sort(few.begin(), few.begin() + found, [&](int32_t a, int32_t b) { return x[a] != x[b] ? x[a] > x[b] : a < b; });
  uint64_t reached = 0;
  Cut cut = {value, 0, 0};
  int64_t i = 0;
  for (; i < found; ++i) {
    const float at = x[few[static_cast<size_t>(i)]];
    if (i == 0 || at != cut.value) cut = {at, 0, 0};
    ++cut.ties;
    reached += weigh ? WeightOf(at) : 1;
    if (reached >= missing) break;
  }
  cut.equal = cut.ties;
  for (++i; i < found && x[few[static_cast<size_t>(i)]] == cut.value; ++i) ++cut.equal;
  return cut;
}

}  // namespace altiplano::cpu
