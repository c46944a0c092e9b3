#include "server/bench/machine.h"

#include <algorithm>
#include <array>

#include "server/base/json.h"
#include "server/base/strings.h"
#include "server/bench/read_file.h"

namespace altiplano::bench {

namespace {

struct Field {
  const char* name;
  double StepCost::*value;
};
constexpr std::array<Field, 6> kFields = {
    Field{"step_us", &StepCost::step_us},    {"weights_us", &StepCost::weights_us},
    {"token_us", &StepCost::token_us},       {"sequence_us", &StepCost::sequence_us},
    {"kv_token_us", &StepCost::kv_token_us}, {"attention_us", &StepCost::attention_us}};

// Derived, not measured, from published sizes and rates:
//   weights_us    bytes of the weights / 75 % of the memory's datasheet rate (H100 3.35 TB/s, H200 4.8 TB/s)
//   token_us      FLOPs of a token's matrices / 790 TFLOP/s (bf16) or 1400 (FP8), and with 8 GPUs the messages of
//                 its all-reduces, 2 a layer and one, each of 4 bytes for each of H, at 64 MiB in 316 us
//   step_us       150, and with 8 GPUs each all-reduce of one token: 7.8 for 32 KiB (70B), 9.07 for 64 KiB (405B)
//   kv_token_us   bytes of keys and values / 83 % of the memory's rate
//   attention_us  FLOPs / 550 TFLOP/s
//   kv_tokens     90 % of the memory without the weights, bf16 keys and values
constexpr const char* kBf16 = "derived from sizes and rates: bf16 weights, one GPU";
constexpr const char* kFp8 = "derived from sizes and rates: FP8 weights, 8 GPUs tensor-parallel";

const std::array<Machine, 6>& Presets() {
  static const std::array<Machine, 6> presets = {{
      {"8b-h100", kBf16, 426'788, {150, 5974, 18.99, 1, 0.04714, 0.000953}},
      {"8b-h200", kBf16, 845'642, {150, 4169, 18.99, 1, 0.0329, 0.000953}},
      {"70b-8xh100", kFp8, 1'536'102, {1406, 3510, 37.25, 1, 0.01473, 0.000596}},
      {"70b-8xh200", kFp8, 2'876'434, {1406, 2450, 37.25, 1, 0.01028, 0.000596}},
      {"405b-8xh100", kFp8, 321'451, {2445, 20194, 150.17, 1, 0.0232, 0.001877}},
      {"405b-8xh200", kFp8, 1'172'456, {2445, 14094, 150.17, 1, 0.01619, 0.001877}},
  }};
  return presets;
}

}  // namespace

std::span<const Machine> MachinePresets() {
  return Presets();
}

StatusOr<Machine> ParseMachine(std::string_view text) {
  ASSIGN_OR_RETURN(Json json, ParseJson(text));
  if (!json.is_object()) return InvalidArgument("must be a JSON object");
  Machine machine;
  for (const Field& field : kFields) {
    auto it = json.find(field.name);
    if (it == json.end() || !it->is_number() || !(it->get<double>() >= 0 && it->get<double>() <= 1e9)) {
      return InvalidArgument(StrCat(field.name, " must be a number of microseconds from 0 to 1e9"));
    }
    machine.cost.*field.value = it->get<double>();
    json.erase(it);
  }
  auto kv_tokens = json.find("kv_tokens");
  if (kv_tokens == json.end() || !kv_tokens->is_number_unsigned() || kv_tokens->get<uint64_t>() < 1 ||
      kv_tokens->get<uint64_t>() > INT32_MAX) {
    return InvalidArgument("kv_tokens must be a whole number from 1 to 2147483647");
  }
  machine.kv_tokens = kv_tokens->get<int64_t>();
  json.erase(kv_tokens);
  auto description = json.find("description");
  if (description == json.end() || !description->is_string()) return InvalidArgument("description must be a string");
  machine.description = description->get<std::string>();
  json.erase(description);
  if (!json.empty()) return InvalidArgument(StrCat("\"", json.begin().key(), "\" is not a field of a step cost"));
  if (machine.cost.step_us + std::max(machine.cost.weights_us, machine.cost.token_us) <= 0) {
    return InvalidArgument("a step must take time: step_us, weights_us and token_us are all 0");
  }
  return machine;
}

OrderedJson ToJson(const StepCost& cost) {
  OrderedJson json;
  for (const Field& field : kFields) json[field.name] = cost.*field.value;
  return json;
}

OrderedJson ToJson(const Machine& machine) {
  OrderedJson json = {{"description", machine.description}, {"kv_tokens", machine.kv_tokens}};
  json.update(ToJson(machine.cost));
  return json;
}

StatusOr<Machine> FindMachine(const std::string& name_or_path) {
  std::string names;
  for (const Machine& machine : MachinePresets()) {
    if (machine.name == name_or_path) return machine;
    names += StrCat(names.empty() ? "" : ", ", machine.name);
  }
  auto contents = ReadMaybeGzipped(name_or_path);
  if (contents.status().code() == Code::kNotFound) {
    return Status(Code::kNotFound, StrCat("there is no file ", name_or_path, ", and no preset but ", names));
  }
  RETURN_IF_ERROR(contents.status());
  auto machine = ParseMachine(*contents);
  if (!machine.ok()) return Status(machine.status().code(), StrCat(name_or_path, ": ", machine.status().message()));
  machine->name = name_or_path;
  return machine;
}

}  // namespace altiplano::bench
