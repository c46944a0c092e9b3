// Seeded simulation of the real scheduler: tests/sim/simulator_testlib.h.
//
//   ALTIPLANO_SIM_SEED=N   runs that seed alone       ALTIPLANO_SIM_TRACE=1  prints what happens
//   ALTIPLANO_SIM_SEEDS=N  runs N seeds instead of the default number, ALTIPLANO_SIM_FIRST=M from M on
//   ALTIPLANO_SIM_SHRINK=1 with a seed that fails: leaves out parts of its world (kParts) and requests as long as it
//                          still does, and says how to replay what is left (ALTIPLANO_SIM_OMIT=tenants,1,2,5). Done of
//                          itself unless the seed ends the process.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

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

Omitted OmittedByEnvironment() {
  Omitted omitted;
  const char* text = std::getenv("ALTIPLANO_SIM_OMIT");
  std::istringstream parts(text != nullptr ? text : "");
  for (std::string part; std::getline(parts, part, ',');) omitted.insert(part);
  return omitted;
}

std::vector<std::string> AllParts() {
  std::vector<std::string> all = kParts;
  for (int32_t key = 1; key <= kMostRequests; ++key) all.push_back(StrCat(key));
  return all;
}

std::vector<std::pair<const char*, uint64_t>> HowOften(const Coverage& coverage) {
  std::vector<std::pair<const char*, uint64_t>> all = coverage.policies.All();
  all.insert(all.end(), {{"preemptions", coverage.preemptions},
                         {"cached tokens", coverage.cached_tokens},
                         {"sibling rows", coverage.siblings},
                         {"prompt scores", coverage.prompt_scores},
                         {"inputs from slot", coverage.from_slot},
                         {"chunks", coverage.chunked},
                         {"cancelled", coverage.cancelled},
                         {"stopped", coverage.stopped},
                         {"time limits", coverage.time_limits},
                         {"deadlines", coverage.deadlines},
                         {"queue timeouts", coverage.queue_timeouts},
                         {"non-finite", coverage.non_finite},
                         {"dropped results", coverage.dropped_results},
                         {"replayed steps", coverage.replayed},
                         {"from checkpoints", coverage.restored},
                         {"targets met", coverage.targets_met},
                         {"targets missed", coverage.targets_missed},
                         {"late tokens", coverage.late_tokens},
                         {"overtaken", coverage.overtaken},
                         {"queue full", coverage.queue.queue_full},
                         {"a tenant's queue full", coverage.queue.tenant_queue_full},
                         {"let in over the bounds", coverage.queue.over_the_bounds},
                         {"hints by rate", coverage.queue.hints_by_rate}});
  return all;
}

// In a process of its own: it may die on a CHECK.
bool Fails(uint64_t seed, const Omitted& omitted) {
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

Omitted WhatItDoesNotNeed(uint64_t seed) {
  return Shrink(AllParts(), [seed](const Omitted& omitted) { return Fails(seed, omitted); });
}

TEST(Shrink, LeavesWhatTheFailureNeeds) {
  const Omitted needed = {"3", "ageing"};
  int runs = 0;
  const Omitted omitted = Shrink({"ageing", "tenants", "1", "2", "3", "4"}, [&](const Omitted& without) {
    ++runs;
    return std::ranges::none_of(needed, [&](const std::string& part) { return without.contains(part); });
  });
  EXPECT_EQ(omitted, (Omitted{"1", "2", "4", "tenants"}));
  EXPECT_LE(runs, 12);
  EXPECT_THAT(ReplayCommand(5, omitted), testing::HasSubstr("SEED=5 ALTIPLANO_SIM_OMIT=1,2,4,tenants "));
}

TEST(Shrink, AWorldGoesOnWithoutAnyPartAndWithoutMostRequests) {
  const std::vector<std::string> all = AllParts();
  for (uint64_t seed = 1; seed <= 100; ++seed) {
    Coverage coverage, few;
    const Omitted one = {kParts[seed % kParts.size()]};
    EXPECT_EQ(Simulator(seed, &coverage, one).Run(), "") << ReplayCommand(seed, one);
    Omitted nearly_all(all.begin(), all.end());
    nearly_all.erase("1");
    EXPECT_EQ(Simulator(seed, &few, nearly_all).Run(), "") << ReplayCommand(seed, nearly_all);
    EXPECT_EQ(few.requests, 1u);
    EXPECT_EQ(few.cancelled + few.stopped + few.deadlines + few.policies.hopeless + few.siblings, 0u);
  }
}

TEST(Simulator, Seeds) {
  Coverage coverage;
  if (std::getenv("ALTIPLANO_SIM_SEED") != nullptr) {
    const uint64_t seed = FromEnvironment("ALTIPLANO_SIM_SEED", 0);
    if (std::getenv("ALTIPLANO_SIM_SHRINK") != nullptr) {
      ASSERT_TRUE(Fails(seed, {})) << "seed " << seed << " does not fail";
      std::printf("%s\n", ReplayCommand(seed, WhatItDoesNotNeed(seed)).c_str());
      return;
    }
    EXPECT_EQ(Simulator(seed, &coverage, OmittedByEnvironment()).Run(), "");
    return;
  }
  const uint64_t seeds = FromEnvironment("ALTIPLANO_SIM_SEEDS", kSeeds);
  const uint64_t first = FromEnvironment("ALTIPLANO_SIM_FIRST", 1);
  for (uint64_t seed = first; seed < first + seeds; ++seed) {
    const std::string wrong = Simulator(seed, &coverage).Run();
    ASSERT_EQ(wrong, "") << ReplayCommand(seed) << "\nor with less,\n" << ReplayCommand(seed, WhatItDoesNotNeed(seed));
  }
  std::string said = StrCat("steps ", coverage.steps, ", requests ", coverage.requests, ", tokens ", coverage.tokens,
                            ", aborts ", coverage.aborts);
  // Each of the things that the simulation is for did happen, about as often as with the seeds it was written with.
  for (const auto& [what, count] : HowOften(coverage)) {
    said += StrCat(", ", what, " ", count);
    EXPECT_GT(count, seeds / 50) << what;
  }
  std::printf("%s\n", said.c_str());
}

}  // namespace
}  // namespace altiplano::sim
