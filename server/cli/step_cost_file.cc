#include "server/cli/step_cost_file.h"

#include "server/base/json.h"
#include "server/base/strings.h"
#include "server/bench/machine.h"
#include "server/bench/step_cost_fit.h"
#include "server/cli/write_file.h"

namespace altiplano::cli {

StatusOr<std::string> FitAndWriteStepCost(const FlightRecord& record, const std::string& description, int64_t kv_tokens,
                                          const std::string& path) {
  ASSIGN_OR_RETURN(const bench::StepCostFit fit, bench::FitStepCost(bench::MeasuredSteps(record)));
  const std::string residual =
      StrFormat("%lld steps, off by %.1f %% in the median and by less than %.1f %% in nine of ten",
                static_cast<long long>(fit.steps), 100 * fit.median_error, 100 * fit.p90_error);
  bench::Machine machine;
  machine.description = StrCat(description, ": ", residual);
  machine.kv_tokens = kv_tokens;
  machine.cost = fit.cost;
  // A file that nobody could read back would be found out only when a server is started with it.
  const std::string text = StrCat(ToJson(machine).dump(2), "\n");
  RETURN_IF_ERROR(bench::ParseMachine(text).status());
  RETURN_IF_ERROR(WriteFile(path, text));
  std::string said = StrCat(path, ": ", residual);
  if (fit.held_up > 0) said += StrCat("; ", fit.held_up, " steps that something held up are left out");
  const StepCost& cost = fit.cost;
  return StrCat(said, StrFormat("\nstep_us %.6g, weights_us %.6g, token_us %.6g, sequence_us %.6g, kv_token_us %.6g, "
                                "attention_us %.6g",
                                cost.step_us, cost.weights_us, cost.token_us, cost.sequence_us, cost.kv_token_us,
                                cost.attention_us));
}

}  // namespace altiplano::cli
