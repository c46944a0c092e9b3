// Chat formats, native: the text and the token ids that a conversation becomes. No template language is interpreted.
// Ids are built piece by piece, so text from users never turns into special tokens.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "server/base/status.h"
#include "server/base/types.h"
#include "server/text/tokenizer.h"
#include "server/text/tool_calls.h"

namespace altiplano {

enum class Role { kSystem, kUser, kAssistant, kTool };

struct ChatMessage {
  Role role = Role::kUser;
  std::string content;
  std::vector<ToolCall> tool_calls;  // of an assistant message
  std::string tool_call_id;          // of a tool message
  // Of a tool message: `content` is a JSON object or array and is printed as such, not quoted as a text.
  bool content_is_json = false;
};

struct Conversation {
  std::vector<ChatMessage> messages;
  std::vector<std::string> tools_json;  // one OpenAI function description each
  bool continue_final_message = false;  // the last message is the assistant's, to be continued
  std::string date;                     // "26 Jul 2024"; empty: the format's fixed default

  // What the templates' further variables say. Formats without such a variable ignore them, as their templates do.
  std::optional<std::vector<std::string>> builtin_tools;  // "brave_search", ...; an empty list still prints its header
  std::optional<bool> tools_in_user_message;              // unset: the format's default
  bool add_generation_prompt = true;                      // end with the assistant's header, unless continuing
};

struct RenderedPrompt {
  std::string text;  // as the reference template would print it
  std::vector<TokenId> ids;
};

// Immutable; any thread.
class ChatFormat {
 public:
  // "llama3", "llama3.1", "llama3.2", "llama3.3", "chatml", ... (docs/chat_formats.md); INVALID_ARGUMENT lists the
  // names.
  static StatusOr<std::shared_ptr<const ChatFormat>> FromName(std::string_view name);
  // Recognises the checkpoint's own template text; NOT_FOUND names the option to choose one: --chat-format.
  static StatusOr<std::shared_ptr<const ChatFormat>> FromTemplate(std::string_view jinja);
  static std::vector<std::string_view> Names();
  virtual ~ChatFormat() = default;

  virtual std::string_view name() const = 0;
  virtual bool supports_tools() const = 0;       // whether Conversation::tools_json may be given
  virtual ToolDialect tool_dialect() const = 0;  // how its models write calls, for ParseToolCalls
  // INVALID_ARGUMENT with field violations ("messages[2].role") for what the format cannot express.
  // FAILED_PRECONDITION when the tokenizer lacks a special token the format needs.
  virtual StatusOr<RenderedPrompt> Render(const Conversation& chat, const Tokenizer& tokenizer) const = 0;
};

}  // namespace altiplano
