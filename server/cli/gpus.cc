#include "server/cli/gpus.h"

#include <cstdint>
#include <limits>
#include <string>

#include "server/base/strings.h"
#include "server/cli/units.h"

namespace altiplano::cli {

StatusOr<std::vector<std::vector<int>>> AssignGpus(std::string_view list, int replicas, int ranks, int present) {
  const int wanted = replicas * ranks;
  const std::string want = StrCat(wanted, wanted == 1 ? " GPU is" : " GPUs are", " wanted here, ", ranks,
                                  " for each of ", replicas, replicas == 1 ? " replica" : " replicas");
  std::vector<int> ordinals;
  if (list.empty()) {
    if (present < wanted)
      return Status(Code::kUnavailable, StrCat("--device cuda: ", want, ", and there are ", present));
    for (int ordinal = 0; ordinal < wanted; ++ordinal) ordinals.push_back(ordinal);
  } else {
    const auto named = ParseCounts(list, 0, std::numeric_limits<int>::max());
    if (!named.ok()) return Status(Code::kOutOfRange, StrCat("--devices: ", named.status().message()));
    for (const int64_t ordinal : *named) ordinals.push_back(static_cast<int>(ordinal));
    if (static_cast<int>(ordinals.size()) != wanted) {
      return Status(Code::kOutOfRange, StrCat("--devices names ", ordinals.size(), ": ", want));
    }
    for (const int ordinal : ordinals) {
      if (ordinal < present) continue;
      return Status(Code::kUnavailable, StrCat("--devices: no GPU ", ordinal, ", there are ", present));
    }
  }
  std::vector<std::vector<int>> assigned;
  for (auto first = ordinals.begin(); first != ordinals.end(); first += ranks) {
    assigned.emplace_back(first, first + ranks);
  }
  return assigned;
}

}  // namespace altiplano::cli
