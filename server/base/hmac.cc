#include "server/base/hmac.h"

#include <algorithm>
#include <array>

namespace altiplano {

Sha256Digest HmacSha256(std::string_view key, std::string_view message) {
  std::array<uint8_t, 64> block{};  // the key, or the digest of one that is longer
  if (key.size() > block.size()) {
    Sha256 sha;
    sha.Update(key.data(), key.size());
    const Sha256Digest digest = sha.Finish();
    std::copy(digest.begin(), digest.end(), block.begin());
  } else {
    std::copy(key.begin(), key.end(), block.begin());
  }
  const auto hash = [&](uint8_t pad, const void* data, size_t size) {
    std::array<uint8_t, 64> padded = block;
    for (uint8_t& byte : padded) byte ^= pad;
    Sha256 sha;
    sha.Update(padded.data(), padded.size());
    sha.Update(data, size);
    return sha.Finish();
  };
  const Sha256Digest inner = hash(0x36, message.data(), message.size());
  return hash(0x5c, inner.data(), inner.size());
}

bool EqualInConstantTime(std::string_view a, std::string_view b) {
  if (a.size() != b.size()) return false;
  unsigned difference = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    difference |= static_cast<unsigned char>(a[i]) ^ static_cast<unsigned char>(b[i]);
  }
  return difference == 0;
}

}  // namespace altiplano
