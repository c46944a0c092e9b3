// The simulator against kernels of a few lines: right ones pass under every seed, and each kind of mistake is named.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "kernels/cuda/ptx.h"
#include "kernels/cuda/sim/sim.h"
#include "kernels/device.h"
#include "kernels/tensor.h"
#include "tests/kernels/cuda/simulator_testlib.h"

namespace altiplano {
namespace {

using testing::AllOf;
using testing::ContainsRegex;
using testing::HasSubstr;

TEST(Simulator, RunsEveryThreadOfEveryBlockOnce) {
  constexpr dim3 kGrid(3, 2, 2), kBlock(8, 4, 2);
  DeviceArray<int32_t> seen(12 * 64, [](size_t) { return 0; });
  EXPECT_EQ(sim::RunGrid({"Count", kGrid, kBlock},
                         [&] {
                           EXPECT_EQ(gridDim.y, kGrid.y);
                           EXPECT_EQ(blockDim.z, kBlock.z);
                           const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
                           const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
                           int32_t* own = seen.data() + block * 64 + thread;
                           ptx::StGlobal(own, ptx::LdGlobal(own) + 1);
                         }),
            "");
  for (size_t i = 0; i < seen.size(); ++i) EXPECT_EQ(seen[i], 1) << i;
}

TEST(Simulator, RefusesLaunchesThatAGpuRefuses) {
  const auto nothing = [] {};
  EXPECT_THAT(sim::RunGrid({"K", 1, 1056}, nothing), HasSubstr("1056 threads per block"));
  EXPECT_THAT(sim::RunGrid({"K", 1, 33}, nothing), HasSubstr("no multiple of 32"));
  EXPECT_THAT(sim::RunGrid({"K", 1, 32, 228 * 1024}, nothing), HasSubstr("bytes of shared memory, at most 232448"));
  EXPECT_THAT(sim::RunGrid({"K", dim3(1, 65536), 32}, nothing), HasSubstr("grid (1,65536,1)"));
  EXPECT_THAT(sim::RunGrid({"K", dim3(0), 32}, nothing), HasSubstr("grid (0,1,1)"));
}

TEST(Simulator, ErrorsStickUntilTheyAreTaken) {
  bool ran = false;
  std::string error;
  const auto stream = Stream::Cuda(0, &error);
  const auto launch = [&](const char* name, unsigned threads) {
    sim::Launch(stream->cuda_stream(), {.grid = {name, 1, threads}, .body = [&] {
                                          if (Thread() == 0) ran = true;
                                        }});
  };
  launch("First", 33);
  launch("Second", 32);
  EXPECT_FALSE(ran);
  EXPECT_THAT(sim::TakeError(), HasSubstr("kernel First"));
  launch("Third", 32);
  EXPECT_TRUE(ran);
  EXPECT_EQ(sim::TakeError(), "");
}

// A kernel that starts before its predecessors have ended.
TEST(Simulator, FindsWhatDoesNotWaitForTheKernelsBefore) {
  DeviceArray<int32_t> data(32, [](size_t) { return 1; });
  const sim::Grid early = {.kernel = "Early", .grid = 1, .block = 32, .overlapping = true};
  const auto add = [&] { ptx::StGlobal(data.data() + Thread(), ptx::LdGlobal(data.data() + Thread()) + 1); };
  EXPECT_EQ(sim::RunGrid(early, [&] { ptx::WaitForKernelsBefore(), add(); }), "");
  EXPECT_EQ(data[31], 2);
  EXPECT_THAT(sim::RunGrid(early, add), HasSubstr("before the wait for the kernels before"));
  const auto writes = [&] { ptx::StGlobal(data.data() + Thread(), 0), ptx::WaitForKernelsBefore(); };
  EXPECT_THAT(sim::RunGrid(early, writes), HasSubstr("before the wait for the kernels before"));
  const auto copies = [&] {
    PTX_SHARED(int32_t, to, 32);
    ptx::CpAsync16(to, data.data(), true);
    ptx::WaitForKernelsBefore();
  };
  EXPECT_THAT(sim::RunGrid(early, copies), HasSubstr("before the wait for the kernels before"));
  const auto some_wait = [&] {
    if (Thread() != 7) ptx::WaitForKernelsBefore();
  };
  EXPECT_THAT(sim::RunGrid(early, some_wait),
              AllOf(HasSubstr("thread 7"), HasSubstr("it ends without a wait for the kernels before")));
  EXPECT_EQ(sim::RunGrid({"Late", 1, 32}, add), "");
}

// What no kernel stores to may be loaded before the wait, and only so.
TEST(Simulator, KnowsWhatMayBeLoadedBeforeTheWait) {
  DeviceArray<int32_t> from(64, [](size_t i) { return static_cast<int32_t>(i); });
  DeviceArray<int32_t> to(32, [](size_t) { return 0; });
  const sim::Grid early = {.kernel = "Early", .grid = 1, .block = 32, .overlapping = true};
  const auto loads = [&](int offset) {
    return [&, offset] {
      const int32_t x = ptx::LdGlobalOnce(from.data() + Thread() + offset);
      ptx::WaitForKernelsBefore();
      ptx::StGlobal(to.data() + Thread(), x);
    };
  };
  const auto stores = [&](int at) {
    return [&, at] {
      if (Thread() == 0) ptx::StGlobal(from.data() + at, 7);
    };
  };
  EXPECT_EQ(sim::RunGrid(early, loads(0)), "");
  EXPECT_EQ(to[31], 31);
  const auto again = [&] {
    ptx::LdGlobalOnce(from.data() + Thread());
    ptx::LdGlobal(from.data() + Thread());
    ptx::WaitForKernelsBefore();
  };
  EXPECT_THAT(sim::RunGrid(early, again), HasSubstr("touched before the wait"));
  EXPECT_EQ(sim::RunGrid({"Store", 1, 32}, stores(32)), "");
  for (const int at : {0, 17, 31}) {
    EXPECT_THAT(sim::RunGrid({"Store", 1, 32}, stores(at)),
                AllOf(HasSubstr("kernel Store"), HasSubstr("what a kernel loads before its wait")))
        << at;
  }
  EXPECT_EQ(sim::RunGrid(early, loads(32)), "");
  EXPECT_THAT(sim::RunGrid({"Store", 1, 32}, stores(63)), HasSubstr("what a kernel loads before its wait"));
  // After the wait it is a load like any other; and what is freed is forgotten.
  DeviceArray<int32_t> late(32, [](size_t) { return 1; });
  const auto waits = [&] {
    ptx::WaitForKernelsBefore();
    ptx::StGlobal(to.data() + Thread(), ptx::LdGlobalOnce(late.data() + Thread()));
  };
  EXPECT_EQ(sim::RunGrid(early, waits), "");
  EXPECT_EQ(sim::RunGrid({"Store", 1, 32}, [&] { ptx::StGlobal(late.data() + Thread(), 2); }), "");
  int32_t* const freed = static_cast<int32_t*>(sim::AllocateDevice(128));
  EXPECT_EQ(sim::RunGrid(early, [&] { ptx::LdGlobalOnce(freed + Thread()), ptx::WaitForKernelsBefore(); }), "");
  const auto overwrite = [&] { ptx::StGlobal(freed + Thread(), 2); };
  EXPECT_THAT(sim::RunGrid({"Store", 1, 32}, overwrite), HasSubstr("what a kernel loads before its wait"));
  sim::FreeDevice(freed);
  int32_t* const next = static_cast<int32_t*>(sim::AllocateDevice(128));
  EXPECT_EQ(sim::RunGrid({"Store", 1, 32}, [&] { ptx::StGlobal(next + Thread(), 2); }), "");
  sim::FreeDevice(next);
}

// A prefetch reads nothing: it may come before the wait, and what it asks for may still be written.
TEST(Simulator, ChecksAndCountsPrefetches) {
  DeviceArray<int32_t> data(64, [](size_t) { return 0; });
  const sim::Grid early = {.kernel = "Early", .grid = 1, .block = 32, .overlapping = true};
  const auto prefetches = [&](const void* from, uint32_t bytes, bool late) {
    return [from, bytes, late] {
      if (late) ptx::WaitForKernelsBefore();
      if (Thread() == 0) ptx::PrefetchL2(from, bytes);
      ptx::WaitForKernelsBefore();
    };
  };
  sim::CountTraffic(true);
  EXPECT_EQ(sim::RunGrid(early, prefetches(data.data(), 256, false)), "");
  EXPECT_EQ(sim::TrafficOf("Early").prefetched_bytes, 256u);
  EXPECT_EQ(sim::RunGrid(early, prefetches(data.data(), 128, true)), "");
  EXPECT_EQ(sim::TrafficOf("Early").prefetched_bytes, 256u);
  EXPECT_EQ(sim::TrafficOf("Early").load_bytes, 0u);
  sim::CountTraffic(false);
  EXPECT_EQ(sim::RunGrid({"Store", 1, 32}, [&] { ptx::StGlobal(data.data() + Thread(), 2); }), "");
  EXPECT_THAT(sim::RunGrid(early, prefetches(data.data() + 4, 256, false)), HasSubstr("outside of device memory"));
  EXPECT_THAT(sim::RunGrid(early, prefetches(data.data() + 1, 128, false)), HasSubstr("misaligned prefetch"));
  EXPECT_THAT(sim::RunGrid(early, prefetches(data.data(), 24, false)), HasSubstr("misaligned prefetch"));
}

// The order of blocks and of warps within a block is another one with another seed, and the same with the same.
TEST(Simulator, OrderIsDrawnFromTheSeed) {
  auto order_with = [](uint64_t seed) {
    sim::SetSeed(seed);
    std::atomic<int> turn = 0;
    std::vector<int> order(8);
    EXPECT_EQ(sim::RunGrid({"Order", 4, 64},
                           [&] {
                             __syncthreads();
                             if (Thread() % 32 != 0) return;
                             order[2 * blockIdx.x + threadIdx.x / 32] = turn.fetch_add(1, std::memory_order_relaxed);
                           }),
              "");
    return order;
  };
  std::set<std::vector<int>> orders;
  for (uint64_t seed = 1; seed <= 16; ++seed) {
    EXPECT_EQ(order_with(seed), order_with(seed));
    orders.insert(order_with(seed));
  }
  EXPECT_GT(orders.size(), 12u);
}

// ---- barriers

// Each thread reads what its neighbour in another warp wrote to shared memory.
void Rotate(DeviceArray<float>& out, bool synced) {
  PTX_SHARED(float, tile, 128);
  ptx::StShared(&tile[Thread()], static_cast<float>(Thread()));
  if (synced) __syncthreads();
  ptx::StGlobal(&out[static_cast<size_t>(Thread())], ptx::LdShared(&tile[(Thread() + 37) % 128]));
}

TEST(Simulator, ABarrierOrdersSharedMemory) {
  DeviceArray<float> out(128);
  const auto wrong = [&] {
    for (int i = 0; i < 128; ++i) {
      if (out[static_cast<size_t>(i)] != static_cast<float>((i + 37) % 128)) return true;
    }
    return false;
  };
  EXPECT_EQ(SeedsThatNotice(
                {"Rotate", 1, 128}, [&] { Rotate(out, true); }, wrong),
            0);
#ifndef __SANITIZE_THREAD__  // which ends the program at the race
  EXPECT_EQ(SeedsThatNotice(
                {"Rotate", 1, 128}, [&] { Rotate(out, false); }, wrong),
            kSeeds);
#endif
}

#ifdef __SANITIZE_THREAD__
// Not that one thread has ended when another begins, nor that each block has barriers of its own.
TEST(SimulatorDeathTest, OrdersNoThreadsThatDoNotMeet) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");  // in a process that was forked TSan ignores what the host orders
  DeviceArray<int32_t> out(64);
  for (const unsigned blocks : {1u, 2u}) {
    // `half` of the threads also write where the others do.
    const auto run = [&](unsigned half) {
      return sim::RunGrid({"Race", blocks, 64 / blocks}, [&] {
        const unsigned thread = blockIdx.x * blockDim.x + threadIdx.x;
        ptx::StGlobal(&out[thread], 1);
        if (blocks == 2) __syncthreads();
        if (blocks == 2) __syncthreads();
        if (thread / 32 == half) ptx::StGlobal(&out[thread ^ 32], 2);
      });
    };
    constexpr unsigned kNone = 2;
    EXPECT_EQ(run(kNone), "");
    for (const unsigned half : {0u, 1u}) EXPECT_DEATH(run(half), "data race") << blocks << " blocks, half " << half;
  }
}
#endif

TEST(Simulator, ABarrierThatNotAllReachIsADeadlockWithItsPlace) {
  sim::SetSeed(5);
  const std::string error = sim::RunGrid({"Half", dim3(2, 1), 64}, [] {
    if (Thread() < 32) __syncthreads();
  });
  EXPECT_THAT(error, AllOf(HasSubstr("deadlock in kernel Half, block ("), HasSubstr("seed 5"),
                           HasSubstr("32 threads, the first is 0: __syncthreads at simulator_test.cc:"),
                           HasSubstr("(32 of 64 arrived)"), HasSubstr("32 threads, the first is 32: exited")));
  // The simulator is as good as new.
  EXPECT_EQ(sim::RunGrid({"Whole", 2, 64}, [] { __syncthreads(); }), "");
}

TEST(Simulator, StuckThreadsAreUnwound) {
  static std::atomic<int> living = 0;
  struct Local {
    Local() { living.fetch_add(1, std::memory_order_relaxed); }
    ~Local() { living.fetch_sub(1, std::memory_order_relaxed); }
  };
  EXPECT_NE(sim::RunGrid({"Stuck", 1, 64},
                         [] {
                           const Local local;
                           if (Thread() != 3) __syncthreads();
                         }),
            "");
  EXPECT_EQ(living, 0);
}

// ---- named barriers

// The PTX ISA's example: a warp produces a value and says so without a wait, another consumes it and says so likewise.
void Produce(DeviceArray<int32_t>& out, bool waits_for_room, bool waits_for_data) {
  constexpr int kFilled = 1, kEmpty = 15, kRounds = 6;
  PTX_SHARED(int32_t, value, 32);
  for (int round = 0; round < kRounds; ++round) {
    if (Thread() < 32) {
      if (round > 0 && waits_for_room) ptx::NamedBarrierSync(kEmpty, 64);
      ptx::StShared(value + Thread(), 100 * round + Thread());
      ptx::NamedBarrierArrive(kFilled, 64);
    } else {
      if (waits_for_data) ptx::NamedBarrierSync(kFilled, 64);
      ptx::StGlobal(&out[static_cast<size_t>(32 * round + Thread() - 32)], ptx::LdShared(value + 63 - Thread()));
      if (round + 1 < kRounds) ptx::NamedBarrierArrive(kEmpty, 64);
    }
  }
}

TEST(SimulatedNamedBarrier, OrdersThoseWhoWaitBehindThoseWhoArrived) {
  DeviceArray<int32_t> out(6 * 32);
  const auto wrong = [&] {
    for (int i = 0; i < 6 * 32; ++i) {
      if (out[static_cast<size_t>(i)] != i / 32 * 100 + 31 - i % 32) return true;
    }
    return false;
  };
  const sim::Grid grid = {"Produce", 1, 64};
  EXPECT_EQ(SeedsThatNotice(
                grid, [&] { Produce(out, true, true); }, wrong),
            0);
#ifndef __SANITIZE_THREAD__  // which ends the program at the race
  EXPECT_EQ(SeedsThatNotice(
                grid, [&] { Produce(out, true, false); }, wrong),
            kSeeds);
  EXPECT_EQ(SeedsThatNotice(
                grid, [&] { Produce(out, false, true); }, wrong),
            kSeeds);
#endif
}

// Any two warps of six are 64 threads: nobody else is waited for, and the barrier is as new for the next two.
TEST(SimulatedNamedBarrier, IsPassedByAnyWarpsThatAreEnough) {
  for (int seed = 1; seed <= kSeeds; ++seed) {
    sim::SetSeed(static_cast<uint64_t>(seed));
    EXPECT_EQ(sim::RunGrid({"Pairs", 2, 192}, [] { ptx::NamedBarrierSync(3, 64); }), "");
  }
}

// One lane's wait is the warp's: it comes when all of its lanes have.
TEST(SimulatedNamedBarrier, CountsWholeWarps) {
  EXPECT_THAT(sim::RunGrid({"Lanes", 1, 64},
                           [] {
                             if (Thread() % 32 != 7) ptx::NamedBarrierSync(3, 64);
                           }),
              AllOf(HasSubstr("deadlock in kernel Lanes"),
                    HasSubstr("62 threads, the first is 0: bar.sync at simulator_test.cc:"),
                    HasSubstr("2 threads, the first is 7: exited")));
}

TEST(SimulatedNamedBarrier, ADeadlockNamesItAndWhoWaits) {
  sim::SetSeed(5);
  EXPECT_THAT(sim::RunGrid({"Lonely", 1, 128},
                           [] {
                             if (Thread() < 64) ptx::NamedBarrierSync(2, 96);
                             if (Thread() >= 96) ptx::NamedBarrierSync(3, 64);
                           }),
              AllOf(HasSubstr("deadlock in kernel Lonely, block (0,0,0), seed 5"),
                    ContainsRegex("64 threads, the first is 0: bar.sync at simulator_test.cc:[0-9]+ for barrier 2 "
                                  "\\(64 of 96 arrived, the first at simulator_test.cc:[0-9]+: warps 0 1\\)"),
                    ContainsRegex(
                        "32 threads, the first is 96: bar.sync at .* for barrier 3 .32 of 64 arrived, .*: warps 3\\)"),
                    HasSubstr("32 threads, the first is 64: exited")));
  // The simulator is as good as new.
  EXPECT_EQ(sim::RunGrid({"Whole", 2, 128}, [] { ptx::NamedBarrierSync(2, 128); }), "");
}

TEST(SimulatedNamedBarrier, NamesMistakes) {
  const std::pair<const char*, std::function<void()>> cases[] = {
      {"bar.sync at barrier 16 for 64 threads: there are 1 to 15", [] { ptx::NamedBarrierSync(16, 64); }},
      {"bar.arrive at barrier 0 for 64 threads: there are 1 to 15, and 0 is that of __syncthreads",
       [] { ptx::NamedBarrierArrive(0, 64); }},
      {"bar.arrive at barrier -1 for 64 threads: there are 1 to 15", [] { ptx::NamedBarrierArrive(-1, 64); }},
      {"bar.sync at barrier 1 for 48 threads: the count is no multiple of 32", [] { ptx::NamedBarrierSync(1, 48); }},
      {"bar.arrive at barrier 1 for 0 threads: the count is no multiple of 32", [] { ptx::NamedBarrierArrive(1, 0); }},
      {"bar.sync at barrier 1 for 160 threads: the block has fewer threads", [] { ptx::NamedBarrierSync(1, 160); }},
      {"for 128 threads: others came for another count (32 of 96 arrived, the first at simulator_test.cc:",
       [] {
         if (Thread() < 32) ptx::NamedBarrierArrive(1, 96);
         __syncthreads();
         if (Thread() >= 32) ptx::NamedBarrierSync(1, 128);
       }},
      {"bar.arrive at barrier 1 for 64 threads: the warp has come already (32 of 64 arrived",
       [] {
         if (Thread() < 32) ptx::NamedBarrierArrive(1, 64);
         if (Thread() < 32) ptx::NamedBarrierArrive(1, 64);
       }},
      {"bar.sync at barrier 1 for 64 threads: the warp has come already (32 of 64 arrived",
       [] {
         if (Thread() < 32) ptx::NamedBarrierArrive(1, 64);
         if (Thread() < 32) ptx::NamedBarrierSync(1, 64);
       }},
      {"the lanes disagree", [] { ptx::NamedBarrierSync(1 + Thread() % 2, 64); }},
      {"the lanes disagree", [] { ptx::NamedBarrierArrive(1, Thread() % 32 < 9 ? 32 : 64); }},
      {"the warp diverged: bar.",
       [] {
         if (Thread() % 32 < 16) ptx::NamedBarrierSync(1, 64);
         ptx::NamedBarrierArrive(1, 64);
       }},
      {"the block has ended before barrier 4 was passed (64 of 128 arrived, the first at simulator_test.cc:",
       [] {
         if (Thread() < 64) ptx::NamedBarrierArrive(4, 128);
       }},
  };
  sim::SetSeed(1);
  for (const auto& [what, body] : cases) {
    EXPECT_THAT(sim::RunGrid({"Named", 1, 128}, body), AllOf(HasSubstr(what), HasSubstr("simulator_test.cc:")));
  }
}

#ifdef __SANITIZE_THREAD__
// What a warp that does not wait does afterwards is ordered before nothing, nor are its lanes among themselves. All
// write to their own place, meet, and then the first warp writes to its lanes' neighbours', or to the other warp's.
TEST(SimulatedNamedBarrierDeathTest, OrdersNobodyWhoDoesNotWait) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");  // as above
  const auto run = [](bool waits, int other) {
    return sim::RunGrid({"Race", 1, 64}, [&] {
      PTX_SHARED(int32_t, value, 64);
      ptx::StShared(value + Thread(), 1);
      if (Thread() >= 32 || waits) {
        ptx::NamedBarrierSync(1, 64);
      } else {
        ptx::NamedBarrierArrive(1, 64);
      }
      if (Thread() < 32) ptx::StShared(value + (Thread() ^ other), 2);
    });
  };
  for (const int other : {1, 32}) {
    EXPECT_EQ(run(true, other), "");
    EXPECT_DEATH(run(false, other), "data race") << other;
  }
}
#endif

