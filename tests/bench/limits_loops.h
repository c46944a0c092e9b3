// The loops behind tests/bench/limits.h for one instruction set; included by limits_*.cc only, each of which gets its
// own copy: the namespace is anonymous on purpose.
#pragma once

#include <cstddef>
#include <cstdint>

namespace altiplano::bench {
namespace {

// V: kBytes, Load(p), Or(a, b), Fold(v), Stream(p, v).
// kStreams: parts of the memory read in turn, as hardware prefetchers follow several runs at a time.
// kAhead: bytes ahead to prefetch, 0: leave it to the hardware.
template <class V, int kStreams, int kAhead>
float ReadLoop(const void* from, size_t bytes) {
  const char* p = static_cast<const char*>(from);
  constexpr size_t kUnroll = 4;
  const size_t part = bytes / kStreams / (kUnroll * V::kBytes) * (kUnroll * V::kBytes);
  typename V::Bits all[kUnroll];
  for (auto& bits : all) bits = V::Load(p);
  for (size_t i = 0; i < part; i += kUnroll * V::kBytes) {
#pragma GCC unroll 8
    for (int stream = 0; stream < kStreams; ++stream) {
      const char* at = p + static_cast<size_t>(stream) * part + i;
      if constexpr (kAhead > 0) {
#pragma GCC unroll 4
        for (size_t line = 0; line < kUnroll * V::kBytes; line += 64) __builtin_prefetch(at + kAhead + line, 0, 3);
      }
#pragma GCC unroll 4
      for (size_t j = 0; j < kUnroll; ++j) all[j] = V::Or(all[j], V::Load(at + j * V::kBytes));
    }
  }
  return V::Fold(V::Or(V::Or(all[0], all[1]), V::Or(all[2], all[3])));
}

// kStream: stores that bypass the caches, so that what is written is not read first.
template <class V, bool kStream>
void CopyLoop(void* to, const void* from, size_t bytes) {
  char* out = static_cast<char*>(to);
  const char* in = static_cast<const char*>(from);
  for (size_t i = 0; i < bytes; i += 4 * V::kBytes) {
#pragma GCC unroll 4
    for (size_t j = 0; j < 4; ++j) {
      const auto bits = V::Load(in + i + j * V::kBytes);
      if constexpr (kStream) {
        V::Stream(out + i + j * V::kBytes, bits);
      } else {
        V::Store(out + i + j * V::kBytes, bits);
      }
    }
  }
}

// Independent chains enough to hide the latency of one multiply-add, all in registers.
template <class M>
float MultiplyLoop(int64_t turns) {
  typename M::Acc acc[M::kChains];
  const typename M::X a = M::Operand(turns), b = M::Operand(turns + 1);
  for (auto& one : acc) one = M::Zero();
  for (int64_t turn = 0; turn < turns; ++turn) {
#pragma GCC unroll 32
    for (int i = 0; i < M::kChains; ++i) acc[i] = M::MultiplyAdd(acc[i], a, b);
  }
  float sum = 0;
  for (auto& one : acc) sum += M::First(one);
  return sum;
}

}  // namespace
}  // namespace altiplano::bench
