// Philox4x32-10: a random function of (key, counter), the same on every device. Nothing is stored between draws.
// Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3 (SC11), section 3.3 and table 2.
#pragma once

#include <array>
#include <cstdint>

namespace altiplano {

using PhiloxWords = std::array<uint32_t, 4>;

constexpr PhiloxWords Philox4x32_10(PhiloxWords counter, uint64_t key) {
  uint32_t key0 = static_cast<uint32_t>(key), key1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * counter[0];
    const uint64_t b = uint64_t{0xCD9E8D57} * counter[2];
    counter = {static_cast<uint32_t>(b >> 32) ^ counter[1] ^ key0, static_cast<uint32_t>(b),
               static_cast<uint32_t>(a >> 32) ^ counter[3] ^ key1, static_cast<uint32_t>(a)};
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  return counter;
}

// The 64 uniform bits of a draw: counter words (position low, position high, sequence, 0); words 1 and 0 of the result,
// the former on top.
constexpr uint64_t SampleBits(uint64_t seed, int64_t position, uint32_t sequence) {
  const uint64_t p = static_cast<uint64_t>(position);
  const PhiloxWords words =
      Philox4x32_10({static_cast<uint32_t>(p), static_cast<uint32_t>(p >> 32), sequence, 0}, seed);
  return uint64_t{words[1]} << 32 | words[0];
}

}  // namespace altiplano
