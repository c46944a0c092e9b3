#include "server/cluster/plan_proto.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

namespace altiplano::cluster {
namespace {

using ::testing::HasSubstr;

TEST(PlanProto, APlanComesBackAsItWas) {
  std::mt19937 random(9);
  auto number = [&] { return static_cast<int32_t>(random() % 100000); };
  for (int round = 0; round < 20; ++round) {
    StepPlan plan;
    plan.step = random();
    for (int i = 0; i < 5; ++i) {
      plan.sequences.push_back({random(), static_cast<uint32_t>(number()), number(), number(), number(), number(),
                                number(), number(), number(), random() % 2 == 0, random() % 2 == 0, random() % 2 == 0,
                                number(), number()});
      auto request = std::make_shared<Request>();
      request->prompt = {number(), number()};
      request->stop.token_ids = {number()};
      request->stop.ignore_eos = random() % 2 == 0;
      request->sampling = {0.5f,
                           number(),
                           0.25f,
                           0.125f,
                           -1.5f,
                           2,
                           i % 2 == 0 ? 1 : 1.25f,
                           ~0ull - random(),
                           {{number(), -100}, {number(), 3}},
                           number() - 1,
                           -1};
      plan.slot_inits.push_back({number(), static_cast<uint32_t>(i), request, {number(), number(), number()}});
      plan.tokens.push_back(i == 0 ? -1 : number());
      plan.block_ids.push_back(number());
      plan.prompt_score_ids.push_back(number());
    }
    plan.num_prefill_tokens = number();
    v1::Plan message, again;
    PlanToProto(plan, &message);
    const auto back = PlanFromProto(message);
    PlanToProto(*back, &again);
    EXPECT_EQ(again.SerializeAsString(), message.SerializeAsString());
    EXPECT_EQ(back->step, plan.step);
    EXPECT_EQ(back->tokens, plan.tokens);
    EXPECT_EQ(back->block_ids, plan.block_ids);
    EXPECT_EQ(back->prompt_score_ids, plan.prompt_score_ids);
    EXPECT_EQ(back->num_prefill_tokens, plan.num_prefill_tokens);
    for (size_t i = 0; i < plan.sequences.size(); ++i) {
      const PlannedSequence &a = plan.sequences[i], &b = back->sequences[i];
      EXPECT_EQ(std::tie(a.request, a.sequence, a.slot, a.first_position, a.num_tokens, a.token_begin, a.block_begin,
                         a.num_blocks, a.known_blocks, a.input_from_slot, a.sample, a.ban_stops, a.num_prompt_scores,
                         a.prompt_score_begin),
                std::tie(b.request, b.sequence, b.slot, b.first_position, b.num_tokens, b.token_begin, b.block_begin,
                         b.num_blocks, b.known_blocks, b.input_from_slot, b.sample, b.ban_stops, b.num_prompt_scores,
                         b.prompt_score_begin));
      const SlotInit &x = plan.slot_inits[i], &y = back->slot_inits[i];
      EXPECT_EQ(x.output_history, y.output_history);
      EXPECT_EQ(x.request->sampling.seed, y.request->sampling.seed);
      EXPECT_EQ(x.request->sampling.logit_bias, y.request->sampling.logit_bias);
      EXPECT_EQ(x.request->sampling.top_logprobs, y.request->sampling.top_logprobs);
      EXPECT_EQ(x.request->sampling.repetition_penalty, y.request->sampling.repetition_penalty);
      EXPECT_EQ(x.request->stop.token_ids, y.request->stop.token_ids);
      EXPECT_EQ(x.request->stop.ignore_eos, y.request->stop.ignore_eos);
      EXPECT_EQ(y.request->prompt, x.request->prompt) << "the penalties want it";
    }
  }
}

TEST(PlanProto, APromptIsSentOnlyWherePenaltiesNeedIt) {
  auto request = std::make_shared<Request>();
  request->prompt.assign(10000, 7);
  StepPlan plan;
  plan.slot_inits.push_back({0, 0, request, {}});
  v1::Plan message;
  PlanToProto(plan, &message);
  EXPECT_LT(message.ByteSizeLong(), 200u);
}

TEST(PlanProto, AResultComesBackAsItWas) {
  StepResult result;
  result.step = 12;
  result.sampled = {{5, true, -0.5f, 1, {{5, -0.5f}, {6, -1.5f}}}, {-1, false, 0, 0, {}}};
  result.prompt_scores = {{{9, true, -2, 3, {}}}, {}};
  result.device_time = std::chrono::microseconds(1234);
  v1::StepDone message, again;
  ResultToProto(result, &message);
  const StepResult back = ResultFromProto(message);
  ResultToProto(back, &again);
  EXPECT_EQ(again.SerializeAsString(), message.SerializeAsString());
  EXPECT_TRUE(back.status.ok());
  EXPECT_EQ(back.sampled[0].top[1].token, 6);
  EXPECT_FALSE(back.sampled[1].finite);
  EXPECT_EQ(back.sampled[1].token, -1);
  EXPECT_EQ(back.prompt_scores.size(), 2u);
  EXPECT_EQ(back.device_time, result.device_time);

  result.status = Status(Code::kInternal, "rank 3: no more");
  message.Clear();
  ResultToProto(result, &message);
  EXPECT_THAT(ResultFromProto(message).status.message(), HasSubstr("rank 3: no more"));
}

}  // namespace
}  // namespace altiplano::cluster
