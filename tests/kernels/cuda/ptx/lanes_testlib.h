// How a lane's part of a register is found.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace altiplano::ptx_machine {

template <typename T>
T Get(const std::byte* registers, uint32_t at, uint32_t lane) {
  if constexpr (std::is_same_v<T, bool>) {
    uint32_t lanes;
    std::memcpy(&lanes, registers + at, sizeof lanes);
    return (lanes >> lane & 1) != 0;
  } else {
    T value;
    std::memcpy(&value, registers + at + lane * (sizeof(T) == 8 ? 8 : 4), sizeof value);
    return value;
  }
}

template <typename T>
void Put(std::byte* registers, uint32_t at, uint32_t lane, T value) {
  if constexpr (std::is_same_v<T, bool>) {
    uint32_t lanes;
    std::memcpy(&lanes, registers + at, sizeof lanes);
    lanes = (lanes & ~(uint32_t{1} << lane)) | uint32_t{value} << lane;
    std::memcpy(registers + at, &lanes, sizeof lanes);
  } else if constexpr (sizeof(T) < 4) {  // the upper part is nobody's
    const auto whole = static_cast<uint32_t>(static_cast<std::make_unsigned_t<T>>(value));
    std::memcpy(registers + at + lane * 4, &whole, sizeof whole);
  } else {
    std::memcpy(registers + at + lane * sizeof(T), &value, sizeof value);
  }
}

// Of a register of 4 bytes, or of a wide one of 8.
inline uint64_t GetBits(const std::byte* registers, uint32_t at, uint32_t lane, bool wide) {
  return wide ? Get<uint64_t>(registers, at, lane) : Get<uint32_t>(registers, at, lane);
}
inline void PutBits(std::byte* registers, uint32_t at, uint32_t lane, bool wide, uint64_t bits) {
  if (wide) {
    Put(registers, at, lane, bits);
  } else {
    Put(registers, at, lane, static_cast<uint32_t>(bits));
  }
}

template <typename Fn>
void ForLanes(uint32_t lanes, Fn fn) {
  for (; lanes != 0; lanes &= lanes - 1) fn(static_cast<uint32_t>(__builtin_ctz(lanes)));
}

}  // namespace altiplano::ptx_machine
