// What the text layer knows of Unicode: the three character classes that pre-tokenizers split by, and strict UTF-8.
// Pure functions over committed tables (Unicode 17.0, made by make_unicode_tables.py); any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace altiplano {

// \p{L}, \p{N} and \s (White_Space) are disjoint; all else, unassigned code points included, is kOther.
enum class CharClass : uint8_t { kOther, kLetter, kNumber, kSpace };

namespace internal {
#include "server/text/unicode_tables.inc"
}  // namespace internal

constexpr CharClass ClassOf(char32_t code_point) {
  const uint32_t block = code_point >> 8;
  if (block >= sizeof internal::kUnicodeBlockIndex) return CharClass::kOther;
  const uint64_t word = internal::kUnicodeBlocks[internal::kUnicodeBlockIndex[block] * 8 + ((code_point & 255) >> 5)];
  return static_cast<CharClass>(word >> ((code_point & 31) * 2) & 3);
}

struct Utf8Char {
  enum Kind : uint8_t {
    kValid,
    kInvalid,   // no continuation can make it valid
    kTruncated  // the text ends inside what could still become valid
  };
  Kind kind;
  uint8_t length;       // bytes: the code point's, or those of the maximal bad subpart (Unicode 15, section 3.9); 1..4
  char32_t code_point;  // when valid
};

// The first code point of `text`, which is not empty.
inline Utf8Char DecodeUtf8(std::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<uint8_t>(text[i]); };
  const uint8_t lead = byte(0);
  if (lead < 0x80) return {Utf8Char::kValid, 1, lead};
  if (lead < 0xC2 || lead > 0xF4) return {Utf8Char::kInvalid, 1, 0};
  const uint8_t length = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
  // The second byte's range is what excludes overlong forms, surrogates and values past U+10FFFF (Unicode table 3-7).
  const uint8_t low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
  const uint8_t high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
  char32_t code_point = lead & (0x7F >> length);
  for (uint8_t i = 1; i < length; ++i) {
    if (i == text.size()) return {Utf8Char::kTruncated, i, 0};
    if (byte(i) < (i == 1 ? low : 0x80) || byte(i) > (i == 1 ? high : 0xBF)) return {Utf8Char::kInvalid, i, 0};
    code_point = code_point << 6 | (byte(i) & 0x3F);
  }
  return {Utf8Char::kValid, length, code_point};
}

}  // namespace altiplano
