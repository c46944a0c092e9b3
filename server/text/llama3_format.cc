#include "server/text/llama3_format.h"

#include <algorithm>

#include "server/base/strings.h"

namespace altiplano {

namespace {

constexpr std::string_view kBegin = "<|begin_of_text|>";
constexpr std::string_view kHeader = "<|start_header_id|>";
constexpr std::string_view kHeaderEnd = "<|end_header_id|>";
constexpr std::string_view kEndOfTurn = "<|eot_id|>";
constexpr std::string_view kEndOfMessage = "<|eom_id|>";  // a tool result is expected
constexpr std::string_view kPythonTag = "<|python_tag|>";
constexpr std::string_view kCodeInterpreter = "code_interpreter";
constexpr std::string_view kDefaultDate = "26 Jul 2024";

// The missing blanks between sentences are the templates'.
constexpr std::string_view kJsonInSystem =
    "You have access to the following functions. To call a function, please respond with JSON for a function call."
    "Respond in the format {\"name\": function name, \"parameters\": dictionary of argument name and its value}."
    "Do not use variables.\n\n";
constexpr std::string_view kJsonInUser =
    "Given the following functions, please respond with a JSON for a function call "
    "with its proper arguments that best answers the given prompt.\n\n"
    "Respond in the format {\"name\": function name, \"parameters\": dictionary of argument name and its value}."
    "Do not use variables.\n\n";
constexpr std::string_view kSpacedJsonInSystem =
    "You have access to the following functions. To call a function, please respond with JSON for a function call. "
    "Respond in the format {\"name\": function name, \"parameters\": dictionary of argument name and its value}. "
    "Do not use variables.\n\n";
constexpr std::string_view kSpacedJsonInUser =
    "Given the following functions, please respond with a JSON for a function call "
    "with its proper arguments that best answers the given prompt.\n\n"
    "Respond in the format {\"name\": function name, \"parameters\": dictionary of argument name and its value}. "
    "Do not use variables.\n\n";
constexpr std::string_view kPythonicInSystem =
    "You have access to the following functions. To call functions, please respond with a python list of the calls. "
    "Respond in the format [func_name1(params_name1=params_value1, params_name2=params_value2...), "
    "func_name2(params)] Do not use variables.\n\n";
constexpr std::string_view kPythonicInUser =
    "Given the following functions, please respond with a python list for function calls "
    "with their proper arguments to best answer the given prompt.\n\n"
    "Respond in the format [func_name1(params_name1=params_value1, params_name2=params_value2...), "
    "func_name2(params)] Do not use variables.\n\n";
constexpr std::string_view kToolSystem =
    "You are a helpful assistant with tool calling capabilities. Only reply with a tool call if the function exists in "
    "the library provided by the user. If it doesn't exist, just reply directly in natural language. When you receive "
    "a tool call response, use the output to format an answer to the original user question.";

using Calls = Llama3Style::Calls;
using Results = Llama3Style::Results;

constexpr Llama3Style kLlama31 = {.name = "llama3.1",
                                  .dated_system = true,
                                  .has_builtin_tools = true,
                                  .tools_in_system = kJsonInSystem,
                                  .tools_in_user = kJsonInUser,
                                  .calls = Calls::kJson,
                                  .dialect = ToolDialect::kLlama};

constexpr Llama3Style Renamed(Llama3Style style, std::string_view name) {
  style.name = name;
  return style;
}

constexpr Llama3Style kVllmLlama31 = {.name = "vllm-llama3.1-json",
                                      .dated_system = true,
                                      .tools_in_system = kSpacedJsonInSystem,
                                      .tools_in_user = kSpacedJsonInUser,
                                      .default_system = kToolSystem,
                                      .calls = Calls::kJson,
                                      .results = Results::kOutputParts,
                                      .dialect = ToolDialect::kLlama};

constexpr Llama3Style VllmLlama32() {
  Llama3Style style = Renamed(kVllmLlama31, "vllm-llama3.2-json");
  style.tools_in_user_message = false;
  return style;
}

constexpr Llama3Style kStyles[] = {
    {.name = "llama3"},
    kLlama31,
    {.name = "llama3.2",
     .dated_system = true,
     .tools_in_system = kJsonInSystem,
     .tools_in_user = kJsonInUser,
     .calls = Calls::kJson,
     .dialect = ToolDialect::kLlama},
    Renamed(kLlama31, "llama3.3"),  // the same template, byte for byte
    {.name = "llama3-meta",
     .trims = false,
     .joins_runs = false,
     .has_builtin_tools = true,
     .calls = Calls::kTypedJson,
     .results = Results::kRaw,
     .dialect = ToolDialect::kLlama},
    kVllmLlama31,
    VllmLlama32(),
    {.name = "vllm-llama3.2-pythonic",
     .dated_system = true,
     .tools_in_user_message = false,
     .tools_in_system = kPythonicInSystem,
     .tools_in_user = kPythonicInUser,
     .default_system = kToolSystem,
     .default_system_needs_tools = false,
     .calls = Calls::kPythonic,
     .results = Results::kOutput,
     .dialect = ToolDialect::kPythonic},
};

// One conversation on its way into one prompt.
class Rendering {
 public:
  Rendering(const Llama3Style& style, const Conversation& chat, const Tokenizer& tokenizer)
      : style_(style), chat_(chat), builder_(tokenizer) {}

