#include "server/text/tool_calls.h"

#include <algorithm>

#include "server/base/strings.h"
#include "server/text/python_json.h"
#include "server/text/tool_calls_python.h"

namespace altiplano {

namespace {

constexpr std::string_view kPythonTag = "<|python_tag|>";
constexpr std::string_view kFunctionTag = "<function=";
constexpr std::string_view kFunctionEnd = "</function>";
constexpr std::string_view kCodeInterpreter = "code_interpreter";
constexpr std::string_view kBlanks = " \t\r\n";

std::string_view StripBlanks(std::string_view text) {
  const size_t begin = text.find_first_not_of(kBlanks);
  if (begin == std::string_view::npos) return {};
  return text.substr(begin, text.find_last_not_of(kBlanks) - begin + 1);
}

bool ConsumePrefix(std::string_view prefix, std::string_view* text) {
  if (!text->starts_with(prefix)) return false;
  text->remove_prefix(prefix.size());
  return true;
}

// The calls of one answer; every function returns false when the answer is text.
class Calls {
 public:
  explicit Calls(std::span<const std::string> offered) : offered_(offered) {}

  bool Add(std::string_view name, const PyValue& arguments) {
    if (name.empty() || !IsValidUtf8(name) || !arguments.is_dict()) return false;
    if (!offered_.empty() && std::find(offered_.begin(), offered_.end(), name) == offered_.end()) return false;
    ToolCall call;
    call.id = StrCat("call_", calls_.size());
    call.name = name;
    AppendPyJson(arguments, &call.arguments_json);
    calls_.push_back(std::move(call));
    return true;
  }
  bool empty() const { return calls_.empty(); }
  std::vector<ToolCall> Take() { return std::move(calls_); }

 private:
  std::span<const std::string> offered_;
  std::vector<ToolCall> calls_;
};

// The JSON object that `text` starts with, without looking inside: up to the brace that closes it, or "".
std::string_view ObjectAt(std::string_view text) {
  int depth = 0;
  bool in_string = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string) {
      if (c == '\\') {
        ++i;
      } else if (c == '"') {
        in_string = false;
      }
    } else if (c == '"') {
      in_string = true;
    } else if (c == '{') {
      ++depth;
    } else if (c == '}' && --depth == 0) {
      return text.substr(0, i + 1);
    }
  }
  return {};
}

// {"name": ..., "parameters": {...}}, or "arguments" in its place.
bool AddJsonCall(std::string_view object, Calls* calls) {
  const auto value = ParsePyJson(object);
  if (!value.ok()) return false;
  const PyValue* name = value->Find("name");
  const PyValue* arguments = value->Find("arguments");
  if (arguments == nullptr) arguments = value->Find("parameters");
  return name != nullptr && name->is_string() && arguments != nullptr && calls->Add(name->text, *arguments);
}

// Every object at the top level of the text is a call; what is between them is dropped.
bool JsonCalls(std::string_view text, Calls* calls) {
  for (size_t at = text.find('{'); at != std::string_view::npos; at = text.find('{')) {
    text.remove_prefix(at);
    const std::string_view object = ObjectAt(text);
    if (object.empty() || !AddJsonCall(object, calls)) return false;
    text.remove_prefix(object.size());
  }
  return !calls->empty();
}

// <function=name>{...}</function>, the closing tag optional; what is between the calls is dropped.
bool FunctionTagCalls(std::string_view text, Calls* calls) {
  for (size_t at = text.find(kFunctionTag); at != std::string_view::npos; at = text.find(kFunctionTag)) {
    text.remove_prefix(at + kFunctionTag.size());
    const size_t name_end = text.find('>');
    if (name_end == std::string_view::npos) return false;
    const std::string_view name = text.substr(0, name_end);
    text.remove_prefix(name_end + 1);
    text.remove_prefix(std::min(text.find_first_not_of(kBlanks), text.size()));
    const std::string_view object = text.starts_with('{') ? ObjectAt(text) : std::string_view();
    const auto arguments = ParsePyJson(object);
    if (!arguments.ok() || !calls->Add(name, *arguments)) return false;
    text.remove_prefix(object.size());
    ConsumePrefix(kFunctionEnd, &text);
  }
  return !calls->empty();
}

