// What this program calls itself. A test holds kVersion to CMakeLists.txt.
#pragma once

namespace altiplano::cli {

inline constexpr const char* kVersion = "0.1.0";
#ifdef ALTIPLANO_COMMIT
inline constexpr const char* kCommit = ALTIPLANO_COMMIT;
#else
inline constexpr const char* kCommit = "unknown";
#endif

}  // namespace altiplano::cli
