// What the chat formats share: building text and ids side by side, and the rules that hold for every conversation.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "server/base/status.h"
#include "server/text/chat_format.h"
#include "server/text/python_json.h"

namespace altiplano {

// Special tokens come only from Special(). Text between two of them is encoded as one run, as the reference does, which
// tokenises the whole prompt: "\n\n" after a header and the blanks that a message starts with may share a token.
class PromptBuilder {
 public:
  explicit PromptBuilder(const Tokenizer& tokenizer) : tokenizer_(tokenizer) {}

  void Text(std::string_view text) { prompt_.text.append(text); }
  void Special(std::string_view name);  // by its name, "<|eot_id|>"
  void EndRun();                        // what follows shares no token with what is before, as where a format says so

  // FAILED_PRECONDITION when the tokenizer lacked a special token. Ends the use of the builder.
  StatusOr<RenderedPrompt> Finish();

 private:
  const Tokenizer& tokenizer_;
  RenderedPrompt prompt_;
  size_t run_begin_ = 0;  // of the text not encoded yet
  std::string missing_;   // the first special token that the tokenizer lacks
};

// INVALID_ARGUMENT with one field violation.
Status ChatViolation(std::string field, std::string_view description);
std::string MessageField(size_t index, std::string_view member = {});  // "messages[2].role"

// Holds for every format: there are messages, all text is UTF-8, calls are the assistant's and well formed, a tool
// message answers an assistant message with calls, a message to be continued is the assistant's plain text.
Status CheckConversation(const Conversation& chat);

// For formats without tools.
Status RefuseTools(const Conversation& chat, std::string_view format);

// The arguments of a call, which CheckConversation has accepted.
PyValue CallArguments(const ToolCall& call);

}  // namespace altiplano
