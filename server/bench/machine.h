// Models on machines, as step costs: derived presets, and files of one's own.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "server/base/json_fwd.h"
#include "server/base/status.h"
#include "server/scheduler/step_cost.h"

namespace altiplano::bench {

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
// What ParseMachine reads back, but for the name.
OrderedJson ToJson(const Machine& machine);
OrderedJson ToJson(const StepCost& cost);

// A preset by name, else the file of that path. NOT_FOUND names the presets.
StatusOr<Machine> FindMachine(const std::string& name_or_path);

}  // namespace altiplano::bench
