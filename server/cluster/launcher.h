// Which node of how many this process is, as the program that started it says.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "server/base/status.h"

namespace altiplano::cluster {

inline constexpr int kLeaderPort = 50060;  // where the leader listens when only its host is known

struct Place {
  int rank = 0;  // 0 leads
  int nodes = 1;
  std::string leader;  // "host:port"; empty: the launcher does not say
};

// launcher: "lws" (LeaderWorkerSet), "slurm" (srun, one task a node) or "openmpi" (mpirun, one process a node).
// FAILED_PRECONDITION naming the variable that is missing or makes no sense. getenv: null when a variable is not set.
StatusOr<Place> PlaceFromEnvironment(std::string_view launcher, const std::function<const char*(const char*)>& getenv);

// The hosts of Slurm's short form, in order: "a[1-3,07],b" is a1, a2, a3, a07, b. nullopt when it is malformed or names
// more than 65536.
std::optional<std::vector<std::string>> ExpandHosts(std::string_view list);

}  // namespace altiplano::cluster