  StatusOr<RenderedPrompt> Run() {
    RETURN_IF_ERROR(Check());
    const size_t first = chat_.messages[0].role == Role::kSystem && style_.dated_system ? 1 : 0;
    const bool tools_in_user = has_tools() && tools_in_user_message();
    builder_.Special(kBegin);
    if (style_.dated_system) SystemBlock();
    for (size_t i = first; i < chat_.messages.size(); ++i) {
      if (i == first && tools_in_user) {
        UserWithTools(chat_.messages[i]);
      } else {
        Message(chat_.messages[i], i + 1 == chat_.messages.size());
      }
    }
    if (!chat_.continue_final_message && chat_.add_generation_prompt) Header("assistant");
    return builder_.Finish();
  }

 private:
  bool has_tools() const { return !chat_.tools_json.empty(); }
  bool tools_in_user_message() const { return chat_.tools_in_user_message.value_or(style_.tools_in_user_message); }
  bool IsBuiltin(std::string_view name) const {
    if (!style_.has_builtin_tools || !chat_.builtin_tools.has_value()) return false;
    return std::find(chat_.builtin_tools->begin(), chat_.builtin_tools->end(), name) != chat_.builtin_tools->end();
  }
  bool builtin_mode() const { return style_.has_builtin_tools && chat_.builtin_tools.has_value(); }

  Status Check() const {
    RETURN_IF_ERROR(CheckConversation(chat_));
    if (style_.calls == Calls::kRefused) return RefuseTools(chat_, style_.name);
    if (has_tools() && style_.tools_in_system.empty()) {
      return ChatViolation("tools_json", StrCat("the chat format ", style_.name,
                                                " does not describe tools: put them in the system message's text"));
    }
    if (has_tools() && tools_in_user_message()) RETURN_IF_ERROR(CheckFirstUserMessage());
    for (size_t i = 0; i < chat_.messages.size(); ++i) RETURN_IF_ERROR(CheckCallsOf(i));
    return OkStatus();
  }

  Status CheckFirstUserMessage() const {
    const size_t first = chat_.messages[0].role == Role::kSystem ? 1 : 0;
    if (first == chat_.messages.size()) {
      return ChatViolation("messages", "tools are described in the first user message, and there is none");
    }
    if (chat_.messages[first].role != Role::kUser) {
      return ChatViolation(MessageField(first, "role"),
                           "tools are described in the first message after the system's, which must be the user's");
    }
    return OkStatus();
  }