bool PythonicCalls(std::string_view text, Calls* calls) {
  std::vector<PythonCall> parsed;
  return ParsePythonCallList(text, &parsed) && std::all_of(parsed.begin(), parsed.end(), [&](const PythonCall& call) {
           return calls->Add(call.name, call.arguments);
         });
}

// What follows <|python_tag|>: a call in any form, else code.
bool TaggedCalls(std::string_view body, Calls* calls) {
  if (body.empty()) return false;
  if (body[0] == '{' && JsonCalls(body, calls)) return true;
  PythonCall builtin;
  if (ParsePythonBuiltinCall(body, &builtin)) return calls->Add(builtin.name, builtin.arguments);
  if (body[0] == '[' && PythonicCalls(body, calls)) return true;
  if (!calls->empty() || !IsValidUtf8(body)) return false;
  PyValue code;
  code.kind = PyValue::Kind::kString;
  code.text = body;
  PyValue arguments;
  arguments.kind = PyValue::Kind::kDict;
  arguments.keys.push_back("code");
  arguments.items.push_back(std::move(code));
  return calls->Add(kCodeInterpreter, arguments);
}

bool LlamaCalls(std::string_view body, Calls* calls) {
  if (body.find(kFunctionTag) != std::string_view::npos) return FunctionTagCalls(body, calls);
  PythonCall builtin;
  if (ParsePythonBuiltinCall(body, &builtin)) return calls->Add(builtin.name, builtin.arguments);
  if (body.starts_with('[') && PythonicCalls(body, calls)) return true;
  return calls->empty() && JsonCalls(body, calls);
}

}  // namespace

std::vector<ToolCall> ParseToolCalls(std::string_view answer, ToolDialect dialect,
                                     std::span<const std::string> offered) {
  std::string_view body = StripBlanks(answer);
  for (const std::string_view end : {"<|eot_id|>", "<|eom_id|>"}) {
    if (body.ends_with(end)) body.remove_suffix(end.size());
  }
  const bool tagged = ConsumePrefix(kPythonTag, &body);
  body = StripBlanks(body);
  Calls calls(offered);
  bool found = false;
  switch (dialect) {
    case ToolDialect::kNone:
      break;
    case ToolDialect::kPythonic:
      found = PythonicCalls(body, &calls);
      break;
    case ToolDialect::kLlama:
      found = tagged ? TaggedCalls(body, &calls) : LlamaCalls(body, &calls);
      break;
  }
  if (!found) return {};
  return calls.Take();
}

StatusOr<std::vector<std::string>> ToolNames(const std::vector<std::string>& tools_json) {
  std::vector<std::string> names;
  for (size_t i = 0; i < tools_json.size(); ++i) {
    std::string wrong;
    const auto tool = ParsePyJson(tools_json[i]);
    if (!tool.ok()) {
      wrong = tool.status().message();
    } else {
      const PyValue* function = tool->is_dict() ? tool->Find("function") : nullptr;
      const PyValue& named = function != nullptr && function->is_dict() ? *function : *tool;
      const PyValue* name = named.is_dict() ? named.Find("name") : nullptr;
      if (name != nullptr && name->is_string() && !name->text.empty()) {
        names.push_back(name->text);
        continue;
      }
      wrong = "a tool is a JSON object with the function's \"name\", in \"function\" or at the top";
    }
    const std::string field = StrCat("tools_json[", i, "]");
    ErrorDetail detail;
    detail.field_violations.push_back({field, wrong});
    return Status(Code::kInvalidArgument, StrCat(field, ": ", wrong), std::move(detail));
  }
  return names;
}

}  // namespace altiplano
