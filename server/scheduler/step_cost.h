// What one step of the engine costs, as a formula: for the ceiling on inter-token latency, and for simulations.
#pragma once

#include <array>
#include <cstdint>

#include "server/base/clock.h"
#include "server/scheduler/step_plan.h"

namespace altiplano {

// The work of a step that its time depends on.
struct StepWork {
  int64_t sequences = 0;
  int64_t tokens = 0;
  int64_t decode_context = 0;   // tokens that sequences with one token look back at, all of them together
  int64_t prefill_context = 0;  // the same for each token of the other sequences

  // One sequence's part: `count` tokens from position `first` on.
  void Add(int64_t first, int64_t count);
};
StepWork WorkOf(const StepPlan& plan);

// Microseconds. A step takes
//   step_us + max(weights_us, tokens * token_us) + sequences * sequence_us
//           + decode_context * kv_token_us + prefill_context * attention_us
// The weights are read once, whatever is computed with them: up to weights_us / token_us tokens a step costs the same.
struct StepCost {
  double step_us = 0;       // launches, communication that does not grow with the batch
  double weights_us = 0;    // reading all weights
  double token_us = 0;      // matrix multiplications of one token, with communication that grows with the batch
  double sequence_us = 0;   // logits and sampling of one sequence
  double kv_token_us = 0;   // a decode's attention to one token: reading its keys and values
  double attention_us = 0;  // a prompt token's attention to one token: arithmetic

  bool operator==(const StepCost&) const = default;
};
// For whoever fits the formula to measured steps. But for its max it is linear: the time is what each of five things
// costs - a step, a token, a sequence, a token of a decode's and of a prompt's context - times how many a step has.
// knee: the tokens up to which a step only waits for the weights.
using StepTerms = std::array<double, 5>;
StepTerms TermsOf(const StepWork& work, double knee);
StepCost CostFrom(const StepTerms& us, double knee);
// No more than thirty years, so that sums with times stay in range.
Duration DurationOf(double us);
Duration StepTime(const StepCost& cost, const StepWork& work);

}  // namespace altiplano
