#include "server/scheduler/scheduler.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <cmath>
#include <map>
#include <random>
#include <set>

#include "tests/server/scheduler/driver_testlib.h"

namespace altiplano {
namespace {

using std::chrono::microseconds;
using std::chrono::milliseconds;
using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

TEST(SchedulerOptions, ContradictionsAreRefusedByName) {
  auto refusal = [](auto change) {
    SchedulerOptions options = SmallOptions();
    change(options);
    auto scheduler = Scheduler::Create(options);
    EXPECT_FALSE(scheduler.ok());
    EXPECT_EQ(scheduler.status().code(), Code::kInvalidArgument);
    return scheduler.status().message();
  };
  EXPECT_THAT(refusal([](auto& o) { o.block_size = 12; }), HasSubstr("block_size is 12"));
  EXPECT_THAT(refusal([](auto& o) { o.num_blocks = 0; }), HasSubstr("num_blocks is 0"));
  EXPECT_THAT(refusal([](auto& o) { o.num_blocks = 1 << 30; }), HasSubstr("below 2^31"));
  EXPECT_THAT(refusal([](auto& o) { o.max_running = 0; }), HasSubstr("max_running is 0"));
  EXPECT_THAT(refusal([](auto& o) { o.token_budget = 0; }), HasSubstr("token_budget is 0"));
  EXPECT_THAT(refusal([](auto& o) { o.max_context = 1; }), HasSubstr("max_context is 1"));
  EXPECT_THAT(refusal([](auto& o) { o.num_blocks = o.block_size = 1; }), HasSubstr("one block of one token"));
  EXPECT_THAT(refusal([](auto& o) { o.step_cost.token_us = -1; }), HasSubstr("a coefficient of -1 us"));
  EXPECT_THAT(refusal([](auto& o) { o.step_cost.kv_token_us = NAN; }), HasSubstr("a coefficient of"));
  EXPECT_THAT(refusal([](auto& o) { o.max_itl = -milliseconds(1); }), HasSubstr("max_itl is negative"));
  EXPECT_THAT(refusal([](auto& o) { o.max_itl = milliseconds(1); }), HasSubstr("needs a step_cost"));
  EXPECT_THAT(refusal([](auto& o) { o.default_ttft_target = -milliseconds(1); }), HasSubstr("target is negative"));
  EXPECT_THAT(refusal([](auto& o) { o.tenants = {{.name = "a", .weight = 0}}; }), HasSubstr("a: weight is 0"));
  EXPECT_THAT(refusal([](auto& o) { o.priority_ageing = -milliseconds(1); }), HasSubstr("ageing is negative"));
  EXPECT_THAT(refusal([](auto& o) { o.max_itl = milliseconds(1), o.step_cost.step_us = 1500; }),
              HasSubstr("max_itl is 1 ms, but by step_cost a step of one token takes 1.5 ms"));
}

TEST(SchedulerOptions, ServableIsBoundedByContextAndByThePool) {
  SchedulerOptions options = SmallOptions();
  EXPECT_EQ(Driver(options)->max_servable_tokens(), 100);
  options.num_blocks = 3;
  EXPECT_EQ(Driver(options)->max_servable_tokens(), 12);
}

// Executors remember a sequence's blocks as long as it keeps its slot.
TEST(Scheduler, PlansNameEachBlockOnceUntilASequenceComesToASlotAgain) {
  SchedulerOptions options = SmallOptions();
  options.num_blocks = 4;
  options.prefix_cache = false;
  Driver driver(options);
  driver->Add(1, MakeRequest(3, 12));
  driver->Add(2, MakeRequest(3, 12));
  std::vector<int32_t> table;  // of request 2
  int32_t preemptions = 0, new_blocks = 0;
  while (!driver.Ended(2)) {
    const auto plan = driver.Step();
    int32_t named = 0;
    for (const PlannedSequence& planned : plan->sequences) {
      named += planned.new_blocks();
      if (planned.request != 2) continue;
      if (planned.known_blocks == 0 && !table.empty()) {
        ++preemptions;
        table.clear();
      }
      EXPECT_EQ(planned.known_blocks, static_cast<int32_t>(table.size()));
      EXPECT_EQ(planned.num_blocks, (planned.first_position + planned.num_tokens + 3) / 4);
      new_blocks += planned.new_blocks();
      const auto begin = plan->block_ids.begin() + planned.block_begin;
      table.insert(table.end(), begin, begin + planned.new_blocks());
    }
    EXPECT_EQ(plan->block_ids.size(), static_cast<size_t>(named));
  }
  EXPECT_EQ(preemptions, 1);
  EXPECT_EQ(new_blocks, 2 + 4) << "before it was preempted, and after";
}

TEST(Scheduler, OneRequestFromPromptToLength) {
  Driver driver(SmallOptions());
  auto request = MakeRequest(5, 3);
  driver->Add(1, request);
  auto plan = driver.Plan();
  ASSERT_EQ(plan->sequences.size(), 1u);
  EXPECT_EQ(plan->step, 1u);
  EXPECT_THAT(plan->tokens, ElementsAre(0, 1, 2, 3, 4));
  EXPECT_EQ(plan->num_prefill_tokens, 5);
  EXPECT_EQ(plan->sequences[0].num_blocks, 2);
  EXPECT_TRUE(plan->sequences[0].sample);
  ASSERT_EQ(plan->slot_inits.size(), 1u);
  EXPECT_EQ(plan->slot_inits[0].request, request);

  auto next = driver.Plan();  // before the token is known
  EXPECT_THAT(next->tokens, ElementsAre(-1));
  EXPECT_TRUE(next->sequences[0].input_from_slot);
  EXPECT_EQ(next->sequences[0].first_position, 5);
  EXPECT_EQ(next->num_prefill_tokens, 0);
  EXPECT_THAT(next->slot_inits, IsEmpty());
  driver.Apply();
  driver.RunAll();
  EXPECT_THAT(driver.TokensOf(1), ElementsAre(1005, 1006, 1007));
  EXPECT_EQ(driver.FinishOf(1), FinishReason::kLength);
  EXPECT_TRUE(driver.EndOf(1).status.ok());
  EXPECT_EQ(driver->load().steps, 3u);  // the last token is never an input
  EXPECT_EQ(driver->load().generated_tokens, 3u);
  EXPECT_EQ(driver->load().blocks_used, 0);
}

TEST(Scheduler, ContextAndPoolEndASequenceAsLength) {
  for (bool by_pool : {false, true}) {
    SchedulerOptions options = SmallOptions();
    (by_pool ? options.num_blocks : options.max_context) = by_pool ? 3 : 12;
    Driver driver(options);
    driver->Add(1, MakeRequest(10, 50));
    driver.RunAll();
    EXPECT_EQ(driver.TokensOf(1).size(), 2u);
    EXPECT_EQ(driver.FinishOf(1), FinishReason::kLength);
  }
}

TEST(Scheduler, LongPromptsAreComputedInChunksBehindDecodes) {
  Driver driver(SmallOptions());
  driver->Add(1, MakeRequest(3, 50));
  driver.Step();
  driver->Add(2, MakeRequest(40, 2, 100));
  std::vector<int> chunks;
  while (driver.TokensOf(2).empty()) {
    auto plan = driver.Step();
    ASSERT_EQ(plan->sequences.size(), 2u);
    EXPECT_EQ(plan->sequences[0].request, 1u);  // decode first, in every step
    EXPECT_EQ(plan->sequences[0].num_tokens, 1);
    EXPECT_LE(plan->tokens.size(), 16u);
    EXPECT_EQ(plan->num_prefill_tokens, plan->sequences[1].num_tokens);
    chunks.push_back(plan->sequences[1].num_tokens);
  }
  EXPECT_THAT(chunks, ElementsAre(15, 15, 10));
}

TEST(Scheduler, AdmitsByPriorityThenByArrivalAndNobodyOvertakes) {
  SchedulerOptions options = SmallOptions();
  options.max_running = 1;
  Driver driver(options);
  for (RequestKey key = 1; key <= 4; ++key) {
    auto request = MakeRequest(2, 1);
    request->priority = key == 3 ? 1 : 0;
    driver->Add(key, request);
  }
  driver.RunAll();
  std::vector<RequestKey> order;
  for (const Event& event : driver.events) {
    if (event.kind == Event::Kind::kAdmitted) order.push_back(event.request);
  }
  EXPECT_THAT(order, ElementsAre(3, 1, 2, 4));
}

TEST(Scheduler, ALargeRequestAtTheHeadIsNotStarvedBySmallOnes) {
  SchedulerOptions options = SmallOptions();
  options.num_blocks = 8;
  options.prefix_cache = false;
  Driver driver(options);
  driver->Add(1, MakeRequest(12, 4));
  driver.Step();
  driver->Add(2, MakeRequest(30, 1));
  driver->Add(3, MakeRequest(2, 1));
  auto plan = driver.Step();
  EXPECT_EQ(plan->sequences.size(), 1u);  // 3 would fit, but 2 came first
  driver.RunAll();
  EXPECT_TRUE(driver.EndOf(2).status.ok());
}

TEST(Scheduler, PriorityDoesNotInterruptARunningRequest) {
  for (bool short_of_slots : {true, false}) {
    SchedulerOptions options = SmallOptions();
    (short_of_slots ? options.max_running : options.num_blocks) = short_of_slots ? 1 : 5;
    options.prefix_cache = false;
    Driver driver(options);
    driver->Add(1, MakeRequest(10, 10));
    driver.Step();
    auto urgent = MakeRequest(10, 1);
    urgent->priority = 100;
    driver->Add(2, urgent);
    while (!driver.Ended(1)) ASSERT_EQ(driver.Step()->sequences[0].request, 1u);
    EXPECT_EQ(driver.EndOf(1).timing.preemptions, 0u);
    driver.RunAll();
    EXPECT_TRUE(driver.EndOf(2).status.ok());
  }
}

TEST(Scheduler, TheOldestDecodesFirstThenTheOthersInOrder) {
  Driver driver(SmallOptions());
  for (RequestKey key = 1; key <= 3; ++key) {
    auto request = MakeRequest(2, 50);
    request->priority = static_cast<int32_t>(key);
    driver->Add(key, request);
    driver.Step();
  }
  auto plan = driver.Step();
  std::vector<RequestKey> order;
  for (const PlannedSequence& planned : plan->sequences) order.push_back(planned.request);
  EXPECT_THAT(order, ElementsAre(1, 3, 2));
}

TEST(Scheduler, AdmissionLeavesEveryRunningSequenceAToken) {
  SchedulerOptions options = SmallOptions();
  options.token_budget = 2;
  Driver driver(options);
  driver->Add(1, MakeRequest(1, 3));
  driver->Add(2, MakeRequest(1, 3));
  driver->Add(3, MakeRequest(1, 3));
  driver.Step();
  while (!driver.Ended(1)) {
    auto plan = driver.Step();
    ASSERT_EQ(plan->sequences.size(), 2u);
    EXPECT_EQ(plan->sequences[0].request, 1u);
    EXPECT_EQ(plan->sequences[1].request, 2u);
  }
  EXPECT_EQ(driver->load().waiting_requests, 1);
  driver.RunAll();
  EXPECT_TRUE(driver.EndOf(3).status.ok());
}

TEST(Scheduler, AdmissionLeavesRoomForRunningSequencesToGrow) {
  // Four sequences of two blocks run, the fifth wants two: one more must stay for the four.
  for (int32_t blocks : {10, 11}) {
    SchedulerOptions options = SmallOptions();
    options.num_blocks = blocks;
    options.prefix_cache = false;
    Driver driver(options);
    for (RequestKey key = 1; key <= 4; ++key) driver->Add(key, MakeRequest(5, 50));
    driver.Step();
    driver.Step();
    driver->Add(5, MakeRequest(5, 1));
    EXPECT_EQ(driver.Step()->sequences.size(), blocks == 10 ? 4u : 5u);
  }
}

TEST(Scheduler, ABlockedHeadIsAdmittedOnceThePrefixCacheHoldsEnoughOfIt) {
  SchedulerOptions options = SmallOptions();
  options.num_blocks = 9;
  options.token_budget = 32;
  Driver driver(options);
  driver->Add(1, MakeRequest(17, 50));
  driver->Add(2, MakeRequest(17, 1));  // five blocks, four are left; after this step four of the five can be shared
  auto plan = driver.Step();
  ASSERT_EQ(plan->sequences.size(), 1u);
  while (plan->sequences.size() == 1) ASSERT_LE((plan = driver.Step())->step, 9u);
  EXPECT_EQ(plan->step, 9u);  // tried again after eight steps, and not in each of them
  EXPECT_EQ(driver.CachedTokensOf(2), 16u);
}

// --- Who is next -----------------------------------------------------------------------------------------------------

// One sequence at a time, a millisecond for each token.
SchedulerOptions OneByOne() {
  SchedulerOptions options = SmallOptions();
  options.num_blocks = 100;
  options.max_context = 400;
  options.max_running = 1;
  options.token_budget = 64;
  options.prefix_cache = false;
  options.step_cost.token_us = 1000;
  return options;
}

struct Asks {
  int prompt = 4;
  int arrives_ms = 0;
  int target_ms = 0;
  int priority = 0;
  int deadline_ms = 0;  // after the driver's beginning; 0: none
};

void Add(Driver& driver, RequestKey key, const Asks& asks) {
  const TimePoint begin{std::chrono::hours(1)};
  auto request = MakeRequest(asks.prompt, 1);
  request->arrival = begin + milliseconds(asks.arrives_ms);
  request->ttft_target = milliseconds(asks.target_ms);
  request->priority = asks.priority;
  if (asks.deadline_ms > 0) request->deadline = begin + milliseconds(asks.deadline_ms);
  driver->Add(key, request);
}

std::vector<RequestKey> AdmittedInOrder(Driver& driver) {
  driver.RunAll();
  std::vector<RequestKey> order;
  for (const Event& event : driver.events) {
    if (event.kind == Event::Kind::kAdmitted) order.push_back(event.request);
  }
  return order;
}

TEST(Targets, WhoHasToStartFirstGoesFirst) {
  Driver driver(OneByOne());
  Add(driver, 1, {.prompt = 10});                      // by 10 s
  Add(driver, 2, {.prompt = 10, .target_ms = 2000});   // by 1990 ms
  Add(driver, 3, {.prompt = 300, .target_ms = 2000});  // by 1700 ms
  Add(driver, 4, {.prompt = 10, .deadline_ms = 1900});
  Add(driver, 5, {.prompt = 10, .target_ms = 20000});  // by 19990 ms
  Add(driver, 6, {.prompt = 10, .target_ms = 9000, .priority = 1});
  EXPECT_THAT(AdmittedInOrder(driver), ElementsAre(6, 3, 4, 2, 1, 5));
}

TEST(Targets, OneThatCannotBeMetAnyMoreHurriesNobody) {
  Driver driver(OneByOne());
  Add(driver, 1, {.target_ms = 1000});
  Add(driver, 2, {.target_ms = 9000});
  Add(driver, 3, {});
  driver.now += milliseconds(997);  // four tokens take four milliseconds
  EXPECT_THAT(AdmittedInOrder(driver), ElementsAre(2, 3, 1));
  EXPECT_EQ(driver->load().targets_met, 2u);
  EXPECT_EQ(driver->load().targets_missed, 0u) << "in the end it came in time: the clock of this test stands still";
}

TEST(Targets, NobodyIsOvertakenByWhoComesAfterItsLatestStart) {
  SchedulerOptions options = OneByOne();
  options.default_ttft_target = milliseconds(50);
  Driver driver(options);
  Add(driver, 1000, {});
  Add(driver, 1001, {.target_ms = 30});
  std::vector<RequestKey> admitted;
  auto has_been = [&](RequestKey key) { return std::ranges::find(admitted, key) != admitted.end(); };
  for (int ms = 0; !has_been(1000) || !has_been(1001); ++ms) {  // always one in a hurry, and each takes a while
    ASSERT_LT(ms, 900);
    Add(driver, static_cast<RequestKey>(ms), {.arrives_ms = ms, .target_ms = 5});
    driver.now = TimePoint(std::chrono::hours(1)) + milliseconds(ms);
    if (ms % 8 == 0) driver.Step();
    admitted.clear();
    for (const Event& event : driver.events) {
      if (event.kind == Event::Kind::kAdmitted) admitted.push_back(event.request);
    }
  }
  auto latest_before = [&](RequestKey key) {
    RequestKey latest = 0;
    for (size_t i = 0; admitted[i] != key; ++i) latest = std::max(latest, admitted[i] < 1000 ? admitted[i] : 0);
    return latest;
  };
  EXPECT_GT(latest_before(1000), 10u) << "some were in more of a hurry";
  EXPECT_LE(latest_before(1000), 50u);
  EXPECT_LE(latest_before(1001), 30u + 50u);
}

TEST(Targets, AreCountedWhenTheFirstTokenComesOrNever) {
  SchedulerOptions options = OneByOne();
  options.max_running = 8;
  Driver driver(options);
  Add(driver, 1, {.target_ms = 10});
  Add(driver, 2, {.target_ms = 100});
  Add(driver, 3, {});
  driver.Plan();
  driver.now += milliseconds(50);
  driver.Apply();
  EXPECT_EQ(driver->load().targets_met, 1u);
  EXPECT_EQ(driver->load().targets_missed, 1u);
  for (RequestKey key : {4, 5}) {
    auto request = MakeRequest(4, 1);
    request->ttft_target = milliseconds(key == 4 ? 60 : 1000);
    driver->Add(key, request);
  }
  driver.now += milliseconds(20);
  for (RequestKey key : {4, 5}) driver->Cancel(key, Status(Code::kCancelled, ""));
  driver.RunAll();
  EXPECT_EQ(driver->load().targets_met, 1u);
  EXPECT_EQ(driver->load().targets_missed, 2u) << "5 gave up before its target had passed";
}

TEST(Deadlines, WhatCannotMeetItsOwnIsRefusedAtOnce) {
  Driver driver(OneByOne());
  Add(driver, 1, {.prompt = 100, .deadline_ms = 150});
  Add(driver, 2, {.prompt = 100, .deadline_ms = 99});
  driver.Step();
  EXPECT_FALSE(driver.Ended(1));
  const Event end = driver.EndOf(2);
  EXPECT_EQ(end.status.code(), Code::kDeadlineExceeded);
  EXPECT_EQ(end.status.reason(), "HOPELESS");
  EXPECT_THAT(end.status.message(), AllOf(HasSubstr("in 99 ms"), HasSubstr("100 tokens"), HasSubstr("100 ms")));
  Add(driver, 3, {.prompt = 100, .deadline_ms = 400});
  EXPECT_EQ(driver->next_deadline(), TimePoint(std::chrono::hours(1)) + milliseconds(150));
  while (!driver.Ended(1)) driver.now += milliseconds(64), driver.Step();
  Add(driver, 4, {.prompt = 100, .deadline_ms = 700});
  driver.Step();
  driver.now = TimePoint(std::chrono::hours(1)) + milliseconds(600);
  driver.Step();
  EXPECT_EQ(driver.EndOf(4).status.reason(), "HOPELESS") << "it waited until it was";
  EXPECT_EQ(driver->load().hopeless, 2u);
}

TEST(Deadlines, NoCostIsTooLargeToBeReckonedWith) {
  SchedulerOptions options = OneByOne();
  options.token_budget = 1;
  options.step_cost = {.step_us = 1e9, .weights_us = 1e9, .token_us = 1e9, .sequence_us = 1e9, .attention_us = 1e9};
  Driver driver(options);
  Add(driver, 1, {.prompt = 300, .priority = INT32_MAX, .deadline_ms = 1000});
  Add(driver, 2, {.prompt = 300, .target_ms = 1000});
  driver.RunAll();
  EXPECT_EQ(driver.EndOf(1).status.reason(), "HOPELESS");
  EXPECT_TRUE(driver.EndOf(2).status.ok());
}

TEST(Deadlines, WhatThePrefixCacheHoldsTakesNoTime) {
  for (bool cached : {false, true}) {
    SchedulerOptions options = OneByOne();
    options.prefix_cache = cached;
    Driver driver(options);
    Add(driver, 1, {.prompt = 100});
    driver.RunAll();
    Add(driver, 2, {.prompt = 100, .deadline_ms = 50});
    driver.RunAll();
    EXPECT_EQ(driver.EndOf(2).status.ok(), cached);
  }
}

TEST(Deadlines, OneTokenBehindALongCachedPrefixReadsAllOfIt) {
  SchedulerOptions options = OneByOne();
  options.prefix_cache = true;
  options.step_cost.kv_token_us = 1000;
  Driver driver(options);
  Add(driver, 1, {.prompt = 101});
  driver.RunAll();
  Add(driver, 2, {.prompt = 101, .deadline_ms = 50});
  driver.RunAll();
  EXPECT_EQ(driver.EndOf(2).status.reason(), "HOPELESS");
  EXPECT_THAT(driver.EndOf(2).status.message(), AllOf(HasSubstr(" 1 tokens"), HasSubstr("takes 102 ms")));
}

TEST(Deadlines, ABadlyLearnedCostMakesNothingHopeless) {
  for (bool steady : {false, true}) {
    SchedulerOptions options = OneByOne();
    options.step_cost = {};
    options.learn_step_cost = true;
    Driver driver(options);
    int steps = 0;
    driver.device_time = [&](const StepPlan& plan) {
      return milliseconds(plan.tokens.size()) * (steady || ++steps % 2 == 0 ? 1 : 3);
    };
    for (RequestKey key = 1; key <= 40; ++key) Add(driver, key, {.prompt = 30 + static_cast<int>(key)});
    driver.RunAll();
    Add(driver, 100, {.prompt = 100, .deadline_ms = 20});
    driver.Step();
    EXPECT_EQ(driver.Ended(100), steady) << "error " << driver->load().step_cost_error;
  }
}

TEST(Priority, WaitingMakesUpForItWhereItAges) {
  for (bool ages : {false, true}) {
    SchedulerOptions options = OneByOne();
    if (ages) options.priority_ageing = milliseconds(100);
    Driver driver(options);
    Add(driver, 1, {});
    Add(driver, 2, {.arrives_ms = 150, .priority = 1});  // worth 100 ms, but 1 has waited 150 ms longer
    Add(driver, 3, {.arrives_ms = 150, .priority = 2});
    Add(driver, 4, {.arrives_ms = 150, .priority = INT32_MAX});
    Add(driver, 5, {.priority = INT32_MIN});
    driver.now += milliseconds(150);
    if (ages) {
      EXPECT_THAT(AdmittedInOrder(driver), ElementsAre(4, 3, 1, 2, 5));
    } else {
      EXPECT_THAT(AdmittedInOrder(driver), ElementsAre(4, 3, 2, 1, 5));
    }
  }
}

// --- Tenants ---------------------------------------------------------------------------------------------------------

// Both tenants always have requests waiting, of sizes drawn by a seed.
class TwoTenants {
 public:
  TwoTenants(SchedulerOptions options, int32_t weight_a, int32_t weight_b)
      : driver_(WithTenants(options, weight_a, weight_b)) {}

