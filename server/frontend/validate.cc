#include "server/frontend/validate.h"

#include <algorithm>
#include <cmath>
#include <unordered_set>

#include "server/base/strings.h"
#include "server/frontend/error_mapping.h"

namespace altiplano {

namespace {

constexpr size_t kMaxViolations = 16;  // then it is enough
constexpr size_t kMaxDateBytes = 64;

// Collects what is wrong.
class Violations {
 public:
  void Add(std::string field, std::string description) {
    if (list_.size() < kMaxViolations) list_.push_back({std::move(field), std::move(description)});
  }
  void AddAll(const Status& status) {
    if (status.ok()) return;
    for (const FieldViolation& violation : status.detail()->field_violations) {
      Add(violation.field, violation.description);
    }
  }
  void AtMost(std::string_view field, uint64_t value, int64_t limit, std::string_view unit) {
    if (value > static_cast<uint64_t>(limit)) {
      Add(std::string(field), StrCat("has ", value, " ", unit, ", at most ", limit, " are allowed"));
    }
  }
  void Utf8(std::string_view field, std::string_view text) {
    if (!IsValidUtf8(text)) Add(std::string(field), "is not valid UTF-8");
  }
  Status Take() { return list_.empty() ? OkStatus() : InvalidFields(std::move(list_)); }

