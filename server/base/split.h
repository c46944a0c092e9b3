// Split: a text at its separators.
#pragma once

#include <algorithm>
#include <string_view>
#include <vector>

namespace altiplano {

// What lies before, between and behind the separators, empty parts too: "a,,b," has four. An empty text has none.
inline std::vector<std::string_view> Split(std::string_view text, char separator) {
  std::vector<std::string_view> parts;
  for (size_t begin = 0; !text.empty() && begin <= text.size();) {
    const size_t end = std::min(text.find(separator, begin), text.size());
    parts.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

}  // namespace altiplano
