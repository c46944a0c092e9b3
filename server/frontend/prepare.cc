#include "server/frontend/prepare.h"

#include <algorithm>

#include "server/base/strings.h"
#include "server/frontend/random_id.h"
#include "server/frontend/validate.h"
#include "server/text/incremental_decoder.h"

namespace altiplano {

namespace {

// Below this, differences of logits that float32 can tell apart are scaled past the range of exp: the draw is greedy.
constexpr float kGreedyBelow = 1e-4F;

Status WithPrefix(const Status& status, std::string_view prefix) {
  if (status.detail() == nullptr || status.detail()->field_violations.empty()) return status;
  ErrorDetail detail = *status.detail();
  for (FieldViolation& violation : detail.field_violations) violation.field = StrCat(prefix, violation.field);
  return Status(status.code(), StrCat(prefix, status.message()), std::move(detail));
}

SamplingParams SamplingOf(const GenerateInput& input, const ServedModel& model) {
  const SamplingInput& in = input.sampling;
  const SamplingDefaults& defaults = model.defaults;
  SamplingParams out;
  auto fill = [](const std::optional<float>& asked, const std::optional<float>& by_model, float* value) {
    if (asked || by_model) *value = asked ? *asked : *by_model;
  };
  fill(in.temperature, defaults.temperature, &out.temperature);
  if (out.temperature < kGreedyBelow) out.temperature = 0;
  fill(in.top_p, defaults.top_p, &out.top_p);
  fill(in.min_p, defaults.min_p, &out.min_p);
  fill(in.repetition_penalty, defaults.repetition_penalty, &out.repetition_penalty);
  fill(in.presence_penalty, std::nullopt, &out.presence_penalty);
  fill(in.frequency_penalty, std::nullopt, &out.frequency_penalty);
  uint32_t top_k = in.top_k ? *in.top_k : static_cast<uint32_t>(std::max(0, defaults.top_k.value_or(0)));
  // As many as there are is the same as off.
  out.top_k = top_k >= static_cast<uint32_t>(model.vocab_size) ? 0 : static_cast<int32_t>(top_k);
  out.seed = in.seed ? *in.seed : RandomU64();
  for (const auto& [id, bias] : in.logit_bias) out.logit_bias.emplace_back(static_cast<TokenId>(id), bias);
  std::sort(out.logit_bias.begin(), out.logit_bias.end());
  auto top = [](const std::optional<uint32_t>& n) { return n ? static_cast<int32_t>(*n) : -1; };
  out.top_logprobs = top(input.output.top_logprobs);
  out.prompt_top_logprobs = top(input.output.prompt_top_logprobs);
  return out;
}

// A tokenizer that leaves off where a prompt is longer than it may be: the rest would only take time.
class PromptTokenizer : public Tokenizer {
 public:
  PromptTokenizer(const Tokenizer& tokenizer, int64_t most) : inner_(tokenizer), most_(static_cast<size_t>(most)) {}
  // All that it was given has been encoded.
  bool whole() const { return whole_; }

  void Encode(std::string_view text, std::vector<TokenId>* ids) const override {
    whole_ = whole_ && inner_.EncodeUpTo(most_, text, ids);
  }
  std::string_view TokenBytes(TokenId id) const override { return inner_.TokenBytes(id); }
  bool IsSpecial(TokenId id) const override { return inner_.IsSpecial(id); }
  std::optional<TokenId> Special(std::string_view name) const override { return inner_.Special(name); }
  int32_t vocab_size() const override { return inner_.vocab_size(); }
  std::optional<TokenId> bos() const override { return inner_.bos(); }

