// GenerateInput: one generation as a client asked for it, whatever the protocol, before anything is judged or filled
// in. Numbers are as wide as clients can send them. Front ends map to it; validate.h judges it; prepare.h makes the
// Request.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "server/base/clock.h"
#include "server/text/chat_format.h"

namespace altiplano {

// google.protobuf.Duration's parts, which need not agree with each other.
struct DurationInput {
  int64_t seconds = 0;
  int32_t nanos = 0;
};

struct ChatMessageInput {
  std::optional<Role> role;  // nullopt: unset or unknown
  std::string content;
  std::vector<ToolCall> tool_calls;
  std::string tool_call_id;
};

enum class ToolChoiceKind : uint8_t { kAuto, kNone, kRequired, kFunction, kUnknown };

struct ChatInput {
  std::vector<ChatMessageInput> messages;
  std::vector<std::string> tools_json;
  ToolChoiceKind tool_choice = ToolChoiceKind::kAuto;
  bool continue_final_message = false;
  std::string date;
};

struct SamplingInput {
  std::optional<float> temperature, top_p, min_p, presence_penalty, frequency_penalty, repetition_penalty;
  std::optional<uint32_t> top_k;
  std::optional<uint64_t> seed;
  std::optional<uint32_t> num_sequences;
  std::vector<std::pair<uint32_t, float>> logit_bias;
};

struct StoppingInput {
  std::optional<uint32_t> max_new_tokens;
  uint32_t min_new_tokens = 0;
  std::vector<std::string> sequences;
  std::vector<uint32_t> token_ids;
  bool include_stop_in_output = false;
  bool ignore_eos = false;
  std::optional<DurationInput> time_limit;
};

struct OutputInput {
  bool omit_text = false;
  bool token_ids = false;
  bool echo_prompt = false;
  bool keep_special_tokens = false;
  std::optional<uint32_t> top_logprobs;
  std::optional<uint32_t> prompt_top_logprobs;
};

enum class PromptKind : uint8_t { kNone, kText, kTokenIds, kChat };

struct GenerateInput {
  std::string model;
  std::string request_id;
  PromptKind prompt = PromptKind::kNone;
  std::string text;                 // kText
  std::vector<uint32_t> token_ids;  // kTokenIds
  ChatInput chat;                   // kChat
  SamplingInput sampling;
  StoppingInput stopping;
  std::string constraint;  // the kind asked for, "json_schema"; "": none
  OutputInput output;
  int32_t priority = 0;
  std::optional<DurationInput> queue_timeout, ttft_target;
  std::string tenant;
  std::string cache_salt;
  bool bypass_prefix_cache = false;
  std::optional<DurationInput> min_flush_interval;  // of streams
};

}  // namespace altiplano
