// Stop strings and a text in chunks, against the definition searched for byte by byte.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "server/base/check.h"
#include "server/text/stop_matcher.h"

namespace altiplano {
namespace {

// Fields are cut at NUL: 'i' or anything else (whether the match is part of the output), the stops, an empty field,
// then the chunks.
struct Case {
  bool include_match = false;
  std::vector<std::string> stops, chunks;
};

Case Build(std::string_view input) {
  Case made;
  std::vector<std::string>* fields = &made.stops;
  for (bool first = true; !input.empty(); first = false) {
    const size_t end = std::min(input.find('\0'), input.size());
    const std::string field(input.substr(0, end));
    input.remove_prefix(std::min(end + 1, input.size()));
    if (first) {
      made.include_match = field == "i";
    } else if (field.empty() && fields == &made.stops) {
      fields = &made.chunks;
    } else {
      fields->push_back(field);
    }
  }
  return made;
}

// The longest of the stops that `text` ends with, the first of equals; -1: none.
int StopAtEnd(const std::vector<std::string>& stops, std::string_view text) {
  int best = -1;
  for (size_t i = 0; i < stops.size(); ++i) {
    if (stops[i].empty() || !text.ends_with(stops[i])) continue;
    if (best < 0 || stops[i].size() > stops[static_cast<size_t>(best)].size()) best = static_cast<int>(i);
  }
  return best;
}

// The length of the longest end of `text` that begins a stop: what must be held back, and no more.
size_t Undecided(const std::vector<std::string>& stops, std::string_view text) {
  size_t held = 0;
  for (const std::string& stop : stops) {
    for (size_t n = std::min(stop.size(), text.size()); n > held; --n) {
      if (std::string_view(stop).starts_with(text.substr(text.size() - n))) held = n;
    }
  }
  return held;
}

void Run(const Case& c) {
  StopMatcher matcher(c.stops, c.include_match);
  std::string seen, out;
  int expected = -1;
  for (const std::string& chunk : c.chunks) {
    for (const char byte : chunk) {
      if (expected >= 0) break;
      seen.push_back(byte);
      expected = StopAtEnd(c.stops, seen);
    }
    out += matcher.Push(chunk);
    CHECK(matcher.matched() == expected);
    if (expected < 0) CHECK(out == seen.substr(0, seen.size() - Undecided(c.stops, seen)));
  }
  out += matcher.Flush();
  CHECK(matcher.matched() == expected);
  const bool cut = expected >= 0 && !c.include_match;
  CHECK(out == seen.substr(0, seen.size() - (cut ? c.stops[static_cast<size_t>(expected)].size() : 0)));
  CHECK(matcher.Flush().empty());
}

}  // namespace
}  // namespace altiplano

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size > 1024) return 0;  // the definition is searched for in cubic time
  altiplano::Run(altiplano::Build(std::string_view(reinterpret_cast<const char*>(data), size)));
  return 0;
}
