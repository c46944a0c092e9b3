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

StepInputBuilder MakeBuilder(const Stream& stream) {
  return StepInputBuilder::Create(stream, {.slots = 4, .max_tokens = 16, .max_context = 28, .page_size = 4}).value();
}

// A chunk of three tokens from position 3, found in the cache up to there (blocks of 4: its page 5, then 9), and a
// decode at position 8 (pages 2 and 7 from TheStepBefore, then 1).
StepPlan TwoSequences() {
  StepPlan plan;
  plan.tokens = {11, 12, 13, -1};
  plan.block_ids = {5, 9, 1};
  PlannedSequence chunk;
  chunk.slot = 0;
  chunk.first_position = 3;
  chunk.num_tokens = 3;
  chunk.num_blocks = 2;
  chunk.num_prompt_scores = 2;
  PlannedSequence decode;
  decode.slot = 1;
  decode.first_position = 8;
  decode.num_tokens = 1;
  decode.token_begin = 3;
  decode.block_begin = 2;
  decode.num_blocks = 3;
  decode.known_blocks = 2;
  decode.input_from_slot = true;
  decode.sample = true;
  plan.sequences = {chunk, decode};
  return plan;
}

// Samples as the first for slot 3 and as the second for slot 1.
StepPlan TheStepBefore() {
  StepPlan plan;
  plan.tokens = {1, 2, 3};
  plan.block_ids = {0, 2, 7};
  plan.sequences = {PlannedSequence{.slot = 3, .num_tokens = 1, .num_blocks = 1, .sample = true},
                    PlannedSequence{.slot = 1,
                                    .first_position = 6,
                                    .num_tokens = 2,
                                    .token_begin = 1,
                                    .block_begin = 1,
                                    .num_blocks = 2,
                                    .sample = true}};
  return plan;
}

TEST(StepInputs, FollowsThePlan) {
  const auto stream = Stream::Cpu(1);
  StepInputBuilder builder = MakeBuilder(*stream);
  EXPECT_THAT(Values(builder.Build(*stream, TheStepBefore()).sample_rows), ElementsAre(0, 2));
  const StepInputBuilder::Step step = builder.Build(*stream, TwoSequences());
  EXPECT_THAT(Values(step.inputs.ids), ElementsAre(11, 12, 13, -2)) << "what was sampled as the second";
  EXPECT_THAT(Values(step.inputs.positions), ElementsAre(3, 4, 5, 8));
  EXPECT_THAT(Values(step.inputs.slots), ElementsAre(5 * 4 + 3, 9 * 4, 9 * 4 + 1, 1 * 4));
  EXPECT_THAT(Values(step.inputs.q_begin), ElementsAre(0, 3, 4));
  EXPECT_THAT(Values(step.inputs.context_lengths), ElementsAre(6, 9));
  EXPECT_EQ(step.inputs.block_tables.dim(0), 2);
  EXPECT_EQ(step.inputs.block_tables.dim(1), 3);
  EXPECT_THAT(Values(step.inputs.block_tables), ElementsAre(5, 9, 0, 2, 7, 1));
  EXPECT_THAT(Values(step.score_rows), ElementsAre(0, 1));
  EXPECT_THAT(Values(step.sample_rows), ElementsAre(3));
}

TEST(StepInputs, ReuseForgetsTheStepsBefore) {
  const auto stream = Stream::Cpu(1);
  StepInputBuilder builder = MakeBuilder(*stream);
  builder.Build(*stream, TheStepBefore());
  builder.Build(*stream, TwoSequences());
  StepPlan plan;
  plan.tokens = {42, -1};
  plan.block_ids = {3, 6};
  plan.sequences = {
      PlannedSequence{.num_tokens = 1, .num_blocks = 1},
      PlannedSequence{
          .slot = 1, .num_tokens = 1, .token_begin = 1, .block_begin = 1, .num_blocks = 1, .input_from_slot = true}};
  const StepInputBuilder::Step step = builder.Build(*stream, plan);
  EXPECT_THAT(Values(step.inputs.ids), ElementsAre(42, -1)) << "the step before sampled for slot 1 alone";
  EXPECT_THAT(Values(step.inputs.slots), ElementsAre(12, 24));
  EXPECT_THAT(Values(step.inputs.q_begin), ElementsAre(0, 1, 2));
  EXPECT_EQ(step.sample_rows.elements(), 0);
  EXPECT_EQ(step.score_rows.elements(), 0);
}

