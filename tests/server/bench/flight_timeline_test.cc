#include "server/bench/flight_timeline.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <string>

#include "server/base/json.h"
#include "server/bench/simulation.h"
#include "server/scheduler/flight_recorder.h"
#include "server/scheduler/flight_replay.h"
#include "tests/server/bench/simulation_testlib.h"

namespace altiplano::bench {
namespace {

using std::chrono::milliseconds;
using testing::HasSubstr;
using testing::Not;

// Two requests of 100 prompt tokens and 5 of an answer on one slot, in steps of 10 ms and 64 tokens.
FlightRecord TwoOnOneSlot() {
  SimulationOptions options = TenMillisecondSteps(1);
  FlightRecorder recorder(options.scheduler, 1 << 20);
  options.scheduler.recorder = &recorder;
  BenchReport report;
  EXPECT_TRUE(Simulate(RandomRequests(2, 100, 5), {Duration(0), Duration(0)}, options, &report).ok());
  return *ParseFlightRecord(recorder.Write(TimePoint{}, 0));
}

TEST(FlightTimeline, OfOneRequestSaysWhatItWaitedForAndWhenItComputed) {
  const FlightRecord record = TwoOnOneSlot();
  const FlightHistory history = HistoryOf(record);
  auto text = FlightTimeline(history, record.options, {.request = "#1", .from = {}, .until = {}});
  ASSERT_TRUE(text.ok());
  EXPECT_EQ(*text,
            "    0.000000 s  arrives: 100 prompt tokens, at most 5 more\n"
            "    0.000000 s  waits 60.000 ms in steps 1 to 6: no slot\n"
            "    0.060000 s  admitted in step 7 into slot 0\n"
            "    0.060000 s  computes tokens 0 to 63 in step 7, 10.000 ms\n"
            "    0.070000 s  computes tokens 64 to 99 in step 8, 10.000 ms\n"
            "    0.080000 s  first token, 80.0 ms after its arrival\n"
            "    0.080000 s  decodes 4 tokens in steps 9 to 12, 10.000 ms each; the longest gap 10.000 ms, to step 9\n"
            "    0.120000 s  finishes: its length\n"
            "    0.120000 s  ends\n");
}

TEST(FlightTimeline, OfAllShowsStepsWithinTheTimesAskedFor) {
  const FlightRecord record = TwoOnOneSlot();
  const FlightHistory history = HistoryOf(record);
  auto text =
      FlightTimeline(history, record.options, {.request = "", .from = milliseconds(15), .until = milliseconds(25)});
  ASSERT_TRUE(text.ok());
  EXPECT_THAT(*text, Not(HasSubstr("step 1 ")));
  EXPECT_THAT(*text, HasSubstr("step 2 10.000 ms  1 sequences, 36 tokens of 64 (36 of prompts), blocks 7 held 0 cached "
                               "of 1000; 1 wait, #1 first: no slot"));
  EXPECT_THAT(*text, HasSubstr("#0 first token, 20.0 ms after its arrival"));
  EXPECT_THAT(*text, HasSubstr("step 3 "));
  EXPECT_THAT(*text, Not(HasSubstr("step 4 ")));
}

TEST(FlightTimeline, ARequestThatIsNotThereIsNamed) {
  const FlightRecord record = TwoOnOneSlot();
  auto text = FlightTimeline(HistoryOf(record), record.options, {.request = "chat-9", .from = {}, .until = {}});
  ASSERT_FALSE(text.ok());
  EXPECT_EQ(text.status().message(), "the record has no request chat-9");
}

TEST(FlightTimeline, WhatHadBegunBeforeTheRecordIsShownByItsKey) {
  FlightRecord record = TwoOnOneSlot();
  std::erase_if(record.frames, [](const FlightFrame& frame) { return std::holds_alternative<FlightArrival>(frame); });
  const FlightHistory history = HistoryOf(record);
  auto text = FlightTimeline(history, record.options, {.request = "#1", .from = {}, .until = {}});
  ASSERT_TRUE(text.ok());
  EXPECT_THAT(*text, HasSubstr("admitted in step 7 into slot 0"));
  EXPECT_THAT(*text, Not(HasSubstr("arrives")));
}

TEST(FlightTrace, HasATrackForEachSlotAndRequestAndCountersForEachStep) {
  const FlightRecord record = TwoOnOneSlot();
  auto json = ParseJson(FlightTrace(HistoryOf(record)));
  ASSERT_TRUE(json.ok()) << json.status().ToString();
  std::map<std::string, int> kinds, names;
  double decode_us = 0;
  for (const Json& event : (*json)["traceEvents"]) {
    ++kinds[event["ph"].get<std::string>()];
    ++names[event["ph"] == "M" ? event["args"]["name"].get<std::string>() : event["name"].get<std::string>()];
    if (event["name"] == "#1 decode") decode_us += event["dur"].get<double>();
  }
  EXPECT_EQ(kinds["C"], 3 * 12);  // blocks, queue and budget of 12 steps
  EXPECT_EQ(names["slot 0"], 1);
  EXPECT_EQ(names["#0"] + names["#1"], 2);
  EXPECT_EQ(names["step 12"], 1);
  EXPECT_DOUBLE_EQ(decode_us, 40000);
}

TEST(FlightRecordOfASimulation, DecidesAlikeWhenItIsReplayed) {
  auto replay = ReplayFlightRecord(TwoOnOneSlot());
  ASSERT_TRUE(replay.ok()) << replay.status().ToString();
  EXPECT_EQ(replay->difference, "");
  EXPECT_EQ(replay->steps, 12u);
}

}  // namespace
}  // namespace altiplano::bench
