#include "server/text/chatml_format.h"

#include "server/text/chat_prompt.h"

namespace altiplano {

namespace {

class ChatMlFormat : public ChatFormat {
 public:
  ChatMlFormat(std::string_view name, std::string_view default_system) : name_(name), default_system_(default_system) {}

  std::string_view name() const override { return name_; }
  bool supports_tools() const override { return false; }
  ToolDialect tool_dialect() const override { return ToolDialect::kNone; }

  StatusOr<RenderedPrompt> Render(const Conversation& chat, const Tokenizer& tokenizer) const override {
    RETURN_IF_ERROR(CheckConversation(chat));
    RETURN_IF_ERROR(RefuseTools(chat, name_));
    PromptBuilder builder(tokenizer);
    const auto open = [&](std::string_view role) {
      builder.Special("<|im_start|>");
      builder.Text(role);
      builder.Text("\n");
    };
    const auto close = [&] {
      builder.Special("<|im_end|>");
      builder.Text("\n");
    };
    if (chat.messages[0].role != Role::kSystem && !default_system_.empty()) {
      open("system");
      builder.Text(default_system_);
      close();
    }
    for (const ChatMessage& message : chat.messages) {
      open(message.role == Role::kSystem ? "system" : message.role == Role::kUser ? "user" : "assistant");
      builder.Text(message.content);
      if (!chat.continue_final_message || &message != &chat.messages.back()) close();
    }
    if (!chat.continue_final_message && chat.add_generation_prompt) open("assistant");
    return builder.Finish();
  }

 private:
  const std::string name_, default_system_;
};

}  // namespace

std::shared_ptr<const ChatFormat> MakeChatMlFormat(std::string_view name, std::string_view default_system) {
  return std::make_shared<ChatMlFormat>(name, default_system);
}

}  // namespace altiplano
