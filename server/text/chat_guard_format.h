// Llama Guard: one user turn that asks for a verdict on the last message of a conversation.
// Sources: Meta's prompt format pages and llama-cookbook's prompt_format_utils.py; they differ in blanks.
#pragma once

#include <memory>
#include <span>
#include <string_view>

#include "server/text/chat_format.h"

namespace altiplano {

struct GuardStyle {
  std::string_view name;
  std::span<const std::string_view> categories;  // S1, S2, ...
  std::string_view after_category;               // ".\n"
  bool headers;                                  // Llama 3 turns; otherwise [INST] ... [/INST]
  std::string_view after_user_header, after_task, after_assistant_header;
};

std::span<const GuardStyle> GuardStyles();

// `style` is one of GuardStyles().
std::shared_ptr<const ChatFormat> MakeGuardFormat(const GuardStyle& style);

}  // namespace altiplano
