#include "server/text/chat_format.h"

#include "server/base/strings.h"
#include "server/text/chat_guard_format.h"
#include "server/text/chat_template.h"
#include "server/text/chatml_format.h"
#include "server/text/llama3_format.h"

namespace altiplano {

namespace {

constexpr std::string_view kChatMl = "chatml";
constexpr std::string_view kSmolLm2 = "smollm2";
constexpr std::string_view kSmolLm2System = "You are a helpful AI assistant named SmolLM, trained by Hugging Face";

std::string ValidNames() {
  std::string names;
  for (const std::string_view name : ChatFormat::Names()) names.append(names.empty() ? "" : ", ").append(name);
  return names;
}

}  // namespace

std::vector<std::string_view> ChatFormat::Names() {
  std::vector<std::string_view> names;
  for (const Llama3Style& style : Llama3Styles()) names.push_back(style.name);
  names.push_back(kChatMl);
  names.push_back(kSmolLm2);
  for (const GuardStyle& style : GuardStyles()) names.push_back(style.name);
  return names;
}

StatusOr<std::shared_ptr<const ChatFormat>> ChatFormat::FromName(std::string_view name) {
  for (const Llama3Style& style : Llama3Styles()) {
    if (style.name == name) return MakeLlama3Format(style);
  }
  for (const GuardStyle& style : GuardStyles()) {
    if (style.name == name) return MakeGuardFormat(style);
  }
  if (name == kChatMl) return MakeChatMlFormat(kChatMl, "");
  if (name == kSmolLm2) return MakeChatMlFormat(kSmolLm2, kSmolLm2System);
  const std::string_view nearest = Nearest(name, Names());
  const std::string hint = nearest.empty() ? "" : StrCat(" (did you mean ", nearest, "?)");
  return Status(Code::kInvalidArgument,
                StrCat("unknown chat format \"", name, "\"", hint, "; valid names: ", ValidNames()));
}

StatusOr<std::shared_ptr<const ChatFormat>> ChatFormat::FromTemplate(std::string_view jinja) {
  const std::string_view name = RecogniseChatTemplate(jinja);
  if (!name.empty()) return FromName(name);
  ErrorDetail detail;
  detail.reason = "CHAT_TEMPLATE_UNKNOWN";
  return Status(
      Code::kNotFound,
      StrCat("the checkpoint's chat template is none that is built in; choose one with --chat-format: ", ValidNames()),
      std::move(detail));
}

}  // namespace altiplano
