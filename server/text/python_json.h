// JSON as Python's json module reads and prints it: the reference chat templates are Jinja2 run by Python, and models
// saw what it printed. Key order, the difference of 1 and 1.0, and integers of any size are kept.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "server/base/json_fwd.h"
#include "server/base/status.h"

namespace altiplano {

struct PyValue {
  enum class Kind { kNone, kBool, kInt, kFloat, kString, kList, kDict };

  Kind kind = Kind::kNone;
  bool boolean = false;
  double number = 0;              // of a float; finite
  std::string text;               // a string's bytes (UTF-8), an integer's decimal digits with sign
  std::vector<std::string> keys;  // of a dict; keys[i] belongs to items[i]
  std::vector<PyValue> items;     // of a list or dict

  bool is_dict() const { return kind == Kind::kDict; }
  bool is_string() const { return kind == Kind::kString; }
  const PyValue* Find(std::string_view key) const;  // in a dict; null: not there
};

// INVALID_ARGUMENT as ParseJson, and for numbers that overflow a double.
StatusOr<PyValue> ParsePyJson(std::string_view text, int max_depth = kMaxJsonDepth);

// json.dumps(value, ensure_ascii=False): ", " and ": " between; with an indent, one item a line.
void AppendPyJson(const PyValue& value, std::string* out);
void AppendPyJsonIndented(const PyValue& value, int indent, std::string* out);
void AppendPyJsonString(std::string_view text, std::string* out);  // with its quotes

// str(value): a string as it is, else as repr would print it.
void AppendPyStr(const PyValue& value, std::string* out);

// repr(number): the shortest digits that read back the same, "1.0", "1e-05", "1e+16".
void AppendPyFloat(double number, std::string* out);

// text.strip(): without the characters at both ends for which str.isspace() holds. `text` is valid UTF-8.
std::string_view PyStrip(std::string_view text);

}  // namespace altiplano
