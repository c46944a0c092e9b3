#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <string>
#include <thread>
#include <vector>

#include "server/base/sha256.h"
#include "server/scheduler/flight_recorder.h"
#include "server/scheduler/flight_replay.h"
#include "tests/server/scheduler/driver_testlib.h"

namespace altiplano {
namespace {

using testing::HasSubstr;

// A scheduler with its recorder.
struct Recorded {
  explicit Recorded(SchedulerOptions options = SmallOptions(), size_t bytes = 1 << 20)
      : Recorded(options, bytes, bytes / 4) {}
  Recorded(SchedulerOptions options, size_t bytes, size_t between)
      : recorder(options, bytes, between), driver(With(options, &recorder)) {}
  static SchedulerOptions With(SchedulerOptions options, FlightRecorder* recorder) {
    options.recorder = recorder;
    return options;
  }
  std::string Write() const { return recorder.Write(driver.now, 1'700'000'000'000'000'000); }
  FlightRecord Read() const {
    auto record = ParseFlightRecord(Write());
    EXPECT_TRUE(record.ok()) << record.status().ToString();
    return *record;
  }

  FlightRecorder recorder;
  Driver driver;
};

template <typename T>
std::vector<T> All(const FlightRecord& record) {
  std::vector<T> found;
  for (const FlightFrame& frame : record.frames) {
    if (const T* one = std::get_if<T>(&frame)) found.push_back(*one);
  }
  return found;
}

std::string Seal(std::string body) {
  Sha256 sha;
  sha.Update(body.data(), body.size());
  const Sha256Digest digest = sha.Finish();
  return body.append(reinterpret_cast<const char*>(digest.data()), digest.size());
}

TEST(FlightRecord, HoldsArrivalsPlansAndResults) {
  Recorded recorded;
  auto request = MakeRequest(/*prompt=*/20, /*max_new_tokens=*/3);
  request->id = "r-1";
  request->tenant = "someone";
  request->priority = -2;
  request->deadline = recorded.driver.now + std::chrono::hours(1);
  recorded.driver->Add(5, request);
  recorded.driver.RunAll();
  const FlightRecord record = recorded.Read();
  EXPECT_EQ(record.dropped_frames, 0u);
  EXPECT_EQ(record.written, recorded.driver.now);
  EXPECT_EQ(record.options.num_blocks, 32);

  const auto arrivals = All<FlightArrival>(record);
  ASSERT_EQ(arrivals.size(), 1u);
  EXPECT_EQ(arrivals[0].key, 5u);
  EXPECT_EQ(arrivals[0].id, "r-1");
  EXPECT_EQ(arrivals[0].tenant, "someone");
  EXPECT_EQ(arrivals[0].prompt_tokens, 20);
  EXPECT_EQ(arrivals[0].max_new_tokens, 3);
  EXPECT_EQ(arrivals[0].priority, -2);
  EXPECT_EQ(arrivals[0].deadline, request->deadline);
  EXPECT_EQ(arrivals[0].time_limit, kNever);

  // 16 tokens and 4 of the prompt, then two of the answer; the budget is 16.
  const auto plans = All<FlightPlan>(record);
  ASSERT_GE(plans.size(), 4u);
  ASSERT_EQ(plans[0].sequences.size(), 1u);
  EXPECT_EQ(plans[0].sequences[0],
            (FlightPlanned{.key = 5, .slot = 0, .num_tokens = 16, .admitted = true, .sample = false}));
  EXPECT_EQ(plans[1].sequences[0], (FlightPlanned{.key = 5, .first_position = 16, .num_tokens = 4, .sample = true}));
  EXPECT_EQ(plans[0].prefill_tokens, 16);
  EXPECT_EQ(plans[0].notes.blocks_held, 6);

  const auto results = All<FlightResult>(record);
  ASSERT_EQ(results.size(), 4u);
  ASSERT_EQ(results[3].ends.size(), 2u);
  EXPECT_EQ(results[3].ends[0], (FlightEnd{.key = 5, .finish = FinishReason::kLength, .with_token = true}));
  EXPECT_EQ(results[3].ends[1], (FlightEnd{.key = 5, .sequence = FlightEnd::kRequest}));
}

TEST(FlightRecord, SaysWhyTheHeadOfTheQueueWaits) {
  auto why = [](SchedulerOptions options, int prompts) {
    Recorded recorded(options);
    for (int i = 1; i <= prompts; ++i) {
      recorded.driver->Add(static_cast<RequestKey>(i), MakeRequest(12, 8, 1000 * i));
    }
    recorded.driver.Step();
    return All<FlightPlan>(recorded.Read()).back().notes;
  };
  SchedulerOptions options = SmallOptions();
  EXPECT_EQ(why(options, 1).why, PlanNotes::Why::kNobodyWaits);
  const PlanNotes budget = why(options, 4);
  EXPECT_EQ(budget.why, PlanNotes::Why::kBudget);
  EXPECT_EQ(budget.waiting, 2);
  EXPECT_EQ(budget.head, 3u);
  options.max_running = 1;
  EXPECT_EQ(why(options, 2).why, PlanNotes::Why::kNoSlot);
  options = SmallOptions();
  options.num_blocks = 6;
  options.token_budget = 64;
  EXPECT_EQ(why(options, 2).why, PlanNotes::Why::kNoBlocks);
}

TEST(FlightRecord, PromptsAreNotInIt) {
  SchedulerOptions options = SmallOptions();
  options.num_blocks = 4096;
  options.max_context = 10000;
  options.token_budget = 10000;
  options.prefix_cache = false;
  Recorded recorded(options);
  recorded.driver->Add(1, MakeRequest(9000, 2));
  recorded.driver.RunAll();
  EXPECT_LT(recorded.Write().size(), 4000u) << "and of its 2250 blocks hardly more than one byte each";
}

TEST(FlightRecord, TheOldestStepsLeaveAFullRing) {
  Recorded recorded(SmallOptions(), 600);
  for (RequestKey key = 1; key <= 30; ++key) {
    recorded.driver->Add(key, MakeRequest(8, 10, static_cast<TokenId>(100 * key)));
    recorded.driver.RunAll();
    const FlightRecord record = recorded.Read();  // whole frames, whatever was overwritten
    EXPECT_LE(record.frame_bytes, 600u);
  }
  const FlightRecord record = recorded.Read();
  EXPECT_GT(record.dropped_frames, 0u);
  const auto results = All<FlightResult>(record);
  ASSERT_FALSE(results.empty());
  EXPECT_EQ(record.dropped_steps + results.size(), results.back().step);
  EXPECT_TRUE(All<FlightCheckpoint>(record).empty())
      << "what is said and it itself are more than a quarter of 600 bytes";
  auto replay = ReplayFlightRecord(record);
  ASSERT_FALSE(replay.ok());
  EXPECT_EQ(replay.status().code(), Code::kFailedPrecondition);
  EXPECT_THAT(replay.status().message(), HasSubstr("no checkpoint with all that it needs is in it"));
}

TEST(FlightReplay, DecidesAsRecorded) {
  SchedulerOptions options = SmallOptions();
  options.num_blocks = 12;  // preemptions
  Recorded recorded(options);
  for (RequestKey key = 1; key <= 6; ++key) {
    auto request = MakeRequest(9, 12, key % 2 == 0 ? 0 : 500);  // two prefixes
    request->num_sequences = key == 3 ? 2 : 1;
    recorded.driver->Add(key, request);
  }
  recorded.driver.token = [](const PlannedSequence& planned) {
    return planned.request == 2 && planned.first_position == 12 ? 7 : 1000 + planned.first_position;  // 7: EOS
  };
  recorded.driver.RunAll();
  const FlightRecord record = recorded.Read();
  EXPECT_GT(recorded.driver->load().preemptions, 0u);
  EXPECT_GT(recorded.driver->load().cached_tokens, 0u);
  EXPECT_EQ(recorded.driver.FinishOf(2), FinishReason::kEos);
  auto replay = ReplayFlightRecord(record);
  ASSERT_TRUE(replay.ok()) << replay.status().ToString();
  EXPECT_EQ(replay->difference, "");
  EXPECT_EQ(replay->steps, All<FlightResult>(record).size());
}

TEST(FlightReplay, SaysWhereDecisionsDiffer) {
  Recorded recorded;
  auto request = MakeRequest(20, 3);
  request->id = "r-1";
  recorded.driver->Add(5, request);
  recorded.driver.RunAll();
  FlightRecord record = recorded.Read();
  for (FlightFrame& frame : record.frames) {
    auto* plan = std::get_if<FlightPlan>(&frame);
    if (plan != nullptr && plan->step == 2) plan->sequences[0].num_tokens = 3;
  }
  auto replay = ReplayFlightRecord(record);
  ASSERT_TRUE(replay.ok()) << replay.status().ToString();
  EXPECT_EQ(replay->difference,
            "plan of step 2: recorded: request r-1 in slot 0, gets 3 tokens from 16 and samples; replayed: request r-1 "
            "in slot 0, gets 4 tokens from 16 and samples");
}

TEST(FlightReplay, RefusesWhatNoSchedulerCouldHaveBeenCalledWith) {
  Recorded recorded;
  recorded.driver->Add(1, MakeRequest(8, 2));
  recorded.driver.RunAll();
  const FlightRecord good = recorded.Read();
  auto error = [](const FlightRecord& record) {
    auto replay = ReplayFlightRecord(record);
    return replay.ok() ? "" : replay.status().message();
  };
  FlightRecord bad = good;
  bad.frames.push_back(bad.frames.front());
  EXPECT_THAT(error(bad), HasSubstr("request 1 arrives again"));
  bad = good;
  std::get<FlightArrival>(bad.frames.front()).prompt_tokens = 1000;
  EXPECT_THAT(error(bad), HasSubstr("frame 0: request 1 could not be served"));
  bad = good;
  bad.frames.push_back(FlightResult{.now = {}, .step = 77, .device_time = {}, .non_finite = {}, .ends = {}});
  EXPECT_THAT(error(bad), HasSubstr("the result of step 77"));
  bad = good;
  bad.options.block_size = 3;
  EXPECT_THAT(error(bad), HasSubstr("block_size is 3"));
}

// --- Records whose oldest steps have left the ring -------------------------------------------------------------------

SchedulerOptions BusyOptions() {
  SchedulerOptions options = SmallOptions();
  options.num_blocks = 24;
  options.learn_step_cost = true;
  options.max_itl = std::chrono::milliseconds(4);
  options.priority_ageing = std::chrono::milliseconds(3);
  options.tenants = {{.name = "gold", .weight = 3, .max_running = 4}, {.name = "free", .weight = 1}};
  return options;
}

// So that a scheduler is in any state there is: prefixes shared and alone, siblings, preemptions, targets, deadlines,
// cancels, stops, scores, NaN, and two steps in flight most of the time.
void LiveThrough(
    Driver& driver, int rounds, const std::function<void(int round)>& after = [](int) {}) {
  driver.token = [](const PlannedSequence& planned) {
    return (planned.request + static_cast<uint64_t>(planned.first_position)) % 37 == 0 ? 7 : 1000;  // 7: EOS
  };
  driver.finite = [](const PlannedSequence& planned) {
    return planned.request % 19 != 5 || planned.first_position < 14;
  };
  driver.device_time = [](const StepPlan& plan) {
    return std::chrono::microseconds(300 + 40 * static_cast<int64_t>(plan.tokens.size()) +
                                     static_cast<int64_t>(plan.step % 7));
  };
  for (int round = 1; round <= rounds; ++round) {
    const auto key = static_cast<RequestKey>(round);
    if (round % 3 != 0 && driver->load().waiting_requests < 12) {
      auto request = MakeRequest(5 + round * 7 % 23, 3 + round % 18, round % 4 == 0 ? 500 * round : 0);
      request->tenant = round % 5 == 0 ? "other" : round % 2 == 0 ? "gold" : "free";
      request->priority = round % 3;
      request->num_sequences = round % 8 == 1 ? 3 : 1;
      request->arrival = driver.now;
      if (round % 4 == 1) request->ttft_target = std::chrono::milliseconds(5 + round % 20);
      if (round % 16 == 2) request->deadline = driver.now + std::chrono::milliseconds(9);
      if (round % 11 == 4) request->sampling.prompt_top_logprobs = 0;
      request->bypass_prefix_cache = round % 13 == 6;
      driver->Add(key, request);
    }
    if (round % 10 == 9) driver->Cancel(key - 4, Status(Code::kCancelled, ""));
    if (round % 14 == 9) driver->StopSequence(key - 5, 0);
    if (round % 90 == 80) driver->ResetPrefixCache();
    driver.now += std::chrono::milliseconds(1);
    if (driver.num_in_flight() < 2) driver.Plan();
    if (driver.num_in_flight() > (round % 6 == 0 ? 0 : 1)) driver.Apply();
    after(round);
  }
}

TEST(FlightCheckpoint, ARecordIsReplayedFromAnyOfThem) {
  Recorded recorded(BusyOptions(), 8 << 20, /*between=*/1);  // before every plan
  LiveThrough(recorded.driver, 400);
  EXPECT_GT(recorded.driver->load().preemptions, 10u);
  EXPECT_GT(recorded.driver->load().cached_tokens, 100u);
  FlightRecord record = recorded.Read();
  ASSERT_EQ(record.dropped_frames, 0u);
  const auto whole = ReplayFlightRecord(record);
  ASSERT_TRUE(whole.ok()) << whole.status().ToString();
  EXPECT_EQ(whole->difference, "");
  EXPECT_FALSE(whole->from.has_value()) << "it begins with its scheduler";

  record.dropped_frames = 1;
  size_t with_a_step = 0, with_victims = 0, with_shares = 0, with_commands = 0, blocked = 0, ended = 0;
  for (size_t left = whole->steps; !record.frames.empty();) {
    const auto* checkpoint = std::get_if<FlightCheckpoint>(&record.frames.front());
    if (checkpoint != nullptr) {
      const auto replay = ReplayFlightRecord(record);
      ASSERT_TRUE(replay.ok()) << replay.status().ToString();
      ASSERT_EQ(replay->difference, "") << "from step " << checkpoint->step;
      EXPECT_EQ(replay->steps, left);
      EXPECT_EQ(replay->from, checkpoint->now);
      with_a_step += !checkpoint->in_flight.empty();
      with_shares += !checkpoint->sharing.empty();
      with_commands += !checkpoint->cancels.empty() || !checkpoint->stops.empty();
      blocked += checkpoint->blocked.has_value();
      ended += !checkpoint->retired.empty();
      for (const auto& request : checkpoint->requests) {
        for (const auto& sequence : request.sequences) {
          with_victims += sequence.preempted > 0 && sequence.state == FlightCheckpoint::State::kWaiting;
        }
      }
    }
    left -= std::holds_alternative<FlightResult>(record.frames.front());
    record.frames.erase(record.frames.begin());
  }
  for (size_t seen : {with_a_step, with_victims, with_shares, with_commands, blocked, ended}) EXPECT_GT(seen, 5u);
}

// The first request holds most of the pool; the second does not fit until the cache holds enough of it, which is looked
// at some steps later only. Whoever forgot that it is blocked would admit it at once.
TEST(FlightCheckpoint, KnowsThatTheHeadOfTheQueueIsNotTriedYet) {
  SchedulerOptions options = SmallOptions();
  options.num_blocks = 9;
  options.token_budget = 32;
  Recorded recorded(options, 1 << 20, /*between=*/1);
  recorded.driver->Add(1, MakeRequest(17, 50));
  recorded.driver->Add(2, MakeRequest(17, 1));
  recorded.driver.RunAll();
  FlightRecord record = recorded.Read();
  record.dropped_frames = 1;
  int blocked = 0;
  for (; !record.frames.empty(); record.frames.erase(record.frames.begin())) {
    const auto* checkpoint = std::get_if<FlightCheckpoint>(&record.frames.front());
    if (checkpoint == nullptr || !checkpoint->blocked) continue;
    EXPECT_EQ(checkpoint->blocked->key, 2u);
    const auto replay = ReplayFlightRecord(record);
    ASSERT_TRUE(replay.ok()) << replay.status().ToString();
    EXPECT_EQ(replay->difference, "") << "from step " << checkpoint->step;
    ++blocked;
  }
  EXPECT_GE(blocked, 6);
}

TEST(FlightCheckpoint, OneIsInTheRingAtEveryMomentOnceItIsFull) {
  constexpr size_t kBytes = 1 << 16;
  Recorded recorded(BusyOptions(), kBytes);
  uint64_t replayed = 0;
  LiveThrough(recorded.driver, 2000, [&](int round) {
    if (round % 97 != 0) return;
    const FlightRecord record = recorded.Read();
    const auto replay = ReplayFlightRecord(record);
    ASSERT_TRUE(replay.ok()) << replay.status().ToString();
    ASSERT_EQ(replay->difference, "");
    ASSERT_EQ(replay->from.has_value(), record.dropped_frames > 0);
    if (!replay->from) return;
    EXPECT_GT(replay->steps, All<FlightResult>(record).size() / 3);
    replayed += replay->steps;
  });
  EXPECT_GT(recorded.Read().dropped_frames, 1000u);
  EXPECT_GT(replayed, 1000u);
}

TEST(FlightCheckpoint, TheLeastBytesHaveRoomForAFullCache) {
  SchedulerOptions options = SmallOptions();
  options.num_blocks = 1000;
  auto checkpoints_with = [&](size_t bytes) {
    Recorded recorded(options, bytes, bytes / 5);
    for (int key = 1; key <= 3000; ++key) {
      recorded.driver->Add(static_cast<RequestKey>(key), MakeRequest(20, 2, 1000 * key));
      recorded.driver.RunAll();
    }
    const FlightRecord record = recorded.Read();
    EXPECT_GT(record.dropped_frames, 1000u);
    EXPECT_GT(All<FlightPlan>(record).back().notes.blocks_cached, 990);
    return All<FlightCheckpoint>(record).size();
  };
  EXPECT_GT(checkpoints_with(FlightRecorder::LeastBytes(1000)), 0u);
  EXPECT_EQ(checkpoints_with(FlightRecorder::LeastBytes(1000) / 3), 0u);
}

TEST(FlightCheckpoint, AStateThatNoSchedulerComesToIsRefused) {
  Recorded recorded(BusyOptions(), 1 << 20, /*between=*/1);
  LiveThrough(recorded.driver, 60);
  FlightRecord good = recorded.Read();
  good.dropped_frames = 1;
  // The last one that has everything which is broken below.
  const FlightCheckpoint* last = nullptr;
  for (const FlightFrame& frame : good.frames) {
    const auto* checkpoint = std::get_if<FlightCheckpoint>(&frame);
    if (checkpoint != nullptr && !checkpoint->in_flight.empty() && checkpoint->held.size() > 3) last = checkpoint;
  }
  ASSERT_NE(last, nullptr);
  good.frames = {*last};
  using State = FlightCheckpoint::State;
  auto error = [&good](const auto& damage) {
    FlightRecord bad = good;
    auto& checkpoint = std::get<FlightCheckpoint>(bad.frames[0]);
    FlightCheckpoint::Sequence* running = nullptr;
    for (auto& request : checkpoint.requests) {
      for (auto& sequence : request.sequences) {
        if (sequence.state == State::kRunning) running = &sequence;
      }
    }
    damage(checkpoint, *running);
    const auto replay = ReplayFlightRecord(bad);
    return replay.ok() ? "" : replay.status().message();
  };
  using C = FlightCheckpoint;
  using S = FlightCheckpoint::Sequence;
  EXPECT_EQ(error([](C&, S&) {}), "");
  EXPECT_THAT(error([](C& c, S&) { c.learner.reset(); }), HasSubstr("is the step cost learned"));
  EXPECT_THAT(error([](C& c, S&) { c.accounts.pop_back(); }), HasSubstr("accounts"));
  EXPECT_THAT(error([](C& c, S&) { c.accounts[0].remainder = 3; }), HasSubstr("remainder"));
  EXPECT_THAT(error([](C& c, S&) { c.free_slots.push_back(99); }), HasSubstr("there is no slot 99"));
  EXPECT_THAT(error([](C& c, S&) { c.free_slots.clear(); }), HasSubstr("max_running"));
  EXPECT_THAT(error([](C& c, S&) { c.held.pop_back(); }), HasSubstr("not all blocks that are held"));
  EXPECT_THAT(error([](C& c, S&) { c.held.push_back({.block = 23, .valued = false, .name = 1}); }),
              HasSubstr("block 23"));
  EXPECT_THAT(error([](C& c, S&) { c.cached.assign(2, 5); }), HasSubstr("the same name"));
  EXPECT_THAT(error([](C& c, S&) { c.cached.resize(24); }), HasSubstr("more blocks than the pool"));
  EXPECT_THAT(error([](C& c, S&) { c.requests.push_back(c.requests[0]); }), HasSubstr("arrives again"));
  EXPECT_THAT(error([](C& c, S&) { c.requests[0].order = c.requests[1].order; }), HasSubstr("orders"));
  EXPECT_THAT(error([](C& c, S&) { c.requests[0].order = 1000; }), HasSubstr("order that has not been given"));
  EXPECT_THAT(error([](C& c, S&) { c.requests[0].leader = 9; }), HasSubstr("there is no leader 9"));
  EXPECT_THAT(error([](C& c, S&) { c.requests[0].arrival.prompt_tokens = 100; }), HasSubstr("could not be served"));
  EXPECT_THAT(error([](C& c, S&) { c.sharing.push_back(12345); }), HasSubstr("request 12345 shares"));
  EXPECT_THAT(error([](C& c, S&) { c.blocked = {.key = 12345}; }), HasSubstr("who is blocked"));
  EXPECT_THAT(error([](C& c, S&) { c.in_flight.push_back(c.in_flight[0]); }), HasSubstr("the step in flight"));
  EXPECT_THAT(error([](C& c, S&) { c.in_flight[0].num_tokens = 0; }), HasSubstr("a step that never was"));
  EXPECT_THAT(error([](C&, S& s) { s.slot = 8; }), HasSubstr("there is no slot 8"));
  EXPECT_THAT(error([](C&, S& s) { s.generated = 1000; }), HasSubstr("beyond its limit"));
  EXPECT_THAT(error([](C&, S& s) { s.blocks[0] = 24; }), HasSubstr("blocks that the pool has not"));
  EXPECT_THAT(error([](C&, S& s) { ++s.scheduled; }), testing::Not(""));
  EXPECT_THAT(error([](C&, S& s) { s.published = 90; }), HasSubstr("published"));
  EXPECT_THAT(error([](C&, S& s) { s.state = State::kWaiting; }), testing::Not(""));
}

TEST(FlightFile, DamageIsNamed) {
  Recorded recorded;
  recorded.driver->Add(1, MakeRequest(8, 2));
  recorded.driver.RunAll();
  const std::string file = recorded.Write();
  auto error = [](const std::string& bytes) {
    auto record = ParseFlightRecord(bytes);
    return record.ok() ? "" : record.status().message();
  };
  EXPECT_EQ(error(file), "");
  EXPECT_THAT(error(""), HasSubstr("is not a flight record"));
  EXPECT_THAT(error("GGUF and more"), HasSubstr("is not a flight record"));
  EXPECT_THAT(error(file.substr(0, 20)), HasSubstr("ends within its header"));
  EXPECT_THAT(error(file.substr(0, file.size() - 1)), HasSubstr("truncated or damaged"));
  std::string damaged = file;
  damaged[file.size() / 2] ^= 1;
  EXPECT_THAT(error(damaged), HasSubstr("truncated or damaged"));
  std::string other = file;
  other[8] = 9;
  EXPECT_THAT(error(other), HasSubstr("is a flight record of version 9; this program reads version 5"));
  // Whoever writes the checksum too is told which frame is wrong.
  const std::string body = file.substr(0, file.size() - sizeof(Sha256Digest));
  EXPECT_THAT(error(Seal(body + '\x01')), HasSubstr("a frame reaches beyond its end"));
  EXPECT_THAT(error(Seal(body + "\x01\x2a")), HasSubstr("there is no kind 42"));
  EXPECT_THAT(error(Seal(body + std::string("\x02\x04\x00", 3))), HasSubstr("1 bytes are left over"));
  EXPECT_THAT(error(Seal(body + "\x03\x02\x01\x7f")), HasSubstr("the code is 127, at most 16 is possible"));
}

// --- When the process dies -------------------------------------------------------------------------------------------

std::string NewPath(const char* name) {
  const std::string path = testing::TempDir() + name;
  std::filesystem::remove(path);
  return path;
}

FlightRecord ReadFile(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  auto record = ParseFlightRecord(std::string(std::istreambuf_iterator<char>(in), {}));
  EXPECT_TRUE(record.ok()) << path << " " << record.status().ToString();
  return record.ok() ? *record : FlightRecord();
}

TEST(FlightRecordDeathTest, IsWrittenWhenTheProcessDies) {
  const std::string path = NewPath("dies.flight");
  EXPECT_DEATH(
      {
        Recorded recorded;
        recorded.recorder.WriteAtCrash(path);
        recorded.driver->Add(1, MakeRequest(8, 5));
        recorded.driver.Step();
        recorded.driver->Add(2, MakeRequest(8, 5));
        raise(SIGSEGV);
      },
      "altiplano: SIGSEGV: the scheduler's last steps are in .*dies.flight, for altiplano replay");
  const FlightRecord record = ReadFile(path);
  EXPECT_EQ(All<FlightArrival>(record).size(), 2u);
  EXPECT_EQ(std::filesystem::status(path).permissions(),
            std::filesystem::perms::owner_read | std::filesystem::perms::owner_write);
  auto replay = ReplayFlightRecord(record);
  ASSERT_TRUE(replay.ok()) << replay.status().ToString();
  EXPECT_EQ(replay->difference, "");
}

// Another thread fails while this one fills the ring over and over.
TEST(FlightRecordDeathTest, IsWholeWhileTheRingIsBeingWritten) {
  const std::string path = NewPath("busy.flight");
  EXPECT_DEATH(
      {
        FlightRecorder recorder(SmallOptions(), 5000);
        recorder.WriteAtCrash(path);
        std::atomic<RequestKey> kept{0};
        std::thread scheduler([&] {
          for (RequestKey key = 1;; ++key) {
            recorder.OnArrival(key, *MakeRequest(8, 5));
            kept = key;
          }
        });
        while (kept < 1000) std::this_thread::yield();
        raise(SIGSEGV);
      },
      "busy.flight");
  const auto arrivals = All<FlightArrival>(ReadFile(path));
  ASSERT_GT(arrivals.size(), 50u);
  EXPECT_GE(arrivals.back().key, 1000u);
  for (size_t i = 1; i < arrivals.size(); ++i) EXPECT_EQ(arrivals[i].key, arrivals[i - 1].key + 1);
}

TEST(FlightRecordDeathTest, OneWhoseOldestStepsHaveLeftIsReplayedFromACheckpoint) {
  const std::string path = NewPath("long.flight");
  EXPECT_DEATH(
      {
        Recorded recorded(BusyOptions(), 1 << 16);
        recorded.recorder.WriteAtCrash(path);
        LiveThrough(recorded.driver, 2000);
        raise(SIGSEGV);
      },
      "long.flight");
  const FlightRecord record = ReadFile(path);
  EXPECT_GT(record.dropped_steps, 100u);
  auto replay = ReplayFlightRecord(record);
  ASSERT_TRUE(replay.ok()) << replay.status().ToString();
  EXPECT_EQ(replay->difference, "");
  EXPECT_GT(replay->steps, 100u);
}

TEST(FlightRecordDeathTest, NeverReplacesAFileAndSaysWhenItCannotBeWritten) {
  const std::string path = NewPath("there.flight");
  std::ofstream(path) << "somebody's";
  EXPECT_DEATH(
      {
        Recorded recorded;
        recorded.recorder.WriteAtCrash(path);
        raise(SIGBUS);
      },
      "altiplano: SIGBUS: the scheduler's last steps cannot be written to .*there.flight: error 17 of the system");
  std::ifstream in(path);
  EXPECT_EQ(std::string(std::istreambuf_iterator<char>(in), {}), "somebody's");
}

}  // namespace
}  // namespace altiplano