// ---- warps

TEST(Simulator, ShufflesExchangeValues) {
  DeviceArray<int32_t> out(32);
  EXPECT_EQ(sim::RunGrid({"Sum", 1, 32},
                         [&] {
                           int32_t sum = Thread();
                           for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xFFFFFFFF, sum, lanes);
                           const int32_t other = __shfl_sync(0xFFFFFFFF, Thread(), 31 - Thread());
                           ptx::StGlobal(&out[static_cast<size_t>(Thread())], 1000 * sum + other);
                         }),
            "");
  for (int i = 0; i < 32; ++i) EXPECT_EQ(out[static_cast<size_t>(i)], 496 * 1000 + 31 - i);
}

TEST(Simulator, NamesAWarpThatDiverged) {
  EXPECT_THAT(sim::RunGrid({"Diverged", 1, 32},
                           [] {
                             if (Thread() < 7) {
                               __syncwarp();
                             } else {
                               __shfl_xor_sync(0xFFFFFFFF, 1, 1);
                             }
                           }),
              HasSubstr("the warp diverged"));
  EXPECT_THAT(sim::RunGrid({"Mask", 1, 32}, [] { __shfl_sync(0x0000FFFF, 1, 0); }), HasSubstr("not in its own mask"));
  EXPECT_THAT(sim::RunGrid({"Outside", 1, 32},
                           [] {
                             if (Thread() < 16) __shfl_sync(0x0000FFFF, 1, 20);
                           }),
              HasSubstr("a lane outside of the mask"));
}

