#include "server/text/python_json.h"

#include <algorithm>
#include <charconv>
#include <iterator>
#include <set>

#include "server/base/json.h"
#include "server/base/strings.h"
#include "server/text/unicode.h"

namespace altiplano {

namespace {

// Builds the value from nlohmann's events: its own tree would turn integers beyond 64 bits into doubles.
class Builder : public nlohmann::json_sax<Json> {
 public:
  Builder(int max_depth, PyValue* root) : max_depth_(max_depth), root_(root) {}
  const std::string& error() const { return error_; }

  bool null() override { return Put({}); }
  bool boolean(bool value) override {
    PyValue v;
    v.kind = PyValue::Kind::kBool;
    v.boolean = value;
    return Put(std::move(v));
  }
  bool number_integer(number_integer_t value) override { return PutInt(StrCat(value)); }
  bool number_unsigned(number_unsigned_t value) override { return PutInt(StrCat(value)); }
  bool number_float(number_float_t value, const string_t& digits) override {
    if (digits.find_first_of(".eE") == string_t::npos) return PutInt(digits);  // an integer beyond 64 bits
    PyValue v;
    v.kind = PyValue::Kind::kFloat;
    v.number = value;
    return Put(std::move(v));
  }
  bool string(string_t& value) override {
    PyValue v;
    v.kind = PyValue::Kind::kString;
    v.text = std::move(value);
    return Put(std::move(v));
  }
  bool binary(binary_t&) override { return false; }
  bool start_object(std::size_t) override { return Open(PyValue::Kind::kDict); }
  bool start_array(std::size_t) override { return Open(PyValue::Kind::kList); }
  bool end_object() override { return Close(); }
  bool end_array() override { return Close(); }
  bool key(string_t& key) override {
    if (!open_.back().keys.insert(key).second) {
      error_ = StrCat("duplicate key \"", Excerpt(key, 64), "\"");
      return false;
    }
    open_.back().value->keys.push_back(std::move(key));
    return true;
  }
  bool parse_error(std::size_t position, const std::string&, const nlohmann::detail::exception& e) override {
    error_ = JsonErrorText(position, e);
    return false;
  }

 private:
  struct Frame {
    PyValue* value;  // stays put: its siblings are only added after it is closed
    std::set<std::string> keys;
  };

  PyValue* Add(PyValue value) {
    if (open_.empty()) {
      *root_ = std::move(value);
      return root_;
    }
    open_.back().value->items.push_back(std::move(value));
    return &open_.back().value->items.back();
  }
  bool Put(PyValue value) {
    Add(std::move(value));
    return true;
  }
  bool PutInt(std::string digits) {
    PyValue v;
    v.kind = PyValue::Kind::kInt;
    v.text = std::move(digits);
    return Put(std::move(v));
  }
  bool Open(PyValue::Kind kind) {
    if (static_cast<int>(open_.size()) >= max_depth_) {
      error_ = StrCat("nested deeper than ", max_depth_, " levels");
      return false;
    }
    PyValue v;
    v.kind = kind;
    open_.push_back({Add(std::move(v)), {}});
    return true;
  }
  bool Close() {
    open_.pop_back();
    return true;
  }

