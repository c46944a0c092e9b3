// Tool calls as models write them in their answers, and back to names and JSON arguments.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "server/base/status.h"

namespace altiplano {

struct ToolCall {
  std::string id;
  std::string name;
  std::string arguments_json;  // a JSON object
};

// How a chat format's models write calls.
enum class ToolDialect : uint8_t {
  kNone,      // never: any answer is text
  kLlama,     // any form of Llama 3.1 to 3.3, told apart by what they begin with (docs/chat_formats.md)
  kPythonic,  // only a Python list of calls: [f(a=1), g()]
};

// Tool calls in a finished answer; empty when it is plain text. The answer may still have its special tokens' names in
// it ("<|python_tag|>", "<|eot_id|>"); code for the interpreter is recognised only by its "<|python_tag|>".
// All or nothing: one malformed call, or one to a function that is not in `offered`, makes the whole answer text.
// `offered` empty: any name will do. Ids are "call_0", "call_1", ... Linear time, bounded depth.
std::vector<ToolCall> ParseToolCalls(std::string_view answer, ToolDialect dialect = ToolDialect::kLlama,
                                     std::span<const std::string> offered = {});

// The function names of OpenAI tool descriptions: {"type": "function", "function": {"name": ...}}, or the bare function
// object. INVALID_ARGUMENT with a field violation ("tools_json[1]") for what is not one.
StatusOr<std::vector<std::string>> ToolNames(const std::vector<std::string>& tools_json);

}  // namespace altiplano
