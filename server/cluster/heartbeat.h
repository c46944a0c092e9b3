// How often nodes say that they are there.
#pragma once

#include <algorithm>
#include <chrono>

namespace altiplano::cluster {

inline constexpr auto kPollInterval = std::chrono::milliseconds(50);  // for what may be cancelled

// Several fit into the silence that ends a node.
inline std::chrono::milliseconds HeartbeatInterval(std::chrono::milliseconds silence) {
  using std::chrono::milliseconds;
  return std::clamp(silence / 5, milliseconds(20), milliseconds(1000));
}

}  // namespace altiplano::cluster
