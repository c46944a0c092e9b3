#include "server/frontend/proto_mapping.h"

#include <utility>

namespace altiplano {

namespace v1 = inference::v1;

namespace {

template <typename Proto, typename T>
void SetOptional(bool has, Proto value, std::optional<T>* out) {
  if (has) *out = value;
}

std::vector<std::string> TakeStrings(google::protobuf::RepeatedPtrField<std::string>* strings) {
  std::vector<std::string> out;
  out.reserve(static_cast<size_t>(strings->size()));
  for (std::string& s : *strings) out.push_back(std::move(s));
  return out;
}

std::optional<Role> RoleFromProto(v1::Role role) {
  switch (role) {
    case v1::ROLE_SYSTEM:
      return Role::kSystem;
    case v1::ROLE_USER:
      return Role::kUser;
    case v1::ROLE_ASSISTANT:
      return Role::kAssistant;
    case v1::ROLE_TOOL:
      return Role::kTool;
    default:
      return std::nullopt;
  }
}

ToolChoiceKind ToolChoiceFromProto(const v1::ToolChoice& choice) {
  if (choice.kind_case() == v1::ToolChoice::kFunction) return ToolChoiceKind::kFunction;
  switch (choice.mode()) {
    case v1::TOOL_MODE_UNSPECIFIED:
    case v1::TOOL_MODE_AUTO:
      return ToolChoiceKind::kAuto;
    case v1::TOOL_MODE_NONE:
      return ToolChoiceKind::kNone;
    case v1::TOOL_MODE_REQUIRED:
      return ToolChoiceKind::kRequired;
    default:
      return ToolChoiceKind::kUnknown;
  }
}

SamplingInput SamplingFromProto(const v1::Sampling& in) {
  SamplingInput out;
  SetOptional(in.has_temperature(), in.temperature(), &out.temperature);
  SetOptional(in.has_top_p(), in.top_p(), &out.top_p);
  SetOptional(in.has_top_k(), in.top_k(), &out.top_k);
  SetOptional(in.has_min_p(), in.min_p(), &out.min_p);
  SetOptional(in.has_presence_penalty(), in.presence_penalty(), &out.presence_penalty);
  SetOptional(in.has_frequency_penalty(), in.frequency_penalty(), &out.frequency_penalty);
  SetOptional(in.has_repetition_penalty(), in.repetition_penalty(), &out.repetition_penalty);
  SetOptional(in.has_seed(), in.seed(), &out.seed);
  SetOptional(in.has_num_sequences(), in.num_sequences(), &out.num_sequences);
  for (const auto& [id, bias] : in.logit_bias()) out.logit_bias.emplace_back(id, bias);
  return out;
}

StoppingInput StoppingFromProto(v1::Stopping&& in) {
  StoppingInput out;
  SetOptional(in.has_max_new_tokens(), in.max_new_tokens(), &out.max_new_tokens);
  out.min_new_tokens = in.min_new_tokens();
  out.sequences = TakeStrings(in.mutable_sequences());
  out.token_ids.assign(in.token_ids().begin(), in.token_ids().end());
  out.include_stop_in_output = in.include_stop_in_output();
  out.ignore_eos = in.ignore_eos();
  if (in.has_time_limit()) out.time_limit = DurationFromProto(in.time_limit());
  return out;
}

OutputInput OutputFromProto(const v1::Output& in) {
  OutputInput out{.omit_text = in.omit_text(),
                  .token_ids = in.token_ids(),
                  .echo_prompt = in.echo_prompt(),
                  .keep_special_tokens = in.keep_special_tokens(),
                  .top_logprobs = {},
                  .prompt_top_logprobs = {}};
  SetOptional(in.has_top_logprobs(), in.top_logprobs(), &out.top_logprobs);
  SetOptional(in.has_prompt_top_logprobs(), in.prompt_top_logprobs(), &out.prompt_top_logprobs);
  return out;
}

std::string ConstraintName(const v1::Constraint& constraint) {
  switch (constraint.kind_case()) {
    case v1::Constraint::kJsonSchema:
      return "json_schema";
    case v1::Constraint::kAnyJsonObject:
      return constraint.any_json_object() ? "any_json_object" : "";
    case v1::Constraint::kRegex:
      return "regex";
    case v1::Constraint::kEbnf:
      return "ebnf";
    case v1::Constraint::kChoices:
      return "choices";
    case v1::Constraint::KIND_NOT_SET:
      return "";
  }
  return "";
}

}  // namespace

DurationInput DurationFromProto(const google::protobuf::Duration& duration) {
  return {.seconds = duration.seconds(), .nanos = duration.nanos()};
}

ChatInput ChatFromProto(v1::ChatPrompt&& chat) {
  ChatInput out;
  out.messages.reserve(static_cast<size_t>(chat.messages_size()));
  for (v1::ChatMessage& in : *chat.mutable_messages()) {
    ChatMessageInput message;
    message.role = RoleFromProto(in.role());
    message.content = std::move(*in.mutable_content());
    message.tool_call_id = std::move(*in.mutable_tool_call_id());
    for (v1::ToolCall& call : *in.mutable_tool_calls()) {
      message.tool_calls.push_back({.id = std::move(*call.mutable_id()),
                                    .name = std::move(*call.mutable_name()),
                                    .arguments_json = std::move(*call.mutable_arguments_json())});
    }
    out.messages.push_back(std::move(message));
  }
  out.tools_json = TakeStrings(chat.mutable_tools_json());
  out.tool_choice = ToolChoiceFromProto(chat.tool_choice());
  out.continue_final_message = chat.continue_final_message();
  out.date = std::move(*chat.mutable_date());
  return out;
}

GenerateInput InputFromProto(v1::GenerateRequest&& request) {
  GenerateInput input;
  input.model = std::move(*request.mutable_model());
  input.request_id = std::move(*request.mutable_request_id());
  switch (request.prompt_case()) {
    case v1::GenerateRequest::kText:
      input.prompt = PromptKind::kText;
      input.text = std::move(*request.mutable_text());
      break;
    case v1::GenerateRequest::kTokenIds:
      input.prompt = PromptKind::kTokenIds;
      input.token_ids.assign(request.token_ids().ids().begin(), request.token_ids().ids().end());
      break;
    case v1::GenerateRequest::kChat:
      input.prompt = PromptKind::kChat;
      input.chat = ChatFromProto(std::move(*request.mutable_chat()));
      break;
    case v1::GenerateRequest::PROMPT_NOT_SET:
      break;
  }
  input.sampling = SamplingFromProto(request.sampling());
  if (request.has_stopping()) input.stopping = StoppingFromProto(std::move(*request.mutable_stopping()));
  input.constraint = ConstraintName(request.constraint());
  input.output = OutputFromProto(request.output());
  const v1::Scheduling& scheduling = request.scheduling();
  input.priority = scheduling.priority();
  input.tenant = scheduling.tenant();
  if (scheduling.has_queue_timeout()) input.queue_timeout = DurationFromProto(scheduling.queue_timeout());
  if (scheduling.has_ttft_target()) input.ttft_target = DurationFromProto(scheduling.ttft_target());
  input.cache_salt = request.cache().salt();
  input.bypass_prefix_cache = request.cache().bypass_prefix_cache();
  return input;
}

google::protobuf::Duration DurationToProto(Duration duration) {
  google::protobuf::Duration out;
  out.set_seconds(duration / std::chrono::seconds(1));
  out.set_nanos(static_cast<int32_t>((duration % std::chrono::seconds(1)).count()));
  return out;
}

v1::FinishReason FinishToProto(FinishReason reason) {
  switch (reason) {
    case FinishReason::kNone:
      return v1::FINISH_REASON_UNSPECIFIED;
    case FinishReason::kEos:
      return v1::FINISH_REASON_EOS;
    case FinishReason::kStop:
      return v1::FINISH_REASON_STOP;
    case FinishReason::kLength:
      return v1::FINISH_REASON_LENGTH;
    case FinishReason::kTimeLimit:
      return v1::FINISH_REASON_TIME_LIMIT;
    case FinishReason::kToolCall:
      return v1::FINISH_REASON_TOOL_CALL;
    case FinishReason::kCancelled:
      return v1::FINISH_REASON_CANCELLED;
  }
  return v1::FINISH_REASON_UNSPECIFIED;
}

void ScoreToProto(const TokenScore& score, const Tokenizer& tokenizer, v1::TokenLogprob* out) {
  out->set_token_id(static_cast<uint32_t>(score.token));
  out->set_logprob(score.logprob);
  out->set_rank(static_cast<uint32_t>(score.rank));
  out->set_token_bytes(std::string(tokenizer.TokenBytes(score.token)));
  for (const TopLogprob& top : score.top) {
    v1::TokenLogprob* entry = out->add_top();
    entry->set_token_id(static_cast<uint32_t>(top.token));
    entry->set_logprob(top.logprob);
    entry->set_rank(static_cast<uint32_t>(out->top_size()));
    entry->set_token_bytes(std::string(tokenizer.TokenBytes(top.token)));
  }
}

}  // namespace altiplano