// A tile of a product, by the fragments that the PTX ISA gives each lane, against plain loops.
TEST(Simulator, MatrixInstructionsFollowTheFragmentsOfThePtxIsa) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  DeviceArray<BF16> a(16 * 16, [&](size_t) { return ToBF16(normal(random)); });
  DeviceArray<BF16> b(16 * 16, [&](size_t) { return ToBF16(normal(random)); });
  DeviceArray<float> plain(16 * 16), transposed(16 * 16);
  EXPECT_EQ(sim::RunGrid({"Product", 1, 32},
                         [&] {
                           PTX_SHARED(uint4, tile_a, 32);
                           PTX_SHARED(uint4, tile_b, 32);
                           const int lane = Thread();
                           ptx::CpAsync16(&tile_a[lane], a.data() + 8 * lane, true);
                           ptx::CpAsync16(&tile_b[lane], b.data() + 8 * lane, true);
                           ptx::CpAsyncCommit();
                           ptx::CpAsyncWait<0>();
                           __syncwarp();
                           uint32_t fa[4], fb[4], ft[4];
                           ptx::LdMatrixX4(fa, &tile_a[lane % 16 * 2 + lane / 16]);
                           // b as its rows n of k (plain), and as rows k of n (transposed).
                           ptx::LdMatrixX4(fb, &tile_b[(lane / 16 * 8 + lane % 8) * 2 + lane / 8 % 2]);
                           ptx::LdMatrixX4Transposed(ft, &tile_b[lane % 16 * 2 + lane / 16]);
                           for (int half = 0; half < 2; ++half) {
                             float d[4] = {}, e[4] = {};
                             ptx::Mma16816(d, fa, {fb[2 * half], fb[2 * half + 1]});
                             ptx::Mma16816(e, fa, {ft[2 * half], ft[2 * half + 1]});
                             for (int i = 0; i < 4; ++i) {
                               const int at = (lane / 4 + 8 * (i / 2)) * 16 + 8 * half + 2 * (lane % 4) + i % 2;
                               ptx::StGlobal(plain.data() + at, d[i]);
                               ptx::StGlobal(transposed.data() + at, e[i]);
                             }
                           }
                         }),
            "");
  for (size_t m = 0; m < 16; ++m) {
    for (size_t n = 0; n < 16; ++n) {
      double with_rows = 0, with_columns = 0;
      for (size_t k = 0; k < 16; ++k) {
        with_rows += double{ToFloat(a[m * 16 + k])} * ToFloat(b[n * 16 + k]);
        with_columns += double{ToFloat(a[m * 16 + k])} * ToFloat(b[k * 16 + n]);
      }
      EXPECT_NEAR(plain[m * 16 + n], with_rows, 1e-5);
      EXPECT_NEAR(transposed[m * 16 + n], with_columns, 1e-5);
    }
  }
}

