// StepCostLearner: the coefficients of the step cost, corrected by every step that has been measured. Arithmetic on
// what is passed in: the same steps give the same cost, on any machine.
#pragma once

#include <array>
#include <cstdint>

#include "server/base/clock.h"
#include "server/scheduler/step_cost.h"

namespace altiplano {

// Recursive least squares of the relative error: measured / predicted is to be 1. A step that something else on the
// machine held up for long weighs little that way, and one far off what steps like it took lately is not learned from.
// No coefficient is ever negative, so that more work never looks cheaper.
class StepCostLearner {
 public:
  // All zero: nothing is known, and the first steps say what there is to know.
  explicit StepCostLearner(const StepCost& start);

  // Nothing is learned from a time that is not positive: nobody measured it.
  void Learn(const StepWork& work, Duration measured);

  const StepCost& cost() const { return cost_; }
  uint64_t steps() const { return steps_; }  // measured
  // Mean of |predicted - measured| / measured over about the last hundred steps, each predicted before it was learned
  // from.
  double error() const { return error_; }

  // For whoever keeps it: visit(number) for every double and integer of a StepCostLearner, which is all there is to it.
  template <typename Learner, typename Visit>
  static void VisitNumbers(Learner& learner, const Visit& visit) {
    for (auto& doubt : learner.doubt_) visit(doubt);
    for (auto& fit : learner.fits_) {
      visit(fit.knee);
      for (auto& coefficient : fit.coefficients) visit(coefficient);
      for (auto& row : fit.covariance) {
        for (auto& covariance : row) visit(covariance);
      }
      visit(fit.error);
      visit(fit.strange);
    }
    visit(learner.best_);
    auto& cost = learner.cost_;
    for (auto* us :
         {&cost.step_us, &cost.weights_us, &cost.token_us, &cost.sequence_us, &cost.kv_token_us, &cost.attention_us}) {
      visit(*us);
    }
    visit(learner.error_);
    visit(learner.steps_);
  }
  // Numbers from outside: whether they can be a learner's.
  bool plausible() const;

  bool operator==(const StepCostLearner&) const = default;

 private:
  static constexpr size_t kTerms = std::tuple_size_v<StepTerms>;
  static constexpr size_t kKnees = 7;

  // A fit for one guess of the token count up to which a step only waits for the weights. The formula is not linear in
  // that count, so that a few guesses run side by side and the one that predicts best speaks.
  struct Fit {
    double knee = 0;
    StepTerms coefficients{};  // a negative one speaks as zero
    std::array<StepTerms, kTerms> covariance{};
    double error = 0;
    uint32_t strange = 0;  // steps in a row that were too far off to learn from

    bool operator==(const Fit&) const = default;
  };
  static StepCost CostOf(const Fit& fit);
  void Doubt(Fit* fit) const;  // takes the coefficients for no more than a start
  bool LearnOne(Fit* fit, const StepWork& work, double measured_us, double weight) const;

  StepTerms doubt_{};  // standard deviation of each coefficient at the start
  std::array<Fit, kKnees> fits_;
  uint32_t best_ = 0;
  StepCost cost_;
  double error_ = 0;
  uint64_t steps_ = 0;
};

}  // namespace altiplano
