#include "server/text/tool_calls_python.h"

#include <charconv>
#include <cmath>
#include <set>

#include "server/base/strings.h"

namespace altiplano {

namespace {

bool IsDigit(char c) {
  return c >= '0' && c <= '9';
}
bool IsNameStart(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_';
}

void AppendUtf8(char32_t c, std::string* out) {
  const auto put = [out](char32_t byte) { out->push_back(static_cast<char>(byte)); };
  if (c < 0x80) return put(c);
  if (c < 0x800) return put(0xC0 | c >> 6), put(0x80 | (c & 0x3F));
  if (c < 0x10000) return put(0xE0 | c >> 12), put(0x80 | (c >> 6 & 0x3F)), put(0x80 | (c & 0x3F));
  put(0xF0 | c >> 18), put(0x80 | (c >> 12 & 0x3F)), put(0x80 | (c >> 6 & 0x3F)), put(0x80 | (c & 0x3F));
}

// Predictive: each function decides by the next byte and consumes what it accepts. False is final.
class Parser {
 public:
  explicit Parser(std::string_view text) : text_(text) {}

  bool CallList(std::vector<PythonCall>* calls) {
    if (!Accept('[')) return false;
    do {
      if (!calls->empty() && Accept(']')) return AtEnd();  // a comma before the bracket
      if (!Call(&calls->emplace_back())) return false;
    } while (Accept(','));
    return Accept(']') && AtEnd();
  }

  bool BuiltinCall(PythonCall* call) {
    constexpr std::string_view kMethod = ".call";
    if (!DottedName(&call->name) || !call->name.ends_with(kMethod)) return false;
    call->name.resize(call->name.size() - kMethod.size());
    return !call->name.empty() && Arguments(&call->arguments) && AtEnd();
  }

 private:
  void SkipSpace() {
    while (at_ < text_.size() &&
           (text_[at_] == ' ' || text_[at_] == '\t' || text_[at_] == '\n' || text_[at_] == '\r')) {
      ++at_;
    }
  }
  char Peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }
  bool Accept(char c) {
    SkipSpace();
    if (Peek() != c || at_ == text_.size()) return false;
    ++at_;
    return true;
  }
  bool AtEnd() {
    SkipSpace();
    return at_ == text_.size();
  }

  bool Name(std::string* name) {
    SkipSpace();
    if (!IsNameStart(Peek())) return false;
    while (IsNameStart(Peek()) || IsDigit(Peek())) name->push_back(text_[at_++]);
    return true;
  }

  bool DottedName(std::string* name) {
    if (!Name(name)) return false;
    while (Peek() == '.' || Peek() == '-') {
      name->push_back(text_[at_++]);
      if (!IsNameStart(Peek()) && !IsDigit(Peek())) return false;
      while (IsNameStart(Peek()) || IsDigit(Peek())) name->push_back(text_[at_++]);
    }
    return true;
  }

  bool Call(PythonCall* call) { return DottedName(&call->name) && Arguments(&call->arguments); }

  bool Arguments(PyValue* arguments) {
    arguments->kind = PyValue::Kind::kDict;
    std::set<std::string> seen;
    if (!Accept('(')) return false;
    if (Accept(')')) return true;
    do {
      if (!seen.empty() && Accept(')')) return true;
      std::string name;
      if (!Name(&name) || !seen.insert(name).second || !Accept('=')) return false;
      arguments->keys.push_back(std::move(name));
      if (!Value(&arguments->items.emplace_back(), 1)) return false;
    } while (Accept(','));
    return Accept(')');
  }

  // `depth`: containers around the value, the arguments' dict included.
  bool Value(PyValue* value, int depth) {
    SkipSpace();
    const char c = Peek();
    if (c == '\'' || c == '"') {
      value->kind = PyValue::Kind::kString;
      return String(&value->text);
    }
    if (c == '[') return depth < kMaxJsonDepth && List(value, depth);
    if (c == '{') return depth < kMaxJsonDepth && Dict(value, depth);
    if (IsNameStart(c)) return Constant(value);
    return Number(value);
  }

  bool List(PyValue* list, int depth) {
    list->kind = PyValue::Kind::kList;
    Accept('[');
    if (Accept(']')) return true;
    do {
      if (!list->items.empty() && Accept(']')) return true;
      if (!Value(&list->items.emplace_back(), depth + 1)) return false;
    } while (Accept(','));
    return Accept(']');
  }

  bool Dict(PyValue* dict, int depth) {
    dict->kind = PyValue::Kind::kDict;
    std::set<std::string> seen;
    Accept('{');
    if (Accept('}')) return true;
    do {
      if (!seen.empty() && Accept('}')) return true;
      SkipSpace();
      std::string key;  // JSON has no other keys
      if ((Peek() != '\'' && Peek() != '"') || !String(&key) || !seen.insert(key).second || !Accept(':')) return false;
      dict->keys.push_back(std::move(key));
      if (!Value(&dict->items.emplace_back(), depth + 1)) return false;
    } while (Accept(','));
    return Accept('}');
  }

  // Models also write JSON's words for the three constants.
  bool Constant(PyValue* value) {
    std::string word;
    Name(&word);
    if (word == "None" || word == "null") return true;
    value->kind = PyValue::Kind::kBool;
    value->boolean = word == "True" || word == "true";
    return value->boolean || word == "False" || word == "false";
  }

