#include "server/text/chat_template.h"

#include <algorithm>
#include <span>

namespace altiplano {

namespace {

// Texts between tags and the insides of tags, in the order of the template.
class Splitter {
 public:
  Splitter(std::string_view jinja, TemplateParts* parts) : jinja_(jinja), parts_(parts) {}

  bool Run() {
    while (at_ < jinja_.size()) {
      const size_t tag = NextTag();
      Between(jinja_.substr(at_, tag - at_), tag < jinja_.size() ? jinja_.substr(tag, 3) : std::string_view());
      at_ = tag;
      if (at_ < jinja_.size() && !Tag()) return false;
    }
    auto& texts = parts_->texts;
    std::sort(texts.begin(), texts.end());
    texts.erase(std::unique(texts.begin(), texts.end()), texts.end());
    return true;
  }

 private:
  size_t NextTag() const {
    for (size_t i = at_; i + 1 < jinja_.size(); ++i) {
      if (jinja_[i] == '{' && (jinja_[i + 1] == '{' || jinja_[i + 1] == '%' || jinja_[i + 1] == '#')) return i;
    }
    return jinja_.size();
  }

  // What Jinja prints of the text between two tags, with the blanks control that Hugging Face sets: trim_blocks (the
  // newline after a block goes) and lstrip_blocks (so do the blanks before one on its line). `next`: the next tag.
  void Between(std::string_view text, std::string_view next) {
    constexpr std::string_view kBlanks = " \t\n";
    const bool next_is_block = next.starts_with("{%") || next.starts_with("{#");
    if (strip_after_tag_) {
      text.remove_prefix(std::min(text.find_first_not_of(kBlanks), text.size()));
    } else if (after_block_ && text.starts_with('\n')) {
      text.remove_prefix(1);
    }
    if (next.ends_with('-')) {
      text = text.substr(0, text.find_last_not_of(kBlanks) + 1);
    } else if (next_is_block) {
      const size_t end = text.find_last_not_of(" \t") + 1;
      if (end == 0 || text[end - 1] == '\n') text = text.substr(0, end);
    } else if (next.empty() && text.ends_with('\n')) {
      text.remove_suffix(1);  // keep_trailing_newline is off
    }
    if (!text.empty()) parts_->texts.emplace_back(text);
  }

  bool Tag() {
    const char kind = jinja_[at_ + 1];
    at_ += 2;
    after_block_ = kind != '{';
    if (kind == '#') {
      const size_t end = jinja_.find("#}", at_);
      if (end == std::string_view::npos) return false;
      strip_after_tag_ = end > at_ && jinja_[end - 1] == '-';
      at_ = end + 2;
      return true;
    }
    if (at_ < jinja_.size() && (jinja_[at_] == '-' || jinja_[at_] == '+')) ++at_;
    parts_->code.append(kind == '{' ? "{{" : "{%");
    return Inside(kind == '{' ? "}}" : "%}");
  }

  bool Inside(std::string_view close) {
    int braces = 0;
    while (at_ < jinja_.size()) {
      const std::string_view rest = jinja_.substr(at_);
      const char c = rest[0];
      const bool controls = (c == '-' || c == '+') && rest.substr(1).starts_with(close);
      if (controls || (rest.starts_with(close) && braces == 0)) {
        strip_after_tag_ = controls && c == '-';
        at_ += close.size() + (controls ? 1 : 0);
        parts_->code.append(close);
        return true;
      }
      if (c == '\'' || c == '"') {
        if (!Literal()) return false;
        continue;
      }
      if (c == '{') ++braces;
      if (c == '}') --braces;
      if (c != ' ' && c != '\t' && c != '\n') parts_->code.push_back(c);
      ++at_;
    }
    return false;
  }

  bool Literal() {
    const char quote = jinja_[at_++];
    std::string text;
    while (at_ < jinja_.size() && jinja_[at_] != quote) {
      char c = jinja_[at_++];
      if (c == '\\' && at_ < jinja_.size()) {
        c = jinja_[at_++];
        if (c == 'n') {
          c = '\n';
        } else if (c == 't') {
          c = '\t';
        } else if (c != '\\' && c != '\'' && c != '"') {
          text.push_back('\\');
        }
      }
      text.push_back(c);
    }
    if (at_ == jinja_.size()) return false;
    ++at_;
    const bool is_error = parts_->code.ends_with("raise_exception(");  // its text is never printed
    parts_->code.append("'").append(text).append("'");
    if (!is_error) parts_->texts.push_back(std::move(text));
    return true;
  }

