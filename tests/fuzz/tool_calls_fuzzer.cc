// Answers from bytes. What is taken for a call has a name and a JSON object, and is read the same when printed again.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>

#include "server/base/check.h"
#include "server/base/strings.h"
#include "server/text/python_json.h"
#include "server/text/tool_calls.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace altiplano;
  const std::string_view answer(reinterpret_cast<const char*>(data), size);
  for (const ToolDialect dialect : {ToolDialect::kLlama, ToolDialect::kPythonic}) {
    for (const ToolCall& call : ParseToolCalls(answer, dialect)) {
      CHECK(!call.name.empty() && IsValidUtf8(call.name));
      const auto arguments = ParsePyJson(call.arguments_json);
      CHECK(arguments.ok() && arguments->is_dict());
      if (call.name.find('>') != std::string::npos) continue;
      const auto again = ParseToolCalls(StrCat("<function=", call.name, ">", call.arguments_json, "</function>"));
      CHECK(again.size() == 1 && again[0].name == call.name && again[0].arguments_json == call.arguments_json);
    }
  }
  return 0;
}