  Status CheckCallsOf(size_t index) const {
    const std::vector<ToolCall>& calls = chat_.messages[index].tool_calls;
    if (calls.size() > 1 && style_.calls != Calls::kPythonic) {
      return ChatViolation(
          MessageField(index, "tool_calls"),
          StrCat("the chat format ", style_.name, " can express one call a message, not ", calls.size()));
    }
    for (const ToolCall& call : calls) {
      if (!IsBuiltin(call.name)) continue;
      const PyValue arguments = CallArguments(call);
      if (std::all_of(arguments.items.begin(), arguments.items.end(), [](const PyValue& v) { return v.is_string(); })) {
        continue;
      }
      return ChatViolation(MessageField(index, "tool_calls[0].arguments_json"),
                           "the arguments of a built-in tool must be strings");
    }
    return OkStatus();
  }

  void Header(std::string_view role) {
    builder_.Special(kHeader);
    builder_.Text(role);
    builder_.Special(kHeaderEnd);
    builder_.Text("\n\n");
    if (!style_.joins_runs) builder_.EndRun();
  }

  std::string_view Content(const ChatMessage& message) const {
    return style_.trims ? PyStrip(message.content) : std::string_view(message.content);
  }

  void ToolList() {
    std::string text;
    for (const std::string& tool : chat_.tools_json) {
      AppendPyJsonIndented(ParsePyJson(tool).value(), 4, &text);
      text.append("\n\n");
    }
    builder_.Text(text);
  }

  void SystemBlock() {
    Header("system");
    if (builtin_mode() || has_tools()) builder_.Text("Environment: ipython\n");
    if (builtin_mode()) {
      builder_.Text("Tools: ");
      std::string_view separator;
      for (const std::string& tool : *chat_.builtin_tools) {
        if (tool == kCodeInterpreter) continue;
        builder_.Text(separator);
        builder_.Text(tool);
        separator = ", ";
      }
      builder_.Text("\n\n");
    }
    builder_.Text("Cutting Knowledge Date: December 2023\nToday Date: ");
    builder_.Text(chat_.date.empty() ? kDefaultDate : std::string_view(chat_.date));
    builder_.Text("\n\n");
    if (has_tools() && !tools_in_user_message()) {
      builder_.Text(style_.tools_in_system);
      ToolList();
    }
    if (chat_.messages[0].role == Role::kSystem) {
      builder_.Text(Content(chat_.messages[0]));
    } else if (has_tools() || !style_.default_system_needs_tools) {
      builder_.Text(style_.default_system);
    }
    builder_.Special(kEndOfTurn);
  }

  void UserWithTools(const ChatMessage& message) {
    Header("user");
    builder_.Text(style_.tools_in_user);
    ToolList();
    builder_.Text(Content(message));
    builder_.Special(kEndOfTurn);
  }

  void Message(const ChatMessage& message, bool is_last) {
    if (message.role == Role::kTool) return ToolResult(message);
    if (!message.tool_calls.empty()) return ToolCalls(message);
    Header(message.role == Role::kSystem ? "system" : message.role == Role::kUser ? "user" : "assistant");
    builder_.Text(Content(message));
    if (!is_last || !chat_.continue_final_message) builder_.Special(kEndOfTurn);
  }

  void ToolResult(const ChatMessage& message) {
    Header("ipython");
    std::string text;
    if (style_.results == Results::kRaw) {
      text = message.content;
    } else if (message.content_is_json) {
      StructuredResult(ParsePyJson(message.content).value(), &text);
    } else {
      if (style_.results != Results::kQuoted) text.append("{\"output\": ");
      AppendPyJsonString(message.content, &text);
      if (style_.results != Results::kQuoted) text.append("}");
    }
    builder_.Text(text);
    builder_.Special(kEndOfTurn);
  }

