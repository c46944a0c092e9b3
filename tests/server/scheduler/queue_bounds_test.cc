#include "server/scheduler/queue_bounds.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace altiplano {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using testing::ElementsAre;
using testing::HasSubstr;

constexpr TimePoint kNow{std::chrono::hours(1)};

QueueBounds::Options OptionsOf(int32_t max_requests, int64_t max_tokens, std::vector<TenantOptions> tenants = {}) {
  return {.max_requests = max_requests, .max_tokens = max_tokens, .tenants = *CompleteTenants(std::move(tenants), 64)};
}

TEST(QueueBounds, RequestsAndTokensOfAllTogether) {
  QueueBounds bounds(OptionsOf(3, 100));
  EXPECT_TRUE(bounds.Enter(0, 500, kNow).ok()) << "the first may have any number of tokens";
  EXPECT_EQ(bounds.Enter(0, 1, kNow).reason(), "QUEUE_FULL");
  bounds.Leave(0, 500, true, kNow);
  for (int i = 0; i < 3; ++i) EXPECT_TRUE(bounds.Enter(0, 30, kNow).ok());
  const Status full = bounds.Enter(0, 1, kNow);
  EXPECT_EQ(full.code(), Code::kResourceExhausted);
  EXPECT_EQ(full.reason(), "QUEUE_FULL");
  EXPECT_THAT(full.message(), HasSubstr("3 requests with 90 prompt tokens"));
  bounds.Leave(0, 30, false, kNow);
  EXPECT_EQ(bounds.Enter(0, 41, kNow).reason(), "QUEUE_FULL");
  EXPECT_TRUE(bounds.Enter(0, 40, kNow).ok());
  EXPECT_THAT(bounds.refused(), ElementsAre(3));
}

TEST(QueueBounds, ATenantsOwnLimitsHaveTheirOwnReason) {
  QueueBounds bounds(
      OptionsOf(100, 1000, {{.name = "a", .max_queued_requests = 2}, {.name = "b", .max_queued_tokens = 50}}));
  EXPECT_TRUE(bounds.Enter(0, 10, kNow).ok());
  EXPECT_TRUE(bounds.Enter(0, 10, kNow).ok());
  const Status full = bounds.Enter(0, 10, kNow);
  EXPECT_EQ(full.code(), Code::kResourceExhausted);
  EXPECT_EQ(full.reason(), "TENANT_QUEUE_FULL");
  EXPECT_THAT(full.message(), HasSubstr("tenant a has 2 requests with 20 prompt tokens waiting"));
  EXPECT_EQ(full.detail()->metadata.at("tenant"), "a");
  EXPECT_EQ(full.detail()->metadata.at("max_queued_requests"), "2");
  EXPECT_FALSE(full.detail()->metadata.contains("max_queued_tokens")) << "it has none";
  EXPECT_TRUE(bounds.Enter(1, 60, kNow).ok());
  EXPECT_EQ(bounds.Enter(1, 1, kNow).reason(), "TENANT_QUEUE_FULL");
  EXPECT_TRUE(bounds.Enter(2, 100, kNow).ok());
  EXPECT_THAT(bounds.refused(), ElementsAre(1, 1, 0));
}

TEST(QueueBounds, NobodyIsKeptOutByWhatOthersHaveWaiting) {
  QueueBounds bounds(OptionsOf(8, 800, {{.name = "a"}, {.name = "b", .weight = 2}}));
  for (int i = 0; i < 8; ++i) EXPECT_TRUE(bounds.Enter(0, 100, kNow).ok()) << "while nobody else is there";
  EXPECT_EQ(bounds.Enter(0, 1, kNow).reason(), "QUEUE_FULL");
  for (int i = 0; i < 4; ++i) EXPECT_TRUE(bounds.Enter(1, 100, kNow).ok()) << "half of the weight, half of the queue";
  EXPECT_EQ(bounds.Enter(1, 1, kNow).reason(), "QUEUE_FULL");
  EXPECT_TRUE(bounds.Enter(2, 5000, kNow).ok());
}

TEST(QueueBounds, TheHintIsTheTenantsOwnDrain) {
  QueueBounds bounds(OptionsOf(40, 1'000'000, {{.name = "a"}, {.name = "b"}}));
  // Over the last five seconds 50 of a's were admitted, and 5 of b's.
  for (int i = 0; i < 50; ++i) {
    for (size_t tenant : {0, 1}) {
      if (tenant == 1 && i % 10 != 0) continue;
      ASSERT_TRUE(bounds.Enter(tenant, 1, kNow).ok());
      bounds.Leave(tenant, 1, true, kNow + i * milliseconds(100));
    }
  }
  const TimePoint now = kNow + seconds(5);
  for (int i = 0; i < 20; ++i) {
    ASSERT_TRUE(bounds.Enter(0, 1, now).ok());
    ASSERT_TRUE(bounds.Enter(1, 1, now).ok());
  }
  EXPECT_EQ(bounds.Enter(0, 1, now).detail()->retry_after, milliseconds(1000));   // 10 at 10 a second
  EXPECT_EQ(bounds.Enter(1, 1, now).detail()->retry_after, milliseconds(10000));  // 10 at one a second
  const TimePoint later = now + seconds(60);
  EXPECT_EQ(bounds.Enter(0, 1, later).detail()->retry_after, seconds(60)) << "nothing moves";
}

}  // namespace
}  // namespace altiplano
