#include "server/cli/gpus.h"

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <string>

#include "server/base/strings.h"

namespace altiplano::cli {

namespace {

StatusOr<std::vector<int>> ParseList(std::string_view list) {
  std::vector<int> ordinals;
  for (size_t begin = 0; begin <= list.size();) {
    const size_t end = std::min(list.find(',', begin), list.size());
    int ordinal = 0;
    const auto [at, error] = std::from_chars(list.data() + begin, list.data() + end, ordinal);
    if (error != std::errc() || at != list.data() + end || ordinal < 0) {
      return Status(Code::kInvalidArgument,
                    StrCat("--devices: \"", list, "\" must be numbers of GPUs with commas between them, as 0,1,4,5"));
    }
    ordinals.push_back(ordinal);
    begin = end + 1;
  }
  return ordinals;
}

}  // namespace

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
    ASSIGN_OR_RETURN(ordinals, ParseList(list));
    if (static_cast<int>(ordinals.size()) != wanted) {
      return Status(Code::kInvalidArgument, StrCat("--devices names ", ordinals.size(), ": ", want));
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
