#include "server/text/tokenizer_json.h"

#include <charconv>

#include "server/base/json.h"
#include "server/base/strings.h"

namespace altiplano {

bool JsonCursor::Fail(std::string_view what) {
  if (status_.ok()) status_ = Status(Code::kInvalidArgument, StrCat("not valid JSON: ", what, " (byte ", at_, ")"));
  return false;
}

void JsonCursor::SkipSpace() {
  while (at_ < text_.size()) {
    const char c = text_[at_];
    if (c != ' ' && c != '\n' && c != '\t' && c != '\r') break;
    ++at_;
  }
}

bool JsonCursor::Accept(char c) {
  SkipSpace();
  if (at_ == text_.size() || text_[at_] != c) return false;
  ++at_;
  return true;
}

bool JsonCursor::Expect(char c) {
  if (Accept(c)) return true;
  if (at_ == text_.size()) return Fail(StrCat("the text ends where '", c, "' should be"));
  return Fail(StrCat("'", c, "' expected"));
}

bool JsonCursor::ExpectEnd() {
  SkipSpace();
  return at_ == text_.size() || Fail("text after the end");
}

bool JsonCursor::ReadString(std::string_view* out) {
  if (!Expect('"')) return false;
  const size_t begin = at_;
  bool escaped = false;
  for (size_t run = at_; at_ < text_.size();) {
    const char c = text_[at_];
    if (c == '"') {
      if (escaped) unescaped_.append(text_, run, at_ - run);
      *out = escaped ? std::string_view(unescaped_) : text_.substr(begin, at_ - begin);
      ++at_;
      return true;
    }
    if (static_cast<uint8_t>(c) < 0x20) return Fail("control character in a string");
    if (c != '\\') {
      ++at_;
      continue;
    }
    if (!escaped) unescaped_.clear();
    escaped = true;
    unescaped_.append(text_, run, at_ - run);
    ++at_;
    if (!AppendEscape()) return false;
    run = at_;
  }
  return Fail("the text ends inside a string");
}

bool JsonCursor::ReadHex4(uint32_t* code_unit) {
  const char* begin = text_.data() + at_;
  if (text_.size() - at_ < 4) return Fail("the text ends inside a string");
  const auto [end, error] = std::from_chars(begin, begin + 4, *code_unit, 16);
  if (error != std::errc() || end != begin + 4) return Fail("four hexadecimal digits expected");
  at_ += 4;
  return true;
}

bool JsonCursor::AppendEscape() {
  if (at_ == text_.size()) return Fail("the text ends inside a string");
  const char c = text_[at_++];
  constexpr std::string_view kNames = "\"\\/bfnrt", kValues = "\"\\/\b\f\n\r\t";
  if (const size_t i = kNames.find(c); i != std::string_view::npos) {
    unescaped_ += kValues[i];
    return true;
  }
  if (c != 'u') return Fail("unknown escape in a string");
  uint32_t code = 0, low = 0;
  if (!ReadHex4(&code)) return false;
  if (code >= 0xD800 && code < 0xE000) {
    if (code >= 0xDC00 || text_.substr(at_, 2) != "\\u") return Fail("half a surrogate pair");
    at_ += 2;
    if (!ReadHex4(&low)) return false;
    if (low < 0xDC00 || low >= 0xE000) return Fail("half a surrogate pair");
    code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
  }
  const auto append = [&](uint32_t byte) { unescaped_ += static_cast<char>(byte); };
  if (code < 0x80) {
    append(code);
  } else if (code < 0x800) {
    append(0xC0 | code >> 6), append(0x80 | (code & 63));
  } else if (code < 0x10000) {
    append(0xE0 | code >> 12), append(0x80 | (code >> 6 & 63)), append(0x80 | (code & 63));
  } else {
    append(0xF0 | code >> 18), append(0x80 | (code >> 12 & 63)), append(0x80 | (code >> 6 & 63)),
        append(0x80 | (code & 63));
  }
  return true;
}

bool JsonCursor::ReadInteger(int64_t* out) {
  SkipSpace();
  const char* begin = text_.data() + at_;
  const char* limit = text_.data() + text_.size();
  const auto [end, error] = std::from_chars(begin, limit, *out);
  if (error == std::errc::result_out_of_range) return Fail("number too large");
  if (error != std::errc() || (end < limit && (*end == '.' || *end == 'e' || *end == 'E'))) {
    return Fail("an integer expected");
  }
  at_ += static_cast<size_t>(end - begin);
  return true;
}

bool JsonCursor::SkipValue(std::string_view* span) {
  SkipSpace();
  const size_t begin = at_;
  std::string closers;  // the brackets still open
  do {
    SkipSpace();
    if (at_ == text_.size()) return Fail("the text ends inside a value");
    const char c = text_[at_];
    if (c == '"') {
      std::string_view ignored;
      if (!ReadString(&ignored)) return false;
      continue;
    }
    if (c == '{' || c == '[') {
      closers += c == '{' ? '}' : ']';
      if (closers.size() > static_cast<size_t>(kMaxJsonDepth))
        return Fail(StrCat("nested deeper than ", kMaxJsonDepth, " levels"));
    } else if (c == '}' || c == ']') {
      if (closers.empty() || closers.back() != c) return Fail("unbalanced bracket");
      closers.pop_back();
    } else if (closers.empty()) {  // a bare literal
      const size_t end = std::min(text_.find_first_of(",]} \t\r\n", at_), text_.size());
      if (end == at_) return Fail("a value expected");
      at_ = end;
      break;
    }
    ++at_;
  } while (!closers.empty());
  *span = text_.substr(begin, at_ - begin);
  return true;
}

}  // namespace altiplano
