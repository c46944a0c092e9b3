#include "server/scheduler/step_cost_learner.h"

#include <algorithm>
#include <cmath>

namespace altiplano {

namespace {

constexpr double kNoise = 0.05;         // of a step's time, as a part of it
constexpr double kForgetting = 0.998;   // what was learned 500 steps ago counts a third
constexpr double kCloseEnough = 1e-4;   // such an error is the clock's, not the formula's
constexpr double kErrorMemory = 0.02;   // weight of the newest step in the mean error
constexpr uint64_t kFirstSteps = 32;    // all of them are learned from: nobody knows yet what is strange
constexpr double kStrange = 0.25;       // an error beyond this and several times the usual is the machine's
constexpr uint32_t kStrangeInARow = 8;  // then the machine is another one now
constexpr double kBetterBy = 0.8;       // so much less must another guess err to be believed

// Where nothing is known: microseconds that each term may cost, on a laptop or on a node of GPUs.
constexpr double kDoubt[] = {1e5, 1e4, 1e3, 10, 1};
// Tokens up to which a step may only wait for the weights.
constexpr double kGuesses[] = {0, 16, 64, 128, 256, 512};

}  // namespace

StepCostLearner::StepCostLearner(const StepCost& start) : cost_(start) {
  const StepTerms given = {start.step_us + start.weights_us, start.token_us, start.sequence_us, start.kv_token_us,
                           start.attention_us};
  const bool known = std::ranges::max(given) > 0;
  for (size_t i = 0; i < kTerms; ++i) doubt_[i] = known ? given[i] + 1e-4 * kDoubt[i] : kDoubt[i];
  fits_[0].knee = start.token_us > 0 ? start.weights_us / start.token_us : 0;
  for (size_t i = 1; i < kKnees; ++i) fits_[i].knee = kGuesses[i - 1];
  for (Fit& fit : fits_) {
    fit.coefficients = given;
    fit.coefficients[0] = std::max(0.0, given[0] - fit.knee * start.token_us);
    Doubt(&fit);
  }
}

void StepCostLearner::Doubt(Fit* fit) const {
  fit->covariance = {};
  for (size_t i = 0; i < kTerms; ++i) fit->covariance[i][i] = doubt_[i] * doubt_[i];
  fit->strange = 0;
}

void StepCostLearner::Learn(const StepWork& work, Duration measured) {
  if (measured <= Duration(0)) return;
  const double us = static_cast<double>(measured.count()) / 1e3;
  ++steps_;
  const double weight = std::max(kErrorMemory, 1 / static_cast<double>(steps_));
  const double predicted = static_cast<double>(StepTime(cost_, work).count()) / 1e3;
  error_ += weight * (std::abs(us - predicted) / us - error_);
  bool changed = false;
  for (Fit& fit : fits_) changed |= LearnOne(&fit, work, us, weight);

  const auto best = static_cast<uint32_t>(std::ranges::min_element(fits_, {}, &Fit::error) - fits_.begin());
  const bool another = best != best_ && fits_[best].error < kBetterBy * fits_[best_].error;
  if (another) best_ = best;
  if (changed || another) cost_ = CostOf(fits_[best_]);
}

bool StepCostLearner::LearnOne(Fit* fit, const StepWork& work, double measured_us, double weight) const {
  StepTerms terms = TermsOf(work, fit->knee);
  double predicted = 0, fitted = 0;
  for (size_t i = 0; i < kTerms; ++i) {
    terms[i] /= measured_us;
    fitted += terms[i] * fit->coefficients[i];
    predicted += terms[i] * std::max(0.0, fit->coefficients[i]);
  }
  const double error = 1 - fitted;
  const double usual = fit->error;
  fit->error += weight * (std::min(1.0, std::abs(1 - predicted)) - fit->error);
  if (std::abs(error) < kCloseEnough) return false;
  if (steps_ > kFirstSteps && std::abs(error) > std::max(kStrange, 5 * usual)) {
    if (++fit->strange < kStrangeInARow) return false;
    Doubt(fit);
  }
  fit->strange = 0;

  StepTerms gain{};  // covariance * terms, then divided
  double spread = kNoise * kNoise;
  for (size_t i = 0; i < kTerms; ++i) {
    for (size_t j = 0; j < kTerms; ++j) gain[i] += fit->covariance[i][j] * terms[j];
    spread += gain[i] * terms[i];
  }
  const StepTerms shift = gain;
  for (double& g : gain) g /= spread;
  for (size_t i = 0; i < kTerms; ++i) {
    fit->coefficients[i] += gain[i] * error;
    for (size_t j = 0; j <= i; ++j) {
      fit->covariance[i][j] = fit->covariance[j][i] = (fit->covariance[i][j] - gain[i] * shift[j]) / kForgetting;
    }
  }
  // Forgetting what the steps of late do not tell ends at the doubt of the start, or one strange step could say
  // anything.
  for (size_t i = 0; i < kTerms; ++i) {
    const double most = doubt_[i] * doubt_[i];
    fit->covariance[i][i] = std::max(fit->covariance[i][i], 1e-12 * most);
    if (fit->covariance[i][i] <= most) continue;
    const double scale = doubt_[i] / std::sqrt(fit->covariance[i][i]);
    for (size_t j = 0; j < kTerms; ++j) fit->covariance[i][j] *= scale, fit->covariance[j][i] *= scale;
  }
  return true;
}

bool StepCostLearner::plausible() const {
  bool bounded = true;
  VisitNumbers(*this, [&bounded](auto number) { bounded &= std::abs(static_cast<double>(number)) <= 1e18; });
  return bounded && best_ < kKnees;  // and no NaN
}

StepCost StepCostLearner::CostOf(const Fit& fit) {
  StepTerms us = fit.coefficients;
  for (double& each : us) each = std::max(0.0, each);
  return CostFrom(us, fit.knee);
}

}  // namespace altiplano
