// The Llama 3 family of chat formats: turns of "<|start_header_id|>role<|end_header_id|>\n\n" content "<|eot_id|>".
// Sources: the chat templates in Meta's Hugging Face repositories (3, 3.1, 3.2, 3.3), Meta's own ChatFormat
// (llama-models, chat_format.py), and the tool-calling templates among vLLM's examples.
#pragma once

#include <memory>
#include <span>
#include <string_view>

#include "server/text/chat_format.h"
#include "server/text/chat_prompt.h"

namespace altiplano {

// What tells the formats of the family apart; one static table of these, see docs/chat_formats.md.
struct Llama3Style {
  std::string_view name;
  bool dated_system = false;  // always a system block, with cut-off and current date
  bool trims = true;          // blanks around contents
  bool joins_runs = true;     // header and content are encoded together
  bool has_builtin_tools = false;
  bool tools_in_user_message = true;  // the default of where tools are described
  // How tools are described; empty: the format has no tools.
  std::string_view tools_in_system = {}, tools_in_user = {};
  std::string_view default_system = {};    // when there is no system message, and
  bool default_system_needs_tools = true;  // tools are given, or always
  enum class Calls { kRefused, kJson, kTypedJson, kPythonic } calls = Calls::kRefused;
  enum class Results { kQuoted, kOutput, kOutputParts, kRaw } results = Results::kQuoted;
  ToolDialect dialect = ToolDialect::kNone;
};

std::span<const Llama3Style> Llama3Styles();

// `style` is one of Llama3Styles().
std::shared_ptr<const ChatFormat> MakeLlama3Format(const Llama3Style& style);

}  // namespace altiplano
