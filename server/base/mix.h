// The finaliser of splitmix64 (Steele, Lea and Flood, 2014): neighbouring inputs give unrelated outputs.
#pragma once

#include <cstdint>

namespace altiplano {

inline uint64_t Mix(uint64_t x) {
  x += 0x9E3779B97F4A7C15;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
  return x ^ (x >> 31);
}

}  // namespace altiplano
