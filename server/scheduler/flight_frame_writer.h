// FlightFrameWriter: one frame of a flight record while it is written, and its numbers (flight_record.h).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "server/base/clock.h"
#include "server/scheduler/flight_record.h"

namespace altiplano {

inline constexpr size_t kMostNumberBytes = 10;

inline uint8_t* PutNumber(uint64_t value, uint8_t* at) {
  for (; value >= 0x80; value >>= 7) *at++ = static_cast<uint8_t>(value | 0x80);
  *at++ = static_cast<uint8_t>(value);
  return at;
}
inline uint64_t ZigZag(int64_t value) {
  return (static_cast<uint64_t>(value) << 1) ^ static_cast<uint64_t>(value >> 63);
}

// Appends numbers to a buffer that keeps its memory.
class FlightFrameWriter {
 public:
  void Begin(FlightKind kind);
  void Number(uint64_t value) {
    Room(kMostNumberBytes);
    End(PutNumber(value, End()));
  }
  void Signed(int64_t value) { Number(ZigZag(value)); }
  void Time(TimePoint time) { Signed(time.time_since_epoch().count()); }
  void Real(double value);
  void Bytes(const void* data, size_t size);
  void Text(std::string_view text) {
    Number(text.size());
    Bytes(text.data(), text.size());
  }
  void Room(size_t more) {  // behind End(), for whoever writes there
    if (buffer_.size() - size_ < more) Grow(more);
  }
  bool HasRoom(size_t more) const { return buffer_.size() - size_ >= more; }  // without asking for memory
  uint8_t* End() { return buffer_.data() + size_; }
  void End(const uint8_t* at) { size_ = static_cast<size_t>(at - buffer_.data()); }
  std::span<const uint8_t> bytes() const { return {buffer_.data(), size_}; }
  bool empty() const { return size_ == 0; }
  void Clear() { size_ = 0; }

 private:
  void Grow(size_t more);

  std::vector<uint8_t> buffer_;
  size_t size_ = 0;
};

}  // namespace altiplano
