#include "server/bench/step_cost_fit.h"

#include <gtest/gtest.h>

#include <random>

namespace altiplano::bench {
namespace {

constexpr StepCost kTruth = {
    .step_us = 300, .weights_us = 4000, .token_us = 20, .sequence_us = 2, .kv_token_us = 0.05, .attention_us = 0.002};

// Steps as a server has them: decodes of many sizes, prompts of many lengths, both.
std::vector<MeasuredStep> Steps(int count, double noise) {
  std::mt19937_64 random(1);
  auto below = [&](int64_t n) { return static_cast<int64_t>(random() % static_cast<uint64_t>(n)); };
  std::normal_distribution<double> error(0, noise);
  std::vector<MeasuredStep> steps;
  for (int i = 0; i < count; ++i) {
    StepWork work;
    for (int64_t decodes = below(3) == 0 ? 0 : below(200); decodes > 0; --decodes) work.Add(100 + below(8000), 1);
    if (work.sequences == 0 || below(2) == 0) work.Add(below(4000), 2 + below(2000));
    steps.push_back({work, Duration(static_cast<int64_t>(static_cast<double>(StepTime(kTruth, work).count()) *
                                                         (1 + error(random))))});
  }
  return steps;
}

TEST(StepCostFit, FindsTheCoefficientsThatMadeTheTimes) {
  auto fit = FitStepCost(Steps(2000, 0));
  ASSERT_TRUE(fit.ok());
  EXPECT_EQ(fit->steps, 2000);
  EXPECT_EQ(fit->held_up, 0);
  EXPECT_LT(fit->p90_error, 0.02);
  EXPECT_NEAR(fit->cost.token_us, kTruth.token_us, 1);
  EXPECT_NEAR(fit->cost.kv_token_us, kTruth.kv_token_us, 0.005);
  EXPECT_NEAR(fit->cost.attention_us, kTruth.attention_us, 0.0002);
  EXPECT_NEAR(fit->cost.step_us + fit->cost.weights_us, 4300, 200);
}

TEST(StepCostFit, SaysHowFarOffItIs) {
  auto fit = FitStepCost(Steps(2000, 0.1));
  ASSERT_TRUE(fit.ok());
  EXPECT_NEAR(fit->median_error, 0.067, 0.015) << "of a normal error of 10 %";
  EXPECT_NEAR(fit->cost.token_us, kTruth.token_us, 2);
}

TEST(StepCostFit, LeavesOutStepsThatSomethingHeldUp) {
  std::vector<MeasuredStep> steps = Steps(2000, 0.01);
  for (size_t i = 0; i < steps.size(); i += 25) steps[i].time *= 20;
  auto fit = FitStepCost(steps);
  ASSERT_TRUE(fit.ok());
  EXPECT_EQ(fit->held_up, 80);
  EXPECT_LT(fit->p90_error, 0.04);
}

TEST(StepCostFit, NothingIsNegativeAndWhatWasNotSeenIsFree) {
  std::vector<MeasuredStep> steps;
  for (int i = 1; i <= 50; ++i) {
    StepWork work;
    work.Add(0, 2 * i);
    steps.push_back({work, std::chrono::microseconds(1000 - i)});  // more work took less time
  }
  auto fit = FitStepCost(steps);
  ASSERT_TRUE(fit.ok());
  for (double value : {fit->cost.step_us, fit->cost.weights_us, fit->cost.token_us, fit->cost.sequence_us,
                       fit->cost.kv_token_us, fit->cost.attention_us}) {
    EXPECT_GE(value, 0);
  }
  EXPECT_EQ(fit->cost.kv_token_us, 0);
}

TEST(StepCostFit, TooFewStepsAreCounted) {
  auto fit = FitStepCost(Steps(19, 0));
  ASSERT_FALSE(fit.ok());
  EXPECT_EQ(fit.status().message(), "a step cost needs at least 20 measured steps, there are 19");
}

TEST(MeasuredSteps, AreThoseWithAPlanAndATime) {
  FlightRecord record;
  auto plan = [](uint64_t step, int32_t first, int32_t tokens) {
    FlightPlan made;
    made.step = step;
    made.sequences = {{.first_position = first, .num_tokens = tokens}};
    return made;
  };
  auto result = [](uint64_t step, int64_t ns) {
    FlightResult came;
    came.step = step;
    came.device_time = Duration(ns);
    return came;
  };
  record.frames = {result(4, 9), plan(5, 0, 10), plan(6, 10, 1), result(5, 70), plan(0, 0, 1), result(6, 0)};
  const std::vector<MeasuredStep> steps = MeasuredSteps(record);
  ASSERT_EQ(steps.size(), 1u) << "step 4 has no plan, step 6 no time";
  EXPECT_EQ(steps[0].time, Duration(70));
  EXPECT_EQ(steps[0].work.tokens, 10);
  EXPECT_EQ(steps[0].work.prefill_context, 55);
}

}  // namespace
}  // namespace altiplano::bench
