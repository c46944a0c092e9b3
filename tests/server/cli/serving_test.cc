#include "server/cli/serving.h"

#include <gtest/gtest.h>

#include "server/cli/config.h"

namespace altiplano::cli {
namespace {

// The table's defaults are the front end's own: neither changes alone.
TEST(Serving, DefaultLimitsAreTheFrontEnds) {
  Command command{.name = "test"};
  auto flags = ParsedFlags::Parse(command, {});
  auto config = ResolveConfig(*flags, nullptr);
  ASSERT_TRUE(config.ok()) << config.status().ToString();
  FrontendLimits configured = LimitsOf(config->values.limits());
  FrontendLimits own;
  EXPECT_EQ(configured.max_message_bytes, own.max_message_bytes);
  EXPECT_EQ(configured.max_streams_per_connection, own.max_streams_per_connection);
  EXPECT_EQ(configured.keepalive_time, own.keepalive_time);
  EXPECT_EQ(configured.keepalive_timeout, own.keepalive_timeout);
  EXPECT_EQ(configured.min_client_ping_interval, own.min_client_ping_interval);
  EXPECT_EQ(configured.max_prompt_bytes, own.max_prompt_bytes);
  EXPECT_EQ(configured.max_chat_messages, own.max_chat_messages);
  EXPECT_EQ(configured.max_tools, own.max_tools);
  EXPECT_EQ(configured.max_sequences, own.max_sequences);
  EXPECT_EQ(configured.max_stop_strings, own.max_stop_strings);
  EXPECT_EQ(configured.max_stop_string_bytes, own.max_stop_string_bytes);
  EXPECT_EQ(configured.max_stop_ids, own.max_stop_ids);
  EXPECT_EQ(configured.max_logit_bias, own.max_logit_bias);
  EXPECT_EQ(configured.max_top_logprobs, own.max_top_logprobs);
  EXPECT_EQ(configured.max_request_id_bytes, own.max_request_id_bytes);
  EXPECT_EQ(configured.max_tenant_bytes, own.max_tenant_bytes);
  EXPECT_EQ(configured.max_cache_salt_bytes, own.max_cache_salt_bytes);
  EXPECT_EQ(configured.max_queue_wait, own.max_queue_wait);
  EXPECT_EQ(configured.max_unprepared_requests, own.max_unprepared_requests);
  EXPECT_EQ(configured.max_unprepared_bytes, own.max_unprepared_bytes);
  EXPECT_EQ(configured.max_unread_bytes, own.max_unread_bytes);
  EXPECT_EQ(configured.max_unread_time, own.max_unread_time);
}

}  // namespace
}  // namespace altiplano::cli
