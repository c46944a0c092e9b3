#include "server/cluster/launcher.h"

#include <charconv>

#include "server/base/split.h"
#include "server/base/strings.h"

namespace altiplano::cluster {

namespace {

constexpr size_t kMostHosts = 65536;

std::optional<int> Number(std::string_view text) {
  int value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < 0) return std::nullopt;
  return value;
}

class Environment {
 public:
  Environment(std::string_view launcher, const std::function<const char*(const char*)>& getenv)
      : launcher_(launcher), getenv_(getenv) {}

  StatusOr<std::string> Text(const char* name) const {
    const char* value = getenv_(name);
    if (value == nullptr || *value == '\0') {
      return Status(Code::kFailedPrecondition,
                    StrCat("--launcher ", launcher_, ": ", name, " is not set; was this process started by it?"));
    }
    return std::string(value);
  }
  StatusOr<int> Count(const char* name, int least) const {
    ASSIGN_OR_RETURN(const std::string text, Text(name));
    const std::optional<int> value = Number(text);
    if (!value || *value < least) {
      return Status(Code::kFailedPrecondition, StrCat("--launcher ", launcher_, ": ", name, "=", text,
                                                      ", must be a whole number from ", least, " on"));
    }
    return *value;
  }

 private:
  const std::string launcher_;
  const std::function<const char*(const char*)>& getenv_;
};

// Appends prefix + each of "1-3,07" with the zeros that the range has.
bool ExpandRange(std::string_view prefix, std::string_view ranges, std::vector<std::string>* hosts) {
  for (const std::string_view range : Split(ranges, ',')) {
    const size_t dash = std::min(range.find('-'), range.size());
    const std::string_view low = range.substr(0, dash);
    const std::string_view high = dash == range.size() ? low : range.substr(dash + 1);
    const std::optional<int> first = Number(low), last = Number(high);
    if (!first || !last || *last < *first) return false;
    for (int i = *first; i <= *last; ++i) {
      std::string number = StrCat(i);
      if (number.size() < low.size()) number.insert(0, low.size() - number.size(), '0');
      if (hosts->size() == kMostHosts) return false;
      hosts->push_back(StrCat(prefix, number));
    }
  }
  return true;
}

}  // namespace

std::optional<std::vector<std::string>> ExpandHosts(std::string_view list) {
  std::vector<std::string> hosts;
  while (!list.empty()) {
    const size_t end = list.find_first_of("[,");
    const std::string_view prefix = list.substr(0, end);
    if (prefix.empty()) return std::nullopt;
    if (end == list.npos || list[end] == ',') {
      hosts.emplace_back(prefix);
      list.remove_prefix(end == list.npos ? list.size() : end + 1);
      continue;
    }
    const size_t close = list.find(']', end);
    if (close == list.npos || close == end + 1) return std::nullopt;
    if (!ExpandRange(prefix, list.substr(end + 1, close - end - 1), &hosts)) return std::nullopt;
    list.remove_prefix(close + 1);
    if (list.empty()) break;
    if (list.front() != ',' || list.size() == 1) return std::nullopt;
    list.remove_prefix(1);
  }
  if (hosts.empty() || hosts.size() > kMostHosts) return std::nullopt;
  return hosts;
}

StatusOr<Place> PlaceFromEnvironment(std::string_view launcher, const std::function<const char*(const char*)>& getenv) {
  const Environment environment(launcher, getenv);
  Place place;
  if (launcher == "lws") {
    ASSIGN_OR_RETURN(place.rank, environment.Count("LWS_WORKER_INDEX", 0));
    ASSIGN_OR_RETURN(place.nodes, environment.Count("LWS_GROUP_SIZE", 1));
    ASSIGN_OR_RETURN(const std::string host, environment.Text("LWS_LEADER_ADDRESS"));
    place.leader = StrCat(host, ":", kLeaderPort);
  } else if (launcher == "slurm") {
    ASSIGN_OR_RETURN(place.rank, environment.Count("SLURM_PROCID", 0));
    ASSIGN_OR_RETURN(place.nodes, environment.Count("SLURM_NTASKS", 1));
    ASSIGN_OR_RETURN(const std::string list, environment.Text("SLURM_NODELIST"));
    const auto hosts = ExpandHosts(list);
    if (!hosts) {
      return Status(Code::kFailedPrecondition,
                    StrCat("--launcher slurm: SLURM_NODELIST=", list, ", must be hosts such as gpu[01-04],big1"));
    }
    place.leader = StrCat(hosts->front(), ":", kLeaderPort);
  } else {
    ASSIGN_OR_RETURN(place.rank, environment.Count("OMPI_COMM_WORLD_RANK", 0));
    ASSIGN_OR_RETURN(place.nodes, environment.Count("OMPI_COMM_WORLD_SIZE", 1));
  }
  if (place.rank >= place.nodes) {
    return Status(Code::kFailedPrecondition,
                  StrCat("--launcher ", launcher, ": this is node ", place.rank, " of ", place.nodes));
  }
  return place;
}

}  // namespace altiplano::cluster
