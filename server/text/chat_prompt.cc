#include "server/text/chat_prompt.h"

#include <algorithm>

#include "server/base/check.h"
#include "server/base/strings.h"

namespace altiplano {

namespace {

constexpr std::string_view kNotUtf8 = "is not valid UTF-8";

std::string CallField(size_t message, size_t call, std::string_view member) {
  return MessageField(message, StrCat("tool_calls[", call, "].", member));
}

Status CheckCalls(const ChatMessage& message, size_t index) {
  if (message.tool_calls.empty()) return OkStatus();
  if (message.role != Role::kAssistant) {
    return ChatViolation(MessageField(index, "tool_calls"), "only messages of the assistant have tool calls");
  }
  for (size_t i = 0; i < message.tool_calls.size(); ++i) {
    const ToolCall& call = message.tool_calls[i];
    if (call.name.empty()) return ChatViolation(CallField(index, i, "name"), "is empty");
    if (!IsValidUtf8(call.name)) return ChatViolation(CallField(index, i, "name"), kNotUtf8);
    const auto arguments = ParsePyJson(call.arguments_json);
    if (!arguments.ok()) return ChatViolation(CallField(index, i, "arguments_json"), arguments.status().message());
    if (!arguments->is_dict()) {
      return ChatViolation(CallField(index, i, "arguments_json"), "must be a JSON object");
    }
  }
  return OkStatus();
}

// `calls`: of the assistant message that the tool messages before this one follow; null when there is none.
Status CheckToolMessage(const ChatMessage& message, size_t index, const std::vector<ToolCall>* calls) {
  if (calls == nullptr) {
    return ChatViolation(MessageField(index, "role"),
                         "a tool message must follow an assistant message with tool calls");
  }
  const std::string& id = message.tool_call_id;
  const bool known =
      std::any_of(calls->begin(), calls->end(), [&](const ToolCall& call) { return call.id.empty() || call.id == id; });
  if (!id.empty() && !known) {
    return ChatViolation(MessageField(index, "tool_call_id"), "none of the calls before has this id");
  }
  if (!message.content_is_json) return OkStatus();
  const auto content = ParsePyJson(message.content);
  if (!content.ok()) return ChatViolation(MessageField(index, "content"), content.status().message());
  if (!content->is_dict() && content->kind != PyValue::Kind::kList) {
    return ChatViolation(MessageField(index, "content"), "must be a JSON object or array");
  }
  return OkStatus();
}

Status CheckTools(const std::vector<std::string>& tools_json) {
  for (size_t i = 0; i < tools_json.size(); ++i) {
    const std::string field = StrCat("tools_json[", i, "]");
    const auto tool = ParsePyJson(tools_json[i]);
    if (!tool.ok()) return ChatViolation(field, tool.status().message());
    if (!tool->is_dict()) return ChatViolation(field, "must be a JSON object");
  }
  return OkStatus();
}

}  // namespace

void PromptBuilder::Special(std::string_view name) {
  EndRun();
  prompt_.text.append(name);
  run_begin_ = prompt_.text.size();
  if (const auto id = tokenizer_.Special(name)) {
    prompt_.ids.push_back(*id);
  } else if (missing_.empty()) {
    missing_ = name;
  }
}

void PromptBuilder::EndRun() {
  const std::string_view run = std::string_view(prompt_.text).substr(run_begin_);
  if (!run.empty()) tokenizer_.Encode(run, &prompt_.ids);
  run_begin_ = prompt_.text.size();
}

StatusOr<RenderedPrompt> PromptBuilder::Finish() {
  EndRun();
  if (!missing_.empty()) {
    return Status(Code::kFailedPrecondition,
                  StrCat("the chat format needs the special token ", missing_, ", which the tokenizer does not have"));
  }
  return std::move(prompt_);
}

Status ChatViolation(std::string field, std::string_view description) {
  ErrorDetail detail;
  std::string message = StrCat(field, ": ", description);
  detail.field_violations.push_back({std::move(field), std::string(description)});
  return Status(Code::kInvalidArgument, std::move(message), std::move(detail));
}

std::string MessageField(size_t index, std::string_view member) {
  return member.empty() ? StrCat("messages[", index, "]") : StrCat("messages[", index, "].", member);
}

Status CheckConversation(const Conversation& chat) {
  if (chat.messages.empty()) return ChatViolation("messages", "must not be empty");
  const std::vector<ToolCall>* calls = nullptr;
  for (size_t i = 0; i < chat.messages.size(); ++i) {
    const ChatMessage& message = chat.messages[i];
    if (!IsValidUtf8(message.content)) return ChatViolation(MessageField(i, "content"), kNotUtf8);
    RETURN_IF_ERROR(CheckCalls(message, i));
    if (message.role == Role::kTool) {
      RETURN_IF_ERROR(CheckToolMessage(message, i, calls));
    } else {
      calls = message.tool_calls.empty() ? nullptr : &message.tool_calls;
    }
  }
  if (!IsValidUtf8(chat.date)) return ChatViolation("date", kNotUtf8);
  for (const std::string& tool : chat.builtin_tools.value_or(std::vector<std::string>())) {
    if (!IsValidUtf8(tool)) return ChatViolation("builtin_tools", kNotUtf8);
  }
  RETURN_IF_ERROR(CheckTools(chat.tools_json));
  const ChatMessage& last = chat.messages.back();
  if (chat.continue_final_message && (last.role != Role::kAssistant || !last.tool_calls.empty())) {
    return ChatViolation("continue_final_message",
                         "the last message must be of the assistant and without tool calls to be continued");
  }
  return OkStatus();
}

Status RefuseTools(const Conversation& chat, std::string_view format) {
  const std::string description = StrCat("the chat format ", format, " has no tools");
  if (!chat.tools_json.empty()) return ChatViolation("tools_json", description);
  for (size_t i = 0; i < chat.messages.size(); ++i) {
    if (!chat.messages[i].tool_calls.empty()) return ChatViolation(MessageField(i, "tool_calls"), description);
    if (chat.messages[i].role == Role::kTool) return ChatViolation(MessageField(i, "role"), description);
  }
  return OkStatus();
}

PyValue CallArguments(const ToolCall& call) {
  auto arguments = ParsePyJson(call.arguments_json);
  CHECK(arguments.ok());
  return std::move(arguments).value();
}

}  // namespace altiplano
