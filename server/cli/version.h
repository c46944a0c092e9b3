// What this program calls itself. A test holds kVersion to CMakeLists.txt.
#pragma once

namespace altiplano::cli {

inline constexpr const char* kVersion = "0.1.0";
extern const char* const kCommit;  // "-dirty" behind it when there were changes; cmake/commit.cmake

}  // namespace altiplano::cli