  bool Number(PyValue* value) {
    std::string digits;
    if (Accept('-')) {
      digits = "-";
    } else {
      Accept('+');
    }
    SkipSpace();
    const size_t begin = at_;
    bool is_float = false;
    while (IsDigit(Peek()) || Peek() == '.' || Peek() == 'e' || Peek() == 'E' ||
           ((Peek() == '+' || Peek() == '-') && at_ > begin && (text_[at_ - 1] == 'e' || text_[at_ - 1] == 'E'))) {
      is_float = is_float || !IsDigit(Peek());
      ++at_;
    }
    const std::string_view token = text_.substr(begin, at_ - begin);
    if (token.empty()) return false;
    if (!is_float) return Integer(token, std::move(digits), value);
    value->kind = PyValue::Kind::kFloat;
    const auto [end, error] = std::from_chars(token.data(), token.data() + token.size(), value->number);
    if (error != std::errc() || end != token.data() + token.size() || !std::isfinite(value->number)) return false;
    if (!digits.empty()) value->number = -value->number;
    return true;
  }

  static bool Integer(std::string_view token, std::string sign, PyValue* value) {
    value->kind = PyValue::Kind::kInt;
    const size_t nonzero = token.find_first_not_of('0');
    if (nonzero == std::string_view::npos) {  // "0", "00" and "-0" are all 0
      value->text = "0";
      return true;
    }
    if (nonzero > 0) return false;  // "007" is no Python
    double as_double = 0;           // JSON readers refuse what overflows it
    const auto [end, error] = std::from_chars(token.data(), token.data() + token.size(), as_double);
    if (error != std::errc() || end != token.data() + token.size()) return false;
    value->text = std::move(sign.append(token));
    return true;
  }

  bool String(std::string* out) {
    const char quote = text_[at_];
    const bool triple = text_.substr(at_).starts_with(std::string(3, quote));
    at_ += triple ? 3 : 1;
    for (;;) {
      if (at_ >= text_.size()) return false;
      const char c = text_[at_];
      if (c == quote && (!triple || text_.substr(at_).starts_with(std::string(3, quote)))) break;
      if (c == '\\') {
        if (!Escape(out)) return false;
        continue;
      }
      if (!triple && (c == '\n' || c == '\r')) return false;
      out->push_back(c);
      ++at_;
    }
    at_ += triple ? 3 : 1;
    return true;
  }

  bool Escape(std::string* out) {
    if (++at_ >= text_.size()) return false;
    const char c = text_[at_++];
    switch (c) {
      case '\n':
        return true;  // a continued line
      case '\\':
      case '\'':
      case '"':
        out->push_back(c);
        return true;
      case 'a':
        out->push_back('\a');
        return true;
      case 'b':
        out->push_back('\b');
        return true;
      case 'f':
        out->push_back('\f');
        return true;
      case 'n':
        out->push_back('\n');
        return true;
      case 'r':
        out->push_back('\r');
        return true;
      case 't':
        out->push_back('\t');
        return true;
      case 'v':
        out->push_back('\v');
        return true;
      case 'x':
        return CodePoint(2, out);
      case 'u':
        return CodePoint(4, out);
      case 'U':
        return CodePoint(8, out);
      case 'N':
        return false;  // by name
      default:
        break;
    }
    if (c < '0' || c > '7') {  // Python keeps the backslash of what is no escape
      out->push_back('\\');
      --at_;
      return true;
    }
    char32_t code = 0;
    --at_;
    for (int i = 0; i < 3 && Peek() >= '0' && Peek() <= '7'; ++i)
      code = code * 8 + static_cast<char32_t>(text_[at_++] - '0');
    AppendUtf8(code, out);
    return true;
  }

  bool Hex(int digits, char32_t* code) {
    if (text_.size() - at_ < static_cast<size_t>(digits)) return false;
    uint32_t value = 0;
    const char* begin = text_.data() + at_;
    const auto [end, error] = std::from_chars(begin, begin + digits, value, 16);
    if (error != std::errc() || end != begin + digits) return false;
    at_ += static_cast<size_t>(digits);
    *code = value;
    return true;
  }

  // Two escaped surrogates are one code point, as in JSON; one alone is no text.
  bool CodePoint(int digits, std::string* out) {
    char32_t code = 0;
    if (!Hex(digits, &code) || code > 0x10FFFF) return false;
    if (code >= 0xD800 && code < 0xDC00) {
      char32_t low = 0;
      if (!text_.substr(at_).starts_with("\\u")) return false;
      at_ += 2;
      if (!Hex(4, &low) || low < 0xDC00 || low > 0xDFFF) return false;
      code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
    } else if (code >= 0xDC00 && code <= 0xDFFF) {
      return false;
    }
    AppendUtf8(code, out);
    return true;
  }

  std::string_view text_;
  size_t at_ = 0;
};

}  // namespace

bool ParsePythonCallList(std::string_view text, std::vector<PythonCall>* calls) {
  return IsValidUtf8(text) && Parser(text).CallList(calls);
}

bool ParsePythonBuiltinCall(std::string_view text, PythonCall* call) {
  return IsValidUtf8(text) && Parser(text).BuiltinCall(call);
}

}  // namespace altiplano
