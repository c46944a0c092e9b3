#include "server/engine/step_inputs.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <vector>

#include "server/engine/slot_states.h"

namespace altiplano {
namespace {

using ::testing::ElementsAre;

std::vector<int32_t> Values(const TensorView& view) {
  return std::vector<int32_t>(view.as<int32_t>(), view.as<int32_t>() + view.elements());
}

// A chunk of three tokens from position 3 (blocks of 4: its page 5, then 9) and a decode at position 8 (pages 2, 7, 1).
StepPlan TwoSequences() {
  StepPlan plan;
  plan.tokens = {11, 12, 13, -1};
  plan.block_ids = {5, 9, 2, 7, 1};
  PlannedSequence chunk;
  chunk.slot = 0;
  chunk.first_position = 3;
  chunk.num_tokens = 3;
  chunk.num_blocks = 2;
  PlannedSequence decode;
  decode.slot = 1;
  decode.first_position = 8;
  decode.num_tokens = 1;
  decode.token_begin = 3;
  decode.block_begin = 2;
  decode.num_blocks = 3;
  decode.input_from_slot = true;
  plan.sequences = {chunk, decode};
  return plan;
}

TEST(StepInputs, FollowsThePlan) {
  StepInputBuilder builder(16, 4, 8, 4);
  StepInputs inputs = builder.Build(TwoSequences(), {100, 101});
  EXPECT_THAT(Values(inputs.ids), ElementsAre(11, 12, 13, 101));
  EXPECT_THAT(Values(inputs.positions), ElementsAre(3, 4, 5, 8));
  EXPECT_THAT(Values(inputs.slots), ElementsAre(5 * 4 + 3, 9 * 4, 9 * 4 + 1, 1 * 4));
  EXPECT_THAT(Values(inputs.q_begin), ElementsAre(0, 3, 4));
  EXPECT_THAT(Values(inputs.context_lengths), ElementsAre(6, 9));
  EXPECT_EQ(inputs.block_tables.dim(0), 2);
  EXPECT_EQ(inputs.block_tables.dim(1), 3);
  EXPECT_THAT(Values(inputs.block_tables), ElementsAre(5, 9, 0, 2, 7, 1));
}

TEST(StepInputs, ReuseForgetsTheStepBefore) {
  StepInputBuilder builder(16, 4, 8, 4);
  builder.Build(TwoSequences(), {100, 101});
  StepPlan plan;
  plan.tokens = {42};
  plan.block_ids = {3};
  plan.sequences = {PlannedSequence{.num_tokens = 1, .num_blocks = 1}};
  StepInputs inputs = builder.Build(plan, {100, 101});
  EXPECT_THAT(Values(inputs.ids), ElementsAre(42));
  EXPECT_THAT(Values(inputs.slots), ElementsAre(12));
  EXPECT_THAT(Values(inputs.q_begin), ElementsAre(0, 1));
}

std::shared_ptr<Request> Penalised() {
  auto request = std::make_shared<Request>();
  request->prompt = {1, 2, 2};
  request->sampling.frequency_penalty = 0.5f;
  request->sampling.seed = 99;
  request->sampling.logit_bias = {{4, 1.5f}, {6, -2.0f}};
  request->stop.token_ids = {8};
  return request;
}

TEST(SlotStates, KeepsHistoryOnlyWhenAPenaltyNeedsIt) {
  SlotStates states(2, 10, {7});
  auto plain = std::make_shared<Request>();
  plain->prompt = {1};
  states.Init({.slot = 0, .sequence = 0, .request = plain, .output_history = {}});
  states.Init({.slot = 1, .sequence = 3, .request = Penalised(), .output_history = {5, 5}});
  states.Record(1, 5);
  PlannedSequence planned;
  planned.slot = 0;
  EXPECT_EQ(states.Params(planned).output_counts, nullptr);
  planned.slot = 1;
  planned.first_position = 4;
  planned.num_tokens = 2;
  SampleParams params = states.Params(planned);
  ASSERT_NE(params.output_counts, nullptr);
  EXPECT_EQ(params.output_counts[5], 3);  // two before the preemption, one since
  EXPECT_EQ(params.output_counts[2], 0);
  EXPECT_EQ(params.in_prompt[2], 1);
  EXPECT_EQ(params.in_prompt[5], 0);
  EXPECT_EQ(params.sequence, 3u);
  EXPECT_EQ(params.seed, 99u);
  EXPECT_EQ(params.position, 6);
  ASSERT_EQ(params.num_bias, 2);
  EXPECT_EQ(params.bias_ids[1], 6);
  EXPECT_EQ(states.last_sampled()[1], 5);
}

TEST(SlotStates, BansEosAndStopIdsOnlyWhenThePlanSaysSo) {
  SlotStates states(1, 10, {7});
  auto request = Penalised();
  PlannedSequence planned;
  states.Init({.slot = 0, .sequence = 0, .request = request, .output_history = {}});
  EXPECT_EQ(states.Params(planned).num_banned, 0);
  planned.ban_stops = true;
  SampleParams params = states.Params(planned);
  EXPECT_THAT(std::vector<int32_t>(params.banned_ids, params.banned_ids + params.num_banned), ElementsAre(8, 7));
  request->stop.ignore_eos = true;  // then EOS is a token like any other
  states.Init({.slot = 0, .sequence = 0, .request = request, .output_history = {}});
  params = states.Params(planned);
  EXPECT_THAT(std::vector<int32_t>(params.banned_ids, params.banned_ids + params.num_banned), ElementsAre(8));
}

}  // namespace
}  // namespace altiplano
