#include "server/cli/gpus.h"

#include <cstdint>
#include <string>

#include "server/base/strings.h"
#include "server/cli/units.h"

namespace altiplano::cli {

namespace {

constexpr int kMostGpus = 256;

std::string Gpus(int count) {
  return StrCat(count, count == 1 ? " GPU" : " GPUs");
}

}  // namespace

StatusOr<std::vector<std::vector<int>>> AssignGpus(std::string_view list, int replicas, int ranks, int present) {
  const int wanted = replicas * ranks;
  const std::string each = wanted == 1
                               ? ""
                               : StrCat(", one for each of the ", ranks, ranks == 1 ? " rank of " : " ranks of ",
                                        replicas, replicas == 1 ? " replica" : " replicas");
  std::vector<int> ordinals;
  if (list.empty()) {
    if (present < wanted)
      return Status(Code::kUnavailable,
                    StrCat("--device cuda needs ", Gpus(wanted), each, "; this process sees ", present,
                           "; lower --tensor-parallel, --pipeline-parallel or --replicas"));
    for (int ordinal = 0; ordinal < wanted; ++ordinal) ordinals.push_back(ordinal);
  } else {
    const auto named = ParseCounts(list, 0, kMostGpus - 1);
    if (!named.ok()) {
      return Status(Code::kOutOfRange,
                    StrCat("--devices: ", named.status().message(), "; give the GPUs' numbers, such as 0,1"));
    }
    for (const int64_t ordinal : *named) ordinals.push_back(static_cast<int>(ordinal));
    if (static_cast<int>(ordinals.size()) != wanted) {
      return Status(Code::kOutOfRange, StrCat("--devices names ", Gpus(static_cast<int>(ordinals.size())), ", but ",
                                              wanted, wanted == 1 ? " is needed" : " are needed", each));
    }
    for (const int ordinal : ordinals) {
      if (ordinal < present) continue;
      return Status(Code::kUnavailable,
                    StrCat("--devices names GPU ", ordinal, ", but this process sees ", Gpus(present),
                           ", counted from 0; CUDA_VISIBLE_DEVICES may hide others"));
    }
  }
  std::vector<std::vector<int>> assigned;
  for (auto first = ordinals.begin(); first != ordinals.end(); first += ranks) {
    assigned.emplace_back(first, first + ranks);
  }
  return assigned;
}

}  // namespace altiplano::cli