  Driver& driver() { return driver_; }
  void Step(bool a_asks, bool b_asks) {
    for (const auto& [asks, tenant] : {std::pair(a_asks, 0), std::pair(b_asks, 1)}) {
      while (asks && driver_->load().tenants[static_cast<size_t>(tenant)].waiting_requests < 3) {
        auto request = MakeRequest(1 + static_cast<int>(random_() % 30), 1 + static_cast<int>(random_() % 30),
                                   static_cast<TokenId>(random_() % 100'000));
        request->tenant = tenant == 0 ? "a" : "b";
        request->priority = tenant == 0 ? static_cast<int32_t>(random_() % 100) : 0;  // which helps against nobody else
        tenants_[++key_] = tenant;
        prompts_[key_] = static_cast<int32_t>(request->prompt.size());
        driver_->Add(key_, request);
      }
    }
    driver_.events.clear();
    auto plan = driver_.Step();
    for (const PlannedSequence& planned : plan->sequences) {
      int32_t& computed = computed_[planned.request];  // what a preemption makes to be computed again is no service
      const int32_t begin = std::max(computed, planned.first_position);
      computed = std::max(computed, planned.first_position + planned.num_tokens);
      const int32_t answer = std::max(0, computed - std::max(begin, prompts_[planned.request]));
      served_[tenants_[planned.request]] += computed - begin + answer;
    }
  }
  double served(int tenant) const { return static_cast<double>(served_[tenant]); }

 private:
  static SchedulerOptions WithTenants(SchedulerOptions options, int32_t a, int32_t b) {
    options.tenants = {{.name = "a", .weight = a}, {.name = "b", .weight = b}};
    return options;
  }
  Driver driver_;
  std::minstd_rand random_{3};
  std::map<RequestKey, int> tenants_;
  std::map<RequestKey, int32_t> prompts_, computed_;
  RequestKey key_ = 0;
  int64_t served_[2] = {};
};

// As much as can run when the other tenant falls behind: no more than its sequences can ask for to their ends.
constexpr double kMostOutstanding = 8 * (30 + 2 * 30);

TEST(Tenants, TwoThatAlwaysWaitAreServedAsTheirWeights) {
  for (const auto& [a, b] : {std::pair(1, 1), std::pair(1, 3), std::pair(5, 2)}) {
    for (int32_t blocks : {40, 12}) {  // with room for all, and with preemptions
      SchedulerOptions options = SmallOptions();
      options.num_blocks = blocks + 8;
      TwoTenants world(options, a, b);
      const double bound = kMostOutstanding / std::min(a, b);
      for (int step = 0; step < 3000; ++step) {
        world.Step(true, true);
        ASSERT_LE(std::abs(world.served(0) / a - world.served(1) / b), bound) << "at step " << step;
      }
      EXPECT_NEAR(world.served(0) / world.served(1) * b / a, 1, 0.05);
    }
  }
}

TEST(Tenants, OneThatWasAwayIsOwedNothing) {
  TwoTenants world(SmallOptions(), 1, 1);
  for (int step = 0; step < 500; ++step) world.Step(true, false);
  const double before = world.served(0);
  EXPECT_GT(before, 5 * kMostOutstanding);
  for (int step = 0; step < 1000; ++step) {
    world.Step(true, true);
    ASSERT_LE(std::abs(world.served(0) - before - world.served(1)), kMostOutstanding) << "at step " << step;
  }
}

TEST(Tenants, RunNoMoreSequencesThanTheyMayAndOthersPassThem) {
  SchedulerOptions options = SmallOptions();
  options.tenants = {{.name = "a", .max_running = 2}};
  Driver driver(options);
  for (RequestKey key = 1; key <= 5; ++key) {
    auto request = MakeRequest(2, 20);
    request->tenant = key <= 4 ? "a" : "whoever";
    driver->Add(key, request);
  }
  auto plan = driver.Step();
  EXPECT_EQ(plan->sequences.size(), 3u);
  EXPECT_EQ(driver->load().tenants[0].running_sequences, 2);
  EXPECT_EQ(driver->load().tenants[0].waiting_requests, 2);
  EXPECT_EQ(driver->load().tenants[1].running_sequences, 1);
  driver.RunAll();
  EXPECT_EQ(driver->load().tenants[0].generated_tokens, 80u);
  EXPECT_EQ(driver->load().tenants[1].prompt_tokens, 2u);
}

TEST(Tenants, WhoHasHadMoreGivesUpFirst) {
  SchedulerOptions options = SmallOptions();
  options.num_blocks = 15;  // for two of the three to their ends
  options.prefix_cache = false;
  options.tenants = {{.name = "a"}, {.name = "b"}};
  Driver driver(options);
  auto add = [&](RequestKey key, const char* tenant, int32_t priority, int prompt) {
    auto request = MakeRequest(prompt, 20, static_cast<TokenId>(100 * key));
    request->tenant = tenant;
    request->priority = priority;
    driver->Add(key, request);
    driver.Step();
  };
  add(1, "a", 0, 5);
  add(2, "a", 9, 14);
  add(3, "b", 0, 5);
  while (driver->load().preemptions == 0) driver.Step();
  driver.RunAll();
  EXPECT_EQ(driver.EndOf(1).timing.preemptions, 0u) << "the oldest";
  EXPECT_GT(driver.EndOf(2).timing.preemptions, 0u) << "though its priority is higher";
  EXPECT_EQ(driver.EndOf(3).timing.preemptions, 0u);
}

// --- The ceiling on inter-token latency ------------------------------------------------------------------------------

SchedulerOptions CeilingOptions(Duration max_itl) {
  SchedulerOptions options = SmallOptions();
  options.num_blocks = 200;
  options.max_context = 400;
  options.token_budget = 64;
  options.prefix_cache = false;
  options.max_itl = max_itl;
  options.step_cost.step_us = 1000;
  options.step_cost.token_us = 1000;  // a millisecond, and one more for each token
  return options;
}

TEST(Ceiling, PromptsGetWhatKeepsTheStepUnderItWhileAnswersAreStreamed) {
  Driver driver(CeilingOptions(milliseconds(12)));
  driver->Add(1, MakeRequest(40, 50));
  auto plan = driver.Step();
  EXPECT_EQ(plan->tokens.size(), 40u);  // nobody is waiting for a token yet
  driver->Add(2, MakeRequest(100, 5));
  driver->Add(3, MakeRequest(100, 5));
  plan = driver.Step();
  ASSERT_EQ(plan->sequences.size(), 2u);  // and no room is left for 3
  EXPECT_EQ(plan->sequences[0].request, 1u);
  EXPECT_EQ(plan->sequences[1].num_tokens, 10);  // 1 + 1 + 10 ms
  while (driver.TokensOf(3).empty()) {
    plan = driver.Step();
    EXPECT_LE(StepTime(CeilingOptions({}).step_cost, WorkOf(*plan)), milliseconds(12));
    EXPECT_EQ(plan->tokens.size(), 11u) << "and no less than that";
    if (driver.TokensOf(3).size() + driver.TokensOf(2).size() > 0) break;
  }
  driver.RunAll();
  for (RequestKey key = 1; key <= 3; ++key) EXPECT_EQ(driver.FinishOf(key), FinishReason::kLength);
}

TEST(Ceiling, AttentionToALongContextShrinksTheChunk) {
  SchedulerOptions options = CeilingOptions(milliseconds(12));
  options.step_cost.attention_us = 20;
  Driver driver(options);
  driver->Add(1, MakeRequest(2, 100));
  driver.Step();
  driver->Add(2, MakeRequest(200, 5));
  std::vector<int32_t> chunks;
  while (driver.TokensOf(2).empty()) {
    auto plan = driver.Step();
    ASSERT_EQ(plan->sequences.size(), 2u);
    chunks.push_back(plan->sequences[1].num_tokens);
  }
  EXPECT_GT(chunks.front(), chunks[chunks.size() - 2]);
}

TEST(Ceiling, ATokenThatAttendsAsADecodeDoesMayTakeLongerThanTwoOfAPrompt) {
  SchedulerOptions options = CeilingOptions(microseconds(17500));
  options.step_cost.kv_token_us = 3000;
  Driver driver(options);
  driver->Add(1, MakeRequest(2, 50));
  driver.Step();
  driver->Add(2, MakeRequest(4, 5));
  driver->Add(3, MakeRequest(10, 5));
  auto plan = driver.Step();  // 1 + (1 + 9) + 4 ms; one token more takes 4 ms, two take 2, three take 3
  ASSERT_EQ(plan->sequences.size(), 3u);
  EXPECT_EQ(plan->sequences[1].num_tokens, 4);
  EXPECT_EQ(plan->sequences[2].num_tokens, 2);
}

TEST(Ceiling, TheFirstPromptGetsABlockInAnyCase) {
  Driver driver(CeilingOptions(milliseconds(4)));
  for (RequestKey key = 1; key <= 5; ++key) driver->Add(key, MakeRequest(2, 50));
  driver.Step();
  driver->Add(6, MakeRequest(9, 5));
  driver->Add(7, MakeRequest(9, 5));
  std::vector<int32_t> chunks;
  while (driver.TokensOf(6).empty()) {
    auto plan = driver.Step();  // the decodes alone take 6 ms
    ASSERT_EQ(plan->sequences.size(), 6u) << "nobody but the first prompt";
    chunks.push_back(plan->sequences[5].num_tokens);
  }
  EXPECT_THAT(chunks, ElementsAre(4, 4, 1));
}

TEST(Ceiling, KeepsToWhatStepsWereMeasuredToTake) {
  SchedulerOptions options = CeilingOptions(microseconds(12500));
  const StepCost truth = options.step_cost;
  for (double assumed : {0.0, 0.25, 4.0}) {  // of the truth; 0: nothing is known
    options.step_cost = {.step_us = assumed * truth.step_us, .token_us = assumed * truth.token_us};
    options.learn_step_cost = true;
    Driver driver(options);
    driver.device_time = [&](const StepPlan& plan) { return StepTime(truth, WorkOf(plan)); };
    for (RequestKey key = 1; key <= 6; ++key) driver->Add(key, MakeRequest(100, 30));
    driver.RunAll();
    const SchedulerLoad load = driver->load();
    EXPECT_EQ(load.measured_steps, load.steps);
    EXPECT_NEAR(load.step_cost.token_us, truth.token_us, 0.02 * truth.token_us);
    driver->Add(7, MakeRequest(2, 100));
    driver.Step();
    driver->Add(8, MakeRequest(200, 5));
    EXPECT_EQ(driver.Step()->tokens.size(), 11u) << "1 ms and 11 tokens of 1 ms, from " << assumed;
  }
}

TEST(Ceiling, LearnsOnlyWhenItIsToldTo) {
  Driver driver(CeilingOptions(milliseconds(12)));
  driver.device_time = [](const StepPlan&) { return milliseconds(100); };
  driver->Add(1, MakeRequest(40, 5));
  driver.RunAll();
  EXPECT_EQ(driver->load().measured_steps, 0u);
  EXPECT_EQ(driver->load().step_cost.token_us, 1000);
}

TEST(Ceiling, LateTokensAreCountedWithHowLateTheyWere) {
  Driver driver(CeilingOptions(milliseconds(12)));
  driver->Add(1, MakeRequest(2, 4));
  for (int ms : {100, 12, 15, 22}) {  // a first token is never late
    driver.Plan();
    driver.now += milliseconds(ms);
    driver.Apply();
  }
  EXPECT_TRUE(driver.Ended(1));
  EXPECT_EQ(driver->load().late_tokens, 2u);
  EXPECT_EQ(driver->load().late_total, milliseconds(3 + 10));
  EXPECT_EQ(driver->load().late_most, milliseconds(10));
}

// --- Ends ------------------------------------------------------------------------------------------------------------

TEST(Scheduler, StopsAtEosAndStopIdsButNotBeforeTheMinimum) {
  struct Case {
    bool ignore_eos;
    std::vector<TokenId> stop_ids;
    int min_new;
    TokenId sampled;
    FinishReason finish;
    size_t tokens;
  };
  for (const Case& c : {Case{false, {}, 0, 7, FinishReason::kEos, 1}, Case{true, {}, 0, 7, FinishReason::kLength, 5},
                        Case{false, {9}, 0, 9, FinishReason::kStop, 1}, Case{true, {7}, 0, 7, FinishReason::kStop, 1},
                        Case{false, {}, 3, 7, FinishReason::kEos, 4}, Case{false, {9}, 2, 9, FinishReason::kStop, 3}}) {
    Driver driver(SmallOptions());
    driver.token = [&](const PlannedSequence& planned) {
      EXPECT_EQ(planned.ban_stops, planned.first_position + planned.num_tokens - 3 < c.min_new);
      return c.sampled;
    };
    auto request = MakeRequest(3, 5);
    request->stop.ignore_eos = c.ignore_eos;
    request->stop.token_ids = c.stop_ids;
    request->stop.min_new_tokens = c.min_new;
    driver->Add(1, request);
    driver.RunAll();
    EXPECT_EQ(driver.TokensOf(1).size(), c.tokens);
    EXPECT_EQ(driver.FinishOf(1), c.finish);
  }
}

TEST(Scheduler, WhatAnEndedSequenceSampledInTheNextStepIsDropped) {
  Driver driver(SmallOptions());
  driver.token = [](const PlannedSequence&) { return 7; };
  driver->Add(1, MakeRequest(3, 5));
  driver.Plan();
  ASSERT_NE(driver.Plan(), nullptr);  // the scheduler cannot know yet that the first token will be EOS
  driver.Apply();
  EXPECT_TRUE(driver.Ended(1));
  EXPECT_EQ(driver->load().blocks_used, 1);  // the step in flight still writes it
  driver.Apply();
  EXPECT_EQ(driver->load().blocks_used, 0);
  EXPECT_THAT(driver.TokensOf(1), ElementsAre(7));
}

TEST(Scheduler, CancelTakesEffectAtTheNextPlanOrApply) {
  for (bool at_plan : {false, true}) {
    Driver driver(SmallOptions());
    driver->Add(1, MakeRequest(3, 50));
    driver->Add(2, MakeRequest(3, 50));
    driver.Step();
    driver.Plan();
    driver->Cancel(1, Status(Code::kCancelled, "gone"));
    driver->Cancel(99, Status(Code::kCancelled, "unknown"));
    if (at_plan) {
      auto plan = driver.Plan();
      ASSERT_EQ(plan->sequences.size(), 1u);
      EXPECT_EQ(plan->sequences[0].request, 2u);
    } else {
      driver.Apply();
    }
    EXPECT_EQ(driver.EndOf(1).status.message(), "gone");
    EXPECT_EQ(driver.FinishOf(1), FinishReason::kCancelled);
    EXPECT_EQ(driver.TokensOf(1).size(), 1u);  // not that of the step in flight
    if (at_plan) driver.Apply();
    // Within one step only request 2 holds blocks; the plan after the next took its second one.
    EXPECT_EQ(driver->load().blocks_used, at_plan ? 2 : 1);
    EXPECT_EQ(driver->load().running_requests, 1);
  }
}

TEST(Scheduler, CancelInTheQueueEndsWithoutAdmission) {
  SchedulerOptions options = SmallOptions();
  options.max_running = 1;
  Driver driver(options);
  driver->Add(1, MakeRequest(3, 50));
  driver->Add(2, MakeRequest(5, 50));
  driver.Step();
  EXPECT_EQ(driver->load().waiting_requests, 1);
  EXPECT_EQ(driver->load().waiting_tokens, 5);
  driver->Cancel(2, Status(Code::kCancelled, "gone"));
  driver.Step();
  EXPECT_EQ(driver.EventsOf(2).size(), 1u);
  EXPECT_EQ(driver.EndOf(2).status.code(), Code::kCancelled);
  EXPECT_EQ(driver->load().waiting_requests, 0);
  EXPECT_EQ(driver->load().waiting_tokens, 0);
}

TEST(Scheduler, DeadlinesEndWaitingAndRunningRequests) {
  SchedulerOptions options = SmallOptions();
  options.max_running = 2;
  Driver driver(options);
  auto timed = [&](auto member, int ms) {
    auto request = MakeRequest(3, 90);
    (*request).*member = driver.now + milliseconds(ms);
    return request;
  };
  driver->Add(1, timed(&Request::deadline, 50));
  driver->Add(2, timed(&Request::time_limit, 60));
  driver->Add(3, timed(&Request::queue_deadline, 20));
  EXPECT_EQ(driver->next_deadline(), driver.now + milliseconds(20));
  driver.Step();
  driver.now += milliseconds(20);
  driver.Step();
  EXPECT_EQ(driver.EndOf(3).status.code(), Code::kDeadlineExceeded);
  EXPECT_EQ(driver.EndOf(3).status.reason(), "QUEUE_TIMEOUT");
  EXPECT_EQ(driver->next_deadline(), driver.now + milliseconds(30));
  driver.now += milliseconds(30);
  driver.Step();
  EXPECT_EQ(driver.EndOf(1).status.code(), Code::kDeadlineExceeded);
  EXPECT_EQ(driver.EndOf(1).status.reason(), "DEADLINE");
  EXPECT_EQ(driver.EndOf(1).timing.total, milliseconds(50));
  driver.now += milliseconds(10);
  driver.Step();
  EXPECT_TRUE(driver.EndOf(2).status.ok());
  EXPECT_EQ(driver.FinishOf(2), FinishReason::kTimeLimit);
  EXPECT_EQ(driver.TokensOf(2).size(), 3u);  // what there was
  EXPECT_EQ(driver->next_deadline(), kNever);
  EXPECT_TRUE(driver->idle());
}

TEST(Scheduler, OfTwoExpiriesTheFirstDecides) {
  struct Case {
    int time_limit, deadline, queue_deadline;
    const char* reason;  // of the error; empty: the time limit, which is an answer
  };
  for (const Case& c : {Case{20, 30, 40, ""}, Case{30, 20, 40, "DEADLINE"}, Case{30, 40, 20, "QUEUE_TIMEOUT"},
                        Case{20, 20, 20, ""}, Case{30, 20, 20, "DEADLINE"}}) {
    SchedulerOptions options = SmallOptions();
    options.max_running = 1;
    Driver driver(options);
    auto first = MakeRequest(3, 90);
    first->priority = 1;
    driver->Add(1, first);
    auto request = MakeRequest(3, 90);
    request->time_limit = driver.now + milliseconds(c.time_limit);
    request->deadline = driver.now + milliseconds(c.deadline);
    request->queue_deadline = driver.now + milliseconds(c.queue_deadline);
    driver->Add(2, request);
    driver.Step();
    driver.now += milliseconds(50);  // all of them are over when the scheduler looks
    driver.Step();
    EXPECT_EQ(driver.EndOf(2).status.reason(), c.reason);
    EXPECT_EQ(driver.FinishOf(2), *c.reason == 0 ? FinishReason::kTimeLimit : FinishReason::kNone);
  }
}

TEST(Scheduler, AdmissionEndsTheQueueDeadline) {
  Driver driver(SmallOptions());
  auto request = MakeRequest(3, 90);
  request->queue_deadline = driver.now + milliseconds(10);
  driver->Add(1, request);
  driver.Step();
  EXPECT_EQ(driver->next_deadline(), kNever);
  driver.now += milliseconds(20);
  driver.Step();
  EXPECT_FALSE(driver.Ended(1));
}

TEST(Scheduler, NonFiniteScoresEndOneRequestAndWithdrawItsBlocks) {
  Driver driver(SmallOptions());
  driver->Add(1, MakeRequest(9, 50));
  driver->Add(2, MakeRequest(3, 4, 500));
  driver.Step();
  driver.finite = [](const PlannedSequence& planned) { return planned.request != 1; };
  driver.Plan();
  driver.Plan();
  driver.Apply();
  driver.Apply();
  EXPECT_EQ(driver.EndOf(1).status.code(), Code::kInternal);
  EXPECT_EQ(driver.EndOf(1).status.reason(), "NON_FINITE_LOGITS");
  EXPECT_EQ(driver.TokensOf(1).size(), 1u);
  driver.RunAll();
  EXPECT_TRUE(driver.EndOf(2).status.ok());
  EXPECT_EQ(driver.TokensOf(2).size(), 4u);
  driver->Add(3, MakeRequest(9, 1));
  driver.RunAll();
  EXPECT_EQ(driver.CachedTokensOf(3), 0u);  // nothing of what 1 had computed is found again
}

TEST(Scheduler, WhoeverFoundABlockDoesNotGiveItBackANameThatNanHasTaken) {
  Driver driver(SmallOptions());
  driver->Add(1, MakeRequest(20, 50));
  driver.Step();  // four blocks, and nothing is sampled
  driver->Add(2, MakeRequest(20, 50));
  driver.finite = [](const PlannedSequence& planned) { return planned.request != 1; };
  driver.Step();
  ASSERT_EQ(driver.CachedTokensOf(2), 16u);
  ASSERT_EQ(driver.EndOf(1).status.reason(), "NON_FINITE_LOGITS");
  driver->Cancel(2, Status(Code::kCancelled, "before its own logits say so"));
  driver->Add(3, MakeRequest(20, 1));
  driver.RunAll();
  EXPECT_EQ(driver.CachedTokensOf(3), 0u);
}

TEST(Scheduler, AbortEndsEverythingAndForgetsTheStepsInFlight) {
  Driver driver(SmallOptions());
  driver->Add(1, MakeRequest(9, 50));
  driver->Add(2, MakeRequest(90, 5));
  driver->Add(3, MakeRequest(90, 5));
  driver.Step();
  driver.Plan();
  driver.Plan();
  driver->Abort(Status(Code::kUnavailable, "device lost"), driver.now, &driver.events);
  driver->CheckInvariants();
  for (RequestKey key : {1, 2, 3}) EXPECT_EQ(driver.EndOf(key).status.message(), "device lost");
  EXPECT_TRUE(driver->idle());
  EXPECT_EQ(driver->load().blocks_used, 0);
  EXPECT_EQ(driver->load().blocks_cached, 0);
  EXPECT_EQ(driver->load().waiting_requests, 0);
}

// --- The prefix cache ------------------------------------------------------------------------------------------------

TEST(PrefixSharing, RepeatedPromptsAreFoundButOneTokenIsLeft) {
  Driver driver(SmallOptions());
  driver->Add(1, MakeRequest(12, 2));
  driver.RunAll();
  EXPECT_EQ(driver.CachedTokensOf(1), 0u);
  driver->Add(2, MakeRequest(12, 2));  // three full blocks, but the last token must be computed
  auto plan = driver.Step();
  EXPECT_EQ(driver.CachedTokensOf(2), 8u);
  EXPECT_EQ(plan->sequences[0].first_position, 8);
  EXPECT_EQ(plan->sequences[0].num_tokens, 4);
  driver.RunAll();
  driver->Add(3, MakeRequest(13, 2));
  driver.Step();
  EXPECT_EQ(driver.CachedTokensOf(3), 12u);
  EXPECT_EQ(driver->load().cached_tokens, 20u);
  EXPECT_EQ(driver->load().prompt_tokens, 37u);
}

TEST(PrefixSharing, AnAnswerIsFoundWhenItComesBackAsAPrompt) {
  Driver driver(SmallOptions());
  driver->Add(1, MakeRequest(6, 7));
  driver.RunAll();
  auto request = MakeRequest(6, 1);
  for (TokenId token : driver.TokensOf(1)) request->prompt.push_back(token);
  driver->Add(2, request);
  driver.RunAll();
  EXPECT_EQ(driver.CachedTokensOf(2), 12u);  // 13 known, the last was never computed
}

TEST(PrefixSharing, RunningRequestsShareBlocksWithoutCopying) {
  Driver driver(SmallOptions());
  driver->Add(1, MakeRequest(13, 50));
  auto first = driver.Step();
  driver->Add(2, MakeRequest(13, 50));
  auto second = driver.Step();
  ASSERT_EQ(second->sequences.size(), 2u);
  ASSERT_EQ(first->block_ids.size(), 4u);
  ASSERT_EQ(second->block_ids.size(), 4u);  // none of the first's, which are known
  for (size_t i = 0; i < 3; ++i) EXPECT_EQ(first->block_ids[i], second->block_ids[i]);
  EXPECT_NE(first->block_ids[3], second->block_ids[3]);
  EXPECT_EQ(driver->load().blocks_used, 5);
}

TEST(PrefixSharing, NeverAcrossTenantsOrSaltsOrRoundABypass) {
  Driver driver(SmallOptions());
  driver->Add(1, MakeRequest(13, 1));
  driver.RunAll();
  auto cached = [&](RequestKey key, auto change) {
    auto request = MakeRequest(13, 1);
    change(*request);
    driver->Add(key, request);
    driver.RunAll();
    return driver.CachedTokensOf(key);
  };
  EXPECT_EQ(cached(2, [](Request& r) { r.tenant = "a"; }), 0u);
  EXPECT_EQ(cached(3, [](Request& r) { r.cache_salt = "a"; }), 0u);
  EXPECT_EQ(cached(4, [](Request& r) { r.bypass_prefix_cache = true; }), 0u);
  EXPECT_EQ(cached(5, [](Request& r) { r.sampling.prompt_top_logprobs = 0; }), 0u);
  EXPECT_EQ(cached(6, [](Request&) {}), 12u);
  EXPECT_EQ(cached(7, [](Request& r) { r.tenant = "a"; }), 12u);

  const auto fresh = [](Request& r) { r.prompt[0] = 77; };
  EXPECT_EQ(cached(8, [&](Request& r) { fresh(r), r.bypass_prefix_cache = true; }), 0u);
  EXPECT_EQ(cached(9, fresh), 0u);  // a bypass does not publish either
  const auto scored = [](Request& r) { r.prompt[0] = 78; };
  EXPECT_EQ(cached(10, [&](Request& r) { scored(r), r.sampling.prompt_top_logprobs = 0; }), 0u);
  EXPECT_EQ(cached(11, scored), 12u);  // prompt scores do
}

TEST(PrefixSharing, CachedBlocksAreEvictedBeforeAnyoneWaits) {
  SchedulerOptions options = SmallOptions();
  options.num_blocks = 6;
  Driver driver(options);
  for (RequestKey key = 1; key <= 5; ++key) {
    driver->Add(key, MakeRequest(20, 4, static_cast<TokenId>(100 * key)));
    driver.RunAll();
    EXPECT_TRUE(driver.EndOf(key).status.ok());
  }
  EXPECT_GT(driver->load().blocks_cached, 0);
  const int32_t cached = driver->load().blocks_cached;
  EXPECT_EQ(driver->ResetPrefixCache(), cached);
  EXPECT_EQ(driver->load().blocks_cached, 0);
}

TEST(PrefixSharing, PrefixesAreForgottenFromTheirEnds) {
  SchedulerOptions options = SmallOptions();
  options.num_blocks = 8;
  Driver driver(options);
  driver->Add(1, MakeRequest(21, 1));
  driver.RunAll();
  EXPECT_EQ(driver->load().blocks_cached, 5);
  driver->Add(2, MakeRequest(19, 1, 500));  // five blocks: the three free ones and two of the cached
  driver.RunAll();
  driver->Add(3, MakeRequest(21, 1));
  driver.RunAll();
  EXPECT_EQ(driver.CachedTokensOf(3), 12u);
}

TEST(PrefixSharing, WhatSeveralRequestsHaveFoundOutlivesAScanOfOthers) {
  for (bool found : {false, true}) {
    SchedulerOptions options = SmallOptions();
    options.num_blocks = 16;
    Driver driver(options);
    auto with_system_prompt = [&](RequestKey key) {
      auto request = MakeRequest(16, 1);
      request->prompt.push_back(static_cast<TokenId>(5000 + key));
      driver->Add(key, request);
      driver.RunAll();
      return driver.CachedTokensOf(key);
    };
    EXPECT_EQ(with_system_prompt(1), 0u);
    if (found) {
      EXPECT_EQ(with_system_prompt(2), 16u);
    }
    for (RequestKey key = 10; key < 30; ++key) {  // each is seen once, and all together need many times the pool
      driver->Add(key, MakeRequest(30, 1, static_cast<TokenId>(100 * key)));
      driver.RunAll();
    }
    EXPECT_EQ(with_system_prompt(3), found ? 16u : 0u);
    EXPECT_EQ(driver->load().cached_tokens, found ? 32u : 0u);
  }
}

TEST(PrefixSharing, PromptScoresComeInOrderAndInPieces) {
  Driver driver(SmallOptions());
  auto request = MakeRequest(20, 2);
  request->sampling.prompt_top_logprobs = 1;
  driver->Add(1, request);
  auto plan = driver.Step();
  EXPECT_EQ(plan->sequences[0].num_prompt_scores, 16);
  EXPECT_EQ(plan->prompt_score_ids.front(), 1);
  driver.RunAll();
  std::vector<TokenId> scored;
  for (const Event& event : driver.EventsOf(1)) {
    if (event.kind == Event::Kind::kToken) break;
    for (const TokenScore& score : event.prompt_scores) scored.push_back(score.token);
  }
  EXPECT_EQ(scored, std::vector<TokenId>(request->prompt.begin() + 1, request->prompt.end()));
}

// --- Several sequences -----------------------------------------------------------------------------------------------

class Siblings : public testing::TestWithParam<int> {};  // 0: prefix cache, 1: without, 2: bypass

TEST_P(Siblings, ComputeThePromptOnceAndShareItsFullBlocks) {
  SchedulerOptions options = SmallOptions();
  options.prefix_cache = GetParam() != 1;
  Driver driver(options);
  auto request = MakeRequest(14, 6);
  request->num_sequences = 3;
  request->bypass_prefix_cache = GetParam() == 2;
  driver->Add(1, request);
  auto plan = driver.Step();
  ASSERT_EQ(plan->sequences.size(), 1u);  // the others wait for the prompt
  EXPECT_EQ(plan->sequences[0].num_tokens, 14);
  plan = driver.Step();
  ASSERT_EQ(plan->sequences.size(), 3u);
  EXPECT_EQ(plan->sequences[0].new_blocks(), 0);
  std::set<int32_t> blocks(plan->block_ids.begin(), plan->block_ids.end());
  EXPECT_EQ(blocks.size(), 3u + 2u);  // three shared with the first, one own each
  for (size_t i = 1; i < 3; ++i) {
    EXPECT_EQ(plan->sequences[i].first_position, 12);
    EXPECT_EQ(plan->sequences[i].num_tokens, 2);  // only the tail block is computed again
  }
  EXPECT_EQ(driver->load().blocks_used, 6);
  driver.RunAll();
  for (uint32_t s = 0; s < 3; ++s) {
    EXPECT_EQ(driver.TokensOf(1, s).size(), 6u);
    EXPECT_EQ(driver.FinishOf(1, s), FinishReason::kLength);
  }
  EXPECT_EQ(driver.CachedTokensOf(1), 0u);  // not a hit in the cache: sharing is between siblings
  EXPECT_EQ(driver->load().blocks_used, 0);
}

TEST_P(Siblings, FindThePromptEvenIfTheFirstHasEndedMeanwhile) {
  SchedulerOptions options = SmallOptions();
  options.prefix_cache = GetParam() != 1;
  options.max_running = 1;
  Driver driver(options);
  auto request = MakeRequest(16, 1);
  request->num_sequences = 3;
  request->bypass_prefix_cache = GetParam() == 2;
  driver->Add(1, request);
  driver.Step();
  EXPECT_EQ(driver->load().blocks_used, 3);  // kept for those who have not started; the last full block is not
  auto plan = driver.Step();
  EXPECT_EQ(plan->sequences[0].first_position, 12);
  driver.RunAll();
  EXPECT_EQ(driver->load().blocks_used, 0);
}

INSTANTIATE_TEST_SUITE_P(Scheduler, Siblings, testing::Values(0, 1, 2));

TEST(Scheduler, StoppingOneSequenceLeavesItsSiblings) {
  Driver driver(SmallOptions());
  auto request = MakeRequest(5, 6);
  request->num_sequences = 3;
  driver->Add(1, request);
  driver->StopSequence(1, 0);  // before it computed the prompt: another has to
  driver.Step();
  EXPECT_EQ(driver.FinishOf(1, 0), FinishReason::kStop);
  driver.Step();
  driver->StopSequence(1, 1);
  driver->StopSequence(1, 17);
  driver->StopSequence(55, 0);
  driver.RunAll();
  EXPECT_EQ(driver.FinishOf(1, 1), FinishReason::kStop);
  EXPECT_EQ(driver.FinishOf(1, 2), FinishReason::kLength);
  EXPECT_EQ(driver.TokensOf(1, 2).size(), 6u);
  EXPECT_TRUE(driver.EndOf(1).status.ok());
}

// --- Preemption ------------------------------------------------------------------------------------------------------

TEST(Preemption, TheNewestGivesUpAndIsComputedAgain) {
  SchedulerOptions options = SmallOptions();
  options.num_blocks = 6;
  Driver driver(options);
  for (RequestKey key = 1; key <= 3; ++key) {
    auto request = MakeRequest(5, 10, static_cast<TokenId>(100 * key));
    request->sampling.presence_penalty = 1;
    driver->Add(key, request);
  }
  std::vector<TokenId> history;
  std::set<std::pair<RequestKey, uint32_t>> started;
  uint64_t recomputed = 0;
  while (!driver->idle()) {
    auto plan = driver.Plan();
    ASSERT_NE(plan, nullptr);
    for (const SlotInit& init : plan->slot_inits) {
      const auto key = static_cast<RequestKey>(init.request->prompt[0] / 100);
      if (started.emplace(key, init.sequence).second) continue;
      EXPECT_NE(key, 1u);
      EXPECT_EQ(init.output_history, driver.TokensOf(key));
      ++recomputed;
    }
    driver.Apply();
  }
  EXPECT_GT(recomputed, 0u);
  EXPECT_EQ(driver.EndOf(1).timing.preemptions, 0u);  // the oldest never gives up
  EXPECT_GT(driver.EndOf(3).timing.preemptions, 0u);
  EXPECT_EQ(driver->load().preemptions, driver.EndOf(2).timing.preemptions + driver.EndOf(3).timing.preemptions);
  for (RequestKey key = 1; key <= 3; ++key) EXPECT_EQ(driver.TokensOf(key).size(), 10u);
}

TEST(Preemption, EachTimeItTakesTwiceTheHeadroomToComeBack) {
  SchedulerOptions options = SmallOptions();
  options.max_running = 9;
  options.num_blocks = 100;
  options.max_context = 400;
  options.prefix_cache = false;
  Driver driver(options);
  // Eight grow, and the ninth, last in order, makes room for them.
  for (RequestKey key = 1; key <= 9; ++key) driver->Add(key, MakeRequest(5, key < 9 ? 90 : 200));
  int admissions = 0;
  bool runs = false;
  for (int steps = 0; !driver.Ended(9); ++steps) {
    ASSERT_LT(steps, 2000);
    auto plan = driver.Plan();
    const bool runs_now = std::ranges::count(plan->sequences, RequestKey{9}, &PlannedSequence::request) > 0;
    if (runs_now && !runs) {
      const auto others = static_cast<int32_t>(plan->sequences.size()) - 1;
      EXPECT_GE(options.num_blocks - driver->load().blocks_used, (others << admissions) / 4)
          << "after " << admissions << " preemptions";
      ++admissions;
    }
    runs = runs_now;
    driver.Apply();
  }
  EXPECT_GE(admissions, 2);
}

TEST(Preemption, TheLowestPriorityGivesUpButNotTheOldest) {
  SchedulerOptions options = SmallOptions();
  options.num_blocks = 10;  // two of the three requests to their ends
  options.prefix_cache = false;
  Driver driver(options);
  const int priorities[] = {-5, -1, 0};  // the oldest has the lowest
  for (RequestKey key = 1; key <= 3; ++key) {
    auto request = MakeRequest(6, 14, static_cast<TokenId>(100 * key));
    request->priority = priorities[key - 1];
    driver->Add(key, request);
    driver.Step();
  }
  driver.RunAll();
  EXPECT_EQ(driver.EndOf(1).timing.preemptions, 0u);
  EXPECT_GT(driver.EndOf(2).timing.preemptions, 0u);
  EXPECT_EQ(driver.EndOf(3).timing.preemptions, 0u);
}

TEST(Preemption, SiblingsOfTheOldestMakeRoomForTheFirst) {
  SchedulerOptions options = SmallOptions();
  options.num_blocks = 4;
  options.prefix_cache = false;
  Driver driver(options);
  auto request = MakeRequest(5, 11);
  request->num_sequences = 3;
  driver->Add(1, request);
  driver.RunAll();
  for (uint32_t s = 0; s < 3; ++s) EXPECT_EQ(driver.TokensOf(1, s).size(), 11u);
}

TEST(Preemption, BlocksComingBackAreWaitedForNotPreemptedFor) {
  SchedulerOptions options = SmallOptions();
  options.num_blocks = 9;
  options.prefix_cache = false;
  Driver driver(options);
  // 1 and 2 want a block in the same step; 4 alone, with four blocks to give, is enough.
  driver->Add(1, MakeRequest(7, 5));
  driver->Add(2, MakeRequest(7, 5));
  driver->Add(3, MakeRequest(5, 2));
  driver->Add(4, MakeRequest(9, 20));
  while (driver->load().preemptions == 0)
    ASSERT_TRUE(driver.Plan() && (driver.num_in_flight() < 2 || (driver.Apply(), true)));
  EXPECT_EQ(driver->load().preemptions, 1u);
  while (driver.num_in_flight() > 0) driver.Apply();
  driver.RunAll();
  for (RequestKey key = 1; key <= 3; ++key) EXPECT_EQ(driver.EndOf(key).timing.preemptions, 0u);
}

}  // namespace
}  // namespace altiplano
