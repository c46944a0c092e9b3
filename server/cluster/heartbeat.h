// How often nodes say that they are there.
#pragma once

#include <algorithm>
#include <chrono>

#include "server/cluster/group.h"

namespace altiplano::cluster {

using SteadyTime = std::chrono::steady_clock::time_point;
inline SteadyTime Now() {
  return std::chrono::steady_clock::now();
}

inline constexpr auto kPollInterval = std::chrono::milliseconds(50);  // for what may be cancelled

// Several fit into the silence that makes a group unhealthy or, where that is shorter, ends it.
inline std::chrono::milliseconds HeartbeatInterval(const GroupOptions& options) {
  using std::chrono::milliseconds;
  return std::clamp(std::min(options.health_deadline, options.silence) / 5, milliseconds(20), milliseconds(1000));
}

}  // namespace altiplano::cluster
