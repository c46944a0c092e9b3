// One good plan, broken in one place at a time. That no plan of a scheduler is taken for a wrong one, the simulator
// demands of millions (tests/sim).
#include "server/scheduler/plan_check.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <memory>

namespace altiplano {
namespace {

using ::testing::HasSubstr;

constexpr TokenId kVocab = 50;

SchedulerOptions Options() {
  SchedulerOptions options;
  options.num_blocks = 10;
  options.block_size = 4;
  options.max_running = 3;
  options.token_budget = 16;
  options.max_context = 30;
  return options;
}

std::shared_ptr<Request> MakeRequest() {
  auto request = std::make_shared<Request>();
  request->prompt = {1, 2, 3};
  request->stop.token_ids = {4};
  request->sampling.logit_bias = {{5, 1.0f}};
  return request;
}

// Two prompts: 6 tokens in slot 0, 5 in slot 2.
StepPlan First() {
  StepPlan plan;
  plan.step = 1;
  plan.slot_inits = {{0, 0, MakeRequest(), {}}, {2, 0, MakeRequest(), {7, 8}}};
  plan.sequences.resize(2);
  plan.sequences[0] = {.slot = 0, .num_tokens = 6, .num_blocks = 2, .sample = true};
  plan.sequences[1] = {.slot = 2,
                       .num_tokens = 5,
                       .token_begin = 6,
                       .block_begin = 2,
                       .num_blocks = 2,
                       .sample = true,
                       .num_prompt_scores = 4};
  plan.tokens.assign(11, 49);
  plan.block_ids = {0, 9, 4, 5};
  plan.prompt_score_ids = {1, 2, 3, 49};
  plan.num_prefill_tokens = 11;
  return plan;
}

// What they sampled, and the next block of slot 0.
StepPlan Second() {
  StepPlan plan;
  plan.step = 2;
  plan.sequences.resize(2);
  plan.sequences[0] = {
      .slot = 2, .first_position = 5, .num_tokens = 1, .num_blocks = 2, .known_blocks = 2, .input_from_slot = true};
  plan.sequences[1] = {.slot = 0,
                       .first_position = 6,
                       .num_tokens = 3,
                       .token_begin = 1,
                       .num_blocks = 3,
                       .known_blocks = 2,
                       .input_from_slot = true,
                       .sample = true};
  plan.tokens = {-1, 9, 9, -1};
  plan.block_ids = {6};
  return plan;
}

TEST(PlanCheck, GoodPlansPass) {
  PlanCheck check(Options(), kVocab);
  EXPECT_EQ(check.Check(First()), "");
  EXPECT_EQ(check.Check(Second()), "");
  StepPlan third = Second();
  third.step = 5;
  third.sequences.erase(third.sequences.begin());
  third.sequences[0] = {
      .slot = 0, .first_position = 9, .num_tokens = 1, .num_blocks = 3, .known_blocks = 3, .input_from_slot = true};
  third.tokens = {-1};
  EXPECT_EQ(check.Check(third), "");
}

using Break = std::function<void(StepPlan&)>;
constexpr int32_t kMost = std::numeric_limits<int32_t>::max(), kLeast = std::numeric_limits<int32_t>::min();

TEST(PlanCheck, AFirstPlanThatIsBrokenIsRefused) {
  const auto request_of = [](StepPlan& plan) {
    auto request = MakeRequest();
    plan.slot_inits[1].request = request;
    return request;
  };
  const std::vector<std::pair<std::string, Break>> cases = {
      {"comes after step 0", [](StepPlan& p) { p.step = 0; }},
      {"17 tokens, at most 16", [](StepPlan& p) { p.tokens.resize(17); }},
      {"12 tokens, of which its sequences have 11", [](StepPlan& p) { p.tokens.push_back(0); }},
      {"the number of its prompts' tokens", [](StepPlan& p) { p.num_prefill_tokens = 12; }},
      {"the number of its prompts' tokens", [](StepPlan& p) { p.num_prefill_tokens = -1; }},
      {"a scored token is not in the vocabulary", [](StepPlan& p) { p.prompt_score_ids[0] = kVocab; }},
      {"block 10 of 10", [](StepPlan& p) { p.block_ids[3] = 10; }},
      {"block -1 of 10", [](StepPlan& p) { p.block_ids[0] = -1; }},
      {"slot 3 of 3", [](StepPlan& p) { p.slot_inits[0].slot = 3; }},
      {"slot -1 of 3", [](StepPlan& p) { p.slot_inits[0].slot = -1; }},
      {"slot 2: a token that is not", [&](StepPlan& p) { request_of(p)->prompt[0] = -1; }},
      {"slot 2: a token that is not", [&](StepPlan& p) { request_of(p)->stop.token_ids[0] = kVocab; }},
      {"slot 2: a token that is not", [](StepPlan& p) { p.slot_inits[1].output_history[1] = kMost; }},
      {"slot 2: the bias of a token", [&](StepPlan& p) { request_of(p)->sampling.logit_bias[0].first = kVocab; }},
      {"slot 2: a sampling parameter", [&](StepPlan& p) { request_of(p)->sampling.logit_bias[0].second = NAN; }},
      {"slot 2: a sampling parameter", [&](StepPlan& p) { request_of(p)->sampling.temperature = INFINITY; }},
      {"slot 2: 21 log-probabilities", [&](StepPlan& p) { request_of(p)->sampling.top_logprobs = 21; }},
      {"slot 2: -2 log-probabilities", [&](StepPlan& p) { request_of(p)->sampling.prompt_top_logprobs = -2; }},
      {"slot 3 of 3", [](StepPlan& p) { p.sequences[0].slot = 3; }},
      {"slot 1: nobody has come to it", [](StepPlan& p) { p.sequences[0].slot = 1; }},
      {"slot 2: twice", [](StepPlan& p) { p.sequences[0].slot = 2; }},
      {"slot 0: tokens from 0, 0 of 11", [](StepPlan& p) { p.sequences[0].num_tokens = 0; }},
      {"slot 2: tokens from 7, 5 of 11", [](StepPlan& p) { p.sequences[1].token_begin = 7; }},
      {"slot 2: tokens from -1, 5 of 11", [](StepPlan& p) { p.sequences[1].token_begin = -1; }},
      {"slot 2: tokens from 2147483647, 5 of 11", [](StepPlan& p) { p.sequences[1].token_begin = kMost; }},
      {"slot 0: token 50 is not", [](StepPlan& p) { p.tokens[5] = kVocab; }},
      {"slot 0: token -1 is not", [](StepPlan& p) { p.tokens[0] = -1; }},
      {"slot 0: it has sampled nothing", [](StepPlan& p) { p.sequences[0].input_from_slot = true; }},
      {"slot 0: positions 25 to 31 of 30", [](StepPlan& p) { p.sequences[0].first_position = 25; }},
      {"slot 0: positions -1 to 5 of 30", [](StepPlan& p) { p.sequences[0].first_position = -1; }},
      {"slot 0: positions 2147483647 to 2147483653", [](StepPlan& p) { p.sequences[0].first_position = kMost; }},
      {"slot 0: 1 blocks of 4 for 6 positions", [](StepPlan& p) { p.sequences[0].num_blocks = 1; }},
      {"slot 0: 9 blocks of 4", [](StepPlan& p) { p.sequences[0].num_blocks = 9; }},
      {"slot 0: -2147483648 blocks of 4", [](StepPlan& p) { p.sequences[0].num_blocks = kLeast; }},
      {"slot 0: 1 known blocks, it has named 0", [](StepPlan& p) { p.sequences[0].known_blocks = 1; }},
      {"slot 0: -1 known blocks", [](StepPlan& p) { p.sequences[0].known_blocks = -1; }},
      {"slot 2: blocks from 3, 2 of 4", [](StepPlan& p) { p.sequences[1].block_begin = 3; }},
      {"slot 2: blocks from -1, 2 of 4", [](StepPlan& p) { p.sequences[1].block_begin = -1; }},
      {"slot 2: block 9 is written to twice", [](StepPlan& p) { p.block_ids[2] = 9; }},
      {"slot 0: block 9 is written to twice", [](StepPlan& p) { p.block_ids[0] = 9; }},
      {"slot 2: scores from 0, 6 of 4", [](StepPlan& p) { p.sequences[1].num_prompt_scores = 6; }},
      {"slot 2: scores from 0, -1 of 4", [](StepPlan& p) { p.sequences[1].num_prompt_scores = -1; }},
      {"slot 2: scores from 1, 4 of 4", [](StepPlan& p) { p.sequences[1].prompt_score_begin = 1; }},
  };
  for (const auto& [error, breaks] : cases) {
    StepPlan plan = First();
    breaks(plan);
    PlanCheck check(Options(), kVocab);
    EXPECT_THAT(check.Check(plan), HasSubstr(error));
  }
}

TEST(PlanCheck, ALaterPlanThatIsBrokenIsRefused) {
  const std::vector<std::pair<std::string, Break>> cases = {
      {"step 1: comes after step 1", [](StepPlan& p) { p.step = 1; }},
      {"slot 2: 1 known blocks, it has named 2", [](StepPlan& p) { p.sequences[0].known_blocks = 1; }},
      {"slot 0: 3 known blocks, it has named 2", [](StepPlan& p) { p.sequences[1].known_blocks = 3; }},
      {"slot 1: nobody has come to it", [](StepPlan& p) { p.sequences[1].slot = 1; }},
      {"slot 0: token -1 is not", [](StepPlan& p) { p.tokens[2] = -1; }},
      {"slot 0: block 5 is written to twice", [](StepPlan& p) { p.block_ids[0] = 5; }},
      {"slot 0: 2 known blocks, it has named 0",
       [](StepPlan& p) {
         p.slot_inits = {{0, 0, MakeRequest(), {}}};
       }},
  };
  for (const auto& [error, breaks] : cases) {
    PlanCheck check(Options(), kVocab);
    ASSERT_EQ(check.Check(First()), "");
    StepPlan plan = Second();
    breaks(plan);
    if (!plan.slot_inits.empty()) plan.sequences[1].input_from_slot = false, plan.tokens[3] = 1;
    EXPECT_THAT(check.Check(plan), HasSubstr(error));
  }
}

// As a prefix that both have in common: only what a step writes to is one sequence's alone.
TEST(PlanCheck, BlocksThatAreOnlyReadMayBeShared) {
  PlanCheck check(Options(), kVocab);
  StepPlan plan = First();
  plan.sequences[1].first_position = 4;
  plan.sequences[1].num_blocks = 3;
  plan.block_ids = {0, 9, 0, 4, 5};
  EXPECT_EQ(check.Check(plan), "");
}

// What a slot sampled is there for the next step alone.
TEST(PlanCheck, WhatWasSampledBeforeTheStepBeforeIsGone) {
  PlanCheck check(Options(), kVocab);
  ASSERT_EQ(check.Check(First()), "");
  StepPlan second = Second();
  second.sequences.pop_back();
  second.tokens = {-1};
  ASSERT_EQ(check.Check(second), "");
  StepPlan third = Second();
  third.step = 3;
  third.sequences.erase(third.sequences.begin());
  third.sequences[0].token_begin = 0;
  third.tokens.erase(third.tokens.begin());
  EXPECT_THAT(check.Check(third), HasSubstr("slot 0: it has sampled nothing"));
}

}  // namespace
}  // namespace altiplano
