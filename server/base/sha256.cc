#include "server/base/sha256.h"

#include <algorithm>
#include <bit>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

#include "server/base/check.h"

namespace altiplano {

namespace {

// FIPS 180-4 4.2.2: the fractional parts of the cube roots of the first 64 primes.
constexpr std::array<uint32_t, 64> kRound = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

uint32_t LoadBigEndian(const uint8_t* p) {
  return uint32_t{p[0]} << 24 | uint32_t{p[1]} << 16 | uint32_t{p[2]} << 8 | uint32_t{p[3]};
}

void Compress(internal::Sha256State& state, const uint8_t* data, size_t blocks) {
  static const bool native = internal::HasShaInstructions();
  if (native) {
    internal::Sha256CompressNative(state, data, blocks);
  } else {
    internal::Sha256CompressPortable(state, data, blocks);
  }
}

}  // namespace

namespace internal {

void Sha256CompressPortable(Sha256State& state, const uint8_t* data, size_t blocks) {
  for (; blocks > 0; --blocks, data += 64) {
    std::array<uint32_t, 64> w;
    for (size_t t = 0; t < 16; ++t) w[t] = LoadBigEndian(data + 4 * t);
    for (size_t t = 16; t < 64; ++t) {
      uint32_t s0 = std::rotr(w[t - 15], 7) ^ std::rotr(w[t - 15], 18) ^ (w[t - 15] >> 3);
      uint32_t s1 = std::rotr(w[t - 2], 17) ^ std::rotr(w[t - 2], 19) ^ (w[t - 2] >> 10);
      w[t] = w[t - 16] + s0 + w[t - 7] + s1;
    }
    auto [a, b, c, d, e, f, g, h] = state;
    for (size_t t = 0; t < 64; ++t) {
      uint32_t s1 = std::rotr(e, 6) ^ std::rotr(e, 11) ^ std::rotr(e, 25);
      uint32_t t1 = h + s1 + ((e & f) ^ (~e & g)) + kRound[t] + w[t];
      uint32_t s0 = std::rotr(a, 2) ^ std::rotr(a, 13) ^ std::rotr(a, 22);
      uint32_t t2 = s0 + ((a & b) ^ (a & c) ^ (b & c));
      h = g, g = f, f = e, e = d + t1, d = c, c = b, b = a, a = t1 + t2;
    }
    const std::array<uint32_t, 8> add = {a, b, c, d, e, f, g, h};
    for (size_t i = 0; i < 8; ++i) state[i] += add[i];
  }
}

#if defined(__x86_64__)

bool HasShaInstructions() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (b & (1u << 29)) == 0) return false;     // SHA
  return __get_cpuid(1, &a, &b, &c, &d) && (c & (1u << 19)) != 0 && (c & (1u << 9)) != 0;  // SSE4.1, SSSE3
}

// The instructions keep the state as (A, B, E, F) and (C, D, G, H), highest lane first, and do two rounds at a time;
// the schedule is kept as a ring of four vectors of four words. Intel SDM volume 2, SHA256RNDS2 / MSG1 / MSG2.
[[gnu::target("sha,sse4.1,ssse3")]] void Sha256CompressNative(Sha256State& state, const uint8_t* data, size_t blocks) {
  const __m128i swap = _mm_set_epi64x(0x0c0d0e0f08090a0bLL, 0x0405060700010203LL);
  __m128i abef = _mm_set_epi32(static_cast<int>(state[0]), static_cast<int>(state[1]), static_cast<int>(state[4]),
                               static_cast<int>(state[5]));
  __m128i cdgh = _mm_set_epi32(static_cast<int>(state[2]), static_cast<int>(state[3]), static_cast<int>(state[6]),
                               static_cast<int>(state[7]));
  for (; blocks > 0; --blocks, data += 64) {
    const __m128i abef_before = abef, cdgh_before = cdgh;
    __m128i w[4];
    for (int i = 0; i < 4; ++i) {
      w[i] = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(data) + i), swap);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      const __m128i words = w[i % 4];
      const __m128i k = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kRound.data()) + i);
      const __m128i sum = _mm_add_epi32(words, k);
      cdgh = _mm_sha256rnds2_epu32(cdgh, abef, sum);
      abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(sum, 0x0e));
      if (i < 12) {  // words 16 + 4i ... 19 + 4i take the place of the four just used
        const __m128i w7 = _mm_alignr_epi8(w[(i + 3) % 4], w[(i + 2) % 4], 4);
        const __m128i partial = _mm_add_epi32(_mm_sha256msg1_epu32(words, w[(i + 1) % 4]), w7);
        w[i % 4] = _mm_sha256msg2_epu32(partial, w[(i + 3) % 4]);
      }
    }
    abef = _mm_add_epi32(abef, abef_before);
    cdgh = _mm_add_epi32(cdgh, cdgh_before);
  }
  alignas(16) std::array<uint32_t, 4> x, y;
  _mm_store_si128(reinterpret_cast<__m128i*>(x.data()), abef);
  _mm_store_si128(reinterpret_cast<__m128i*>(y.data()), cdgh);
  state = {x[3], x[2], y[3], y[2], x[1], x[0], y[1], y[0]};
}

#else

bool HasShaInstructions() {
  return false;
}
void Sha256CompressNative(Sha256State&, const uint8_t*, size_t) {
  CHECK(false);
}

#endif

}  // namespace internal

// FIPS 180-4 5.3.3.
Sha256::Sha256()
    : state_{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19} {}

void Sha256::Update(const void* data, size_t size) {
  const auto* bytes = static_cast<const uint8_t*>(data);
  const size_t waiting = size_ % 64;
  size_ += size;
  if (waiting > 0) {
    const size_t take = std::min(size, 64 - waiting);
    if (take > 0) std::memcpy(buffer_.data() + waiting, bytes, take);
    bytes += take, size -= take;
    if (waiting + take < 64) return;
    Compress(state_, buffer_.data(), 1);
  }
  if (size >= 64) Compress(state_, bytes, size / 64);
  bytes += size / 64 * 64;
  size %= 64;
  if (size > 0) std::memcpy(buffer_.data(), bytes, size);
}

Sha256Digest Sha256::Finish() {
  const uint64_t bits = size_ * 8;
  size_t at = size_ % 64;
  buffer_[at++] = 0x80;
  if (at > 56) {
    std::fill(buffer_.begin() + static_cast<ptrdiff_t>(at), buffer_.end(), uint8_t{0});
    Compress(state_, buffer_.data(), 1);
    at = 0;
  }
  std::fill(buffer_.begin() + static_cast<ptrdiff_t>(at), buffer_.begin() + 56, uint8_t{0});
  for (size_t i = 0; i < 8; ++i) buffer_[56 + i] = static_cast<uint8_t>(bits >> (56 - 8 * i));
  Compress(state_, buffer_.data(), 1);
  Sha256Digest digest;
  for (size_t i = 0; i < 32; ++i) digest[i] = static_cast<uint8_t>(state_[i / 4] >> (24 - 8 * (i % 4)));
  return digest;
}

}  // namespace altiplano
