#include "server/scheduler/step_cost_learner.h"

#include <gtest/gtest.h>

#include <chrono>
#include <random>
#include <vector>

namespace altiplano {
namespace {

constexpr StepCost kTruth = {
    .step_us = 300, .weights_us = 5000, .token_us = 20, .sequence_us = 8, .kv_token_us = 0.02, .attention_us = 0.002};

// Steps as a server makes them: decodes alone, or with a chunk of a prompt.
StepWork SomeWork(std::minstd_rand& random) {
  StepWork work;
  const auto decodes = 1 + static_cast<int64_t>(random() % 64);
  for (int64_t i = 0; i < decodes; ++i) work.Add(static_cast<int64_t>(random() % 4000), 1);
  if (random() % 3 == 0) {
    work.Add(static_cast<int64_t>(random() % 8000), 2 + static_cast<int64_t>(random() % 2000));
  }
  return work;
}

struct Machine {
  StepCost truth = kTruth;
  double noise = 0.03;  // uniform, to either side
  double held_up = 0;   // probability of a step that something else held up, fifty times as long
  std::minstd_rand random{7};

  Duration Measure(const StepWork& work) {
    auto fraction = [&] { return static_cast<double>(random() % 10000) / 10000; };
    double ns = static_cast<double>(StepTime(truth, work).count()) * (1 + noise * (2 * fraction() - 1));
    if (fraction() < held_up) ns *= 50;
    return Duration(static_cast<int64_t>(ns));
  }
};

void Teach(StepCostLearner& learner, Machine& machine, int steps) {
  for (int i = 0; i < steps; ++i) {
    const StepWork work = SomeWork(machine.random);
    learner.Learn(work, machine.Measure(work));
    const StepCost& c = learner.cost();
    for (double us : {c.step_us, c.weights_us, c.token_us, c.sequence_us, c.kv_token_us, c.attention_us}) {
      ASSERT_GE(us, 0) << "more work would look cheaper";
    }
  }
}

// Mean relative error over fresh work.
double ErrorOf(const StepCost& learned, const StepCost& truth) {
  std::minstd_rand random(99);
  double sum = 0;
  for (int i = 0; i < 500; ++i) {
    const StepWork work = SomeWork(random);
    const double is = Seconds(StepTime(truth, work));
    sum += std::abs(Seconds(StepTime(learned, work)) - is) / is;
  }
  return sum / 500;
}

TEST(StepCostLearner, LearnsFromNothing) {
  StepCostLearner learner({});
  Machine machine;
  Teach(learner, machine, 300);
  EXPECT_LT(ErrorOf(learner.cost(), kTruth), 0.05);
  EXPECT_LT(learner.error(), 0.06);
  EXPECT_EQ(learner.steps(), 300u);
}

TEST(StepCostLearner, CorrectsAStartThatIsFarOff) {
  for (double factor : {0.2, 5.0}) {
    StepCost start = kTruth;
    for (double* us : {&start.step_us, &start.weights_us, &start.token_us, &start.sequence_us, &start.kv_token_us,
                       &start.attention_us}) {
      *us *= factor;
    }
    StepCostLearner learner(start);
    Machine machine;
    Teach(learner, machine, 200);
    EXPECT_LT(ErrorOf(learner.cost(), kTruth), 0.05) << factor;
  }
}

TEST(StepCostLearner, AStartThatIsRightStaysAsItIs) {
  StepCostLearner learner(kTruth);
  Machine machine;
  machine.noise = 0;
  Teach(learner, machine, 1000);
  EXPECT_EQ(learner.cost().token_us, kTruth.token_us);
  EXPECT_EQ(learner.cost().weights_us, kTruth.weights_us);
  EXPECT_LT(learner.error(), 1e-4);
}

TEST(StepCostLearner, StepsThatWereHeldUpTeachNothing) {
  StepCostLearner learner({});
  Machine machine;
  machine.held_up = 0.05;
  Teach(learner, machine, 1000);
  EXPECT_LT(ErrorOf(learner.cost(), kTruth), 0.08);
}

TEST(StepCostLearner, AMachineThatBecomesSlowerIsLearnedAnew) {
  StepCostLearner learner(kTruth);
  Machine machine;
  Teach(learner, machine, 500);
  for (double* us : {&machine.truth.step_us, &machine.truth.weights_us, &machine.truth.token_us,
                     &machine.truth.sequence_us, &machine.truth.kv_token_us, &machine.truth.attention_us}) {
    *us *= 3;
  }
  Teach(learner, machine, 100);
  EXPECT_LT(ErrorOf(learner.cost(), machine.truth), 0.08);
}

TEST(StepCostLearner, DecodesAloneSayNothingAboutPromptsButAreLearned) {
  StepCostLearner learner(kTruth);
  Machine machine;
  StepWork decodes;
  for (int i = 0; i < 32; ++i) decodes.Add(1000, 1);
  for (int i = 0; i < 5000; ++i) learner.Learn(decodes, machine.Measure(decodes));
  const double is = Seconds(StepTime(kTruth, decodes));
  EXPECT_NEAR(Seconds(StepTime(learner.cost(), decodes)), is, 0.05 * is);
  Teach(learner, machine, 100);
  EXPECT_LT(ErrorOf(learner.cost(), kTruth), 0.08) << "and one kind of step for long does not spoil the others";
}

TEST(StepCostLearner, AStepThatNobodyMeasuredIsNoStep) {
  StepCostLearner learner(kTruth);
  learner.Learn({.sequences = 1, .tokens = 1}, Duration(0));
  EXPECT_EQ(learner.steps(), 0u);
  EXPECT_EQ(learner.error(), 0);
  EXPECT_EQ(learner.cost().step_us, kTruth.step_us);
}

TEST(StepCostLearner, TheSameStepsGiveTheSameCost) {
  StepCostLearner a({}), b({});
  Machine one, other;
  Teach(a, one, 200);
  Teach(b, other, 200);
  EXPECT_EQ(a.cost().step_us, b.cost().step_us);
  EXPECT_EQ(a.cost().attention_us, b.cost().attention_us);
}

}  // namespace
}  // namespace altiplano