  const int max_depth_;
  PyValue* const root_;
  std::vector<Frame> open_;
  std::string error_;
};

void AppendNewline(int spaces, std::string* out) {
  out->push_back('\n');
  out->append(static_cast<size_t>(spaces), ' ');
}

// indent < 0: on one line.
void AppendJson(const PyValue& value, int indent, int depth, std::string* out) {
  switch (value.kind) {
    case PyValue::Kind::kNone:
      out->append("null");
      return;
    case PyValue::Kind::kBool:
      out->append(value.boolean ? "true" : "false");
      return;
    case PyValue::Kind::kInt:
      out->append(value.text);
      return;
    case PyValue::Kind::kFloat:
      AppendPyFloat(value.number, out);
      return;
    case PyValue::Kind::kString:
      AppendPyJsonString(value.text, out);
      return;
    case PyValue::Kind::kList:
    case PyValue::Kind::kDict:
      break;
  }
  const bool dict = value.is_dict();
  out->push_back(dict ? '{' : '[');
  for (size_t i = 0; i < value.items.size(); ++i) {
    if (i > 0) out->append(indent < 0 ? ", " : ",");
    if (indent >= 0) AppendNewline(indent * (depth + 1), out);
    if (dict) {
      AppendPyJsonString(value.keys[i], out);
      out->append(": ");
    }
    AppendJson(value.items[i], indent, depth + 1, out);
  }
  if (indent >= 0 && !value.items.empty()) AppendNewline(indent * depth, out);
  out->push_back(dict ? '}' : ']');
}

struct Range {
  char32_t first, last;
};

// What str.isprintable() refuses besides unassigned code points: categories Cc, Cf, Zl, Zp, Co and Zs but for the
// blank (Unicode 14; Python's unicodedata).
constexpr Range kUnprintable[] = {{0x0, 0x1F},        {0x7F, 0xA0},       {0xAD, 0xAD},       {0x600, 0x605},
                                  {0x61C, 0x61C},     {0x6DD, 0x6DD},     {0x70F, 0x70F},     {0x890, 0x891},
                                  {0x8E2, 0x8E2},     {0x1680, 0x1680},   {0x180E, 0x180E},   {0x2000, 0x200F},
                                  {0x2028, 0x202F},   {0x205F, 0x2064},   {0x2066, 0x206F},   {0x3000, 0x3000},
                                  {0xE000, 0xF8FF},   {0xFEFF, 0xFEFF},   {0xFFF9, 0xFFFB},   {0x110BD, 0x110BD},
                                  {0x110CD, 0x110CD}, {0x13430, 0x13438}, {0x1BCA0, 0x1BCA3}, {0x1D173, 0x1D17A},
                                  {0xE0001, 0xE0001}, {0xE0020, 0xE007F}, {0xF0000, 0xFFFFD}, {0x100000, 0x10FFFD}};

bool IsUnprintable(char32_t c) {
  const auto* range = std::partition_point(std::begin(kUnprintable), std::end(kUnprintable),
                                           [c](const Range& r) { return r.last < c; });
  return range != std::end(kUnprintable) && range->first <= c;
}

// repr() of a string: single quotes unless only they occur in it.
void AppendPyStringRepr(std::string_view text, std::string* out) {
  const char quote = text.find('\'') != std::string_view::npos && text.find('"') == std::string_view::npos ? '"' : '\'';
  out->push_back(quote);
  while (!text.empty()) {
    const Utf8Char c = DecodeUtf8(text);
    const char byte = text[0];
    if (byte == quote || byte == '\\') {
      out->push_back('\\');
      out->push_back(byte);
    } else if (byte == '\n' || byte == '\r' || byte == '\t') {
      out->append(byte == '\n' ? "\\n" : byte == '\r' ? "\\r" : "\\t");
    } else if (!IsUnprintable(c.code_point)) {
      out->append(text.substr(0, c.length));
    } else {
      const auto code = static_cast<unsigned>(c.code_point);
      out->append(code < 0x100     ? StrFormat("\\x%02x", code)
                  : code < 0x10000 ? StrFormat("\\u%04x", code)
                                   : StrFormat("\\U%08x", code));
    }
    text.remove_prefix(c.length);
  }
  out->push_back(quote);
}

void AppendPyRepr(const PyValue& value, std::string* out) {
  switch (value.kind) {
    case PyValue::Kind::kNone:
      out->append("None");
      return;
    case PyValue::Kind::kBool:
      out->append(value.boolean ? "True" : "False");
      return;
    case PyValue::Kind::kInt:
      out->append(value.text);
      return;
    case PyValue::Kind::kFloat:
      AppendPyFloat(value.number, out);
      return;
    case PyValue::Kind::kString:
      AppendPyStringRepr(value.text, out);
      return;
    case PyValue::Kind::kList:
    case PyValue::Kind::kDict:
      break;
  }
  out->push_back(value.is_dict() ? '{' : '[');
  for (size_t i = 0; i < value.items.size(); ++i) {
    if (i > 0) out->append(", ");
    if (value.is_dict()) {
      AppendPyStringRepr(value.keys[i], out);
      out->append(": ");
    }
    AppendPyRepr(value.items[i], out);
  }
  out->push_back(value.is_dict() ? '}' : ']');
}

// str.isspace(): White_Space and the four separators that Unicode gives bidirectional type B or S.
bool IsPySpace(char32_t c) {
  return ClassOf(c) == CharClass::kSpace || (c >= 0x1C && c <= 0x1F);
}

}  // namespace

const PyValue* PyValue::Find(std::string_view key) const {
  const auto at = std::find(keys.begin(), keys.end(), key);
  return at == keys.end() ? nullptr : &items[static_cast<size_t>(at - keys.begin())];
}

StatusOr<PyValue> ParsePyJson(std::string_view text, int max_depth) {
  RETURN_IF_ERROR(CheckNoNul(text));
  PyValue value;
  Builder builder(max_depth, &value);
  if (!Json::sax_parse(text, &builder)) {
    return Status(Code::kInvalidArgument, StrCat("not valid JSON: ", builder.error()));
  }
  return value;
}

void AppendPyJson(const PyValue& value, std::string* out) {
  AppendJson(value, -1, 0, out);
}

void AppendPyJsonIndented(const PyValue& value, int indent, std::string* out) {
  AppendJson(value, indent, 0, out);
}

void AppendPyJsonString(std::string_view text, std::string* out) {
  out->push_back('"');
  for (const char c : text) {
    switch (c) {
      case '"':
        out->append("\\\"");
        break;
      case '\\':
        out->append("\\\\");
        break;
      case '\n':
        out->append("\\n");
        break;
      case '\r':
        out->append("\\r");
        break;
      case '\t':
        out->append("\\t");
        break;
      case '\b':
        out->append("\\b");
        break;
      case '\f':
        out->append("\\f");
        break;
      default:
        if (static_cast<unsigned char>(c) < 0x20) {
          out->append(StrFormat("\\u%04x", static_cast<unsigned>(c)));
        } else {
          out->push_back(c);
        }
    }
  }
  out->push_back('"');
}

void AppendPyStr(const PyValue& value, std::string* out) {
  if (value.is_string()) {
    out->append(value.text);
  } else {
    AppendPyRepr(value, out);
  }
}

void AppendPyFloat(double number, std::string* out) {
  char buffer[32];  // "-1.2345678901234567e-308"
  const auto end = std::to_chars(buffer, buffer + sizeof buffer, number, std::chars_format::scientific).ptr;
  const std::string_view printed(buffer, static_cast<size_t>(end - buffer));
  const size_t e = printed.find('e');
  int exponent = 0;
  const size_t sign = printed[e + 1] == '+' ? 1 : 0;  // from_chars knows only '-'
  std::from_chars(buffer + e + 1 + sign, end, exponent);
  if (exponent < -4 || exponent >= 16) {
    out->append(printed);  // two digits of exponent at least, as Python
    return;
  }
  std::string digits;
  for (const char c : printed.substr(0, e)) {
    if (c == '-') out->push_back(c);
    if (c >= '0' && c <= '9') digits.push_back(c);
  }
  if (exponent < 0) {
    out->append("0.").append(static_cast<size_t>(-exponent - 1), '0').append(digits);
    return;
  }
  const auto whole = static_cast<size_t>(exponent) + 1;
  if (digits.size() <= whole) {
    out->append(digits).append(whole - digits.size(), '0').append(".0");
  } else {
    out->append(digits, 0, whole).append(".").append(digits, whole);
  }
}

std::string_view PyStrip(std::string_view text) {
  while (!text.empty()) {
    const Utf8Char c = DecodeUtf8(text);
    if (!IsPySpace(c.code_point)) break;
    text.remove_prefix(c.length);
  }
  while (!text.empty()) {
    size_t last = text.size() - 1;
    while (last > 0 && (static_cast<unsigned char>(text[last]) & 0xC0) == 0x80) --last;
    if (!IsPySpace(DecodeUtf8(text.substr(last)).code_point)) break;
    text = text.substr(0, last);
  }
  return text;
}

}  // namespace altiplano