// ---- cp.async

// Two groups of one thread; the second is waited for or not.
TEST(Simulator, ACopyIsNotThereBeforeItIsWaitedFor) {
  DeviceArray<float> in(256, [](size_t i) { return static_cast<float>(i); }), out(256);
  for (bool waits : {true, false}) {
    EXPECT_EQ(sim::RunGrid({"Copy", 1, 32},
                           [&] {
                             PTX_SHARED(uint4, tile, 64);
                             for (int half = 0; half < 2; ++half) {
                               const int i = 32 * half + Thread();
                               ptx::CpAsync16(&tile[i], in.data() + 4 * i, true);
                               ptx::CpAsyncCommit();
                             }
                             if (waits) {
                               ptx::CpAsyncWait<0>();
                             } else {
                               ptx::CpAsyncWait<1>();
                             }
                             for (int i = Thread(); i < 64; i += 32) {
                               ptx::StGlobal(reinterpret_cast<uint4*>(out.data()) + i, ptx::LdShared(&tile[i]));
                             }
                           }),
              "");
    for (size_t i = 0; i < 128; ++i) EXPECT_EQ(out[i], static_cast<float>(i));
    for (size_t i = 128; i < 256; ++i) EXPECT_EQ(std::isnan(out[i]), !waits) << i;
  }
}