TEST(StepInputs, RememberEachSlotsBlocksThroughStepsWithoutIt) {
  const auto stream = Stream::Cpu(1);
  StepInputBuilder builder = MakeBuilder(*stream);
  builder.Build(*stream, TheStepBefore());
  StepPlan other;  // its sequence replaces that of slot 3
  other.tokens = {5};
  other.block_ids = {4};
  other.sequences = {PlannedSequence{.slot = 3, .num_tokens = 1, .num_blocks = 1}};
  EXPECT_THAT(Values(builder.Build(*stream, other).inputs.block_tables), ElementsAre(4));
  StepPlan both;
  both.tokens = {6, 7};
  both.block_ids = {1};
  both.sequences = {
      PlannedSequence{.slot = 3, .first_position = 1, .num_tokens = 1, .num_blocks = 1, .known_blocks = 1},
      PlannedSequence{
          .slot = 1, .first_position = 8, .num_tokens = 1, .token_begin = 1, .num_blocks = 3, .known_blocks = 2}};
  const StepInputBuilder::Step step = builder.Build(*stream, both);
  EXPECT_THAT(Values(step.inputs.block_tables), ElementsAre(4, 0, 0, 2, 7, 1));
  EXPECT_THAT(Values(step.inputs.slots), ElementsAre(4 * 4 + 1, 1 * 4));
}

TEST(StepInputsDeathTest, APlanThatWasLeftOutIsNoticed) {
  const auto stream = Stream::Cpu(1);
  StepInputBuilder builder = MakeBuilder(*stream);
  EXPECT_DEATH(builder.Build(*stream, TwoSequences()), "known_blocks");
}

TEST(StepInputs, HoldTheLargestStep) {
  const auto stream = Stream::Cpu(1);
  StepInputBuilder builder = MakeBuilder(*stream);
  StepPlan plan;
  for (int32_t slot = 0; slot < 4; ++slot) {
    plan.sequences.push_back(PlannedSequence{.slot = slot,
                                             .first_position = 24,
                                             .num_tokens = 4,
                                             .token_begin = 4 * slot,
                                             .block_begin = 8 * slot,
                                             .num_blocks = 8,
                                             .sample = true,
                                             .num_prompt_scores = 3});
    for (int32_t i = 0; i < 4; ++i) plan.tokens.push_back(slot);
    for (int32_t i = 0; i < 8; ++i) plan.block_ids.push_back(100 * slot + i);
  }
  for (int repeat = 0; repeat < 3; ++repeat) {
    const StepInputBuilder::Step step = builder.Build(*stream, plan);
    EXPECT_THAT(Values(step.sample_rows), ElementsAre(3, 7, 11, 15));
    EXPECT_EQ(Values(step.inputs.block_tables), plan.block_ids);
    EXPECT_EQ(Values(step.inputs.ids), plan.tokens);
    EXPECT_EQ(step.score_rows.elements(), 12);
  }
}

// A chunk of one token, which samples nothing, and a decode, padded to four.
TEST(StepInputs, PaddedRowsAreOfNoSequence) {
  const auto stream = Stream::Cpu(1);
  StepInputBuilder builder = MakeBuilder(*stream);
  const DecodeShape shape = {.sequences = 4, .pages = 3};
  StepPlan plan;
  plan.tokens = {42, 43};
  plan.block_ids = {3, 6, 7};
  plan.sequences = {PlannedSequence{.num_tokens = 1, .num_blocks = 1}, PlannedSequence{.slot = 1,
                                                                                       .first_position = 5,
                                                                                       .num_tokens = 1,
                                                                                       .token_begin = 1,
                                                                                       .block_begin = 1,
                                                                                       .num_blocks = 2,
                                                                                       .sample = true}};
  const StepInputBuilder::Step step = builder.Build(*stream, plan, &shape);
  EXPECT_THAT(Values(step.inputs.ids), ElementsAre(42, 43, 0, 0));
  EXPECT_THAT(Values(step.inputs.positions), ElementsAre(0, 5, 0, 0));
  EXPECT_THAT(Values(step.inputs.slots), ElementsAre(12, 29, -1, -1));
  EXPECT_THAT(Values(step.inputs.q_begin), ElementsAre(0, 1, 2, 2, 2));
  EXPECT_THAT(Values(step.inputs.context_lengths), ElementsAre(1, 6, 0, 0));
  EXPECT_THAT(Values(step.inputs.block_tables), ElementsAre(3, 0, 0, 6, 7, 0, 0, 0, 0, 0, 0, 0));
  EXPECT_THAT(Values(step.sample_rows), ElementsAre(1));
  EXPECT_THAT(Values(step.padded_sample_rows), ElementsAre(1, 0, 0, 0));

  // Where a graph of the shape reads them, whatever the step: here the host's blocks take turns.
  const StepInputBuilder::Step other = builder.Build(*stream, TheStepBefore());
  EXPECT_NE(other.inputs.ids.data, step.inputs.ids.data);
  const StepInputBuilder::Step again = builder.Build(*stream, StepPlan(), &shape);
  EXPECT_EQ(again.inputs.ids.data, step.inputs.ids.data);
  EXPECT_EQ(again.inputs.positions.data, step.inputs.positions.data);
  EXPECT_EQ(again.inputs.slots.data, step.inputs.slots.data);
  EXPECT_EQ(again.inputs.q_begin.data, step.inputs.q_begin.data);
  EXPECT_EQ(again.inputs.context_lengths.data, step.inputs.context_lengths.data);
  EXPECT_EQ(again.inputs.block_tables.data, step.inputs.block_tables.data);
  EXPECT_EQ(again.padded_sample_rows.data, step.padded_sample_rows.data);
  EXPECT_THAT(Values(again.inputs.q_begin), ElementsAre(0, 0, 0, 0, 0));
}

