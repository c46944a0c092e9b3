// For a caller that broke a contract of this folder: says so and ends the process.
#pragma once

#include <cstdio>
#include <cstdlib>

namespace altiplano {

[[noreturn]] inline void Die(const char* sentence) {
  std::fprintf(stderr, "%s\n", sentence);
  std::abort();
}

}  // namespace altiplano
