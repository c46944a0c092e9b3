// Several engines behind one front end: where requests go, and what is left when one is lost.
#include "server/engine/replica_set.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <random>
#include <thread>

#include "server/base/strings.h"
#include "server/engine/replica_router.h"
#include "tests/server/engine/engine_testlib.h"

namespace altiplano {
namespace {

using std::chrono::milliseconds;
using ::testing::Each;
using ::testing::ElementsAre;

constexpr int32_t kBlock = 4;

// Prompts of different `kind` differ from their first block on.
std::shared_ptr<Request> MakeRequest(int kind, int prompt_tokens = 40, int max_new_tokens = 4) {
  auto request = std::make_shared<Request>();
  request->id = StrCat("kind-", kind);
  for (int i = 0; i < prompt_tokens; ++i) request->prompt.push_back(i == 0 ? kind : 100 + i);
  request->stop.max_new_tokens = max_new_tokens;
  return request;
}

int Best(const ReplicaRouter& router, const Request& request) {
  return router.Find(request).order.front();
}
ReplicaRouter::Work Send(ReplicaRouter& router, const Request& request) {
  const ReplicaRouter::Route route = router.Find(request);
  return router.Sent(request, route, route.order.front());
}

TEST(ReplicaRouter, EqualReplicasAreTakenInOrderAndLoadIsSpread) {
  ReplicaRouter router(3, kBlock, 1000);
  EXPECT_THAT(router.Find(*MakeRequest(0)).order, ElementsAre(0, 1, 2));
  std::vector<int> taken;
  for (int i = 0; i < 6; ++i) taken.push_back(Send(router, *MakeRequest(i)).replica);
  EXPECT_THAT(taken, ElementsAre(0, 1, 2, 0, 1, 2));
}

TEST(ReplicaRouter, TheSamePrefixGoesWhereItIsCachedAmongEqualTenantsAndSalts) {
  ReplicaRouter router(3, kBlock, 1000);
  for (int i = 0; i < 3; ++i) {
    ReplicaRouter::Work work = Send(router, *MakeRequest(i));
    router.Computed(&work);  // all three decode
  }
  for (int i : {2, 0, 1}) EXPECT_EQ(Best(router, *MakeRequest(i)), i);
  auto longer = MakeRequest(2, 60);
  EXPECT_EQ(Best(router, *longer), 2) << "its beginning is known";
  longer->tenant = "other";
  EXPECT_EQ(Best(router, *longer), 0);
  longer->tenant.clear();
  longer->cache_salt = "salt";
  EXPECT_EQ(Best(router, *longer), 0);
  longer->cache_salt.clear();
  longer->bypass_prefix_cache = true;
  EXPECT_EQ(Best(router, *longer), 0);
}

TEST(ReplicaRouter, APrefixIsComputedAgainWhereThatIsSoonerDone) {
  ReplicaRouter router(2, kBlock, 100000);
  const auto session = MakeRequest(7, 400);
  ASSERT_EQ(Send(router, *session).replica, 0);
  int sent = 1;  // to replica 0
  while (Best(router, *session) == 0) {
    ASSERT_EQ(Send(router, *session).replica, 0);
    ASSERT_LT(++sent, 20);
  }
  // 100 whole blocks are cached; a sequence counts as much as 128 tokens; the first one's prompt is not computed yet.
  EXPECT_EQ(sent, 1);
  ReplicaRouter fresh(2, kBlock, 100000);
  ReplicaRouter::Work first = Send(fresh, *session);
  fresh.Computed(&first);
  for (sent = 1; Best(fresh, *session) == 0; ++sent) Send(fresh, *session);
  EXPECT_EQ(sent, 4);
}

TEST(ReplicaRouter, WhatHasEndedWeighsNothing) {
  std::mt19937 random(3);
  ReplicaRouter router(4, kBlock, 0);  // no cache: only load decides
  std::vector<ReplicaRouter::Work> works;
  for (int i = 0; i < 200; ++i) works.push_back(Send(router, *MakeRequest(i, 1 + static_cast<int>(random() % 99))));
  std::shuffle(works.begin(), works.end(), random);
  for (ReplicaRouter::Work& work : works) {
    if (random() % 2 == 0) router.Computed(&work);
    router.Ended(&work);
    router.Ended(&work);  // once more changes nothing
  }
  EXPECT_THAT(router.Find(*MakeRequest(0)).order, ElementsAre(0, 1, 2, 3));
}

TEST(ReplicaRouter, ForgetsWhatTheCacheCannotHoldOrHasLost) {
  ReplicaRouter router(2, kBlock, 15);  // 10 blocks a prompt
  auto keep = [&](int kind, int replica) {
    const auto request = MakeRequest(kind);
    ReplicaRouter::Work work = router.Sent(*request, router.Find(*request), replica);
    router.Ended(&work);
  };
  keep(1, 1);
  EXPECT_EQ(Best(router, *MakeRequest(1)), 1);
  keep(2, 1);
  EXPECT_EQ(Best(router, *MakeRequest(2)), 1);
  EXPECT_EQ(Best(router, *MakeRequest(1)), 1) << "half of it is still there";
  keep(3, 1);
  EXPECT_EQ(Best(router, *MakeRequest(1)), 0);
  EXPECT_EQ(Best(router, *MakeRequest(3)), 1);
  router.Forget(1);
  EXPECT_EQ(Best(router, *MakeRequest(3)), 0);
}

EngineOptions SmallOptions() {
  EngineOptions options;
  options.scheduler.num_blocks = 64;
  options.scheduler.block_size = kBlock;
  options.scheduler.max_running = 8;
  options.scheduler.token_budget = 64;
  options.scheduler.max_context = 200;
  return options;
}

// Executors whose steps wait, or fail, as the test says.
struct Control {
  std::atomic<bool> held{false}, fails{false};
  CountingExecutor::Hook Hook() {
    return [this](const StepPlan&) {
      while (held) std::this_thread::sleep_for(milliseconds(1));
      return fails ? Status(Code::kInternal, "broken") : OkStatus();
    };
  }
};

std::unique_ptr<ReplicaSet> MakeSet(const EngineOptions& options, std::vector<Control>& controls) {
  std::vector<std::unique_ptr<Engine>> engines;
  for (Control& control : controls) {
    auto engine = Engine::Start(options, std::make_unique<CountingExecutor>(control.Hook()));
    EXPECT_TRUE(engine.ok()) << engine.status().ToString();
    engines.push_back(std::move(*engine));
  }
  return std::make_unique<ReplicaSet>(std::move(engines), true);
}

struct Call {
  RequestHandle handle;
  std::shared_ptr<CollectingSink> sink;
};

Call MustSubmit(ReplicaSet& set, std::shared_ptr<const Request> request) {
  auto sink = std::make_shared<CollectingSink>();
  auto handle = set.Submit(std::move(request), sink);
  EXPECT_TRUE(handle.ok()) << handle.status().ToString();
  return {handle.ok() ? std::move(*handle) : RequestHandle(), sink};
}

template <typename Done>
void Eventually(Done done) {
  while (!done()) std::this_thread::sleep_for(milliseconds(1));
}

std::vector<int32_t> Live(const ReplicaSet& set) {
  std::vector<int32_t> live;
  for (const EngineLoad& load : set.loads()) {
    live.push_back(load.scheduler.running_requests + load.scheduler.waiting_requests);
  }
  return live;
}

TEST(ReplicaSet, RequestsAreSpreadAndTurnsOfASessionStayTogether) {
  std::vector<Control> controls(2);
  auto set = MakeSet(SmallOptions(), controls);
  for (Control& control : controls) control.held = true;
  std::vector<Call> calls;
  for (int kind = 0; kind < 4; ++kind) calls.push_back(MustSubmit(*set, MakeRequest(kind)));
  Eventually([&] { return Live(*set) == std::vector<int32_t>{2, 2}; });
  for (Control& control : controls) control.held = false;
  for (Call& call : calls) EXPECT_TRUE(call.sink->WaitForEnd().back().status.ok());
  for (int kind : {3, 0, 1, 2, 3}) {
    Call call = MustSubmit(*set, MakeRequest(kind, 44));
    EXPECT_EQ(call.sink->WaitForEnd().front().cached_tokens, 40u) << "the replica that has it was found: kind " << kind;
  }
  EXPECT_GT(set->ResetPrefixCache(), 0);
  EXPECT_EQ(MustSubmit(*set, MakeRequest(3)).sink->WaitForEnd().front().cached_tokens, 0u);
}

TEST(ReplicaSet, TotalsAreSumsOfTheReplicas) {
  std::vector<Control> controls(3);
  auto set = MakeSet(SmallOptions(), controls);
  for (Control& control : controls) control.held = true;
  std::vector<Call> calls;
  for (int kind = 0; kind < 5; ++kind) calls.push_back(MustSubmit(*set, MakeRequest(kind)));
  Eventually([&] {
    const SchedulerLoad load = Total(set->loads()).scheduler;
    return load.running_requests + load.waiting_requests == 5;
  });
  EXPECT_THAT(Live(*set), ElementsAre(2, 2, 1));
  const EngineLoad total = Total(set->loads());
  EXPECT_EQ(total.scheduler.blocks_total, 3 * 64);
  EXPECT_EQ(total.block_size, kBlock);
  EXPECT_TRUE(total.healthy);
  for (Control& control : controls) control.held = false;
}

TEST(ReplicaSet, FlightRecordsAreNumberedFromZero) {
  std::vector<Control> one(1), two(2);
  EXPECT_EQ(MakeSet(SmallOptions(), one)->FlightRecord(1).status().message(),
            "there is no replica 1: this server has one, which is number 0");
  EXPECT_EQ(MakeSet(SmallOptions(), two)->FlightRecord(2).status().message(),
            "there is no replica 2: this server has 2, numbered 0 to 1");
}

TEST(ReplicaSet, CancellingReachesTheReplicaThatHasTheRequest) {
  std::vector<Control> controls(2);
  auto set = MakeSet(SmallOptions(), controls);
  for (Control& control : controls) control.held = true;
  Call first = MustSubmit(*set, MakeRequest(1, 40, 100)), second = MustSubmit(*set, MakeRequest(2, 40, 100));
  second.handle.Cancel(Status(Code::kCancelled, "enough"));
  for (Control& control : controls) control.held = false;
  EXPECT_EQ(second.sink->WaitForEnd().back().status.code(), Code::kCancelled);
  EXPECT_TRUE(first.sink->WaitForEnd().back().status.ok());
}

TEST(ReplicaSet, AFullQueueSendsOnToTheOthersUntilAllAreFull) {
  std::vector<Control> controls(2);
  EngineOptions options = SmallOptions();
  options.scheduler.max_running = 1;
  options.max_queued_requests = 1;
  auto set = MakeSet(options, controls);
  for (Control& control : controls) control.held = true;
  // One runs and one waits on each. The third of a session would be best off where its prefix is, but there is no room.
  std::vector<Call> calls;
  for (int i = 0; i < 4; ++i) {
    calls.push_back(MustSubmit(*set, MakeRequest(1, 160, 30)));
    Eventually([&] {
      int32_t waiting = 0;
      for (const EngineLoad& load : set->loads()) waiting += load.scheduler.waiting_requests;
      return waiting == std::max(0, i - 1);
    });
  }
  EXPECT_THAT(Live(*set), ElementsAre(2, 2));
  auto refused = set->Submit(MakeRequest(1, 160, 30), std::make_shared<CollectingSink>());
  EXPECT_EQ(refused.status().reason(), "QUEUE_FULL") << refused.status().ToString();
  for (Control& control : controls) control.held = false;
  for (Call& call : calls) EXPECT_TRUE(call.sink->WaitForEnd().back().status.ok());
}

TEST(ReplicaSet, ALostReplicaIsLeftOutAndTheOthersServe) {
  std::vector<Control> controls(2);
  auto set = MakeSet(SmallOptions(), controls);
  for (Control& control : controls) control.held = true;
  Call zero = MustSubmit(*set, MakeRequest(0)), one = MustSubmit(*set, MakeRequest(1));
  controls[1].fails = true;
  for (Control& control : controls) control.held = false;
  EXPECT_EQ(one.sink->WaitForEnd().back().status.reason(), "ENGINE_DOWN");
  EXPECT_TRUE(zero.sink->WaitForEnd().back().status.ok());
  Eventually([&] { return !set->loads()[1].healthy; });
  EXPECT_TRUE(set->healthy());
  EXPECT_FALSE(set->failed_for_good());
  for (int i = 0; i < 8; ++i) {
    EXPECT_TRUE(MustSubmit(*set, MakeRequest(1)).sink->WaitForEnd().back().status.ok()) << "its prefix was there";
  }
  controls[0].fails = true;
  EXPECT_EQ(MustSubmit(*set, MakeRequest(2)).sink->WaitForEnd().back().status.reason(), "ENGINE_DOWN");
  Eventually([&] { return set->failed_for_good(); });
  EXPECT_FALSE(set->healthy());
  auto refused = set->Submit(MakeRequest(3), std::make_shared<CollectingSink>());
  EXPECT_EQ(refused.status().reason(), "ENGINE_DOWN");
}

TEST(ReplicaSet, AnOverdueReplicaGetsNothingNewUntilItGetsOn) {
  std::vector<Control> controls(2);
  FakeClock clock;
  EngineOptions options = SmallOptions();
  options.clock = &clock;
  options.scheduler.num_blocks = 128;
  auto set = MakeSet(options, controls);
  controls[0].held = true;
  Call first = MustSubmit(*set, MakeRequest(0));
  // Of the last one the second replica holds so much that it would go there although a request runs there.
  for (const auto& request : {MakeRequest(1), MakeRequest(20), MakeRequest(9, 190)}) {
    EXPECT_TRUE(MustSubmit(*set, request).sink->WaitForEnd().back().status.ok());
  }
  controls[0].held = false;
  EXPECT_TRUE(first.sink->WaitForEnd().back().status.ok());

  controls[1].held = true;
  Call overdue = MustSubmit(*set, MakeRequest(1));
  Eventually([&] { return Live(*set)[1] == 1; });
  Eventually([&] {
    clock.Advance(options.health_deadline);
    return !set->loads()[1].healthy;
  });
  EXPECT_TRUE(set->healthy());
  for (const auto& request : {MakeRequest(9, 190), MakeRequest(1), MakeRequest(2), MakeRequest(3)}) {
    Call call = MustSubmit(*set, request);
    Eventually([&] { return call.sink->ended() || Live(*set)[1] > 1; });  // there it would wait for the test
    EXPECT_THAT(Live(*set), ElementsAre(0, 1));
    if (HasFailure()) break;
  }
  controls[1].held = false;
  EXPECT_TRUE(overdue.sink->WaitForEnd().back().status.ok());
  EXPECT_TRUE(set->loads()[1].healthy);
  EXPECT_EQ(MustSubmit(*set, MakeRequest(20)).sink->WaitForEnd().front().cached_tokens, 36u) << "it forgot nothing";
}

TEST(ReplicaSet, AReplicaThatIsMadeAgainServesWithAnEmptyCache) {
  std::vector<Control> controls(2);
  EngineOptions options = SmallOptions();
  options.restart = [&](const auto&) -> StatusOr<std::unique_ptr<Executor>> {
    for (Control& control : controls) control.fails = false;
    return std::unique_ptr<Executor>(new CountingExecutor());
  };
  auto set = MakeSet(options, controls);
  controls[0].fails = true;
  EXPECT_EQ(MustSubmit(*set, MakeRequest(0)).sink->WaitForEnd().back().status.reason(), "ENGINE_DOWN");
  Eventually([&] { return set->loads()[0].healthy; });
  std::vector<Call> calls;
  for (int kind = 0; kind < 2; ++kind) calls.push_back(MustSubmit(*set, MakeRequest(kind)));
  for (Call& call : calls) EXPECT_TRUE(call.sink->WaitForEnd().back().status.ok());
  EXPECT_THAT(set->loads(), Each(::testing::Field(&EngineLoad::healthy, true)));
}

// Clients, cancels and a replica that fails in between, at once: every request ends exactly once.
TEST(ReplicaSet, ManyThreadsWhileAReplicaIsLost) {
  std::vector<Control> controls(3);
  auto set = MakeSet(SmallOptions(), controls);
  std::vector<std::thread> clients;
  std::atomic<int> served{0};
  for (int client = 0; client < 4; ++client) {
    clients.emplace_back([&, client] {
      for (int i = 0; i < 50; ++i) {
        auto sink = std::make_shared<CollectingSink>();
        auto handle = set->Submit(MakeRequest(client * 7 + i % 5), sink);
        if (!handle.ok()) continue;
        if (i % 9 == 0) handle->Cancel(Status(Code::kCancelled, "enough"));
        served += sink->WaitForEnd().back().status.ok();
        if (client == 0 && i == 20) controls[2].fails = true;
      }
    });
  }
  for (std::thread& client : clients) client.join();
  EXPECT_GT(served, 100);
  EXPECT_TRUE(set->healthy());
  EXPECT_THAT(Live(*set), Each(0));
}

}  // namespace
}  // namespace altiplano