TEST(Simulator, ACopyFromOutsideIsZeros) {
  DeviceArray<float> out(128);
  EXPECT_EQ(sim::RunGrid({"Zeros", 1, 32},
                         [&] {
                           PTX_SHARED(uint4, tile, 32);
                           ptx::CpAsync16(&tile[Thread()], nullptr, false);
                           ptx::CpAsyncCommit();
                           ptx::CpAsyncWait<0>();
                           ptx::StGlobal(reinterpret_cast<uint4*>(out.data()) + Thread(),
                                         ptx::LdShared(&tile[Thread()]));
                         }),
            "");
  for (size_t i = 0; i < 128; ++i) EXPECT_EQ(out[i], 0);
}

// ---- blocks that run together

// A value and then a flag, from one stream to the other; 96 threads, so that the flag's warp is one of several.
struct Passing {
  bool barrier_before = true, release = true, acquire = true, barrier_after = true;
};
std::vector<std::vector<sim::Kernel>> Pass(const Passing& how, DeviceArray<float>& value, DeviceArray<uint32_t>& flag,
                                           DeviceArray<float>& out) {
  const auto send = [&, how] {
    ptx::StGlobal(&value[static_cast<size_t>(Thread())], static_cast<float>(Thread()));
    if (how.barrier_before) __syncthreads();
    if (Thread() != 40) return;
    how.release ? ptx::StReleaseSys(flag.data(), 1u) : ptx::StRelaxedSys(flag.data(), 1u);
  };
  const auto receive = [&, how] {
    if (Thread() == 40) {
      while ((how.acquire ? ptx::LdAcquireSys(flag.data()) : ptx::LdRelaxedSys(flag.data())) == 0) {
      }
    }
    if (how.barrier_after) __syncthreads();
    ptx::StGlobal(&out[static_cast<size_t>(Thread())],
                  ptx::LdGlobal(&value[static_cast<size_t>((Thread() + 41) % 96)]));
  };
  return {{{{"Send", 1, 96}, send}}, {{{"Receive", 1, 96}, receive}}};
}

// How many seeds end with another value than was sent.
int SeedsThatSeeAnotherValue(const Passing& how) {
  int seen = 0;
  for (uint64_t seed = 1; seed <= kSeeds; ++seed) {
    sim::SetSeed(seed);
    DeviceArray<float> value(96), out(96);
    DeviceArray<uint32_t> flag(1, [](size_t) { return 0u; });
    EXPECT_EQ(sim::RunTogether(Pass(how, value, flag, out)), "");
    bool wrong = false;
    for (size_t i = 0; i < 96; ++i) wrong |= out[i] != static_cast<float>((i + 41) % 96);
    seen += wrong;
  }
  return seen;
}

TEST(SimulatorTogether, AReleaseThatIsAcquiredShowsWhatWasStored) {
  EXPECT_EQ(SeedsThatSeeAnotherValue({}), 0);
}

#ifndef __SANITIZE_THREAD__  // which ends the program at the race
TEST(SimulatorTogether, StoresAreSeenLateWithoutReleaseAcquireOrBarrier) {
  EXPECT_GT(SeedsThatSeeAnotherValue({.barrier_before = false}), kSeeds / 2);
  EXPECT_GT(SeedsThatSeeAnotherValue({.release = false}), kSeeds / 2);
  EXPECT_GT(SeedsThatSeeAnotherValue({.acquire = false}), kSeeds / 2);
  EXPECT_GT(SeedsThatSeeAnotherValue({.barrier_after = false}), kSeeds / 2);
}
#endif

TEST(SimulatorTogether, AKernelSeesTheOneBeforeItOnItsStream) {
  for (uint64_t seed = 1; seed <= kSeeds; ++seed) {
    sim::SetSeed(seed);
    DeviceArray<int32_t> value(64, [](size_t) { return 0; });
    const auto add = [&] {
      int32_t* own = &value[static_cast<size_t>(Thread())];
      ptx::StGlobal(own, 3 * ptx::LdGlobal(own) + 1);
    };
    const sim::Kernel kernel = {{"Add", 1, 32}, add};
    const sim::Kernel other = {{"Other", 2, 32}, [&] { ptx::LdGlobal(&value[32]); }};
    ASSERT_EQ(sim::RunTogether({{kernel, kernel, kernel}, {other, other}}), "");
    for (size_t i = 0; i < 32; ++i) ASSERT_EQ(value[i], 13) << i;
  }
}

TEST(SimulatorTogether, WaitingForEverIsADeadlockWithItsPlaces) {
  DeviceArray<uint32_t> flag(1, [](size_t) { return 0u; });
  const auto wait = [&] {
    if (Thread() == 3) {
      while (ptx::LdAcquireSys(flag.data()) == 0) {
      }
    }
    __syncthreads();
  };
  EXPECT_THAT(sim::RunTogether({{{{"First", 1, 64}, wait}}, {{{"Second", 1, 64}, wait}}}),
              AllOf(HasSubstr("deadlock of blocks that wait for each other, seed"), HasSubstr("kernel First"),
                    HasSubstr("stream 1, kernel Second"), HasSubstr("the first is 3: polls at simulator_test.cc:"),
                    HasSubstr("63 threads, the first is 0: __syncthreads at simulator_test.cc:")));
  // A block alone has nobody to wait for.
  EXPECT_THAT(sim::RunGrid({"Alone", 1, 64}, wait), HasSubstr("polls for ever"));
  // Whoever looks at the clock may give up.
  EXPECT_EQ(sim::RunTogether({{{{"Patient", 1, 32},
                                [&] {
                                  const uint64_t begin = ptx::GlobalTimer();
                                  while (ptx::LdAcquireSys(flag.data()) == 0 && ptx::GlobalTimer() - begin < 1000) {
                                  }
                                }}}}),
            "");
}

