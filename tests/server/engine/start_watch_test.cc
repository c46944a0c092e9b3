#include "server/engine/start_watch.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <future>

namespace altiplano {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using ::testing::HasSubstr;

// Three ranks, called 4, 5 and 6, that are as far as the test says, at a time that the test says.
class StartPhaseTest : public ::testing::Test {
 protected:
  Status At(seconds time) { return phase_.Look(TimePoint() + time, seconds(60)); }

  std::vector<std::optional<uint64_t>> progress_ = {0, 0, 0};
  StartPhase phase_{"the warm-up", {"4", "5", "6 (GPU 2)"}, [this](size_t i) { return progress_[i]; }, TimePoint()};
};

TEST_F(StartPhaseTest, GoesOnAsLongAsAnyRankGetsOn) {
  for (int i = 1; i < 100; ++i) {
    progress_[static_cast<size_t>(i % 3)] = i;
    EXPECT_TRUE(At(seconds(59 * i)).ok()) << i;
  }
}

TEST_F(StartPhaseTest, NamesWhoHasNotDoneItsPart) {
  EXPECT_TRUE(At(seconds(59)).ok());
  progress_[0] = std::nullopt;  // done, which is to get on
  EXPECT_TRUE(At(seconds(118)).ok());
  EXPECT_TRUE(At(seconds(177)).ok());
  const Status two = At(seconds(178));
  EXPECT_EQ(two.code(), Code::kDeadlineExceeded);
  EXPECT_EQ(two.message(), "ranks 5, 6 (GPU 2) hang in the warm-up: nothing has got on for 60000 ms");
  progress_[2] = std::nullopt;
  EXPECT_TRUE(At(seconds(179)).ok());
  EXPECT_EQ(At(seconds(239)).message(), "rank 5 hangs in the warm-up: nothing has got on for 60000 ms");
}

TEST_F(StartPhaseTest, WhenARankHasFailedTheOthersAreNotWaitedForLong) {
  EXPECT_TRUE(At(seconds(20)).ok());
  phase_.GiveUp(Status(Code::kUnavailable, "no word from rank 6"));
  phase_.GiveUp(Status(Code::kUnavailable, "a consequence"));
  progress_[0] = progress_[1] = std::nullopt;
  EXPECT_TRUE(At(seconds(30)).ok());
  EXPECT_TRUE(At(seconds(34)).ok());
  EXPECT_EQ(At(seconds(35)).message(),
            "rank 6 (GPU 2) hangs in the warm-up: nothing has got on for 5000 ms, and no word from rank 6");
}

TEST(StartPhase, OfWhichNothingIsSeenHasItsTime) {
  StartPhase phase("connecting the ranks", {}, {}, TimePoint());
  EXPECT_TRUE(phase.Look(TimePoint() + milliseconds(99), milliseconds(100)).ok());
  EXPECT_EQ(phase.Look(TimePoint() + milliseconds(100), milliseconds(100)).message(),
            "the start hangs in connecting the ranks: nothing has got on for 100 ms");
}

TEST(StartWatch, TellsOnceOfThePhaseThatHangs) {
  std::promise<Status> told;
  std::atomic<uint64_t> progress{0};
  StartWatch watch(milliseconds(100), [&](const Status& status) { told.set_value(status); });
  watch.Begin("loading the weights", {"0"}, [&](size_t) { return ++progress; });
  while (progress < 10) std::this_thread::sleep_for(milliseconds(1));  // looks, while the rank gets on
  watch.End();
  watch.Begin("the warm-up", {"0"}, [](size_t) { return 7; });
  EXPECT_THAT(told.get_future().get().message(), HasSubstr("rank 0 hangs in the warm-up"));
}

TEST(StartWatch, TellsWhatBeginsWhetherOrNotAnybodyLooks) {
  std::vector<std::string> begun;
  StartWatch watch(milliseconds(0), {}, [&](const std::string& what) { begun.push_back(what); });
  watch.Begin("loading the weights");
  watch.End();
  watch.Begin("the warm-up", {"0"}, [](size_t) { return 7; });
  EXPECT_THAT(begun, ::testing::ElementsAre("loading the weights", "the warm-up"));
}

TEST(StartWatch, BetweenPhasesNobodyLooks) {
  StartWatch watch(milliseconds(1), [&](const Status& status) { ADD_FAILURE() << status.ToString(); });
  StartWatch idle(milliseconds(0), [&](const Status& status) { ADD_FAILURE() << status.ToString(); });
  idle.Begin("what is waited for");
  std::atomic<int> looks{0};
  StartWatch other(std::chrono::hours(1), [](const Status&) {});
  other.Begin("something else", {"0"}, [&](size_t) { return looks++; });
  while (looks < 5) std::this_thread::sleep_for(milliseconds(1));  // so long
}

}  // namespace
}  // namespace altiplano
