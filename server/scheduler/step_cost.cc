#include "server/scheduler/step_cost.h"

#include <algorithm>
#include <cmath>

namespace altiplano {

void StepWork::Add(int64_t first, int64_t count) {
  ++sequences;
  tokens += count;
  if (count == 1) {
    decode_context += first + 1;
  } else {
    prefill_context += first * count + count * (count + 1) / 2;  // the token at position p looks at p + 1
  }
}

StepWork WorkOf(const StepPlan& plan) {
  StepWork work;
  for (const PlannedSequence& planned : plan.sequences) work.Add(planned.first_position, planned.num_tokens);
  return work;
}

Duration DurationOf(double us) {
  constexpr double kMostNanoseconds = 1e18;
  return Duration(std::llround(std::min(us * 1e3, kMostNanoseconds)));
}

Duration StepTime(const StepCost& cost, const StepWork& work) {
  const double us = cost.step_us + std::max(cost.weights_us, static_cast<double>(work.tokens) * cost.token_us) +
                    static_cast<double>(work.sequences) * cost.sequence_us +
                    static_cast<double>(work.decode_context) * cost.kv_token_us +
                    static_cast<double>(work.prefill_context) * cost.attention_us;
  return DurationOf(us);
}

StepTerms TermsOf(const StepWork& work, double knee) {
  return {1, std::max(knee, static_cast<double>(work.tokens)), static_cast<double>(work.sequences),
          static_cast<double>(work.decode_context), static_cast<double>(work.prefill_context)};
}

StepCost CostFrom(const StepTerms& us, double knee) {
  return {.step_us = us[0],
          .weights_us = us[1] * knee,
          .token_us = us[1],
          .sequence_us = us[2],
          .kv_token_us = us[3],
          .attention_us = us[4]};
}

}  // namespace altiplano
