// A JSON cursor for one purpose: tokenizer.json holds half a million strings, and a document tree of them takes
// seconds. The caller walks the two big members with it and gives the small rest to base/json.h.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "server/base/status.h"

namespace altiplano {

// Reads forward over `text`, which must be valid UTF-8 and outlive it; a byte order mark is skipped, as base/json.h
// does. Functions return false on malformed input; the first error stays in status(), with its byte offset.
class JsonCursor {
 public:
  explicit JsonCursor(std::string_view text) : text_(text), at_(text.starts_with("\xEF\xBB\xBF") ? 3 : 0) {}

  // Consumes `c` if it is next after white space; without it, no error.
  bool Accept(char c);
  bool Expect(char c);
  bool ReadString(std::string_view* out);  // valid until the next ReadString; no copy when nothing is escaped
  bool ReadInteger(int64_t* out);          // an integer number that fits
  bool SkipValue(std::string_view* span);  // any value; only brackets and strings are checked
  bool ExpectEnd();                        // nothing but white space is left

  // Visits the members of the object that starts here: member(key), at the value, must consume it.
  template <typename F>
  bool ReadObject(const F& member) {
    if (!Expect('{')) return false;
    if (Accept('}')) return true;
    do {
      std::string_view key;
      if (!ReadString(&key) || !Expect(':') || !member(key)) return false;
    } while (Accept(','));
    return Expect('}');
  }

  template <typename F>
  bool ReadArray(const F& element) {
    if (!Expect('[')) return false;
    if (Accept(']')) return true;
    do {
      if (!element()) return false;
    } while (Accept(','));
    return Expect(']');
  }

  size_t offset() const { return at_; }
  const Status& status() const { return status_; }
  bool Fail(std::string_view what);  // sets the error, unless there is one; false

 private:
  void SkipSpace();
  bool AppendEscape();  // at_ is behind the backslash
  bool ReadHex4(uint32_t* code_unit);

  std::string_view text_;
  size_t at_;
  std::string unescaped_;
  Status status_;
};

}  // namespace altiplano