TEST(SimulatorTogether, AFailureEndsAllBlocks) {
  DeviceArray<float> in(32, [](size_t) { return 1.0f; });
  DeviceArray<uint32_t> flag(1, [](size_t) { return 0u; });
  const sim::Kernel waits = {{"Waits", 3, 32}, [&] {
                               while (ptx::LdAcquireSys(flag.data()) == 0) {
                               }
                             }};
  const sim::Kernel fails = {{"Fails", 1, 32}, [&] { ptx::LdGlobal(in.data() + 1 + Thread()); }};
  EXPECT_THAT(sim::RunTogether({{waits}, {fails}}),
              AllOf(HasSubstr("kernel Fails"), HasSubstr("outside of device memory")));
  EXPECT_THAT(sim::RunTogether({{{{"Many", 133, 32}, [] {}}}}), HasSubstr("133 blocks that wait for each other"));
  EXPECT_THAT(sim::RunTogether({{{{"Odd", 1, 33}, [] {}}}}), HasSubstr("no multiple of 32"));
}

// ---- bounds

TEST(Simulator, NamesAccessesOutOfBounds) {
  DeviceArray<float> in(40, [](size_t) { return 1.0f; });
  std::vector<float> host(64);
  struct Case {
    const char* what;
    std::function<void()> body;
  };
  const Case cases[] = {
      {"a global load of 4 bytes is outside of device memory", [&] { ptx::LdGlobal(in.data() + 9 + Thread()); }},
      {"a global load of 4 bytes is outside of device memory", [&] { ptx::LdGlobal(host.data()); }},
      {"a global store of 16 bytes is outside",
       [&] { ptx::StGlobal(reinterpret_cast<uint4*>(in.data()) + 10, uint4()); }},
      {"misaligned access of 16 bytes", [&] { ptx::LdGlobal(reinterpret_cast<const uint4*>(in.data() + 2)); }},
      {"the source of cp.async is outside",
       [&] {
         PTX_SHARED(uint4, tile, 32);
         ptx::CpAsync16(&tile[Thread()], in.data() + 40, true);
       }},
      {"a shared load is outside",
       [&] {
         PTX_SHARED(float, tile, 32);
         ptx::LdShared(&tile[Thread() + 1]);
       }},
      {"the destination of cp.async is outside",
       [&] { ptx::CpAsync16(static_cast<uint4*>(ptx::DynamicShared()) + 8, in.data(), true); }},
      {"a row of ldmatrix is outside",
       [&] {
         uint32_t r[4];
         ptx::LdMatrixX4(r, static_cast<uint4*>(ptx::DynamicShared()) + Thread());
       }},
  };
  for (const Case& c : cases) {
    const std::string error = sim::RunGrid({"Bounds", 1, 32, 128}, c.body);
    EXPECT_THAT(error, AllOf(HasSubstr(c.what), HasSubstr("at simulator_test.cc:")));
  }
}

TEST(Simulator, MemoryStartsAsNaN) {
  DeviceArray<float> out(3);
  EXPECT_EQ(sim::RunGrid({"Poison", 1, 32, 128},
                         [&] {
                           PTX_SHARED(float, variable, 1);
                           if (Thread() != 0) return;
                           ptx::StGlobal(&out[0], ptx::LdShared(variable));
                           ptx::StGlobal(&out[1], ptx::LdShared(static_cast<float*>(ptx::DynamicShared())));
                         }),
            "");
  for (size_t i = 0; i < 3; ++i) EXPECT_TRUE(std::isnan(out[i])) << i;
}

// Not through ptx.h, and so without its checks.
TEST(Simulator, NoticesAPlainWritePastSharedMemory) {
  const auto write = [] {
    if (Thread() == 0) static_cast<char*>(ptx::DynamicShared())[130] = 1;
  };
#ifdef __SANITIZE_ADDRESS__
  EXPECT_DEATH(sim::RunGrid({"Guard", 1, 32, 128}, write), "use-after-poison(.|\n)*simulator_test.cc");
#else
  EXPECT_THAT(sim::RunGrid({"Guard", 1, 32, 128}, write),
              HasSubstr("a write 2 bytes past the end of dynamic shared memory"));
#endif
}

TEST(Simulator, DeviceMemoryIsCounted) {
  const size_t before = sim::LiveDeviceBytes();
  {
    DeviceArray<float> array(100);
    EXPECT_EQ(sim::LiveDeviceBytes(), before + 400);
  }
  EXPECT_EQ(sim::LiveDeviceBytes(), before);
}

// ---- the simulated GPU behind Stream::Cuda

TEST(SimulatedGpu, IsNumberZeroAlone) {
  std::string error;
  EXPECT_EQ(Stream::Cuda(1, &error), nullptr);
  EXPECT_EQ(error, "no simulated GPU 1, only 0");
  const auto stream = Stream::Cuda(0, &error);
  ASSERT_NE(stream, nullptr);
  EXPECT_EQ(stream->device(), Device::kCuda);
  EXPECT_EQ(Describe(*stream), "simulated GPU");
}

TEST(SimulatedGpu, HasNoMoreMemoryThanItSays) {
  const MemoryInfo before = QueryMemory(Device::kCuda);
  {
    const Buffer buffer = Buffer::Allocate(Device::kCuda, 1 << 20);
    EXPECT_EQ(QueryMemory(Device::kCuda).free_bytes, before.free_bytes - (1 << 20));
  }
  EXPECT_EQ(QueryMemory(Device::kCuda).free_bytes, before.free_bytes);
  EXPECT_FALSE(Buffer::Allocate(Device::kCuda, before.free_bytes + 1));
}

