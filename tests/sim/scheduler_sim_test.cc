// Seeded simulation of the real scheduler: tests/sim/simulator_testlib.h.
//
//   ALTIPLANO_SIM_SEED=N   runs that seed alone       ALTIPLANO_SIM_TRACE=1  prints what happens
//   ALTIPLANO_SIM_SEEDS=N  runs N seeds instead of the default number, ALTIPLANO_SIM_FIRST=M from M on
//   ALTIPLANO_SIM_SHRINK=1 with a seed that fails: leaves out requests as long as it still does, and says how to replay
//                          what is left (ALTIPLANO_SIM_OMIT=1,2,5 leaves those out)
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <set>

#include "server/base/strings.h"
#include "tests/sim/simulator_testlib.h"

namespace altiplano::sim {
namespace {

uint64_t FromEnvironment(const char* name, uint64_t otherwise) {
  const char* text = std::getenv(name);
  return text != nullptr ? std::strtoull(text, nullptr, 10) : otherwise;
}

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr uint64_t kSeeds = 1000;
#else
constexpr uint64_t kSeeds = 25000;
#endif

constexpr RequestKey kMostRequests = 40;  // of a world

std::set<RequestKey> OmittedByEnvironment() {
  std::set<RequestKey> omitted;
  const char* text = std::getenv("ALTIPLANO_SIM_OMIT");
  for (char* end = nullptr; text != nullptr && *text != '\0'; text = *end == ',' ? end + 1 : "") {
    omitted.insert(std::strtoull(text, &end, 10));
  }
  return omitted;
}

// In a process of its own: it may die on a CHECK.
bool Fails(uint64_t seed, const std::set<RequestKey>& omitted) {
  const pid_t child = fork();
  if (child == 0) {
    if (std::freopen("/dev/null", "w", stderr) == nullptr) _exit(2);
    Coverage coverage;
    _exit(Simulator(seed, &coverage, omitted).Run().empty() ? 0 : 1);
  }
  int status = 0;
  EXPECT_EQ(waitpid(child, &status, 0), child);
  return status != 0;
}

TEST(Shrink, LeavesWhatTheFailureNeeds) {
  const std::set<RequestKey> needed = {3, 7, 8};
  int runs = 0;
  const std::set<RequestKey> omitted = Shrink(10, [&](const std::set<RequestKey>& without) {
    ++runs;
    return std::ranges::none_of(needed, [&](RequestKey key) { return without.contains(key); });
  });
  EXPECT_EQ(omitted, (std::set<RequestKey>{1, 2, 4, 5, 6, 9, 10}));
  EXPECT_LE(runs, 20);
  EXPECT_THAT(ReplayCommand(5, omitted), testing::HasSubstr("SEED=5 ALTIPLANO_SIM_OMIT=1,2,4,5,6,9,10 "));
}

TEST(Shrink, AWorldGoesOnWithoutSomeOfItsRequests) {
  for (uint64_t seed = 1; seed <= 100; ++seed) {
    Coverage all, few;
    EXPECT_EQ(Simulator(seed, &all).Run(), "");
    std::set<RequestKey> omitted;
    for (RequestKey key = 2; key <= kMostRequests; ++key) omitted.insert(key);
    EXPECT_EQ(Simulator(seed, &few, omitted).Run(), "");
    EXPECT_EQ(few.requests, 1u);
  }
}

TEST(Simulator, Seeds) {
  Coverage coverage;
  if (std::getenv("ALTIPLANO_SIM_SEED") != nullptr) {
    const uint64_t seed = FromEnvironment("ALTIPLANO_SIM_SEED", 0);
    if (std::getenv("ALTIPLANO_SIM_SHRINK") != nullptr) {
      ASSERT_TRUE(Fails(seed, {})) << "seed " << seed << " does not fail";
      const auto still_fails = [&](const std::set<RequestKey>& omitted) { return Fails(seed, omitted); };
      std::printf("%s\n", ReplayCommand(seed, Shrink(kMostRequests, still_fails)).c_str());
      return;
    }
    EXPECT_EQ(Simulator(seed, &coverage, OmittedByEnvironment()).Run(), "");
    return;
  }
  const uint64_t seeds = FromEnvironment("ALTIPLANO_SIM_SEEDS", kSeeds);
  const uint64_t first = FromEnvironment("ALTIPLANO_SIM_FIRST", 1);
  for (uint64_t seed = first; seed < first + seeds; ++seed) {
    const std::string wrong = Simulator(seed, &coverage).Run();
    ASSERT_EQ(wrong, "") << ReplayCommand(seed);
  }
  std::printf(
      "%s\n",
      StrCat("steps ", coverage.steps, ", requests ", coverage.requests, ", tokens ", coverage.tokens, ", preemptions ",
             coverage.preemptions, ", cached tokens ", coverage.cached_tokens, ", sibling rows ", coverage.siblings,
             ", prompt scores ", coverage.prompt_scores, ", inputs from slot ", coverage.from_slot, ", chunks ",
             coverage.chunked, ", cancelled ", coverage.cancelled, ", stopped ", coverage.stopped, ", time limits ",
             coverage.time_limits, ", deadlines ", coverage.deadlines, ", queue timeouts ", coverage.queue_timeouts,
             ", non-finite ", coverage.non_finite, ", aborts ", coverage.aborts, ", dropped results ",
             coverage.dropped_results, ", replayed steps ", coverage.replayed, ", targets met ", coverage.targets_met,
             ", missed ", coverage.targets_missed, ", hopeless ", coverage.hopeless, ", overtaken ", coverage.overtaken,
             ", choices between tenants ", coverage.share_choices)
          .c_str());
  // Each of the things that the simulation is for did happen, about as often as with the seeds it was written with.
  for (uint64_t count :
       {coverage.preemptions, coverage.cached_tokens, coverage.siblings, coverage.prompt_scores, coverage.from_slot,
        coverage.chunked, coverage.cancelled, coverage.stopped, coverage.time_limits, coverage.deadlines,
        coverage.queue_timeouts, coverage.non_finite, coverage.dropped_results, coverage.replayed, coverage.targets_met,
        coverage.targets_missed, coverage.hopeless, coverage.overtaken, coverage.share_choices}) {
    EXPECT_GT(count, seeds / 50);
  }
}

}  // namespace
}  // namespace altiplano::sim
