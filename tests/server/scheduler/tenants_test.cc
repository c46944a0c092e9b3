#include "server/scheduler/tenants.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace altiplano {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

TEST(ParseTenants, ReadsWhatIsThere) {
  auto tenants = ParseTenants("gold:weight=4,max-running=64;free;*:max-queued=20,max-queued-tokens=100000");
  ASSERT_TRUE(tenants.ok()) << tenants.status().ToString();
  EXPECT_THAT(*tenants,
              ElementsAre(TenantOptions{.name = "gold", .weight = 4, .max_running = 64}, TenantOptions{.name = "free"},
                          TenantOptions{.name = "*", .max_queued_requests = 20, .max_queued_tokens = 100000}));
  EXPECT_THAT(*ParseTenants(""), IsEmpty());
}

TEST(ParseTenants, SaysWhatIsWrong) {
  auto refusal = [](std::string_view text) {
    auto tenants = ParseTenants(text);
    EXPECT_FALSE(tenants.ok()) << text;
    return tenants.status().message();
  };
  EXPECT_THAT(refusal(":weight=1"), HasSubstr("has no name"));
  EXPECT_THAT(refusal("a:"), HasSubstr("nothing follows"));
  EXPECT_THAT(refusal("a:weight=1,"), HasSubstr("a comma too many"));
  for (const char* bad : {";", "a;", ";a", "a;;b", "a:weight=1;"}) {
    EXPECT_THAT(refusal(bad), HasSubstr("a semicolon too many")) << bad;
  }
  EXPECT_THAT(refusal("a:wait=1"), HasSubstr("no setting \"wait\"; there are weight, max-running"));
  for (const char* bad : {"a:weight=0", "a:weight=-1", "a:weight=x", "a:weight=1x", "a:weight", "a:weight="}) {
    EXPECT_THAT(refusal(bad), HasSubstr("tenant a: weight is")) << bad;
  }
}

TEST(CompleteTenants, EndsWithTheOthersAndRefusesContradictions) {
  EXPECT_THAT(*CompleteTenants({}, 8), ElementsAre(TenantOptions{.name = "*"}));
  auto tenants = *CompleteTenants({{.name = "*", .weight = 2}, {.name = "a"}}, 8);
  EXPECT_THAT(tenants, ElementsAre(TenantOptions{.name = "a"}, TenantOptions{.name = "*", .weight = 2}));
  EXPECT_EQ(TenantOf(tenants, "a"), 0u);
  for (const char* other : {"b", "", "*"}) EXPECT_EQ(TenantOf(tenants, other), 1u);
  auto refusal = [](std::vector<TenantOptions> list) {
    auto complete = CompleteTenants(std::move(list), 8);
    EXPECT_EQ(complete.status().code(), Code::kInvalidArgument);
    return complete.status().message();
  };
  EXPECT_THAT(refusal({{.name = "a"}, {.name = "a"}}), HasSubstr("tenant a is listed twice"));
  EXPECT_THAT(refusal({{.name = "a b"}}), HasSubstr("use visible ASCII"));
  EXPECT_THAT(refusal({{.name = ""}}), HasSubstr("use visible ASCII"));
  EXPECT_THAT(refusal({{.name = "a", .weight = 1001}}), HasSubstr("must be from 1 to 1000; only the weights' ratios"));
  EXPECT_THAT(refusal({{.name = "a", .max_running = 9}}), HasSubstr("lower it or raise --max-num-seqs"));
  EXPECT_THAT(refusal(std::vector<TenantOptions>(300, {.name = "a"})), HasSubstr("twice"));
}

}  // namespace
}  // namespace altiplano