  std::string_view jinja_;
  TemplateParts* parts_;
  size_t at_ = 0;
  bool strip_after_tag_ = false, after_block_ = false;
};

using Texts = std::span<const std::string_view>;

struct KnownTemplate {
  std::string_view format;
  Texts required, optional;  // all texts of the template are among these
  Texts more_required;
  int trims;            // uses of the filter `trim`
  int slices;           // of messages, where the first is taken apart
  Texts code, no_code;  // that the code must, and must not have
};

constexpr std::string_view kWords[] = {
    "",     "role",      "content", "system", "user",    "assistant",        "function",
    "name", "arguments", "type",    "text",   "equalto", "<|begin_of_text|>"};

constexpr std::string_view kLlama3[] = {"<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>",
                                        "<|start_header_id|>assistant<|end_header_id|>\n\n"};

// Of all the templates with a dated system block.
constexpr std::string_view kDated[] = {"<|start_header_id|>",
                                       "<|end_header_id|>\n\n",
                                       "<|eot_id|>",
                                       "<|start_header_id|>assistant<|end_header_id|>\n\n",
                                       "<|start_header_id|>system<|end_header_id|>\n\n",
                                       "<|start_header_id|>user<|end_header_id|>\n\n",
                                       "<|start_header_id|>ipython<|end_header_id|>\n\n",
                                       "Environment: ipython\n",
                                       "Cutting Knowledge Date: December 2023\n",
                                       "Today Date: ",
                                       "26 Jul 2024",
                                       "\n\n",
                                       "Do not use variables.\n\n"};
constexpr std::string_view kDatedWords[] = {
    "",     "role",      "content", "system", "user",    "assistant",  "tool", "ipython",           "function",
    "name", "arguments", "type",    "text",   "equalto", "tool_calls", "trim", "<|begin_of_text|>", "%d %b %Y",
    "\n"};

constexpr std::string_view kJsonTools[] = {
    "You have access to the following functions. To call a function, please respond with JSON for a function call.",
    "Given the following functions, please respond with a JSON for a function call ",
    "with its proper arguments that best answers the given prompt.\n\n",
    "Respond in the format {\"name\": function name, \"parameters\": dictionary of argument name and its value}.",
    "{\"name\": \"",
    "\", ",
    "\"parameters\": ",
    "}"};
constexpr std::string_view kBuiltinTools[] = {
    "You have access to the following functions. To call a function, please respond with JSON for a function call.",
    "Given the following functions, please respond with a JSON for a function call ",
    "with its proper arguments that best answers the given prompt.\n\n",
    "Respond in the format {\"name\": function name, \"parameters\": dictionary of argument name and its value}.",
    "{\"name\": \"",
    "\", ",
    "\"parameters\": ",
    "}",
    "Tools: ",
    "code_interpreter",
    ", ",
    "<|python_tag|>",
    ".call(",
    "=\"",
    "\"",
    ")",
    "<|eom_id|>"};
constexpr std::string_view kToolSystem =
    "You are a helpful assistant with tool calling capabilities. Only reply with a tool call if the function exists in "
    "the library provided by the user. If it doesn't exist, just reply directly in natural language. When you receive "
    "a tool call response, use the output to format an answer to the original user question.";
constexpr std::string_view kSpacedJsonTools[] = {
    "You have access to the following functions. To call a function, please respond with JSON for a function call. ",
    "Given the following functions, please respond with a JSON for a function call ",
    "with its proper arguments that best answers the given prompt.\n\n",
    "Respond in the format {\"name\": function name, \"parameters\": dictionary of argument name and its value}. ",
    "{\"name\": \"",
    "\", ",
    "\"parameters\": ",
    "}",
    "output",
    kToolSystem};
constexpr std::string_view kSpacedJsonImageTools[] = {
    "You have access to the following functions. To call a function, please respond with JSON for a function call. ",
    "Given the following functions, please respond with a JSON for a function call ",
    "with its proper arguments that best answers the given prompt.\n\n",
    "Respond in the format {\"name\": function name, \"parameters\": dictionary of argument name and its value}. ",
    "{\"name\": \"",
    "\", ",
    "\"parameters\": ",
    "}",
    "output",
    "image",
    "<|image|>",
    kToolSystem};
constexpr std::string_view kPythonicTools[] = {
    "You have access to the following functions. To call functions, please respond with a python list of the calls. ",
    "Given the following functions, please respond with a python list for function calls ",
    "with their proper arguments to best answer the given prompt.\n\n",
    "Respond in the format [func_name1(params_name1=params_value1, params_name2=params_value2...), "
    "func_name2(params)] ",
    "<|start_header_id|>assistant<|end_header_id|>\n\n[",
    "]<|eot_id|>",
    "(",
    ")",
    "=",
    "%s",
    ", ",
    "output",
    kToolSystem};

constexpr std::string_view kChatMlMarks[] = {"<|im_start|>", "\n", "<|im_end|>", "<|im_start|>assistant\n"};
constexpr std::string_view kChatMlJoined[] = {"<|im_start|>", "\n", "<|im_end|>\n", "<|im_start|>assistant\n"};
constexpr std::string_view kSmolLm2Words[] = {
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"};

constexpr std::string_view kNoCode[] = {"bos_token", "tools", "strip("};
constexpr std::string_view kPlainNoCode[] = {"tools", "strip("};
constexpr std::string_view kToolsInUser[] = {"settools_in_user_message=true", "tojson(indent=4)", "bos_token"};
constexpr std::string_view kToolsInSystem[] = {"settools_in_user_message=false", "tojson(indent=4)", "bos_token"};
constexpr std::string_view kBos[] = {"bos_token"};
constexpr std::string_view kFirstNotSystem[] = {"messages[0]['role']!='system'"};
constexpr std::string_view kStrip[] = {"strip("};

constexpr KnownTemplate kKnown[] = {
    {"llama3", kLlama3, kWords, {}, 1, 0, kBos, kPlainNoCode},
    {"llama3-meta", kLlama3, kWords, {}, 0, 0, kBos, kPlainNoCode},
    {"llama3.1", kDated, kDatedWords, kBuiltinTools, 3, 2, kToolsInUser, kStrip},  // 3.3's is the same
    {"llama3.2", kDated, kDatedWords, kJsonTools, 3, 2, kToolsInUser, kStrip},
    {"vllm-llama3.1-json", kDated, kDatedWords, kSpacedJsonTools, 5, 2, kToolsInUser, kStrip},
    {"vllm-llama3.2-json", kDated, kDatedWords, kSpacedJsonImageTools, 5, 2, kToolsInSystem, kStrip},
    {"vllm-llama3.2-pythonic", kDated, kDatedWords, kPythonicTools, 3, 2, kToolsInSystem, kStrip},
    {"smollm2", kChatMlMarks, kWords, kSmolLm2Words, 0, 0, kFirstNotSystem, kNoCode},
    {"chatml", kChatMlMarks, kWords, {}, 0, 0, {}, kNoCode},
    {"chatml", kChatMlJoined, kWords, {}, 0, 0, {}, kNoCode},
};

bool Contains(Texts texts, std::string_view text) {
  return std::find(texts.begin(), texts.end(), text) != texts.end();
}

int Count(std::string_view code, std::string_view snippet) {
  int count = 0;
  for (size_t at = code.find(snippet); at != std::string_view::npos; at = code.find(snippet, at + 1)) ++count;
  return count;
}

// Changes of logic that add no text: a second BOS token, the answer's header under another condition than that it is
// asked for, a branch switched off, messages in another order.
bool HasKnownLogic(std::string_view code) {
  const bool has_default = Count(code, "{%ifnotadd_generation_promptisdefined%}{%setadd_generation_prompt=false%}") > 0;
  return Count(code, "bos_token") <= 1 && Count(code, "{%ifadd_generation_prompt%}") <= 1 &&
         Count(code, "add_generation_prompt") == Count(code, "{%ifadd_generation_prompt%}") + (has_default ? 2 : 0) &&
         Count(code, "{%iffalse%}") + Count(code, "{%iftrue%}") == 0 &&
         Count(code, "|reverse") + Count(code, "|sort") + Count(code, "[::") == 0;
}

bool Matches(const KnownTemplate& known, const TemplateParts& parts) {
  const auto present = [&](std::string_view text) {
    return std::binary_search(parts.texts.begin(), parts.texts.end(), text);
  };
  const auto in_code = [&](std::string_view snippet) { return parts.code.find(snippet) != std::string::npos; };
  return std::all_of(parts.texts.begin(), parts.texts.end(),
                     [&](const std::string& text) {
                       return Contains(known.required, text) || Contains(known.more_required, text) ||
                              Contains(known.optional, text);
                     }) &&
         std::all_of(known.required.begin(), known.required.end(), present) &&
         std::all_of(known.more_required.begin(), known.more_required.end(), present) &&
         Count(parts.code, "|trim") == known.trims && Count(parts.code, "[1:]") == known.slices &&
         std::all_of(known.code.begin(), known.code.end(), in_code) &&
         std::none_of(known.no_code.begin(), known.no_code.end(), in_code);
}

}  // namespace

bool SplitTemplate(std::string_view jinja, TemplateParts* parts) {
  std::string unix_lines;
  for (size_t i = 0; i < jinja.size(); ++i) {
    if (jinja[i] != '\r' || !jinja.substr(i + 1).starts_with('\n')) unix_lines.push_back(jinja[i]);
  }
  return Splitter(unix_lines, parts).Run();
}

std::string_view RecogniseChatTemplate(std::string_view jinja) {
  TemplateParts parts;
  if (!SplitTemplate(jinja, &parts) || !HasKnownLogic(parts.code)) return "";
  for (const KnownTemplate& known : kKnown) {
    if (Matches(known, parts)) return known.format;
  }
  return "";
}

}  // namespace altiplano