TEST(SimulatedGpu, NamesCopiesOutOfBounds) {
  std::string error;
  const auto stream = Stream::Cuda(0, &error);
  const Buffer buffer = Buffer::Allocate(Device::kCuda, 8);
  char host[16] = {1, 2, 3};
  Copy(*stream, buffer.data(), Device::kCuda, host, Device::kCpu, 8);
  EXPECT_EQ(stream->Synchronize(), "");
  Copy(*stream, host + 8, Device::kCpu, buffer.data(), Device::kCuda, 8);
  EXPECT_EQ(host[10], 3);
  Copy(*stream, buffer.data(), Device::kCuda, host, Device::kCpu, 9);
  EXPECT_EQ(stream->Synchronize(), "a copy of 9 bytes to outside of device memory");
  Copy(*stream, host, Device::kCpu, buffer.data(), Device::kCuda, 9);
  EXPECT_EQ(sim::TakeError(), "a copy of 9 bytes to outside of device memory") << "the first error sticks";
  Copy(*stream, host, Device::kCpu, buffer.data(), Device::kCuda, 9);
  EXPECT_EQ(sim::TakeError(), "a copy of 9 bytes from outside of device memory");
}

TEST(SimulatedGpu, ZeroStaysInBounds) {
  std::string error;
  const auto stream = Stream::Cuda(0, &error);
  const Buffer buffer = Buffer::Allocate(*stream, 8);
  const Buffer host = Buffer::AllocateHost(*stream, 8);
  ASSERT_TRUE(buffer && host);
  EXPECT_EQ(host.device(), Device::kCpu);
  std::memset(host.data(), 1, 8);
  Copy(*stream, buffer.data(), Device::kCuda, host.data(), Device::kCpu, 8);
  Zero(*stream, buffer.data(), 4);
  Copy(*stream, host.data(), Device::kCpu, buffer.data(), Device::kCuda, 8);
  EXPECT_EQ(stream->Synchronize(), "");
  const auto* bytes = static_cast<const char*>(host.data());
  EXPECT_EQ(bytes[3], 0);
  EXPECT_EQ(bytes[4], 1);
  Zero(*stream, buffer.data(), 9);
  EXPECT_EQ(sim::TakeError(), "zeros for 9 bytes outside of device memory");
}

// ---- copies of two streams

TEST(SimulatedDeviceCopies, ThatNothingOrdersAreARace) {
  std::string error;
  const auto one = Stream::Cuda(0, &error), other = Stream::Cuda(0, &error);
  const auto event = StreamEvent::Create(*one);
  const Buffer a = Buffer::Allocate(*one, 8), b = Buffer::Allocate(*one, 8), c = Buffer::Allocate(*one, 8);
  const auto copy = [](Stream& stream, const Buffer& to, const Buffer& from) {
    Copy(stream, to.data(), Device::kCuda, from.data(), Device::kCuda, 8);
  };
  const auto expect = [&](const std::string& found) {
    EXPECT_EQ(sim::StuckError(), found.empty() ? found : "a copy of 8 bytes between device memory " + found);
    sim::TakeError();
    EXPECT_EQ(one->Synchronize() + other->Synchronize(), "");
  };
  const std::string race = "races with one of another stream: no event orders them";
  copy(*one, b, a);
  copy(*other, c, b);  // reads what may not be there
  expect(race);
  copy(*other, c, b);
  copy(*one, b, a);  // writes what may not have been read
  expect(race);
  copy(*one, b, a);
  copy(*other, b, c);  // both write
  expect(race);
  copy(*one, b, a);
  copy(*other, c, a);  // both read
  copy(*one, b, a);    // the same again
  expect("");
  copy(*one, b, a);
  event->Record(*one);
  event->Precede(*other);
  copy(*other, c, b);
  expect("");
  event->Record(*one);
  copy(*one, b, a);
  event->Precede(*other);
  copy(*other, c, b);  // the event is of before
  expect(race);
  copy(*one, b, a);
  EXPECT_EQ(one->Synchronize(), "");
  copy(*other, c, b);  // the host has waited
  expect("");
}

// ---- what the host may know of its copies

// A pinned block, and eight bytes on the device that hold 1 to 8.
class SimulatedHostCopies : public testing::Test {
 protected:
  void SetUp() override {
    std::string error;
    stream_ = Stream::Cuda(0, &error);
    other_ = Stream::Cuda(0, &error);
    event_ = StreamEvent::Create(*stream_);
    device_ = Buffer::Allocate(*stream_, 8);
    host_ = Buffer::AllocateHost(*stream_, 8);
    const unsigned char bytes[8] = {1, 2, 3, 4, 5, 6, 7, 8};
    Copy(*stream_, device_.data(), Device::kCuda, bytes, Device::kCpu, 8);
  }
  void TearDown() override {
    EXPECT_EQ(stream_->Synchronize(), "");
    sim::TakeError();
  }
  void FetchOn(Stream& stream) { Copy(stream, host_.data(), Device::kCpu, device_.data(), Device::kCuda, 8); }
  void Send() { Copy(*stream_, device_.data(), Device::kCuda, host_.data(), Device::kCpu, 8); }
  unsigned char& byte(int i) { return static_cast<unsigned char*>(host_.data())[i]; }
  std::string Changed() const {
    return "pinned memory was written over before the host had waited for a copy of 8 bytes from it";
  }

  std::unique_ptr<Stream> stream_, other_;
  std::unique_ptr<StreamEvent> event_;
  Buffer device_, host_;
};

TEST_F(SimulatedHostCopies, ResultsShowWhenTheHostHasWaited) {
  event_->Record(*stream_);
  FetchOn(*stream_);
  EXPECT_EQ(byte(2), 0xFF);
  EXPECT_EQ(event_->Wait(), "");
  EXPECT_EQ(byte(2), 0xFF) << "the event is of before the copy";
  EXPECT_EQ(other_->Synchronize(), "");
  EXPECT_EQ(byte(2), 0xFF) << "another stream";
  EXPECT_EQ(stream_->Synchronize(), "");
  EXPECT_EQ(byte(2), 3);

  FetchOn(*stream_);
  event_->Record(*stream_);
  EXPECT_EQ(byte(2), 0xFF);
  EXPECT_EQ(event_->Wait(), "");
  EXPECT_EQ(byte(2), 3);
}

TEST_F(SimulatedHostCopies, AnEventThatHasBeenPassedMayNotBeKnownTo) {
  int late = 0;
  for (int i = 0; i < 64; ++i) {
    FetchOn(*stream_);
    event_->Record(*stream_);
    if (!event_->Passed()) {
      ++late;
      EXPECT_EQ(byte(2), 0xFF);
      EXPECT_TRUE(event_->Passed()) << "for ever";
    }
    EXPECT_EQ(byte(2), 3);
  }
  EXPECT_GT(late, 0);
  EXPECT_LT(late, 64);
}

