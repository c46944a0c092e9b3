#include "server/bench/simulation.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "server/base/json.h"
#include "server/bench/arrivals.h"
#include "tests/server/bench/simulation_testlib.h"

namespace altiplano::bench {
namespace {

using std::chrono::microseconds;
using std::chrono::milliseconds;
using testing::Each;
using testing::HasSubstr;

TEST(Simulation, OneRequestStepByStep) {
  BenchReport report;
  SimulationTotals totals = *Simulate(RandomRequests(1, 100, 5), {Duration(0)}, TenMillisecondSteps(), &report);
  const RequestRecord& request = report.requests[0];
  EXPECT_TRUE(request.ok);
  EXPECT_EQ(request.ttft, milliseconds(20)) << "two chunks";
  EXPECT_THAT(request.itl, Each(Duration(milliseconds(10))));
  EXPECT_EQ(request.itl.size(), 4u);
  EXPECT_EQ(request.latency, milliseconds(60));
  EXPECT_EQ(request.output_tokens, 5u);
  EXPECT_EQ(request.queued, Duration(0));
  EXPECT_EQ(report.duration, milliseconds(60));
  EXPECT_EQ(totals.steps, 6u);
  EXPECT_EQ(totals.tokens, 104u) << "the last token is no input";
  EXPECT_EQ(totals.busy, milliseconds(60));
  EXPECT_EQ(totals.peak_blocks, 7);
}

// The step after the running one is planned when that one starts: who comes later has to wait for two ends.
TEST(Simulation, WhoComesDuringAStepWaitsAsInTheEngine) {
  BenchReport report;
  Dataset dataset = RandomRequests(2, 10, 5);
  ASSERT_TRUE(Simulate(dataset, {Duration(0), milliseconds(3)}, TenMillisecondSteps(), &report).ok());
  EXPECT_EQ(report.requests[1].start, milliseconds(3));
  EXPECT_EQ(report.requests[1].queued, milliseconds(7)) << "admitted by the plan made at 10 ms";
  EXPECT_EQ(report.requests[1].ttft, milliseconds(27)) << "which runs from 20 to 30";
}

TEST(Simulation, AnIdleServerWaitsForTheNextArrival) {
  BenchReport report;
  ASSERT_TRUE(
      Simulate(RandomRequests(2, 10, 1), {Duration(0), milliseconds(5000)}, TenMillisecondSteps(), &report).ok());
  EXPECT_EQ(report.requests[1].ttft, milliseconds(10));
  EXPECT_EQ(report.duration, milliseconds(5010));
}

TEST(Simulation, ClosedLoopSendsWhenAnotherHasEnded) {
  BenchReport report;
  report.max_concurrency = 2;
  Dataset dataset = RandomRequests(6, 10, 3);
  ASSERT_TRUE(Simulate(dataset, std::vector<Duration>(6), TenMillisecondSteps(), &report).ok());
  EXPECT_EQ(report.ToJson()["max_concurrent_requests"], 2);
  EXPECT_EQ(report.requests[1].start, Duration(0));
  EXPECT_EQ(report.requests[2].start, report.requests[0].start + report.requests[0].latency);
  EXPECT_EQ(report.requests[2].held, report.requests[2].start);
}

TEST(Simulation, SharedPrefixesAreFoundAndSaveTime) {
  SimulationOptions options = TenMillisecondSteps();
  options.cost = {
      .step_us = 10, .weights_us = 0, .token_us = 100, .sequence_us = 0, .kv_token_us = 0, .attention_us = 0};
  Dataset dataset = RandomRequests(10, 16, 4, /*prefix_len=*/160);
  BenchReport with, without;
  with.max_concurrency = without.max_concurrency = 1;
  ASSERT_TRUE(Simulate(dataset, std::vector<Duration>(10), options, &with).ok());
  options.scheduler.prefix_cache = false;
  ASSERT_TRUE(Simulate(dataset, std::vector<Duration>(10), options, &without).ok());
  EXPECT_EQ(with.requests[0].cached_tokens, 0u);
  for (size_t i = 1; i < 10; ++i) EXPECT_EQ(with.requests[i].cached_tokens, 160u);
  EXPECT_EQ(without.requests[9].cached_tokens, 0u);
  EXPECT_EQ(without.requests[9].ttft - with.requests[9].ttft, 160 * microseconds(100) + 2 * microseconds(10))
      << "160 tokens, in two steps more";
}

TEST(Simulation, AFullQueueRefuses) {
  SimulationOptions options = TenMillisecondSteps();
  options.scheduler.max_running = 1;
  options.max_queued_requests = 3;
  BenchReport report;
  ASSERT_TRUE(Simulate(RandomRequests(10, 10, 4), std::vector<Duration>(10), options, &report).ok());
  EXPECT_EQ(report.ToJson()["completed"], 3);
  EXPECT_EQ(report.ToJson()["errors"]["RESOURCE_EXHAUSTED QUEUE_FULL"]["count"], 7);
  options.max_queued_requests = 100;
  options.max_queued_tokens = 25;
  ASSERT_TRUE(Simulate(RandomRequests(10, 10, 4), std::vector<Duration>(10), options, &report).ok());
  EXPECT_EQ(report.ToJson()["completed"], 2);
}

TEST(Simulation, TooFewBlocksPreemptAndEveryoneStillEnds) {
  SimulationOptions options = TenMillisecondSteps();
  options.scheduler.num_blocks = 20;
  options.scheduler.prefix_cache = false;
  BenchReport report;
  SimulationTotals totals = *Simulate(RandomRequests(12, 20, 150), std::vector<Duration>(12), options, &report);
  EXPECT_GT(totals.load.preemptions, 0u);
  EXPECT_LE(totals.peak_blocks, 20);
  for (const RequestRecord& request : report.requests) {
    EXPECT_TRUE(request.ok);
    EXPECT_EQ(request.output_tokens, 150u);
  }
}

TEST(Simulation, ACeilingTradesTimeToFirstTokenForSteadyStreams) {
  SimulationOptions options = TenMillisecondSteps();
  options.scheduler.num_blocks = 10000;
  options.scheduler.token_budget = 1000;
  options.cost = {
      .step_us = 1000, .weights_us = 0, .token_us = 100, .sequence_us = 0, .kv_token_us = 0, .attention_us = 0};
  options.scheduler.step_cost = options.cost;
  Dataset dataset = RandomRequests(20, 500, 50);
  std::vector<Duration> arrivals = *MakeArrivals({.kind = ArrivalOptions::Kind::kRate, .rate = 5, .seed = 1}, dataset);
  BenchReport free, bound;
  ASSERT_TRUE(Simulate(dataset, arrivals, options, &free).ok());
  options.scheduler.max_itl = milliseconds(10);
  SimulationTotals totals = *Simulate(dataset, arrivals, options, &bound);
  EXPECT_GT(free.ToJson()["max_itl_ms"], 50) << "a prompt of 500 tokens holds everybody up";
  EXPECT_LE(bound.ToJson()["max_itl_ms"], 10);
  EXPECT_EQ(totals.load.late_tokens, 0u) << "the formula is the truth here";
  EXPECT_GT(bound.ToJson()["mean_ttft_ms"], free.ToJson()["mean_ttft_ms"]);
}

TEST(Simulation, TheStepCostIsLearnedWhereTheSchedulerDoesNotKnowIt) {
  SimulationOptions options = TenMillisecondSteps();
  options.cost = {.step_us = 500, .weights_us = 4000, .token_us = 30, .sequence_us = 10, .kv_token_us = 1};
  options.scheduler.num_blocks = 10000;
  options.scheduler.learn_step_cost = true;
  Dataset dataset = RandomRequests(60, 200, 40);
  std::vector<Duration> arrivals = *MakeArrivals({.kind = ArrivalOptions::Kind::kRate, .rate = 5, .seed = 1}, dataset);
  BenchReport report;
  const SchedulerLoad load = Simulate(dataset, arrivals, options, &report)->load;
  EXPECT_EQ(load.measured_steps, load.steps);
  EXPECT_LT(load.step_cost_error, 0.03);
}

TEST(Simulation, TheSameArgumentsGiveTheSameTable) {
  Dataset dataset = RandomRequests(50, 80, 30);
  std::vector<Duration> arrivals =
      *MakeArrivals({.kind = ArrivalOptions::Kind::kRate, .rate = 20, .burstiness = 0.5, .seed = 4}, dataset);
  BenchReport a, b;
  ASSERT_TRUE(Simulate(dataset, arrivals, TenMillisecondSteps(), &a).ok());
  ASSERT_TRUE(Simulate(dataset, arrivals, TenMillisecondSteps(), &b).ok());
  EXPECT_EQ(a.ToText(), b.ToText());
}

// Two at a time: when it is asked before the ninth step, two have ended, two are live and two were never sent.
TEST(Simulation, AnInterruptionLeavesWhatHasEnded) {
  BenchReport report;
  report.max_concurrency = 2;
  SimulationOptions options = TenMillisecondSteps();
  int asked = 0;
  options.interrupted = [&] { return report.requests[1].ok && ++asked > 3; };
  ASSERT_TRUE(Simulate(RandomRequests(6, 10, 3), std::vector<Duration>(6), options, &report).ok());
  EXPECT_TRUE(report.interrupted);
  EXPECT_EQ(report.not_sent, 2);
  ASSERT_EQ(report.requests.size(), 4u);
  for (size_t i : {0, 1}) EXPECT_TRUE(report.requests[i].ok);
  for (size_t i : {2, 3}) EXPECT_TRUE(report.requests[i].cancelled);
  EXPECT_GT(report.duration, report.requests[1].latency);
  EXPECT_EQ(report.ToJson()["completed"], 2);
  EXPECT_EQ(report.ToJson()["failed"], 0);
}

TEST(Simulation, ContradictingOptionsAreRefused) {
  SimulationOptions options = TenMillisecondSteps();
  options.scheduler.block_size = 12;
  BenchReport report;
  EXPECT_THAT(Simulate(RandomRequests(1, 10, 1), {Duration(0)}, options, &report).status().message(),
              HasSubstr("block_size is 12"));
}

}  // namespace
}  // namespace altiplano::bench
