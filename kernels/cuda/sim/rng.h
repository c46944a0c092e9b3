// The simulator's whims: a small generator, so that a launch replays from its seed.
#pragma once

#include <cstdint>

namespace altiplano::sim {

class Rng {
 public:
  explicit Rng(uint64_t seed = 1) : state_(seed * 0x9E3779B97F4A7C15 + 0xD1B54A32D192ED03) {}

  uint32_t operator()() {  // xorshift64*
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return static_cast<uint32_t>((state_ * 0x2545F4914F6CDD1D) >> 32);
  }
  uint32_t Below(uint32_t n) { return static_cast<uint32_t>((uint64_t{(*this)()} * n) >> 32); }

 private:
  uint64_t state_;
};

}  // namespace altiplano::sim