TEST_F(SimulatedHostCopies, WhoWaitsForAStreamWaitsForWhatItWaitsFor) {
  FetchOn(*stream_);
  event_->Record(*stream_);
  event_->Precede(*other_);
  EXPECT_EQ(byte(2), 0xFF);
  EXPECT_EQ(other_->Synchronize(), "");
  EXPECT_EQ(byte(2), 3);
}

TEST_F(SimulatedHostCopies, PinnedMemoryMustNotChangeUnderACopyFromIt) {
  byte(0) = 10;
  Send();
  EXPECT_EQ(stream_->Synchronize(), "");
  byte(0) = 11;
  Send();
  event_->Record(*stream_);
  EXPECT_EQ(event_->Wait(), "");
  byte(0) = 12;
  EXPECT_EQ(stream_->Synchronize(), "");
  Send();
  byte(0) = 13;
  EXPECT_EQ(stream_->Synchronize(), Changed());
  EXPECT_EQ(sim::TakeError(), Changed());
  // Nor by way of a second copy from there, or of its release.
  Send();
  byte(0) = 14;
  Send();
  EXPECT_EQ(sim::TakeError(), Changed());
  byte(0) = 15;
  host_ = Buffer();
  EXPECT_EQ(sim::TakeError(), Changed());
}

// The stream's own order needs no wait of the host's.
TEST_F(SimulatedHostCopies, AStreamSeesItsOwnCopies) {
  FetchOn(*stream_);
  Zero(*stream_, device_.data(), 8);
  Send();
  FetchOn(*stream_);
  EXPECT_EQ(stream_->Synchronize(), "");
  EXPECT_EQ(byte(2), 3);
}

TEST_F(SimulatedHostCopies, CopiesOfAGraphAreOfTheStreamThatLaunchesIt) {
  std::string error;
  const auto fetch = [&] {
    FetchOn(*stream_);
    return true;
  };
  const auto graph = StepGraph::Capture(*stream_, fetch, &error);
  ASSERT_NE(graph, nullptr) << error;
  std::memset(host_.data(), 0, 8);
  graph->Launch(*other_);
  EXPECT_EQ(stream_->Synchronize(), "");
  EXPECT_EQ(byte(2), 0xFF);
  EXPECT_EQ(other_->Synchronize(), "");
  EXPECT_EQ(byte(2), 3);
}

TEST(SimulatedGpu, EveryThreadSeesTheErrorThatStuck) {
  std::string error;
  const auto stream = Stream::Cuda(0, &error);
  const auto event = StreamEvent::Create(*stream);
  ASSERT_NE(event, nullptr);
  std::thread([&] {
    stream->UseFromThisThread();
    EXPECT_EQ(stream->Error(), "");
    sim::Stick("the GPU fell off the bus");
    event->Record(*stream);
  }).join();
  EXPECT_TRUE(event->Passed());
  EXPECT_EQ(event->Wait(), "the GPU fell off the bus");
  EXPECT_EQ(stream->Error(), "the GPU fell off the bus");
  EXPECT_EQ(sim::TakeError(), "the GPU fell off the bus");
}

TEST(SimulatedGpu, AllocationsAreCounted) {
  std::string error;
  const auto stream = Stream::Cuda(0, &error);
  const uint64_t before = Buffer::DeviceAllocations();
  const Buffer on_device = Buffer::Allocate(*stream, 8), pinned = Buffer::AllocateHost(*stream, 8);
  const Buffer on_host = Buffer::Allocate(Device::kCpu, 8);
  EXPECT_EQ(Buffer::DeviceAllocations(), before + 2);
}

// ---- counters

sim::Traffic Count(const std::function<void()>& body) {
  sim::CountTraffic(true);
  EXPECT_EQ(sim::RunGrid({"Counted", 1, 32, 32 * 1024}, body), "");
  const sim::Traffic traffic = sim::TrafficOf("Counted");
  sim::CountTraffic(false);
  EXPECT_EQ(traffic.launches, 1u);
  return traffic;
}

TEST(Simulator, CountsSectorsOfGlobalMemory) {
  DeviceArray<float> in(32 * 64, [](size_t) { return 0.0f; });
  // A warp that reads 128 bytes in a row touches four sectors, with a stride of two eight, and 32 far apart.
  for (const auto& [stride, sectors] : {std::pair{1, 4}, {2, 8}, {64, 32}, {0, 1}}) {
    const sim::Traffic traffic = Count([&, s = stride] { ptx::LdGlobal(in.data() + s * Thread()); });
    EXPECT_EQ(traffic.sectors, static_cast<uint64_t>(sectors)) << stride;
    EXPECT_EQ(traffic.ideal_sectors, stride == 0 ? 1u : 4u) << stride;
    EXPECT_EQ(traffic.load_bytes, 128u);
    EXPECT_EQ(traffic.store_bytes, 0u);
  }
  const sim::Traffic misplaced = Count([&] { ptx::StGlobal(in.data() + 1 + Thread(), 0.0f); });
  EXPECT_EQ(misplaced.sectors, 5u);
  EXPECT_EQ(misplaced.store_bytes, 128u);
}

TEST(Simulator, CountsBankConflicts) {
  // 32 banks of 4 bytes: a stride of 1 or 33 has no conflict, of 2 two, of 32 all; one address is a broadcast.
  for (const auto& [stride, wavefronts] : {std::pair{1, 1}, {33, 1}, {2, 2}, {8, 8}, {32, 32}, {0, 1}}) {
    const sim::Traffic traffic =
        Count([s = stride] { ptx::LdShared(static_cast<float*>(ptx::DynamicShared()) + s * Thread()); });
    EXPECT_EQ(traffic.wavefronts, static_cast<uint64_t>(wavefronts)) << stride;
    EXPECT_EQ(traffic.ideal_wavefronts, 1u) << stride;
  }
  // 16 bytes a lane: four wavefronts at best. Rows of 128 bytes one below the other conflict eightfold in ldmatrix.
  EXPECT_EQ(Count([] { ptx::LdShared(static_cast<uint4*>(ptx::DynamicShared()) + Thread()); }).wavefronts, 4u);
  for (int stride : {1, 8, 9}) {
    const sim::Traffic traffic = Count([stride] {
      uint32_t r[4];
      ptx::LdMatrixX4(r, static_cast<uint4*>(ptx::DynamicShared()) + stride * Thread());
    });
    EXPECT_EQ(traffic.wavefronts, stride == 8 ? 32u : 4u) << stride;
    EXPECT_EQ(traffic.ideal_wavefronts, 4u);
  }
}

}  // namespace
}  // namespace altiplano
