// Seeded simulation of the real scheduler: tests/sim/simulator_testlib.h.
//
//   ALTIPLANO_SIM_SEED=N   runs that seed alone       ALTIPLANO_SIM_TRACE=1  prints what happens
//   ALTIPLANO_SIM_SEEDS=N  runs N seeds instead of the default number
#include <gtest/gtest.h>

#include <cstdlib>

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
constexpr uint64_t kSeeds = 12000;
#endif

TEST(Simulator, Seeds) {
  Coverage coverage;
  if (std::getenv("ALTIPLANO_SIM_SEED") != nullptr) {
    const uint64_t seed = FromEnvironment("ALTIPLANO_SIM_SEED", 0);
    EXPECT_EQ(Simulator(seed, &coverage).Run(), "");
    return;
  }
  const uint64_t seeds = FromEnvironment("ALTIPLANO_SIM_SEEDS", kSeeds);
  for (uint64_t seed = 1; seed <= seeds; ++seed) {
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
