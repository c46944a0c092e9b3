#include "tests/server/text/chat_testlib.h"

#include <gtest/gtest.h>

#include "server/base/strings.h"
#include "tests/server/text/tokenizer_testlib.h"

namespace altiplano::testing {

namespace {

std::string Dump(const PyValue& value) {
  std::string text;
  AppendPyJson(value, &text);
  return text;
}

ToolCall CallFrom(const PyValue& call) {
  ToolCall result;
  if (const PyValue* id = call.Find("id")) result.id = id->text;
  const PyValue& function = *call.Find("function");
  result.name = TextOf(function, "name");
  const PyValue& arguments = *function.Find("arguments");
  result.arguments_json = arguments.is_string() ? arguments.text : Dump(arguments);
  return result;
}

ChatMessage MessageFrom(const PyValue& message) {
  ChatMessage result;
  const std::string& role = TextOf(message, "role");
  result.role = role == "system"      ? Role::kSystem
                : role == "user"      ? Role::kUser
                : role == "assistant" ? Role::kAssistant
                                      : Role::kTool;
  if (const PyValue* content = message.Find("content")) {
    result.content_is_json = !content->is_string();
    result.content = content->is_string() ? content->text : Dump(*content);
  }
  if (const PyValue* id = message.Find("tool_call_id")) result.tool_call_id = id->text;
  if (const PyValue* calls = message.Find("tool_calls")) {
    for (const PyValue& call : calls->items) result.tool_calls.push_back(CallFrom(call));
  }
  return result;
}

}  // namespace

std::vector<PyValue> ReadPyJsonLines(const std::string& path) {
  std::vector<PyValue> rows;
  const std::string text = ReadFileIfPresent(path).value_or("");
  for (std::string_view rest = text; !rest.empty();) {
    const size_t end = std::min(rest.find('\n'), rest.size());
    auto row = ParsePyJson(rest.substr(0, end));
    EXPECT_TRUE(row.ok()) << path << ": " << row.status().ToString();
    if (row.ok()) rows.push_back(*std::move(row));
    rest.remove_prefix(std::min(end + 1, rest.size()));
  }
  return rows;
}

PyValue ReadPyJson(const std::string& path) {
  auto value = ParsePyJson(ReadFileIfPresent(path).value_or(""));
  EXPECT_TRUE(value.ok()) << path << ": " << value.status().ToString();
  return value.ok() ? *std::move(value) : PyValue();
}

std::string SourcePath(std::string_view relative) {
  return StrCat(ALTIPLANO_SOURCE_DIR, "/", relative);
}

const std::string& TextOf(const PyValue& dict, std::string_view key) {
  static const std::string none;
  const PyValue* value = dict.Find(key);
  EXPECT_TRUE(value != nullptr && value->is_string()) << key;
  return value != nullptr ? value->text : none;
}

std::vector<TokenId> IdsOf(const PyValue& dict, std::string_view key) {
  std::vector<TokenId> ids;
  for (const PyValue& id : dict.Find(key)->items) ids.push_back(std::stoi(id.text));
  return ids;
}

Conversation FromContext(const PyValue& context) {
  Conversation chat;
  for (size_t i = 0; i < context.keys.size(); ++i) {
    const std::string& key = context.keys[i];
    const PyValue& value = context.items[i];
    if (key == "messages") {
      for (const PyValue& message : value.items) chat.messages.push_back(MessageFrom(message));
    } else if (key == "tools" || key == "custom_tools") {
      for (const PyValue& tool : value.items) chat.tools_json.push_back(Dump(tool));
    } else if (key == "builtin_tools") {
      chat.builtin_tools.emplace();
      for (const PyValue& tool : value.items) chat.builtin_tools->push_back(tool.text);
    } else if (key == "tools_in_user_message") {
      chat.tools_in_user_message = value.boolean;
    } else if (key == "date_string") {
      chat.date = value.text;
    } else if (key == "add_generation_prompt") {
      chat.add_generation_prompt = value.boolean;
    } else {
      // The last three are in llama.cpp's contexts; no template here reads them.
      EXPECT_TRUE(key == "bos_token" || key == "eos_token" || key == "cutting_knowledge_date" || key == "todays_date")
          << key;
    }
  }
  return chat;
}

ChatMessage System(std::string content) {
  return {.role = Role::kSystem, .content = std::move(content), .tool_calls = {}, .tool_call_id = ""};
}
ChatMessage User(std::string content) {
  return {.role = Role::kUser, .content = std::move(content), .tool_calls = {}, .tool_call_id = ""};
}
ChatMessage Assistant(std::string content) {
  return {.role = Role::kAssistant, .content = std::move(content), .tool_calls = {}, .tool_call_id = ""};
}
ChatMessage Calls(std::vector<ToolCall> calls) {
  return {.role = Role::kAssistant, .content = "", .tool_calls = std::move(calls), .tool_call_id = ""};
}
ChatMessage Result(std::string content, std::string call_id) {
  return {.role = Role::kTool, .content = std::move(content), .tool_calls = {}, .tool_call_id = std::move(call_id)};
}

std::shared_ptr<const ChatFormat> Format(std::string_view name) {
  return ChatFormat::FromName(name).value();
}

std::vector<TokenId> EncodeWithSpecials(const Tokenizer& tokenizer, std::string_view text) {
  std::vector<TokenId> ids;
  size_t begin = 0;
  for (size_t at = text.find("<|"); at != std::string_view::npos; at = text.find("<|", at + 1)) {
    const size_t end = text.find("|>", at);
    if (end == std::string_view::npos) break;
    const auto special = tokenizer.Special(text.substr(at, end + 2 - at));
    if (!special) continue;
    tokenizer.Encode(text.substr(begin, at - begin), &ids);
    ids.push_back(*special);
    begin = end + 2;
  }
  tokenizer.Encode(text.substr(begin), &ids);
  return ids;
}

}  // namespace altiplano::testing
