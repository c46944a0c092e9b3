// SHA-256 (FIPS 180-4), with the CPU's SHA instructions where it has them.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace altiplano {

using Sha256Digest = std::array<uint8_t, 32>;

class Sha256 {
 public:
  Sha256();
  void Update(const void* data, size_t size);
  // The digest of everything given to Update. The object is spent afterwards.
  Sha256Digest Finish();

 private:
  std::array<uint32_t, 8> state_;
  std::array<uint8_t, 64> buffer_;
  uint64_t size_ = 0;  // bytes so far; size_ % 64 of them wait in buffer_
};

namespace internal {
using Sha256State = std::array<uint32_t, 8>;
// Both fold `blocks` blocks of 64 bytes into the state; exposed so that a test can hold them against each other.
void Sha256CompressPortable(Sha256State& state, const uint8_t* data, size_t blocks);
bool HasShaInstructions();
void Sha256CompressNative(Sha256State& state, const uint8_t* data, size_t blocks);  // only if HasShaInstructions()
}  // namespace internal

}  // namespace altiplano
