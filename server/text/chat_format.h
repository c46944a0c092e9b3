// Chat formats, native: the text and the token ids that a conversation becomes. No template language is interpreted.
// Ids are built piece by piece, so text from users never turns into special tokens.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "server/base/status.h"
#include "server/base/types.h"
#include "server/text/tokenizer.h"

namespace altiplano {

enum class Role { kSystem, kUser, kAssistant, kTool };

struct ToolCall {
  std::string id;
  std::string name;
  std::string arguments_json;  // a JSON object
};

struct ChatMessage {
  Role role = Role::kUser;
  std::string content;
  std::vector<ToolCall> tool_calls;  // of an assistant message
  std::string tool_call_id;          // of a tool message
};

struct Conversation {
  std::vector<ChatMessage> messages;
  std::vector<std::string> tools_json;  // one OpenAI function description each
  bool continue_final_message = false;  // the last message is the assistant's, to be continued
  std::string date;                     // "26 Jul 2024"; empty: the format's fixed default
};

struct RenderedPrompt {
  std::string text;  // as the reference template would print it
  std::vector<TokenId> ids;
};

class ChatFormat {
 public:
  // "llama3", "llama3.1", "llama3.2", "llama3.3", "chatml", ...; INVALID_ARGUMENT lists the names.
  static StatusOr<std::shared_ptr<const ChatFormat>> FromName(std::string_view name);
  // Recognises the checkpoint's own template text; NOT_FOUND names the option to choose one: --chat-format.
  static StatusOr<std::shared_ptr<const ChatFormat>> FromTemplate(std::string_view jinja);
  static std::vector<std::string_view> Names();
  virtual ~ChatFormat() = default;

  virtual std::string_view name() const = 0;
  virtual bool supports_tools() const = 0;
  // INVALID_ARGUMENT with field violations ("messages[2].role") for what the format cannot express.
  // FAILED_PRECONDITION when the tokenizer lacks a special token the format needs.
  virtual StatusOr<RenderedPrompt> Render(const Conversation& chat, const Tokenizer& tokenizer) const = 0;
};

// Tool calls in a finished answer; empty when it is plain text. `tools` are the names offered in the request.
std::vector<ToolCall> ParseToolCalls(std::string_view answer);

}  // namespace altiplano
