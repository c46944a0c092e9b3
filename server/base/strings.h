// StrCat and friends: readable messages without iostreams. GCC 12 has no std::format, and base must not need libfmt.
#pragma once

#include <charconv>
#include <concepts>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace altiplano {

namespace internal {
inline void Append(std::string& out, std::string_view s) {
  out.append(s);
}
inline void Append(std::string& out, const char* s) {
  out.append(s);
}
inline void Append(std::string& out, const std::string& s) {
  out.append(s);
}
inline void Append(std::string& out, char c) {
  out.push_back(c);
}
inline void Append(std::string& out, bool b) {
  out.append(b ? "true" : "false");
}
template <std::integral T>
void Append(std::string& out, T value) {
  char buffer[24];
  auto end = std::to_chars(buffer, buffer + sizeof buffer, value).ptr;
  out.append(buffer, end);
}
template <std::floating_point T>
void Append(std::string& out, T value) {  // shortest text that reads back as the same value
  char buffer[64];
  auto end = std::to_chars(buffer, buffer + sizeof buffer, value).ptr;
  out.append(buffer, end);
}
}  // namespace internal

template <typename... Args>
std::string StrCat(const Args&... args) {
  std::string out;
  (internal::Append(out, args), ...);
  return out;
}

// printf into a string, for columns and fixed decimals.
[[gnu::format(printf, 1, 2)]] std::string StrFormat(const char* format, ...);

// 1536 -> "1.50 KiB", 16060522496 -> "14.96 GiB".
std::string HumanBytes(uint64_t bytes);

// Two lower-case digits for each byte.
std::string Hex(std::span<const uint8_t> bytes);

// True when every byte sequence of `text` is well-formed UTF-8 (no surrogates, no overlong forms).
bool IsValidUtf8(std::string_view text);

// For a message, the beginning of a text that may hold anything: up to `bytes`, and "..." where there is more; whole
// code points, with control characters and what is no UTF-8 as \xNN.
std::string Excerpt(std::string_view text, size_t bytes);

// The candidate nearest to `word` by edit distance, or "" when none is near enough to be worth suggesting.
template <typename Range>
std::string_view Nearest(std::string_view word, const Range& candidates);

size_t EditDistance(std::string_view a, std::string_view b);

template <typename Range>
std::string_view Nearest(std::string_view word, const Range& candidates) {
  std::string_view best;
  size_t best_distance = word.size() / 3 + 2;  // exclusive bound: short words must be close
  for (std::string_view candidate : candidates) {
    size_t distance = EditDistance(word, candidate);
    if (distance < best_distance) best = candidate, best_distance = distance;
  }
  return best;
}

}  // namespace altiplano
