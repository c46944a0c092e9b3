// Steps that are like those before them ask for no memory.
#include <gtest/gtest.h>

#include <memory>

#include "server/scheduler/flight_recorder.h"
#include "server/scheduler/scheduler.h"
#include "tests/server/scheduler/count_allocations.h"

namespace altiplano {
namespace {

class Allocations : public ::testing::TestWithParam<bool> {};

INSTANTIATE_TEST_SUITE_P(Scheduler, Allocations, ::testing::Bool());  // with a prefix cache

TEST_P(Allocations, NoneInStepsOfDecodesThoughTheyTakeAndPublishBlocks) {
  constexpr int32_t kSequences = 40, kBlockSize = 4, kSteps = 300;
  SchedulerOptions options;
  options.block_size = kBlockSize;
  options.max_running = kSequences;
  options.token_budget = 512;
  options.max_context = 2048;
  options.num_blocks = kSequences * options.max_context / kBlockSize;
  options.prefix_cache = GetParam();
  // Full long before the end, with a checkpoint in every few steps.
  FlightRecorder recorder(options, /*bytes=*/1 << 18, /*between=*/1 << 10);
  options.recorder = &recorder;
  std::unique_ptr<Scheduler> scheduler = *Scheduler::Create(options);
  for (int32_t i = 0; i < kSequences; ++i) {
    auto request = std::make_shared<Request>();
    request->prompt.assign(static_cast<size_t>(20 + i), 1000 + i);  // so that in every step some fill a block
    request->stop.max_new_tokens = 1000;
    scheduler->Add(static_cast<RequestKey>(i) + 1, std::move(request));
  }

  std::shared_ptr<const StepPlan> running;
  StepResult result;
  std::vector<Event> events;
  TimePoint now{};
  const auto step = [&] {  // returns what Plan and Apply asked for
    events.clear();
    now += std::chrono::milliseconds(1);
    const int64_t before = allocations;
    std::shared_ptr<const StepPlan> next = scheduler->Plan(now, &events);
    int64_t asked = allocations - before;
    if (running != nullptr) {
      result.step = running->step;
      result.sampled.clear();
      for (const PlannedSequence& planned : running->sequences) {
        if (planned.sample) result.sampled.emplace_back().token = static_cast<TokenId>(running->step % 7);
      }
      const int64_t before_apply = allocations;
      scheduler->Apply(*running, result, now, &events);
      asked += allocations - before_apply;
    }
    running = std::move(next);
    return asked;
  };
  int64_t at_first = 0;
  for (int i = 0; i < 20; ++i) at_first += step();
  ASSERT_EQ(running->num_prefill_tokens, 0);
  EXPECT_GT(at_first, 0) << "nothing is counted";

  size_t blocks = 0;
  int64_t asked = 0;
  for (int i = 0; i < kSteps; ++i) {
    asked += step();
    ASSERT_EQ(running->sequences.size(), size_t{kSequences});
    blocks += running->block_ids.size();
  }
  EXPECT_EQ(asked, 0);
  EXPECT_EQ(blocks, size_t{kSequences} * kSteps / kBlockSize);
}

}  // namespace
}  // namespace altiplano