// What attention on a GPU shall do, made of the step's lengths and sent behind all else.
TEST(StepInputs, CarryTheWorkOfAttention) {
  const auto stream = Stream::Cpu(1);
  const cuda::AttentionSizes attention = {.q_heads = 8, .kv_heads = 2, .dim = 64};
  StepInputBuilder builder =
      StepInputBuilder::Create(
          *stream, {.slots = 4, .max_tokens = 16, .max_context = 28, .page_size = 4, .attention = attention})
          .value();
  builder.Build(*stream, TheStepBefore());
  const StepInputBuilder::Step step = builder.Build(*stream, TwoSequences());
  const std::vector<int32_t> q_begin = {0, 3, 4}, lengths = {6, 9};
  std::vector<int32_t> list(static_cast<size_t>(cuda::AttentionListWords(attention, 4, 2)));
  const AttentionWork work = cuda::PlanAttention(attention, q_begin.data(), lengths.data(), 2, 4, list.data());
  EXPECT_EQ(Values(step.inputs.attention_work.list), Values(work.list));
  EXPECT_EQ(step.inputs.attention_work.workers, 2);
  // A graph's launches are as large as any step of its shape needs.
  const DecodeShape shape = {.sequences = 4, .pages = 7};
  const StepInputBuilder::Step padded = builder.Build(*stream, StepPlan(), &shape);
  EXPECT_EQ(padded.inputs.attention_work.workers, 4);
  EXPECT_EQ(padded.inputs.attention_work.cuts, 0);
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

TEST(SlotStates, KeepHistoryOnlyWhenAPenaltyNeedsIt) {
  const auto stream = Stream::Cpu(1);
  const auto created = SlotStates::Create(*stream, 2, 10, {7});
  ASSERT_NE(created, nullptr);
  SlotStates& states = *created;
  auto plain = std::make_shared<Request>();
  plain->prompt = {1};
  states.Init(*stream, {.slot = 0, .sequence = 0, .request = plain, .output_history = {}});
  states.Init(*stream, {.slot = 1, .sequence = 3, .request = Penalised(), .output_history = {5, 5}});
  PlannedSequence planned;
  planned.slot = 0;
  EXPECT_EQ(states.Params(planned).output_counts, nullptr);
  planned.slot = 1;
  planned.first_position = 4;
  planned.num_tokens = 2;
  SampleParams params = states.Params(planned);
  ASSERT_NE(params.output_counts, nullptr);
  EXPECT_EQ(params.output_counts[5], 2);  // before the preemption
  EXPECT_EQ(params.output_counts[2], 0);
  EXPECT_EQ(params.in_prompt[2], 1);
  EXPECT_EQ(params.in_prompt[5], 0);
  EXPECT_EQ(params.sequence, 3u);
  EXPECT_EQ(params.seed, 99u);
  EXPECT_EQ(params.position, 6);
  ASSERT_EQ(params.num_bias, 2);
  EXPECT_EQ(params.bias_ids[1], 6);
  EXPECT_EQ(params.counts_out, params.output_counts);
}

TEST(SlotStates, BansEosAndStopIdsOnlyWhenThePlanSaysSo) {
  const auto stream = Stream::Cpu(1);
  const auto created = SlotStates::Create(*stream, 1, 10, {7});
  ASSERT_NE(created, nullptr);
  SlotStates& states = *created;
  auto request = Penalised();
  PlannedSequence planned;
  states.Init(*stream, {.slot = 0, .sequence = 0, .request = request, .output_history = {}});
  EXPECT_EQ(states.Params(planned).num_banned, 0);
  planned.ban_stops = true;
  SampleParams params = states.Params(planned);
  EXPECT_THAT(std::vector<int32_t>(params.banned_ids, params.banned_ids + params.num_banned), ElementsAre(8, 7));
  request->stop.ignore_eos = true;  // then EOS is a token like any other
  states.Init(*stream, {.slot = 0, .sequence = 0, .request = request, .output_history = {}});
  params = states.Params(planned);
  EXPECT_THAT(std::vector<int32_t>(params.banned_ids, params.banned_ids + params.num_banned), ElementsAre(8));
}

}  // namespace
}  // namespace altiplano