 private:
  const Tokenizer& inner_;
  const size_t most_;
  mutable bool whole_ = true;
};

// What the prompt becomes. whole: false when only its beginning is in ids, which is too long already.
struct Prompt {
  std::vector<TokenId> ids;
  bool whole = true;
};

// actual: of a prompt that is not whole, at least.
Status TooLong(Code code, std::string_view reason, std::string_view what, int64_t actual, int64_t limit,
               bool whole = true) {
  ErrorDetail detail;
  detail.reason = std::string(reason);
  detail.metadata = {{"limit", StrCat(limit)}, {"actual", StrCat(actual)}};
  return Status(code,
                StrCat("the prompt and at least one new token (or min_new_tokens) are ", whole ? "" : "at least ",
                       actual, " tokens, ", what, " takes ", limit),
                std::move(detail));
}

// Fills max_new_tokens with what both the context and this server's KV pool leave.
Status FitLength(const StoppingInput& in, const Prompt& prompt, const PrepareContext& context, StopParams* out) {
  const auto prompt_tokens = static_cast<int64_t>(prompt.ids.size());
  int64_t least = prompt_tokens + std::max<int64_t>(1, in.min_new_tokens);
  int64_t max_context = context.model.max_context;
  if (least > max_context) {
    return TooLong(Code::kInvalidArgument, "CONTEXT_LENGTH_EXCEEDED", "the model's context", least, max_context,
                   prompt.whole);
  }
  int64_t servable = context.max_servable_tokens;
  if (least > servable) {
    return TooLong(Code::kFailedPrecondition, "REQUEST_TOO_LARGE_FOR_SERVER", "this server's KV cache", least,
                   servable);
  }
  int64_t room = std::min(max_context, servable) - prompt_tokens;
  out->max_new_tokens = static_cast<int32_t>(std::min<int64_t>(room, in.max_new_tokens.value_or(room)));
  out->min_new_tokens = static_cast<int32_t>(in.min_new_tokens);
  return OkStatus();
}

// The instant `wait` after now; far waits are never.
TimePoint After(TimePoint now, Duration wait) {
  return wait > kNever - now ? kNever : now + wait;
}

StatusOr<RenderedPrompt> Render(ChatInput chat, const ChatFormat& format, const Tokenizer& tokenizer) {
  Conversation conversation;
  conversation.messages.reserve(chat.messages.size());
  for (ChatMessageInput& in : chat.messages) {
    ChatMessage message;
    message.role = *in.role;
    message.content = std::move(in.content);
    message.tool_calls = std::move(in.tool_calls);
    message.tool_call_id = std::move(in.tool_call_id);
    conversation.messages.push_back(std::move(message));
  }
  // With "none" the model is not told of its tools: it cannot call what it does not know.
  if (chat.tool_choice != ToolChoiceKind::kNone) conversation.tools_json = std::move(chat.tools_json);
  conversation.continue_final_message = chat.continue_final_message;
  conversation.date = std::move(chat.date);
  auto rendered = format.Render(conversation, tokenizer);
  if (!rendered.ok()) return WithPrefix(rendered.status(), "chat.");
  return rendered;
}

StatusOr<Prompt> PromptOf(GenerateInput* input, const ServedModel& model) {
  const PromptTokenizer tokenizer(*model.tokenizer, model.max_context);
  Prompt prompt;
  switch (input->prompt) {
    case PromptKind::kChat: {
      ASSIGN_OR_RETURN(RenderedPrompt rendered, Render(std::move(input->chat), *model.chat_format, tokenizer));
      prompt.ids = std::move(rendered.ids);
      break;
    }
    case PromptKind::kTokenIds:
      prompt.ids.assign(input->token_ids.begin(), input->token_ids.end());
      break;
    default:
      prompt.ids = EncodeText(input->text, /*omit_bos=*/false, tokenizer);
  }
  prompt.whole = tokenizer.whole();
  return prompt;
}

Status OfferTools(const ChatInput& chat, const ServedModel& model, PreparedRequest* out) {
  if (chat.tools_json.empty() || chat.tool_choice == ToolChoiceKind::kNone) return OkStatus();
  auto names = ToolNames(chat.tools_json);
  if (!names.ok()) return WithPrefix(names.status(), "chat.");
  out->tools = true;
  out->tool_names = std::move(*names);
  out->tool_dialect = model.chat_format->tool_dialect();
  return OkStatus();
}

}  // namespace

std::vector<TokenId> EncodeText(std::string_view text, bool omit_bos, const Tokenizer& tokenizer) {
  std::vector<TokenId> ids;
  if (!omit_bos && tokenizer.bos()) ids.push_back(*tokenizer.bos());
  tokenizer.Encode(text, &ids);
  return ids;
}

std::string DecodeTokens(const std::vector<TokenId>& ids, bool keep_special,
                         const std::shared_ptr<const Tokenizer>& tokenizer) {
  IncrementalDecoder decoder(tokenizer, keep_special);
  std::string text;
  for (TokenId id : ids) text += decoder.Push(id);
  text += decoder.Flush();
  return text;
}

StatusOr<RenderedPrompt> RenderChat(ChatInput chat, const ServedModel& model) {
  return Render(std::move(chat), *model.chat_format, *model.tokenizer);
}

StatusOr<PreparedRequest> Prepare(GenerateInput input, const PrepareContext& context) {
  const ServedModel& model = context.model;
  PreparedRequest out;
  if (input.prompt == PromptKind::kChat) RETURN_IF_ERROR(OfferTools(input.chat, model, &out));

  auto request = std::make_shared<Request>();
  ASSIGN_OR_RETURN(Prompt prompt, PromptOf(&input, model));
  RETURN_IF_ERROR(FitLength(input.stopping, prompt, context, &request->stop));
  request->prompt = std::move(prompt.ids);
  request->id = std::move(input.request_id);
  request->num_sequences = static_cast<int32_t>(input.sampling.num_sequences.value_or(1));
  request->sampling = SamplingOf(input, model);
  request->stop.ignore_eos = input.stopping.ignore_eos;
  request->stop.token_ids.assign(input.stopping.token_ids.begin(), input.stopping.token_ids.end());
  request->priority = input.priority;
  request->tenant = std::move(input.tenant);
  request->cache_salt = std::move(input.cache_salt);
  request->bypass_prefix_cache = input.bypass_prefix_cache;
  request->arrival = context.now;
  Duration queue_wait = context.limits.max_queue_wait;
  if (input.queue_timeout) queue_wait = std::min(queue_wait, *ToDuration(*input.queue_timeout));
  request->queue_deadline = After(context.now, queue_wait);
  request->deadline = context.client_deadline;
  if (input.ttft_target) request->ttft_target = *ToDuration(*input.ttft_target);

  out.text = !input.output.omit_text;
  out.token_ids = input.output.token_ids;
  out.keep_special_tokens = input.output.keep_special_tokens;
  out.include_stop = input.stopping.include_stop_in_output;
  out.stop_strings = std::move(input.stopping.sequences);
  if (input.output.echo_prompt) {
    out.echo = DecodeTokens(request->prompt, out.keep_special_tokens, model.tokenizer);
  }
  if (input.stopping.time_limit) out.time_limit = *ToDuration(*input.stopping.time_limit);
  if (input.min_flush_interval) out.min_flush_interval = *ToDuration(*input.min_flush_interval);
  out.request = std::move(request);
  return out;
}

}  // namespace altiplano
