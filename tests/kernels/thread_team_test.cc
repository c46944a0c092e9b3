#include "kernels/cpu/thread_team.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <set>
#include <thread>
#include <vector>

namespace altiplano {
namespace {

TEST(ThreadTeam, CallsEachThreadOnceAndTheCallerAsWorkerZero) {
  for (int threads : {1, 2, 3, 8}) {
    ThreadTeam team(threads);
    ASSERT_EQ(team.size(), threads);
    std::vector<std::thread::id> ids(static_cast<size_t>(threads));
    std::atomic<int> calls = 0;
    for (int run = 1; run <= 20; ++run) {
      team.Run([&](int worker, int size) {
        ++calls;
        EXPECT_EQ(size, threads);
        ASSERT_GE(worker, 0);
        ASSERT_LT(worker, threads);
        std::thread::id& id = ids[static_cast<size_t>(worker)];
        EXPECT_TRUE(run == 1 || id == std::this_thread::get_id()) << worker << " is another thread than before";
        id = std::this_thread::get_id();
      });
      EXPECT_EQ(calls, run * threads);
    }
    EXPECT_EQ(ids[0], std::this_thread::get_id());
    EXPECT_EQ(std::set(ids.begin(), ids.end()).size(), ids.size());
  }
}

// What the caller wrote before Run is seen in it, and what the workers wrote is seen after it.
void ExpectRunsInOrder(ThreadTeam& team, int runs) {
  std::vector<int64_t> sums(static_cast<size_t>(team.size()) * 16);
  int64_t step = 0, expected = 0, wrong = 0;
  for (int run = 0; run < runs; ++run) {
    expected += ++step;
    team.Run([&](int worker, int) { sums[static_cast<size_t>(worker) * 16] += step; });
    for (size_t worker = 0; worker < static_cast<size_t>(team.size()); ++worker) {
      wrong += sums[worker * 16] != expected;
    }
  }
  EXPECT_EQ(wrong, 0);
}

TEST(ThreadTeam, RunsFollowEachOther) {
  for (int threads : {1, 2, 3, 5}) {
    ThreadTeam team(threads);
    ExpectRunsInOrder(team, threads > 2 ? 50 : 1000);  // few where spinning threads may share a core
  }
}

// Pauses on both sides of the time for which workers spin before they sleep.
TEST(ThreadTeam, WakesWorkersThatFellAsleep) {
  ThreadTeam team(3);
  for (int pause = 0; pause < 100; ++pause) {
    std::this_thread::sleep_for(std::chrono::microseconds(pause * 10));
    ExpectRunsInOrder(team, 2);
  }
}

TEST(ThreadTeam, WaitsForTheSlowest) {
  ThreadTeam team(3);
  for (int slow = 0; slow < 3; ++slow) {
    std::atomic<int> done = 0;
    team.Run([&](int worker, int) {
      if (worker == slow) std::this_thread::sleep_for(std::chrono::milliseconds(5));
      ++done;
    });
    EXPECT_EQ(done, 3);
  }
}

TEST(ThreadTeam, EndsWhetherWorkersSpinOrSleep) {
  for (int microseconds : {0, 0, 0, 50, 150, 200, 250, 1000}) {
    ThreadTeam unused(4), used(4);
    ExpectRunsInOrder(used, 1);
    std::this_thread::sleep_for(std::chrono::microseconds(microseconds));
  }
}

TEST(ThreadTeam, ScratchIsAlignedKeptAndGrows) {
  ThreadTeam team(2);
  size_t largest = 0;
  for (size_t bytes : {1u, 64u, 1u << 20, 100u, (4u << 20) + 1, 4u << 20, 5u << 20}) {
    auto* scratch = static_cast<char*>(team.Scratch(bytes));
    EXPECT_EQ(reinterpret_cast<uintptr_t>(scratch) % 64, 0u);
    std::memset(scratch, 1, bytes);
    EXPECT_TRUE(bytes > largest || scratch[largest - 1] == 1) << "not the memory that a larger op used before";
    largest = std::max(largest, bytes);
    EXPECT_EQ(team.Scratch(bytes), scratch);
    EXPECT_EQ(team.Scratch(bytes / 2), scratch);
  }
}

}  // namespace
}  // namespace altiplano
