// What one step of the engine costs, as a formula: for simulations, and for whoever plans by predicted time.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "server/base/clock.h"
#include "server/base/status.h"
#include "server/scheduler/step_plan.h"

namespace altiplano::bench {

// The work of a step that its time depends on.
struct StepWork {
  int64_t sequences = 0;
  int64_t tokens = 0;
  int64_t decode_context = 0;   // tokens that the decodes look back at, all of them together
  int64_t prefill_context = 0;  // the same of all tokens of prompts under way
};
StepWork WorkOf(const StepPlan& plan);

// Microseconds. A step takes
//   step_us + max(weights_us, tokens * token_us) + sequences * sequence_us
//           + decode_context * kv_token_us + prefill_context * attention_us
// The weights are read once, whatever is computed with them: up to weights_us / token_us tokens a step costs the same.
struct StepCost {
  double step_us = 0;       // launches, communication that does not grow with the batch
  double weights_us = 0;    // reading all weights
  double token_us = 0;      // matrix multiplications of one token, with communication that grows with the batch
  double sequence_us = 0;   // logits and sampling of one sequence
  double kv_token_us = 0;   // a decode's attention to one token: reading its keys and values
  double attention_us = 0;  // a prompt token's attention to one token: arithmetic
};
Duration StepTime(const StepCost& cost, const StepWork& work);

// A model on a machine.
struct Machine {
  std::string name;
  std::string description;  // where the numbers come from
  int64_t kv_tokens = 0;    // that fit beside the weights
  StepCost cost;
};
std::span<const Machine> MachinePresets();

// A file such as config/step_cost.json: every field of StepCost, kv_tokens and description, nothing else.
StatusOr<Machine> ParseMachine(std::string_view json);

// A preset by name, else the file of that path. NOT_FOUND names the presets.
StatusOr<Machine> FindMachine(const std::string& name_or_path);

}  // namespace altiplano::bench