 private:
  std::vector<FieldViolation> list_;
};

// A finite number within [low, high]; low itself only when `closed`.
void CheckFloat(std::string_view name, const std::optional<float>& value, float low, float high, bool closed,
                Violations* out) {
  if (!value) return;
  bool above = closed ? *value >= low : *value > low;
  if (std::isfinite(*value) && above && *value <= high) return;
  out->Add(StrCat("sampling.", name), StrCat("is ", *value, ", must be in ", closed ? "[" : "(", low, ", ", high, "]"));
}

void CheckIds(std::string_view field, const std::vector<uint32_t>& ids, int32_t vocab_size, Violations* out) {
  for (size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < static_cast<uint32_t>(vocab_size)) continue;
    out->Add(StrCat(field, "[", i, "]"), StrCat("is ", ids[i], ", the vocabulary has ", vocab_size, " tokens"));
    return;
  }
}

void CheckSampling(const SamplingInput& in, const ServedModel& model, const FrontendLimits& limits, Violations* out) {
  CheckFloat("temperature", in.temperature, 0, 100, true, out);
  CheckFloat("top_p", in.top_p, 0, 1, false, out);
  CheckFloat("min_p", in.min_p, 0, 1, true, out);
  CheckFloat("presence_penalty", in.presence_penalty, -2, 2, true, out);
  CheckFloat("frequency_penalty", in.frequency_penalty, -2, 2, true, out);
  CheckFloat("repetition_penalty", in.repetition_penalty, 0.01F, 100, true, out);
  if (in.num_sequences && (*in.num_sequences < 1 || *in.num_sequences > static_cast<uint32_t>(limits.max_sequences))) {
    out->Add("sampling.num_sequences",
             StrCat("is ", *in.num_sequences, ", must be in [1, ", limits.max_sequences, "]"));
  }
  out->AtMost("sampling.logit_bias", in.logit_bias.size(), limits.max_logit_bias, "entries");
  std::unordered_set<uint32_t> seen;
  for (const auto& [id, bias] : in.logit_bias) {
    std::string field = StrCat("sampling.logit_bias[", id, "]");
    if (id >= static_cast<uint32_t>(model.vocab_size)) {
      out->Add(field, StrCat("names no token, the vocabulary has ", model.vocab_size));
    } else if (!std::isfinite(bias) || std::abs(bias) > 100) {
      out->Add(field, StrCat("is ", bias, ", must be in [-100, 100]"));
    } else if (!seen.insert(id).second) {
      out->Add(field, "is given twice");
    }
  }
}

void CheckDuration(std::string_view field, const std::optional<DurationInput>& value, Violations* out) {
  if (!value || ToDuration(*value)) return;
  out->Add(std::string(field), StrCat("is ", value->seconds, " s and ", value->nanos,
                                      " ns, must be more than nothing, at most ten years, and of one sign"));
}

void CheckStopping(const StoppingInput& in, const ServedModel& model, const FrontendLimits& limits, Violations* out) {
  if (in.max_new_tokens == 0U) out->Add("stopping.max_new_tokens", "is 0, must be at least 1");
  if (in.max_new_tokens && in.min_new_tokens > *in.max_new_tokens) {
    out->Add("stopping.min_new_tokens",
             StrCat("is ", in.min_new_tokens, ", more than max_new_tokens, which is ", *in.max_new_tokens));
  }
  out->AtMost("stopping.sequences", in.sequences.size(), limits.max_stop_strings, "strings");
  for (size_t i = 0; i < in.sequences.size(); ++i) {
    std::string field = StrCat("stopping.sequences[", i, "]");
    if (in.sequences[i].empty()) out->Add(field, "is empty");
    out->AtMost(field, in.sequences[i].size(), limits.max_stop_string_bytes, "bytes");
    out->Utf8(field, in.sequences[i]);
  }
  out->AtMost("stopping.token_ids", in.token_ids.size(), limits.max_stop_ids, "ids");
  CheckIds("stopping.token_ids", in.token_ids, model.vocab_size, out);
  CheckDuration("stopping.time_limit", in.time_limit, out);
}

void CheckOutput(const GenerateInput& input, const FrontendLimits& limits, Violations* out) {
  auto top = [&](std::string_view name, const std::optional<uint32_t>& value) {
    if (value && *value > static_cast<uint32_t>(limits.max_top_logprobs)) {
      out->Add(StrCat("output.", name), StrCat("is ", *value, ", must be in [0, ", limits.max_top_logprobs, "]"));
    }
  };
  top("top_logprobs", input.output.top_logprobs);
  top("prompt_top_logprobs", input.output.prompt_top_logprobs);
  if (input.output.omit_text && input.output.echo_prompt) {
    out->Add("output.echo_prompt", "needs text, which output.omit_text leaves out");
  }
}

// Empty: none is given.
void CheckName(std::string_view field, std::string_view name, int64_t most_bytes, Violations* out) {
  out->AtMost(field, name.size(), most_bytes, "bytes");
  if (std::any_of(name.begin(), name.end(), [](char c) { return c < '!' || c > '~'; })) {
    out->Add(std::string(field), "has a byte outside of visible ASCII ('!' to '~')");
  }
}

void CheckRequestId(std::string_view id, const FrontendLimits& limits, Violations* out) {
  CheckName("request_id", id, limits.max_request_id_bytes, out);
}

void CheckNames(const GenerateInput& input, const FrontendLimits& limits, Violations* out) {
  CheckRequestId(input.request_id, limits, out);
  CheckName("scheduling.tenant", input.tenant, limits.max_tenant_bytes, out);
  out->AtMost("cache.salt", input.cache_salt.size(), limits.max_cache_salt_bytes, "bytes");
  CheckDuration("scheduling.queue_timeout", input.queue_timeout, out);
  CheckDuration("scheduling.ttft_target", input.ttft_target, out);
}

// What ValidateChat reports of one message. Returns its bytes.
uint64_t CheckMessage(const ChatMessageInput& message, const std::string& field, Violations* out) {
  if (!message.role) out->Add(field + ".role", "is missing or unknown");
  out->Utf8(field + ".content", message.content);
  uint64_t bytes = message.content.size() + message.tool_call_id.size();
  for (const ToolCall& call : message.tool_calls) {
    bytes += call.id.size() + call.name.size() + call.arguments_json.size();
  }
  return bytes;
}

void CheckChat(const ChatInput& chat, const std::string& prefix, const FrontendLimits& limits, Violations* out) {
  if (chat.messages.empty()) out->Add(prefix + ".messages", "is empty");
  out->AtMost(prefix + ".messages", chat.messages.size(), limits.max_chat_messages, "messages");
  out->AtMost(prefix + ".tools_json", chat.tools_json.size(), limits.max_tools, "tools");
  uint64_t bytes = 0;
  for (size_t i = 0; i < chat.messages.size(); ++i) {
    bytes += CheckMessage(chat.messages[i], StrCat(prefix, ".messages[", i, "]"), out);
  }
  for (const std::string& tool : chat.tools_json) bytes += tool.size();
  out->AtMost(prefix, bytes, limits.max_prompt_bytes, "bytes of text");
  if (chat.tool_choice == ToolChoiceKind::kUnknown) out->Add(prefix + ".tool_choice", "is not a known mode");
  if (chat.date.size() > kMaxDateBytes ||
      std::any_of(chat.date.begin(), chat.date.end(), [](char c) { return c < ' ' || c > '~'; })) {
    out->Add(prefix + ".date", "must be printable ASCII of at most 64 bytes, as \"26 Jul 2024\"");
  }
}

void CheckPrompt(const GenerateInput& input, const ServedModel& model, const FrontendLimits& limits, Violations* out) {
  switch (input.prompt) {
    case PromptKind::kNone:
      out->Add("prompt", "is missing: one of text, token_ids and chat is needed");
      break;
    case PromptKind::kText:
      out->AddAll(ValidateText(input.text, "text", limits));
      if (input.text.empty() && !model.tokenizer->bos()) {
        out->Add("text", "is empty, and this model has no beginning-of-text token to start from");
      }
      break;
    case PromptKind::kTokenIds:
      if (input.token_ids.empty()) out->Add("token_ids.ids", "is empty");
      CheckIds("token_ids.ids", input.token_ids, model.vocab_size, out);
      break;
    case PromptKind::kChat:
      CheckChat(input.chat, "chat", limits, out);
      break;
  }
}

Status CheckChatSupport(const ChatInput& chat, const ServedModel& model) {
  if (model.chat_format == nullptr) {
    ErrorDetail detail;
    detail.reason = "NO_CHAT_FORMAT";
    return Status(Code::kFailedPrecondition,
                  StrCat("model \"", model.name,
                         "\" is served without a chat format; start the server with --chat-format to choose one"),
                  std::move(detail));
  }
  if (chat.tool_choice == ToolChoiceKind::kRequired || chat.tool_choice == ToolChoiceKind::kFunction) {
    return Unsupported("tool_choice", "a forced tool choice (required, or one function) is not supported yet");
  }
  return OkStatus();
}

}  // namespace

