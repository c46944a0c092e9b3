// What a client may ask for, each with a number. Plain values; no gRPC types, so main can fill it from its config.
#pragma once

#include <cstdint>

#include "server/base/clock.h"

namespace altiplano {

struct FrontendLimits {
  // Transport.
  int32_t max_message_bytes = 16 << 20;  // received; larger is RESOURCE_EXHAUSTED before it is parsed
  int32_t max_streams_per_connection = 100;
  Duration keepalive_time = std::chrono::seconds(60);  // own pings: a dead peer's blocks are free soon
  Duration keepalive_timeout = std::chrono::seconds(20);
  Duration min_client_ping_interval = std::chrono::seconds(5);  // sooner ends the connection at the third; 0: any

  // One request.
  int64_t max_prompt_bytes = 4 << 20;  // text, or a chat's contents and tools together
  int32_t max_chat_messages = 2048;
  int32_t max_tools = 128;
  int32_t max_sequences = 16;
  int32_t max_stop_strings = 16;
  int32_t max_stop_string_bytes = 256;
  int32_t max_stop_ids = 128;
  int32_t max_logit_bias = 1024;
  int32_t max_top_logprobs = 20;
  int32_t max_request_id_bytes = 128;  // of [!-~]
  int32_t max_tenant_bytes = 128;
  int32_t max_cache_salt_bytes = 128;
  Duration max_queue_wait = std::chrono::seconds(60);  // also where the request names none

  // Between the parts.
  int32_t max_unprepared_requests = 512;                // waiting for the text pool
  int64_t max_unprepared_bytes = 256 << 20;             // of these, as received
  int64_t max_unread_bytes = 256 << 10;                 // output of a stream that its client has not read
  Duration max_unread_time = std::chrono::seconds(30);  // one message's stay in the socket
};

}  // namespace altiplano
