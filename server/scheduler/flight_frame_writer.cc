#include "server/scheduler/flight_frame_writer.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace altiplano {

void FlightFrameWriter::Grow(size_t more) {
  buffer_.resize(std::max(2 * buffer_.size(), size_ + more));
}

void FlightFrameWriter::Begin(FlightKind kind) {
  size_ = 0;
  Room(1);
  buffer_[size_++] = static_cast<uint8_t>(kind);
}

void FlightFrameWriter::Real(double value) {
  const auto bits = std::bit_cast<uint64_t>(value);
  uint8_t bytes[sizeof bits];
  for (size_t i = 0; i < sizeof bits; ++i) bytes[i] = static_cast<uint8_t>(bits >> (8 * i));
  Bytes(bytes, sizeof bytes);
}

void FlightFrameWriter::Bytes(const void* data, size_t size) {
  Room(size);
  if (size > 0) std::memcpy(buffer_.data() + size_, data, size);
  size_ += size;
}

}  // namespace altiplano
