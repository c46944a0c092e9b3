#include "server/bench/step_cost_fit.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "server/base/strings.h"

namespace altiplano::bench {

namespace {

constexpr size_t kLeastSteps = 20;
constexpr size_t kTerms = std::tuple_size_v<StepTerms>;

double Dot(const StepTerms& a, const StepTerms& b) {
  double sum = 0;
  for (size_t i = 0; i < kTerms; ++i) sum += a[i] * b[i];
  return sum;
}

struct Solution {
  StepTerms coefficients{};
  double squares = std::numeric_limits<double>::infinity();  // of relative errors
};

// Reading the weights hides the arithmetic of up to `hidden` tokens. Least squares of relative errors without negative
// coefficients: coordinate descent on the normal equations, whose terms are scaled to equal size first.
Solution Solve(const std::vector<MeasuredStep>& steps, double hidden) {
  constexpr int kRounds = 20000;
  constexpr double kStill = 1e-12;
  StepTerms scale{};
  std::array<StepTerms, kTerms> normal{};
  StepTerms right{};
  for (const MeasuredStep& step : steps) {
    StepTerms terms = TermsOf(step.work, hidden);
    const double us = Seconds(step.time) * 1e6;
    for (double& term : terms) term /= us;
    for (size_t i = 0; i < kTerms; ++i) {
      right[i] += terms[i];
      for (size_t j = 0; j < kTerms; ++j) normal[i][j] += terms[i] * terms[j];
    }
  }
  for (size_t i = 0; i < kTerms; ++i) scale[i] = normal[i][i] > 0 ? 1 / std::sqrt(normal[i][i]) : 0;
  StepTerms x{};
  for (int round = 0; round < kRounds; ++round) {
    double moved = 0;
    for (size_t i = 0; i < kTerms; ++i) {
      if (scale[i] == 0) continue;
      double gradient = right[i] * scale[i];
      for (size_t j = 0; j < kTerms; ++j) gradient -= normal[i][j] * scale[i] * scale[j] * x[j];
      const double next = std::max(0.0, x[i] + gradient);
      moved = std::max(moved, std::abs(next - x[i]));
      x[i] = next;
    }
    if (moved < kStill * std::sqrt(static_cast<double>(steps.size()))) break;
  }
  Solution solution;
  for (size_t i = 0; i < kTerms; ++i) solution.coefficients[i] = x[i] * scale[i];
  solution.squares = 0;
  for (const MeasuredStep& step : steps) {
    const double error = Dot(solution.coefficients, TermsOf(step.work, hidden)) / (Seconds(step.time) * 1e6) - 1;
    solution.squares += error * error;
  }
  return solution;
}

StepCost Fit(const std::vector<MeasuredStep>& steps) {
  int64_t most = 1;
  for (const MeasuredStep& step : steps) most = std::max(most, step.work.tokens);
  Solution best;
  double best_hidden = 0;
  for (double hidden = 0; hidden <= static_cast<double>(most); hidden = hidden == 0 ? 1 : hidden * 1.2) {
    const Solution solution = Solve(steps, hidden);
    // Of two that fit alike the simpler one: the weights hide nothing.
    if (solution.squares < best.squares * (1 - 1e-6)) best = solution, best_hidden = hidden;
  }
  return CostFrom(best.coefficients, best_hidden);
}

std::vector<double> Errors(const std::vector<MeasuredStep>& steps, const StepCost& cost) {
  std::vector<double> errors;
  for (const MeasuredStep& step : steps) errors.push_back(Seconds(StepTime(cost, step.work)) / Seconds(step.time) - 1);
  return errors;
}

double Quantile(std::vector<double> values, double at) {
  std::ranges::sort(values);
  return values[static_cast<size_t>(at * static_cast<double>(values.size() - 1))];
}

}  // namespace

std::vector<MeasuredStep> MeasuredSteps(const FlightRecord& record) {
  std::vector<MeasuredStep> steps;
  std::vector<const FlightPlan*> planned;  // at most two without a result
  for (const FlightFrame& frame : record.frames) {
    if (const auto* plan = std::get_if<FlightPlan>(&frame)) {
      if (plan->step != 0) planned.push_back(plan);
    } else if (const auto* result = std::get_if<FlightResult>(&frame)) {
      auto it = std::ranges::find(planned, result->step, &FlightPlan::step);
      if (it == planned.end()) continue;
      if (result->device_time > Duration(0)) {
        MeasuredStep& step = steps.emplace_back(MeasuredStep{.work = {}, .time = result->device_time});
        for (const FlightPlanned& one : (*it)->sequences) step.work.Add(one.first_position, one.num_tokens);
      }
      planned.erase(planned.begin(), it + 1);
    } else if (std::holds_alternative<FlightAbort>(frame)) {
      planned.clear();
    }
  }
  return steps;
}

StatusOr<StepCostFit> FitStepCost(const std::vector<MeasuredStep>& measured) {
  if (measured.size() < kLeastSteps) {
    return Status(Code::kFailedPrecondition,
                  StrCat("a step cost needs at least ", kLeastSteps, " measured steps, there are ", measured.size()));
  }
  // What else ran on the machine makes some steps far slower: they go by the errors of a first fit, and the rest is
  // fitted again.
  constexpr double kLeastOff = 0.25, kTimesMedian = 5;
  std::vector<MeasuredStep> steps = measured;
  StepCostFit fit;
  fit.cost = Fit(steps);
  std::vector<double> errors = Errors(steps, fit.cost);
  std::vector<double> sizes = errors;
  for (double& error : sizes) error = std::abs(error);
  const double off = std::max(kLeastOff, kTimesMedian * Quantile(sizes, 0.5));
  std::vector<MeasuredStep> kept;
  for (size_t i = 0; i < steps.size(); ++i) {
    if (errors[i] > -off / (1 + off)) kept.push_back(steps[i]);
  }
  if (kept.size() >= kLeastSteps && kept.size() < steps.size()) {
    fit.held_up = static_cast<int64_t>(steps.size() - kept.size());
    steps = std::move(kept);
    fit.cost = Fit(steps);
  }
  fit.steps = static_cast<int64_t>(steps.size());
  sizes = Errors(steps, fit.cost);
  for (double& error : sizes) error = std::abs(error);
  fit.median_error = Quantile(sizes, 0.5);
  fit.p90_error = Quantile(sizes, 0.9);
  return fit;
}

}  // namespace altiplano::bench