  void StructuredResult(const PyValue& content, std::string* text) const {
    if (style_.results == Results::kQuoted || (style_.results == Results::kOutput && content.is_dict())) {
      AppendPyJson(content, text);
    } else if (style_.results == Results::kOutput) {
      text->append("{\"output\": ");
      AppendPyJson(content, text);
      text->append("}");
    } else {  // kOutputParts: of an array of content parts, the texts; all else prints nothing
      for (const PyValue& part : content.items) {
        const PyValue* type = part.is_dict() ? part.Find("type") : nullptr;
        const PyValue* part_text = part.is_dict() ? part.Find("text") : nullptr;
        if (type == nullptr || type->text != "text" || part_text == nullptr) continue;
        text->append("{\"output\": ");
        AppendPyJson(*part_text, text);
        text->append("}");
      }
    }
  }

  // Content beside calls is dropped, except by Meta's own format, which puts it first.
  void ToolCalls(const ChatMessage& message) {
    Header("assistant");
    if (style_.calls == Calls::kPythonic) {
      builder_.Text(PythonicCalls(message.tool_calls));
      return builder_.Special(kEndOfTurn);
    }
    const ToolCall& call = message.tool_calls[0];
    const bool builtin = IsBuiltin(call.name);
    const bool typed = style_.calls == Calls::kTypedJson;
    if (typed) {
      builder_.Text(message.content);
      builder_.EndRun();
    }
    if (builtin) {
      builder_.Special(kPythonTag);
      builder_.Text(BuiltinCall(call, typed));
    } else {
      std::string text =
          StrCat(typed ? "{\"type\": \"function\", " : "{", "\"name\": \"", call.name, "\", \"parameters\": ");
      AppendPyJson(CallArguments(call), &text);
      text.append("}");
      builder_.Text(text);
    }
    // Meta's format ends a message, not the turn, where a built-in tool was called; the templates wherever there are
    // any.
    builder_.Special((typed ? builtin : builtin_mode()) ? kEndOfMessage : kEndOfTurn);
  }

  // name.call(query="..."); Meta's format prints the code of the interpreter bare.
  static std::string BuiltinCall(const ToolCall& call, bool bare_code) {
    const PyValue arguments = CallArguments(call);
    const PyValue* code = bare_code && call.name == kCodeInterpreter ? arguments.Find("code") : nullptr;
    if (code != nullptr) return code->text;
    std::string text = StrCat(call.name, ".call(");
    for (size_t i = 0; i < arguments.items.size(); ++i) {
      text.append(StrCat(i > 0 ? ", " : "", arguments.keys[i], "=\"", arguments.items[i].text, "\""));
    }
    return text.append(")");
  }

  // The template prints texts without quotes.
  static std::string PythonicCalls(const std::vector<ToolCall>& calls) {
    std::string text = "[";
    for (size_t i = 0; i < calls.size(); ++i) {
      const PyValue arguments = CallArguments(calls[i]);
      text.append(StrCat(i > 0 ? ", " : "", calls[i].name, "("));
      for (size_t j = 0; j < arguments.items.size(); ++j) {
        text.append(StrCat(j > 0 ? ", " : "", arguments.keys[j], "="));
        AppendPyStr(arguments.items[j], &text);
      }
      text.append(")");
    }
    return text.append("]");
  }

  const Llama3Style& style_;
  const Conversation& chat_;
  PromptBuilder builder_;
};

class Llama3Format : public ChatFormat {
 public:
  explicit Llama3Format(const Llama3Style& style) : style_(style) {}

  std::string_view name() const override { return style_.name; }
  bool supports_tools() const override { return !style_.tools_in_system.empty(); }
  ToolDialect tool_dialect() const override { return style_.dialect; }
  StatusOr<RenderedPrompt> Render(const Conversation& chat, const Tokenizer& tokenizer) const override {
    return Rendering(style_, chat, tokenizer).Run();
  }

 private:
  const Llama3Style& style_;
};

}  // namespace

std::span<const Llama3Style> Llama3Styles() {
  return kStyles;
}

std::shared_ptr<const ChatFormat> MakeLlama3Format(const Llama3Style& style) {
  return std::make_shared<Llama3Format>(style);
}

}  // namespace altiplano
