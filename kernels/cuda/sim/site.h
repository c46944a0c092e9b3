// Where in a kernel's source something was called. Not std::source_location, which clang 14 lacks.
#pragma once

#include <string>
#include <string_view>

namespace altiplano::sim {

struct Site {
  const char* file = "";
  int line = 0;

  static constexpr Site Current(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
  bool operator==(const Site& other) const { return line == other.line && std::string_view(file) == other.file; }
};

std::string ToString(const Site& site);  // "rms_norm.cu:30"

}  // namespace altiplano::sim
