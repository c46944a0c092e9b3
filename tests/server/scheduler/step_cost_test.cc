#include "server/scheduler/step_cost.h"

#include <gtest/gtest.h>

#include <chrono>

namespace altiplano {
namespace {

using std::chrono::microseconds;

PlannedSequence Planned(int32_t first_position, int32_t num_tokens) {
  PlannedSequence planned;
  planned.first_position = first_position;
  planned.num_tokens = num_tokens;
  return planned;
}

TEST(WorkOf, DecodesAndPromptsApart) {
  StepPlan plan;
  plan.sequences = {Planned(9, 1), Planned(99, 1), Planned(4, 3)};
  StepWork work = WorkOf(plan);
  EXPECT_EQ(work.sequences, 3);
  EXPECT_EQ(work.tokens, 5);
  EXPECT_EQ(work.decode_context, 10 + 100);
  EXPECT_EQ(work.prefill_context, 5 + 6 + 7);
}

TEST(StepTime, WeightsHideTheMatricesUntilThereAreManyTokens) {
  const StepCost cost = {
      .step_us = 100, .weights_us = 1000, .token_us = 10, .sequence_us = 2, .kv_token_us = 0.5, .attention_us = 0.25};
  EXPECT_EQ(StepTime(cost, {.sequences = 0, .tokens = 100}), microseconds(1100));
  EXPECT_EQ(StepTime(cost, {.sequences = 0, .tokens = 101}), microseconds(1110));
  EXPECT_EQ(StepTime(cost, {.sequences = 4, .tokens = 4, .decode_context = 200, .prefill_context = 400}),
            microseconds(1100 + 8 + 100 + 100));
}

}  // namespace
}  // namespace altiplano
