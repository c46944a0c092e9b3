// The GPUs that the kernels are for. Pure, but for PropertiesOf.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/device.h"

namespace altiplano::cuda {

struct Architecture {
  int capability;           // major * 10 + minor
  std::string_view target;  // of nvcc: 90a is 9.0 with what only it has
  uint32_t shared_bytes;    // of shared memory that a block may ask for
};
inline constexpr Architecture kArchitectures[] = {
    {80, "80", 163 * 1024},
    {89, "89", 99 * 1024},
    {90, "90a", 227 * 1024},
};
inline constexpr const Architecture& kHopper = kArchitectures[2];

// What every one of them has.
inline constexpr uint32_t kLeastSharedBytes = 99 * 1024;

constexpr const Architecture* FindArchitecture(int capability) {
  for (const Architecture& each : kArchitectures) {
    if (each.capability == capability) return &each;
  }
  return nullptr;
}

// Of `built`, the targets that this program has kernels for, such as "80-real 90a-real": 80, 90a.
inline std::vector<std::string_view> TargetsIn(std::string_view built) {
  std::vector<std::string_view> targets;
  while (!built.empty()) {
    const std::string_view target = built.substr(0, built.find(' '));
    built.remove_prefix(target.size() < built.size() ? target.size() + 1 : target.size());
    targets.push_back(target.substr(0, target.find('-')));
  }
  return targets;
}

// Of the same: "sm_80 and sm_90a".
inline std::string TargetNames(std::string_view built) {
  const std::vector<std::string_view> targets = TargetsIn(built);
  std::string names;
  for (size_t i = 0; i < targets.size(); ++i) {
    names += (i == 0 ? "sm_" : i + 1 == targets.size() ? " and sm_" : ", sm_") + std::string(targets[i]);
  }
  return names;
}

// Empty, or why a GPU of this compute capability cannot be used.
inline std::string WhyRefused(int ordinal, std::string_view name, int capability, std::string_view built) {
  const Architecture* found = FindArchitecture(capability);
  for (const std::string_view target : TargetsIn(built)) {
    if (found != nullptr && found->target == target) return "";
  }
  return "GPU " + std::to_string(ordinal) + ", " + std::string(name) + ", is of sm_" + std::to_string(capability) +
         "; this program has kernels for " + TargetNames(built) + " alone";
}

struct GpuProperties {
  const Architecture* architecture = nullptr;
  int64_t multiprocessors = 0;
};
// Of the stream's GPU, known since its first stream was opened.
const GpuProperties& PropertiesOf(const Stream& stream);

}  // namespace altiplano::cuda
