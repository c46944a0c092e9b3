// Conversations and templates from bytes. A prompt's ids must spell its text, and only the format makes special tokens.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>
#include <vector>

#include "server/base/check.h"
#include "server/text/chat_format.h"
#include "tests/fuzz/byte_tokenizer.h"

namespace altiplano {
namespace {

// Fields are cut at NUL; the first byte of each says what it is.
Conversation Build(std::string_view input) {
  Conversation chat;
  while (!input.empty()) {
    const size_t end = std::min(input.find('\0'), input.size());
    const std::string_view field = input.substr(0, end);
    input.remove_prefix(std::min(end + 1, input.size()));
    if (field.empty()) continue;
    const std::string text(field.substr(1));
    switch (field[0]) {
      case 's':
        chat.messages.push_back({.role = Role::kSystem, .content = text, .tool_calls = {}, .tool_call_id = {}});
        break;
      case 'u':
        chat.messages.push_back({.role = Role::kUser, .content = text, .tool_calls = {}, .tool_call_id = {}});
        break;
      case 'a':
        chat.messages.push_back({.role = Role::kAssistant, .content = text, .tool_calls = {}, .tool_call_id = {}});
        break;
      case 'r':
        chat.messages.push_back({.role = Role::kTool, .content = text, .tool_calls = {}, .tool_call_id = {}});
        break;
      case 'j':
        chat.messages.push_back(
            {.role = Role::kTool, .content = text, .tool_calls = {}, .tool_call_id = {}, .content_is_json = true});
        break;
      case 'c':
        if (!chat.messages.empty())
          chat.messages.back().tool_calls.push_back({.id = "", .name = "f", .arguments_json = text});
        break;
      case 't':
        chat.tools_json.push_back(text);
        break;
      case 'b':
        if (!chat.builtin_tools) chat.builtin_tools.emplace();
        chat.builtin_tools->push_back(text);
        break;
      case 'd':
        chat.date = text;
        break;
      case '+':
        chat.continue_final_message = true;
        break;
      case '-':
        chat.add_generation_prompt = false;
        break;
      case 'y':
        chat.tools_in_user_message = true;
        break;
      case 'n':
        chat.tools_in_user_message = false;
        break;
      default:
        break;
    }
  }
  return chat;
}

void RenderAll(std::string_view input) {
  static const ByteTokenizer tokenizer;
  const Conversation chat = Build(input);
  for (const std::string_view name : ChatFormat::Names()) {
    const auto prompt = ChatFormat::FromName(name).value()->Render(chat, tokenizer);
    if (!prompt.ok()) {
      CHECK(prompt.status().code() == Code::kInvalidArgument);
      CHECK(prompt.status().detail() != nullptr && prompt.status().detail()->field_violations.size() == 1);
      continue;
    }
    std::string spelled;
    size_t specials = 0;
    for (const TokenId id : prompt->ids) {
      spelled.append(tokenizer.TokenBytes(id));
      specials += tokenizer.IsSpecial(id) ? 1 : 0;
    }
    CHECK(spelled == prompt->text);
    CHECK(specials <= 4 * (chat.messages.size() + 3));  // whatever the contents spell
  }
}

}  // namespace
}  // namespace altiplano

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view input(reinterpret_cast<const char*>(data), size);
  altiplano::RenderAll(input);
  const auto format = altiplano::ChatFormat::FromTemplate(input);
  CHECK(format.ok() || format.status().code() == altiplano::Code::kNotFound);
  return 0;
}
