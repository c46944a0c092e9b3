// What the simulator knows of sm_90a: mbarriers, TMA and wgmma, by the PTX ISA's layouts; and each kind of mistake
// named.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "kernels/cuda/ptx_hopper.h"
#include "kernels/cuda/sim/matrix_descriptor.h"
#include "kernels/cuda/sim/sim.h"
#include "kernels/tensor.h"
#include "tests/kernels/cuda/simulator_testlib.h"

namespace altiplano {
namespace {

using testing::AllOf;
using testing::HasSubstr;

constexpr unsigned kSharedBytes = 64 * 1024;

unsigned char* Shared(int offset) {
  return static_cast<unsigned char*>(ptx::DynamicShared()) + offset;
}
uint64_t* Barrier(int index) {
  return reinterpret_cast<uint64_t*>(Shared(60 * 1024)) + index;
}
// By thread 0; then all may use it.
void InitBarrier(int index, uint32_t arrivals) {
  if (Thread() == 0) {
    ptx::MbarrierInit(Barrier(index), arrivals);
    ptx::FenceProxyAsync();
  }
  __syncthreads();
}

std::string RunBlock(const std::function<void()>& body, unsigned threads = 128) {
  return sim::RunGrid({"Hopper", 1, threads, kSharedBytes}, body);
}

// ---- mbarriers

// Two warps hand a value to and fro: the first writes when the last one was read, the second reads when it was written.
void HandOver(DeviceArray<int32_t>& out, bool waits_for_data, bool waits_for_room) {
  InitBarrier(0, 32);
  InitBarrier(1, 32);
  auto* value = reinterpret_cast<int32_t*>(Shared(0));
  for (int round = 0; round < 6; ++round) {
    const auto parity = static_cast<uint32_t>(round & 1);
    if (Thread() < 32) {
      if (round > 0 && waits_for_room) ptx::MbarrierWait(Barrier(1), parity ^ 1);
      ptx::StShared(value + Thread(), 100 * round + Thread());
      ptx::MbarrierArrive(Barrier(0));
    } else {
      if (waits_for_data) ptx::MbarrierWait(Barrier(0), parity);
      ptx::StGlobal(&out[static_cast<size_t>(32 * round + Thread() - 32)], ptx::LdShared(value + 63 - Thread()));
      ptx::MbarrierArrive(Barrier(1));
    }
  }
}

TEST(SimulatedHopper, MbarriersOrderTheirPhases) {
  DeviceArray<int32_t> out(6 * 32);
  const auto wrong = [&] {
    for (int i = 0; i < 6 * 32; ++i) {
      if (out[static_cast<size_t>(i)] != i / 32 * 100 + 31 - i % 32) return true;
    }
    return false;
  };
  const sim::Grid grid = {"HandOver", 1, 64, kSharedBytes};
  EXPECT_EQ(SeedsThatNotice(
                grid, [&] { HandOver(out, true, true); }, wrong),
            0);
#ifndef __SANITIZE_THREAD__  // which ends the program at the race
  EXPECT_EQ(SeedsThatNotice(
                grid, [&] { HandOver(out, false, true); }, wrong),
            kSeeds);
  EXPECT_GT(SeedsThatNotice(
                grid, [&] { HandOver(out, true, false); }, wrong),
            kSeeds / 2);
#endif
}

TEST(SimulatedHopper, AWaitForTheOtherParityIsAtOnceOver) {
  EXPECT_EQ(RunBlock([] {
              InitBarrier(0, 1);
              ptx::MbarrierWait(Barrier(0), 1);
              __syncthreads();
              if (Thread() == 0) ptx::MbarrierArrive(Barrier(0));
              ptx::MbarrierWait(Barrier(0), 0);
            }),
            "");
}

TEST(SimulatedHopper, SaysWhatAnMbarrierLacks) {
  EXPECT_THAT(
      RunBlock([] {
        InitBarrier(0, 3);
        if (Thread() == 0) ptx::MbarrierArriveExpecting(Barrier(0), 48);
        if (Thread() == 1) ptx::MbarrierWait(Barrier(0), 0);
      }),
      AllOf(HasSubstr("deadlock in kernel Hopper"), HasSubstr("1 threads, the first is 1: mbarrier.try_wait at"),
            HasSubstr("simulator_hopper_test.cc:"), HasSubstr("for phase 0"), HasSubstr("is in phase 0"),
            HasSubstr("2 of 3 arrivals and 48 bytes missing")));
}

TEST(SimulatedHopper, NamesMistakesWithMbarriers) {
  const std::pair<const char*, std::function<void()>> cases[] = {
      {"an mbarrier that was not initialized", [] { ptx::MbarrierArrive(Barrier(0)); }},
      {"more arrivals at an mbarrier than it counts",
       [] {
         InitBarrier(0, 200);
         ptx::MbarrierArrive(Barrier(0));
         if (Thread() < 100) ptx::MbarrierArrive(Barrier(0));
         InitBarrier(1, 1);
         if (Thread() < 1) ptx::MbarrierArriveExpecting(Barrier(1), 16);
         if (Thread() < 1) ptx::MbarrierArrive(Barrier(1));
       }},
      {"mbarrier.init of an mbarrier in use",
       [] {
         InitBarrier(0, 1);
         InitBarrier(0, 1);
       }},
      {"no count of arrivals", [] { InitBarrier(0, 0); }},
      {"a parity is 0 or 1",
       [] {
         InitBarrier(0, 1);
         ptx::MbarrierWait(Barrier(0), 2);
       }},
      {"was written over",
       [] {
         InitBarrier(0, 1);
         if (Thread() != 0) return;
         ptx::StShared(Barrier(0), uint64_t{0});
         ptx::MbarrierArrive(Barrier(0));
       }},
  };
  for (const auto& [what, body] : cases) {
    EXPECT_THAT(RunBlock(body), AllOf(HasSubstr(what), HasSubstr("at simulator_hopper_test.cc:")));
  }
}

// ---- TMA

BF16 Numbered(size_t i) {
  return BF16{static_cast<uint16_t>(i)};
}

// PTX ISA, "128B swizzle": chunk c of 16 bytes of row r lies where chunk c ^ (r % 8) would.
TEST(SimulatedHopper, BoxesAreSwizzledAndZeroBeyondTheMatrix) {
  constexpr int kRows = 20, kColumns = 72, kStride = 80, kBoxRows = 16;
  DeviceArray<BF16> matrix(kRows * kStride, Numbered);
  DeviceArray<BF16> out(kBoxRows * 64);
  const ptx::TensorMap map = ptx::MakeTensorMap(matrix.data(), kRows, kColumns, kStride, kBoxRows);
  for (const auto& [column, row] : {std::pair{0, 0}, {0, 2}, {8, 10}, {16, -3}, {-8, 17}, {200, 0}}) {
    EXPECT_EQ(RunBlock([&, column = column, row = row] {
                InitBarrier(0, 1);
                if (Thread() == 0) {
                  ptx::MbarrierArriveExpecting(Barrier(0), kBoxRows * 128);
                  ptx::CopyBox(Shared(1024), map, column, row, Barrier(0));
                }
                ptx::MbarrierWait(Barrier(0), 0);
                for (int i = Thread(); i < kBoxRows * 64; i += 128) {
                  const int r = i / 64, chunk = i % 64 / 8;
                  const auto* rows = reinterpret_cast<const uint16_t*>(Shared(1024));
                  const uint16_t x = ptx::LdShared(rows + r * 64 + (chunk ^ r % 8) * 8 + i % 8);
                  ptx::StGlobal(&out[static_cast<size_t>(i)].bits, x);
                }
              }),
              "");
    for (int r = 0; r < kBoxRows; ++r) {
      for (int c = 0; c < 64; ++c) {
        const bool inside = row + r >= 0 && row + r < kRows && column + c >= 0 && column + c < kColumns;
        EXPECT_EQ(out[static_cast<size_t>(r * 64 + c)].bits, inside ? (row + r) * kStride + column + c : 0)
            << r << ", " << c << " of the box at " << row << ", " << column;
      }
    }
  }
}

TEST(SimulatedHopper, ABoxIsNotThereBeforeItIsWaitedFor) {
  DeviceArray<BF16> matrix(8 * 64, [](size_t) { return ToBF16(1); });
  DeviceArray<BF16> out(1);
  const ptx::TensorMap map = ptx::MakeTensorMap(matrix.data(), 8, 64, 64, 8);
  int early = 0;
  for (int seed = 1; seed <= kSeeds; ++seed) {
    sim::SetSeed(static_cast<uint64_t>(seed));
    EXPECT_EQ(RunBlock([&] {
                InitBarrier(0, 1);
                if (Thread() != 0) return;
                ptx::MbarrierArriveExpecting(Barrier(0), 1024);
                ptx::CopyBox(Shared(0), map, 0, 0, Barrier(0));
                ptx::StGlobal(&out[0].bits, ptx::LdShared(reinterpret_cast<uint16_t*>(Shared(0))));
                ptx::MbarrierWait(Barrier(0), 0);
              }),
              "");
    early += std::isnan(ToFloat(out[0]));
  }
  // Now and then a copy is as fast as that.
  EXPECT_GT(early, kSeeds / 2);
}

TEST(SimulatedHopper, NamesMistakesWithTma) {
  DeviceArray<BF16> matrix(8 * 64, Numbered);
  const ptx::TensorMap map = ptx::MakeTensorMap(matrix.data(), 8, 64, 64, 8);
  const ptx::TensorMap beyond = ptx::MakeTensorMap(matrix.data(), 9, 64, 64, 8);
  const auto copy = [](unsigned char* to, const ptx::TensorMap& from, uint32_t bytes) {
    if (Thread() != 0) return;
    ptx::MbarrierArriveExpecting(Barrier(0), bytes);
    ptx::CopyBox(to, from, 0, 0, Barrier(0));
  };
  const std::pair<const char*, std::function<void()>> cases[] = {
      {"not aligned to 1024 bytes",
       [&] {
         InitBarrier(0, 1);
         copy(Shared(128), map, 1024);
       }},
      {"the destination of a box is outside",
       [&] {
         InitBarrier(0, 1);
         copy(Shared(kSharedBytes), map, 1024);
       }},
      {"the matrix of a tensor map is outside",
       [&] {
         InitBarrier(0, 1);
         copy(Shared(0), beyond, 1024);
       }},
      {"that was initialized without a fence.proxy.async",
       [&] {
         if (Thread() == 0) ptx::MbarrierInit(Barrier(0), 1);
         __syncthreads();
         copy(Shared(0), map, 1024);
       }},
      {"TMA writes to shared memory that thread 5 wrote without a fence.proxy.async",
       [&] {
         InitBarrier(0, 1);
         if (Thread() == 5) ptx::StShared(reinterpret_cast<float*>(Shared(64)), 1.0f);
         __syncthreads();
         copy(Shared(0), map, 1024);
       }},
      {"0 of 1 arrivals and 16 bytes missing",
       [&] {
         InitBarrier(0, 1);
         copy(Shared(0), map, 1040);
         ptx::MbarrierWait(Barrier(0), 0);
       }},
  };
  sim::SetSeed(1);
  for (const auto& [what, body] : cases) EXPECT_THAT(RunBlock(body), HasSubstr(what));
  for (const uint32_t rows : {0, 257}) {
    const ptx::TensorMap odd = ptx::MakeTensorMap(matrix.data(), 8, 64, 64, rows);
    EXPECT_THAT(RunBlock([&] {
                  InitBarrier(0, 1);
                  copy(Shared(0), odd, rows * 128);
                }),
                HasSubstr("a box has 1 to 256 rows"));
  }

  int under_way = 0;
  for (int seed = 1; seed <= kSeeds; ++seed) {
    sim::SetSeed(static_cast<uint64_t>(seed));
    const std::string error = RunBlock([&] {
      InitBarrier(0, 1);
      copy(Shared(0), map, 1024);
    });
    under_way +=
        error.find("the block has ended, and the box that TMA was told to copy at simulator_hopper_test.cc:") !=
        std::string::npos;
  }
  EXPECT_GT(under_way, kSeeds / 4);
}

TEST(SimulatedHopper, CountsWhatBoxesRead) {
  DeviceArray<BF16> matrix(20 * 64, Numbered);
  const ptx::TensorMap map = ptx::MakeTensorMap(matrix.data(), 20, 64, 64, 16);
  sim::CountTraffic(true);
  EXPECT_EQ(RunBlock([&] {
              InitBarrier(0, 1);
              if (Thread() == 0) {
                ptx::MbarrierArriveExpecting(Barrier(0), 2 * 2048);
                ptx::CopyBox(Shared(0), map, 0, 0, Barrier(0));
                ptx::CopyBox(Shared(2048), map, 16, 10, Barrier(0));
              }
              ptx::MbarrierWait(Barrier(0), 0);
            }),
            "");
  const sim::Traffic traffic = sim::TrafficOf("Hopper");
  sim::CountTraffic(false);
  EXPECT_EQ(traffic.load_bytes, 16u * 128 + 10 * 96);
  EXPECT_EQ(traffic.sectors, 16u * 4 + 10 * 3);
  EXPECT_EQ(traffic.ideal_sectors, 16u * 4 + 10 * 3);
}

// A box of what no kernel writes may be copied before the wait for the kernels before; its rows are then held to that.
TEST(SimulatedHopper, BoxesThatNoKernelWritesMayBeCopiedBeforeTheWait) {
  constexpr int kRows = 20, kColumns = 72, kStride = 80;
  DeviceArray<BF16> matrix(kRows * kStride, Numbered);
  DeviceArray<uint16_t> out(3);
  const ptx::TensorMap map = ptx::MakeTensorMap(matrix.data(), kRows, kColumns, kStride, 16);
  const sim::Grid early = {
      .kernel = "Early", .grid = 1, .block = 32, .shared_bytes = kSharedBytes, .overlapping = true};
  // Rows 8 to 19 of columns 32 to 71, and boxes beyond the matrix.
  const auto copies = [&](bool once, bool waits) {
    return [&, once, waits] {
      InitBarrier(0, 1);
      if (waits) ptx::WaitForKernelsBefore();
      if (Thread() == 0) {
        ptx::MbarrierArriveExpecting(Barrier(0), 3 * 2048);
        (once ? ptx::CopyBoxOnce : ptx::CopyBox)(Shared(0), map, 32, 8, Barrier(0), sim::Site::Current());
        (once ? ptx::CopyBoxOnce : ptx::CopyBox)(Shared(2048), map, 125, 0, Barrier(0), sim::Site::Current());
        (once ? ptx::CopyBoxOnce : ptx::CopyBox)(Shared(4096), map, 0, 20, Barrier(0), sim::Site::Current());
      }
      ptx::WaitForKernelsBefore();
      ptx::MbarrierWait(Barrier(0), 0);
      if (Thread() != 0) return;
      for (int box = 0; box < 3; ++box) {
        ptx::StGlobal(&out[static_cast<size_t>(box)], ptx::LdShared(reinterpret_cast<uint16_t*>(Shared(2048 * box))));
      }
    };
  };
  const auto stores = [&](int row, int column) {
    return sim::RunGrid({"Store", 1, 32}, [&] {
      if (Thread() == 0) ptx::StGlobal(&matrix[static_cast<size_t>(row * kStride + column)].bits, uint16_t{7});
    });
  };
  EXPECT_THAT(sim::RunGrid(early, copies(false, false)),
              AllOf(HasSubstr("touched before the wait"), HasSubstr("simulator_hopper_test.cc:")));
  sim::CountTraffic(true);
  EXPECT_EQ(sim::RunGrid(early, copies(true, true)), "");
  EXPECT_EQ(sim::TrafficOf("Early").early_bytes, 0u);
  EXPECT_EQ(stores(8, 32), "") << "was copied after the wait";
  EXPECT_EQ(sim::RunGrid(early, copies(true, false)), "");
  EXPECT_EQ(sim::TrafficOf("Early").early_bytes, 12u * 80);
  sim::CountTraffic(false);
  EXPECT_EQ(out[0], 7u);
  EXPECT_EQ(out[1], 0u);
  EXPECT_EQ(out[2], 0u);
  for (const auto& [row, column] : {std::pair{8, 32}, {8, 71}, {13, 50}, {19, 32}, {19, 71}}) {
    EXPECT_THAT(stores(row, column), AllOf(HasSubstr("kernel Store"), HasSubstr("what a kernel loads before its wait")))
        << row << ", " << column;
  }
  for (const auto& [row, column] : {std::pair{7, 71}, {8, 31}, {8, 72}, {13, 31}, {0, 0}, {19, 72}}) {
    EXPECT_EQ(stores(row, column), "") << row << ", " << column;
  }
  EXPECT_EQ(sim::RunGrid({"Store", 1, 32},
                         [&] {
                           auto* words = reinterpret_cast<uint4*>(matrix.data());
                           if (Thread() < 7 * kStride / 8) ptx::StGlobal(words + Thread(), uint4{});
                         }),
            "");
  // The permission is for one box.
  EXPECT_THAT(sim::RunGrid(early,
                           [&] {
                             InitBarrier(0, 1);
                             if (Thread() == 0) {
                               ptx::CopyBoxOnce(Shared(0), map, 0, 0, Barrier(0));
                               ptx::CopyBox(Shared(2048), map, 0, 0, Barrier(0));
                             }
                             ptx::WaitForKernelsBefore();
                           }),
              HasSubstr("touched before the wait"));
}

// ---- wgmma

// The PTX ISA's tables of the fields, and its examples of layouts for bf16: the offset of (mn, k) in elements.
TEST(SimulatedHopper, DescriptorsFollowThePtxIsa) {
  const sim::MatrixDescriptor fields(0x12345ull >> 4 | 0x40ull << 16 | 0x80ull << 32 | 5ull << 49 | 2ull << 62);
  EXPECT_EQ(fields.start, 0x12340u);
  EXPECT_EQ(fields.leading, 0x400u);
  EXPECT_EQ(fields.stride, 0x800u);
  EXPECT_EQ(fields.base_offset, 5u);
  EXPECT_EQ(fields.swizzle, sim::Swizzle::k64Bytes);

  // ((8,chunks,2),(8,2)) : ((1,8,a),(b,c)), with LBO and SBO as the ISA encodes them.
  struct Example {
    int swizzle, leading, stride, chunks, a, b, c;
  };
  for (const Example& e :
       {Example{0, 16, 8, 1, 64, 8, 128}, {3, 16, 32, 2, 128, 16, 256}, {2, 32, 64, 4, 256, 32, 512}}) {
    const sim::MatrixDescriptor descriptor(static_cast<uint64_t>(e.leading) << 16 |
                                           static_cast<uint64_t>(e.stride) << 32 |
                                           static_cast<uint64_t>(e.swizzle) << 62);
    for (int mn = 0; mn < 16 * e.chunks; ++mn) {
      for (int k = 0; k < 16; ++k) {
        const int elements = mn % 8 + mn / 8 % e.chunks * 8 + mn / 8 / e.chunks * e.a + k % 8 * e.b + k / 8 * e.c;
        ASSERT_EQ(descriptor.Offset(static_cast<uint32_t>(mn), static_cast<uint32_t>(k), true), 2u * elements)
            << e.swizzle << ": " << mn << ", " << k;
      }
    }
  }
  // Its rule for 128 bytes, K-major: ((8,m),(8,2k)) : ((64,SBO),(1,8)).
  const sim::MatrixDescriptor k_major(64ull << 32 | 1ull << 62);
  EXPECT_EQ(k_major.Offset(13, 11, false), 1024u + 5 * 128 + 16 + 6);
  EXPECT_EQ(sim::Swizzled(0x2000 + 5 * 128 + 0x30, sim::Swizzle::k128Bytes), 0x2000u + 5 * 128 + 0x60);
  EXPECT_EQ(sim::Swizzled(0x2000 + 5 * 128 + 0x30, sim::Swizzle::k64Bytes), 0x2000u + 5 * 128 + 0x20);
  EXPECT_EQ(sim::Swizzled(0x2000 + 5 * 128 + 0x30, sim::Swizzle::k32Bytes), 0x2000u + 5 * 128 + 0x20);
}

TEST(SimulatedHopper, MatrixDescriptorsAreEncodedAsTheyAreDecoded) {
  EXPECT_EQ(RunBlock([] {
              const sim::MatrixDescriptor d(ptx::MatrixDescriptor(Shared(2048 + 32), 8192, 1024));
              EXPECT_EQ(d.start, 1024u + 2048 + 32) << "the window begins with 1 KiB of the system's";
              EXPECT_EQ(d.leading, 8192u);
              EXPECT_EQ(d.stride, 1024u);
              EXPECT_EQ(d.base_offset, 0u);
              EXPECT_EQ(d.swizzle, sim::Swizzle::k128Bytes);
            }),
            "");
}

// A of 64 x 32 in registers by the ISA's fragment, times B of 32 x N, K-major (its rows are columns of B) or MN-major.
template <int kColumns, bool kMnMajor>
void Multiply(DeviceArray<BF16>& a, const ptx::TensorMap& b, DeviceArray<float>& d) {
  constexpr int kRegisters = kColumns / 2, kBoxes = kMnMajor ? kColumns / 64 : 1;
  constexpr int kBoxRows = kMnMajor ? 32 : kColumns;
  InitBarrier(0, 1);
  if (Thread() == 0) {
    ptx::MbarrierArriveExpecting(Barrier(0), kBoxes * kBoxRows * 128);
    for (int box = 0; box < kBoxes; ++box) {
      ptx::CopyBox(Shared(box * kBoxRows * 128), b, 64 * box, 0, Barrier(0));
    }
  }
  ptx::MbarrierWait(Barrier(0), 0);
  const int row = Thread() / 32 * 16 + Thread() % 32 / 4, column = Thread() % 4 * 2;
  float sums[kRegisters];
  for (float& sum : sums) sum = 1000;
  uint32_t registers[2][4];
  for (int step = 0; step < 2; ++step) {
    for (int i = 0; i < 4; ++i) {
      const auto* pair = a.data() + (row + i % 2 * 8) * 32 + step * 16 + i / 2 * 8 + column;
      registers[step][i] = ptx::LdGlobal(reinterpret_cast<const uint32_t*>(pair));
    }
  }
  ptx::WgmmaFence(sums, registers);
  for (int step = 0; step < 2; ++step) {
    const int at = kMnMajor ? step * 2048 : step * 32;
    ptx::Wgmma<kMnMajor>(sums, registers[step], ptx::MatrixDescriptor(Shared(at), kBoxRows * 128, 1024), step > 0);
  }
  EXPECT_TRUE(std::isnan(sums[0])) << "before the wait";
  ptx::WgmmaCommit();
  ptx::WgmmaWait<0>(sums);
  for (int i = 0; i < kRegisters; ++i) {
    const int at = (row + i / 2 % 2 * 8) * kColumns + i / 4 * 8 + column + i % 2;
    ptx::StGlobal(d.data() + at, sums[i]);
  }
}

template <int kColumns, bool kMnMajor>
void ExpectProduct() {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  const auto any = [&](size_t) { return ToBF16(normal(random)); };
  DeviceArray<BF16> a(64 * 32, any), b(32 * kColumns, any);
  // K-major rows are padded to the box's 64 columns.
  DeviceArray<BF16> rows(kMnMajor ? 32 * kColumns : kColumns * 64, [](size_t) { return ToBF16(0); });
  for (size_t k = 0; k < 32; ++k) {
    for (size_t n = 0; n < kColumns; ++n) rows[kMnMajor ? k * kColumns + n : n * 64 + k] = b[k * kColumns + n];
  }
  const ptx::TensorMap map = kMnMajor ? ptx::MakeTensorMap(rows.data(), 32, kColumns, kColumns, 32)
                                      : ptx::MakeTensorMap(rows.data(), kColumns, 64, 64, kColumns);
  DeviceArray<float> d(64 * kColumns);
  for (int seed = 1; seed <= 3; ++seed) {
    sim::SetSeed(static_cast<uint64_t>(seed));
    ASSERT_EQ(RunBlock([&] { Multiply<kColumns, kMnMajor>(a, map, d); }), "");
    for (size_t m = 0; m < 64; ++m) {
      for (size_t n = 0; n < kColumns; ++n) {
        double exact = 0;
        for (size_t k = 0; k < 32; ++k) exact += double{ToFloat(a[m * 32 + k])} * ToFloat(b[k * kColumns + n]);
        ASSERT_NEAR(d[m * kColumns + n], exact, 1e-5) << m << ", " << n;
      }
    }
  }
}

TEST(SimulatedHopper, ProductsOfAWarpgroup) {
  ExpectProduct<64, false>();
  ExpectProduct<64, true>();
  ExpectProduct<128, false>();
  ExpectProduct<128, true>();
}

// A of 128 x 64, two tiles of 64 rows, times B of 64 x N, both K-major in shared memory.
template <int kColumns>
void MultiplyTiles(const ptx::TensorMap& a, const ptx::TensorMap& b, DeviceArray<float>& d) {
  constexpr int kABytes = 128 * 128;
  InitBarrier(0, 1);
  if (Thread() == 0) {
    ptx::MbarrierArriveExpecting(Barrier(0), kABytes + kColumns * 128);
    ptx::CopyBox(Shared(0), a, 0, 0, Barrier(0));
    ptx::CopyBox(Shared(kABytes), b, 0, 0, Barrier(0));
  }
  ptx::MbarrierWait(Barrier(0), 0);
  float sums[2][kColumns / 2];
  for (auto& tile : sums) {
    for (float& sum : tile) sum = 1000;
  }
  ptx::WgmmaFence(sums);
  for (int step = 0; step < 4; ++step) {
    for (int tile = 0; tile < 2; ++tile) {
      const uint64_t first = ptx::MatrixDescriptor(Shared(tile * kABytes / 2 + step * 32), 0, 1024);
      const uint64_t second = ptx::MatrixDescriptor(Shared(kABytes + step * 32), 0, 1024);
      ptx::Wgmma(sums[tile], first, second, step > 0);
    }
  }
  EXPECT_TRUE(std::isnan(sums[0][0]) && std::isnan(sums[1][kColumns / 2 - 1])) << "before the wait";
  ptx::WgmmaCommit();
  ptx::WgmmaWait<0>(sums);
  const int row = Thread() / 32 * 16 + Thread() % 32 / 4, column = Thread() % 4 * 2;
  for (int i = 0; i < kColumns; ++i) {
    const int tile = i / (kColumns / 2), at = i % (kColumns / 2);
    const int m = 64 * tile + row + at / 2 % 2 * 8, n = at / 4 * 8 + column + at % 2;
    ptx::StGlobal(d.data() + m * kColumns + n, sums[tile][at]);
  }
}

template <int kColumns>
void ExpectProductOfTiles() {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  const auto any = [&](size_t) { return ToBF16(normal(random)); };
  DeviceArray<BF16> a(128 * 64, any), b(kColumns * 64, any);
  const ptx::TensorMap a_map = ptx::MakeTensorMap(a.data(), 128, 64, 64, 128);
  const ptx::TensorMap b_map = ptx::MakeTensorMap(b.data(), kColumns, 64, 64, kColumns);
  DeviceArray<float> d(128 * kColumns);
  for (int seed = 1; seed <= 3; ++seed) {
    sim::SetSeed(static_cast<uint64_t>(seed));
    ASSERT_EQ(RunBlock([&] { MultiplyTiles<kColumns>(a_map, b_map, d); }), "");
    for (size_t m = 0; m < 128; ++m) {
      for (size_t n = 0; n < kColumns; ++n) {
        double exact = 0;
        for (size_t k = 0; k < 64; ++k) exact += double{ToFloat(a[m * 64 + k])} * ToFloat(b[n * 64 + k]);
        ASSERT_NEAR(d[m * kColumns + n], exact, 2e-5) << m << ", " << n;
      }
    }
  }
}

TEST(SimulatedHopper, ProductsOfTwoMatricesInSharedMemory) {
  ExpectProductOfTiles<16>();
  ExpectProductOfTiles<32>();
  ExpectProductOfTiles<64>();
}

// 16 KiB of zeros for a product to read, behind the fence that it needs.
void ClearShared(bool fence = true) {
  for (int i = Thread(); i < 1024; i += 128) ptx::StShared(reinterpret_cast<uint4*>(Shared(0)) + i, uint4{0, 0, 0, 0});
  if (fence) ptx::FenceProxyAsync();
  __syncthreads();
}
void Issue(float (&d)[32], const uint32_t (&a)[4]) {
  ptx::Wgmma<false>(d, a, ptx::MatrixDescriptor(Shared(0), 16, 1024), false);
}

TEST(SimulatedHopper, NamesMistakesWithWgmma) {
  const std::pair<const char*, std::function<void()>> cases[] = {
      {"",  // none
       [] {
         ClearShared();
         float d[32] = {};
         uint32_t a[1][4] = {};
         ptx::WgmmaFence(d, a);
         Issue(d, a[0]);
         ptx::WgmmaCommit();
         ptx::WgmmaWait<0>(d, a);
         ptx::WgmmaFence(d, a);
         Issue(d, a[0]);
         ptx::WgmmaCommit();
         ptx::WgmmaWait<0>(d, a);
         EXPECT_EQ(d[31], 0);
       }},
      {"wgmma without a wgmma.fence since the last wait",
       [] {
         ClearShared();
         float d[32] = {};
         uint32_t a[1][4] = {};
         Issue(d, a[0]);
       }},
      {"wgmma without a wgmma.fence since the last wait",
       [] {
         ClearShared();
         float d[32] = {};
         uint32_t a[1][4] = {};
         ptx::WgmmaFence(d, a);
         Issue(d, a[0]);
         ptx::WgmmaCommit();
         ptx::WgmmaWait<0>(d);
         Issue(d, a[0]);
       }},
      {"was not waited for",
       [] {
         ClearShared();
         float d[32] = {};
         uint32_t a[1][4] = {};
         ptx::WgmmaFence(d, a);
         Issue(d, a[0]);
         ptx::WgmmaCommit();
         ptx::WgmmaWait<1>(d);
         EXPECT_TRUE(std::isnan(d[0]));
       }},
      {"its matrix in shared memory changed before it was waited for",
       [] {
         ClearShared();
         float d[32] = {};
         uint32_t a[1][4] = {};
         ptx::WgmmaFence(d, a);
         Issue(d, a[0]);
         ptx::WgmmaCommit();
         __syncthreads();
         if (Thread() == 0) ptx::StShared(reinterpret_cast<float*>(Shared(128)), 1.0f);
         if (Thread() == 0) ptx::FenceProxyAsync();
         __syncthreads();
         ptx::WgmmaWait<0>(d);
       }},
      {"its matrix in registers changed before it was waited for",
       [] {
         ClearShared();
         float d[32] = {};
         uint32_t a[1][4] = {};
         ptx::WgmmaFence(d, a);
         Issue(d, a[0]);
         ptx::WgmmaCommit();
         a[0][3] = static_cast<uint32_t>(Thread());
         ptx::WgmmaWait<0>(d);
       }},
      {"wgmma reads shared memory that thread",
       [] {
         ClearShared(false);
         float d[32] = {};
         uint32_t a[1][4] = {};
         ptx::WgmmaFence(d, a);
         Issue(d, a[0]);
       }},
      {"warps 0 and 2 of a warpgroup issued different wgmmas",
       [] {
         ClearShared();
         float d[32] = {};
         uint32_t a[1][4] = {};
         ptx::WgmmaFence(d, a);
         if (Thread() / 32 != 2) Issue(d, a[0]);
         ptx::WgmmaCommit();
         ptx::WgmmaWait<0>(d);
       }},
      {"the lanes' descriptors or predicates differ",
       [] {
         ClearShared();
         float d[32] = {};
         uint32_t a[1][4] = {};
         ptx::WgmmaFence(d, a);
         ptx::Wgmma<false>(d, a[0], ptx::MatrixDescriptor(Shared(Thread() % 2 * 32), 16, 1024), false);
       }},
      {"does not start in the first row of an atom",
       [] {
         ClearShared();
         float d[32] = {};
         uint32_t a[1][4] = {};
         ptx::WgmmaFence(d, a);
         ptx::Wgmma<false>(d, a[0], ptx::MatrixDescriptor(Shared(128), 16, 1024), false);
       }},
      {"the matrix of a wgmma is outside",
       [] {
         float d[32] = {};
         uint32_t a[1][4] = {};
         ptx::WgmmaFence(d, a);
         ptx::Wgmma<false>(d, a[0], ptx::MatrixDescriptor(Shared(kSharedBytes - 1024), 16, 1024), false);
       }},
  };
  sim::SetSeed(1);
  for (const auto& [what, body] : cases) {
    if (*what == 0) {
      EXPECT_EQ(RunBlock(body), "");
    } else {
      EXPECT_THAT(RunBlock(body), HasSubstr(what));
    }
  }
  EXPECT_THAT(RunBlock(
                  [] {
                    float d[32] = {};
                    uint32_t a[1][4] = {};
                    ptx::WgmmaFence(d, a);
                    Issue(d, a[0]);
                  },
                  96),
              HasSubstr("wgmma in a warpgroup of less than 128 threads"));
}

// The first matrix lies at 0, the second behind it.
void IssueShared(float (&d)[8], int at = 0) {
  ptx::Wgmma(d, ptx::MatrixDescriptor(Shared(at), 0, 1024), ptx::MatrixDescriptor(Shared(8192), 0, 1024), false);
}
// As if the products of ClearShared's zeros had not been waited for when thread 0 writes to `at`.
void ChangeBeforeTheWait(int at) {
  ClearShared();
  float d[8] = {};
  ptx::WgmmaFence(d);
  IssueShared(d);
  ptx::WgmmaCommit();
  __syncthreads();
  if (Thread() == 0) ptx::StShared(reinterpret_cast<float*>(Shared(at)), 1.0f);
  if (Thread() == 0) ptx::FenceProxyAsync();
  __syncthreads();
  ptx::WgmmaWait<0>(d);
}

TEST(SimulatedHopper, NamesMistakesWithWgmmaOfTwoMatricesInSharedMemory) {
  sim::SetSeed(1);
  // Rows of 128 bytes: the first and the last rows of each warp, chunk 0 as swizzled.
  for (const int row : {0, 15, 16, 31, 32, 47, 48, 63}) {
    const std::string error = RunBlock([&] { ChangeBeforeTheWait(row * 128 + row % 8 * 16); });
    EXPECT_THAT(error, HasSubstr("its first matrix in shared memory changed before it was waited for")) << row;
    const std::string before = ", thread ";
    EXPECT_EQ(std::atoi(error.c_str() + error.find(before) + before.size()) / 32, row / 16) << error;
  }
  EXPECT_EQ(RunBlock([] { ChangeBeforeTheWait(64); }), "") << "of k from 32 on";
  EXPECT_EQ(RunBlock([] { ChangeBeforeTheWait(8192 + 16 * 128); }), "") << "of column 16";
  EXPECT_THAT(RunBlock([] { ChangeBeforeTheWait(8192 + 128 + 16); }),
              HasSubstr("its matrix in shared memory changed before it was waited for"));
  const std::pair<const char*, std::function<void()>> cases[] = {
      {"wgmma reads shared memory that thread 5",
       [] {
         ClearShared();
         if (Thread() == 5) ptx::StShared(reinterpret_cast<float*>(Shared(40 * 128)), 1.0f);
         __syncthreads();
         float d[8] = {};
         ptx::WgmmaFence(d);
         IssueShared(d);
       }},
      {"warps 0 and 2 of a warpgroup issued different wgmmas",
       [] {
         ClearShared();
         float d[8] = {};
         ptx::WgmmaFence(d);
         IssueShared(d, Thread() / 32 == 2 ? 32 : 0);
         ptx::WgmmaCommit();
         ptx::WgmmaWait<0>(d);
       }},
      {"the lanes' descriptors or predicates differ",
       [] {
         ClearShared();
         float d[8] = {};
         ptx::WgmmaFence(d);
         IssueShared(d, Thread() % 2 * 32);
       }},
      {"does not start in the first row of an atom",
       [] {
         ClearShared();
         float d[8] = {};
         ptx::WgmmaFence(d);
         IssueShared(d, 128);
       }},
      {"the matrix of a wgmma is outside",
       [] {
         ClearShared();
         float d[8] = {};
         ptx::WgmmaFence(d);
         IssueShared(d, kSharedBytes - 7 * 1024);
       }},
  };
  for (const auto& [what, body] : cases) EXPECT_THAT(RunBlock(body), HasSubstr(what));
}

// ---- registers

TEST(SimulatedHopper, RegistersAreTakenFromThoseThatWereGivenBack) {
  // 168 for each of 384 threads: 128 give back 128 each, for which 256 others may have 64 more each.
  for (int seed = 1; seed <= kSeeds; ++seed) {
    sim::SetSeed(static_cast<uint64_t>(seed));
    EXPECT_EQ(RunBlock([] { Thread() >= 256 ? ptx::GiveRegistersBack<40>() : ptx::TakeRegisters<232>(); }, 384), "");
  }
  EXPECT_THAT(RunBlock([] { Thread() >= 256 ? ptx::GiveRegistersBack<40>() : ptx::TakeRegisters<240>(); }, 384),
              AllOf(HasSubstr("deadlock in kernel Hopper"), HasSubstr("setmaxnreg.inc at simulator_hopper_test.cc:"),
                    HasSubstr("from 168 to 240 registers")));
}

TEST(SimulatedHopper, NamesMistakesWithRegisters) {
  EXPECT_THAT(RunBlock([] { ptx::GiveRegistersBack<176>(); }, 384),
              HasSubstr("to 176 registers, where a thread has 168"));
  EXPECT_THAT(RunBlock([] { ptx::TakeRegisters<160>(); }, 384), HasSubstr("to 160 registers, where a thread has 168"));
  EXPECT_THAT(RunBlock([] { ptx::GiveRegistersBack<40>(); }, 96),
              HasSubstr("setmaxnreg.dec in a warpgroup of less than 128 threads"));
  EXPECT_THAT(RunBlock([] {
                if (Thread() / 32 != 2) ptx::GiveRegistersBack<40>();
              }),
              HasSubstr("warps 0 and 2 of a warpgroup end with 40 and 256 registers"));
  sim::SetSeed(1);
  EXPECT_THAT(RunBlock([] {
                if (Thread() % 2 == 0) {
                  ptx::GiveRegistersBack<40>();
                } else {
                  ptx::GiveRegistersBack<48>();
                }
              }),
              HasSubstr("the lanes disagree"));
}

}  // namespace
}  // namespace altiplano
