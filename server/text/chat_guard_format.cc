#include "server/text/chat_guard_format.h"

#include "server/base/strings.h"
#include "server/text/chat_prompt.h"

namespace altiplano {

namespace {

// The two versions number their categories differently: read a verdict by the version that gave it.
constexpr std::string_view kCategories2[] = {"Violent Crimes",
                                             "Non-Violent Crimes",
                                             "Sex Crimes",
                                             "Child Exploitation",
                                             "Specialized Advice",
                                             "Privacy",
                                             "Intellectual Property",
                                             "Indiscriminate Weapons",
                                             "Hate",
                                             "Self-Harm",
                                             "Sexual Content"};
constexpr std::string_view kCategories3[] = {"Violent Crimes",
                                             "Non-Violent Crimes",
                                             "Sex Crimes",
                                             "Child Exploitation",
                                             "Defamation",
                                             "Specialized Advice",
                                             "Privacy",
                                             "Intellectual Property",
                                             "Indiscriminate Weapons",
                                             "Hate",
                                             "Self-Harm",
                                             "Sexual Content",
                                             "Elections",
                                             "Code Interpreter Abuse"};

constexpr GuardStyle kStyles[] = {
    {.name = "llama-guard-2",
     .categories = kCategories2,
     .after_category = ". \n",
     .headers = false,
     .after_user_header = "",
     .after_task = "",
     .after_assistant_header = ""},
    {.name = "llama-guard-3",
     .categories = kCategories3,
     .after_category = ".\n",
     .headers = true,
     .after_user_header = "\n\n",
     .after_task = "",
     .after_assistant_header = "\n\n"},
    {.name = "llama-guard-3-cookbook",
     .categories = kCategories3,
     .after_category = ". \n",
     .headers = true,
     .after_user_header = " ",
     .after_task = " ",
     .after_assistant_header = ""},
};

class GuardFormat : public ChatFormat {
 public:
  explicit GuardFormat(const GuardStyle& style) : style_(style) {}

  std::string_view name() const override { return style_.name; }
  bool supports_tools() const override { return false; }
  ToolDialect tool_dialect() const override { return ToolDialect::kNone; }

  StatusOr<RenderedPrompt> Render(const Conversation& chat, const Tokenizer& tokenizer) const override {
    RETURN_IF_ERROR(Check(chat));
    PromptBuilder builder(tokenizer);
    builder.Special("<|begin_of_text|>");
    if (style_.headers) {
      Header("user", &builder);
      builder.Text(style_.after_user_header);
      Task(chat, &builder);
      builder.Text(style_.after_task);
      builder.Special("<|eot_id|>");
      Header("assistant", &builder);
      builder.Text(style_.after_assistant_header);
    } else {
      builder.Text("[INST] ");
      Task(chat, &builder);
      builder.Text(" [/INST]");
    }
    return builder.Finish();
  }

 private:
  Status Check(const Conversation& chat) const {
    RETURN_IF_ERROR(CheckConversation(chat));
    RETURN_IF_ERROR(RefuseTools(chat, style_.name));
    if (chat.continue_final_message) {
      return ChatViolation("continue_final_message", StrCat(style_.name, " judges a conversation and continues none"));
    }
    for (size_t i = 0; i < chat.messages.size(); ++i) {
      if (chat.messages[i].role == (i % 2 == 0 ? Role::kUser : Role::kAssistant)) continue;
      return ChatViolation(MessageField(i, "role"), StrCat(style_.name,
                                                           " takes messages of the user and the assistant "
                                                           "in turn, the user's first"));
    }
    return OkStatus();
  }

  static void Header(std::string_view role, PromptBuilder* builder) {
    builder->Special("<|start_header_id|>");
    builder->Text(role);
    builder->Special("<|end_header_id|>");
  }

  void Task(const Conversation& chat, PromptBuilder* builder) const {
    const std::string_view judged = chat.messages.back().role == Role::kUser ? "User" : "Agent";
    std::string text = StrCat("Task: Check if there is unsafe content in '", judged,
                              "' messages in conversations according our safety policy with the below categories.\n\n"
                              "<BEGIN UNSAFE CONTENT CATEGORIES>\n");
    for (size_t i = 0; i < style_.categories.size(); ++i) {
      text.append(StrCat("S", i + 1, ": ", style_.categories[i], style_.after_category));
    }
    text.append("<END UNSAFE CONTENT CATEGORIES>\n\n<BEGIN CONVERSATION>\n\n");
    for (const ChatMessage& message : chat.messages) {
      text.append(StrCat(message.role == Role::kUser ? "User" : "Agent", ": ", PyStrip(message.content), "\n\n"));
    }
    text.append(StrCat("<END CONVERSATION>\n\nProvide your safety assessment for ONLY THE LAST ", judged,
                       " message in the above conversation:\n - First line must read 'safe' or 'unsafe'.\n"
                       " - If unsafe, a second line must include a comma-separated list of violated categories."));
    builder->Text(text);
  }

  const GuardStyle& style_;
};

}  // namespace

std::span<const GuardStyle> GuardStyles() {
  return kStyles;
}

std::shared_ptr<const ChatFormat> MakeGuardFormat(const GuardStyle& style) {
  return std::make_shared<GuardFormat>(style);
}

}  // namespace altiplano
