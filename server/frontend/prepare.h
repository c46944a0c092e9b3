// From a judged GenerateInput to what the engine runs: text becomes ids, unset fields become the model's defaults, and
// the rules that need the prompt's length are applied. On the text pool.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "server/frontend/generate_input.h"
#include "server/frontend/limits.h"
#include "server/frontend/server.h"
#include "server/scheduler/request.h"

namespace altiplano {

// One request, and how its tokens are to be turned into an answer.
struct PreparedRequest {
  std::shared_ptr<const Request> request;
  bool text = true;
  bool token_ids = false;
  bool keep_special_tokens = false;
  bool include_stop = false;
  std::vector<std::string> stop_strings;
  std::string echo;    // the prompt's text, put before each sequence's
  bool tools = false;  // look for calls to these functions in the answer
  std::vector<std::string> tool_names;
  ToolDialect tool_dialect = ToolDialect::kNone;
  Duration time_limit{};          // from admission; zero: none
  Duration min_flush_interval{};  // zero: none
};

struct PrepareContext {
  const ServedModel& model;
  const FrontendLimits& limits;
  int32_t max_servable_tokens = 0;  // Engine's
  TimePoint now{};
  TimePoint client_deadline = kNever;
};

// `input` has passed ValidateInput and has a request id. Errors: the chat format's (fields below "chat."),
// INVALID_ARGUMENT CONTEXT_LENGTH_EXCEEDED, FAILED_PRECONDITION REQUEST_TOO_LARGE_FOR_SERVER; of a text far too long
// only the beginning is tokenized, and "actual" is what that alone has.
StatusOr<PreparedRequest> Prepare(GenerateInput input, const PrepareContext& context);

// `chat` has passed ValidateChat. Fields in errors begin with "chat.".
StatusOr<RenderedPrompt> RenderChat(ChatInput chat, const ServedModel& model);

// BOS where the model wants one, then the text.
std::vector<TokenId> EncodeText(std::string_view text, bool omit_bos, const Tokenizer& tokenizer);

std::string DecodeTokens(const std::vector<TokenId>& ids, bool keep_special,
                         const std::shared_ptr<const Tokenizer>& tokenizer);

}  // namespace altiplano