bool IsRequestId(std::string_view text, const FrontendLimits& limits) {
  Violations violations;
  CheckRequestId(text, limits, &violations);
  return !text.empty() && violations.Take().ok();
}

std::optional<Duration> ToDuration(const DurationInput& input) {
  constexpr int64_t kTenYears = int64_t{10} * 366 * 24 * 3600;
  if (input.seconds < 0 || input.seconds > kTenYears || input.nanos < 0 || input.nanos > 999'999'999) {
    return std::nullopt;
  }
  Duration value = std::chrono::seconds(input.seconds) + std::chrono::nanoseconds(input.nanos);
  if (value <= Duration(0)) return std::nullopt;
  return value;
}

Status ValidateModelName(std::string_view asked, const ServedModel& model) {
  return asked.empty() || asked == model.name ? OkStatus() : ModelNotFound(asked, model.name);
}

Status ValidateText(std::string_view text, std::string_view field, const FrontendLimits& limits) {
  Violations violations;
  violations.AtMost(field, text.size(), limits.max_prompt_bytes, "bytes");
  violations.Utf8(field, text);
  return violations.Take();
}

Status ValidateTokenIds(const std::vector<uint32_t>& ids, std::string_view field, int32_t vocab_size) {
  Violations violations;
  CheckIds(field, ids, vocab_size, &violations);
  return violations.Take();
}

Status ValidateChat(const ChatInput& chat, std::string_view prefix, const ServedModel& model,
                    const FrontendLimits& limits) {
  Violations violations;
  CheckChat(chat, std::string(prefix), limits, &violations);
  RETURN_IF_ERROR(violations.Take());
  return CheckChatSupport(chat, model);
}

Status ValidateInput(const GenerateInput& input, const ServedModel& model, const FrontendLimits& limits) {
  RETURN_IF_ERROR(ValidateModelName(input.model, model));
  Violations violations;
  CheckNames(input, limits, &violations);
  CheckPrompt(input, model, limits, &violations);
  CheckSampling(input.sampling, model, limits, &violations);
  CheckStopping(input.stopping, model, limits, &violations);
  CheckOutput(input, limits, &violations);
  CheckDuration("min_flush_interval", input.min_flush_interval, &violations);
  RETURN_IF_ERROR(violations.Take());
  if (!input.constraint.empty()) {
    return Unsupported("constraint", StrCat("constraint.", input.constraint, " is not supported yet"));
  }
  if (input.prompt == PromptKind::kChat) RETURN_IF_ERROR(CheckChatSupport(input.chat, model));
  return OkStatus();
}

}  // namespace altiplano
