#include "kernels/device.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <limits>
#include <string>
#include <thread>
#include <utility>

#include "kernels/cpu/cpu_features.h"
#include "kernels/cpu/thread_team.h"

namespace altiplano {
namespace {

using testing::HasSubstr;

TEST(Stream, OfTheCpuOwnsATeam) {
  for (int threads : {1, 2, 5}) {
    const auto stream = Stream::Cpu(threads);
    EXPECT_EQ(stream->device(), Device::kCpu);
    EXPECT_EQ(stream->team().size(), threads);
    EXPECT_EQ(stream->Synchronize(), "");
    EXPECT_THAT(Describe(*stream), HasSubstr(CpuModelName()));
    EXPECT_THAT(Describe(*stream), HasSubstr(threads == 1 ? ", 1 thread, " : std::to_string(threads) + " threads, "));
  }
  EXPECT_EQ(Stream::Cpu()->team().size(), UsableCores());
}

TEST(Stream, OfAGpuThatIsNotThereIsNullWithTheReason) {
  std::string error;
  EXPECT_EQ(Stream::Cuda(1 << 20, &error), nullptr);
  EXPECT_NE(error, "");
}

TEST(Stream, OfACpuHasNoErrorsAndPassesEventsAtOnce) {
  std::string error;
  const auto stream = Stream::Open(Device::kCpu, 0, 1, &error);
  ASSERT_NE(stream, nullptr);
  const auto event = StreamEvent::Create(*stream);
  ASSERT_NE(event, nullptr);
  event->Record(*stream);
  EXPECT_TRUE(event->Passed());
  EXPECT_EQ(event->Wait(), "");
  EXPECT_EQ(stream->Error(), "");
}

TEST(StreamEvent, TellsTheTimeSinceAnotherOne) {
  const auto stream = Stream::Cpu(1);
  const auto first = StreamEvent::Create(*stream, /*timed=*/true), second = StreamEvent::Create(*stream, true);
  first->Record(*stream);
  const auto begin = std::chrono::steady_clock::now();
  std::this_thread::sleep_for(std::chrono::milliseconds(2));
  const auto least = std::chrono::steady_clock::now() - begin;
  second->Record(*stream);
  EXPECT_GE(second->Since(*first), least);
  EXPECT_EQ(first->Since(*second), -second->Since(*first));
}

TEST(Buffer, OfAStreamIsHostMemoryOnTheCpu) {
  const auto stream = Stream::Cpu(1);
  const uint64_t before = Buffer::DeviceAllocations();
  for (const Buffer& buffer : {Buffer::Allocate(*stream, 100), Buffer::AllocateHost(*stream, 100)}) {
    ASSERT_TRUE(buffer);
    EXPECT_EQ(buffer.device(), Device::kCpu);
    auto* bytes = static_cast<char*>(buffer.data());
    EXPECT_EQ(bytes[99], 0);
    bytes[50] = bytes[51] = 7;
    Zero(*stream, bytes, 51);
    EXPECT_EQ(bytes[50], 0);
    EXPECT_EQ(bytes[51], 7);
  }
  EXPECT_EQ(Buffer::DeviceAllocations(), before);
}

// The process's affinity, restored at the end.
class Affinity {
 public:
  Affinity() { EXPECT_EQ(sched_getaffinity(0, sizeof(before_), &before_), 0); }
  ~Affinity() { sched_setaffinity(0, sizeof(before_), &before_); }
  int cores() const { return CPU_COUNT(&before_); }
  void KeepOne() {
    int core = 0;
    while (!CPU_ISSET(core, &before_)) ++core;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(core, &one);
    EXPECT_EQ(sched_setaffinity(0, sizeof(one), &one), 0);
  }

 private:
  cpu_set_t before_;
};

TEST(UsableCores, FollowsTheAffinity) {
  Affinity affinity;
  EXPECT_GE(UsableCores(), 1);
  EXPECT_LE(UsableCores(), affinity.cores());
  affinity.KeepOne();
  EXPECT_EQ(UsableCores(), 1);
}

constexpr size_t kHugePage = size_t{2} << 20;

TEST(Buffer, HoldsZerosUpToItsLastByte) {
  for (size_t bytes : {size_t{1}, size_t{4095}, size_t{4097}, kHugePage - 1, kHugePage, kHugePage + 1, 5 * kHugePage}) {
    const Buffer buffer = Buffer::Allocate(Device::kCpu, bytes);
    ASSERT_TRUE(buffer) << bytes;
    EXPECT_EQ(buffer.bytes(), bytes);
    EXPECT_EQ(buffer.device(), Device::kCpu);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(buffer.data()) % (bytes >= kHugePage ? kHugePage : 64), 0u) << bytes;
    auto* data = static_cast<char*>(buffer.data());
    EXPECT_EQ(std::count(data, data + bytes, 0), static_cast<int64_t>(bytes));
    std::memset(data, 1, bytes);
  }
}

TEST(Buffer, OfNoBytesIsNotAFailure) {
  const Buffer buffer = Buffer::Allocate(Device::kCpu, 0);
  EXPECT_TRUE(buffer);
  EXPECT_EQ(buffer.bytes(), 0u);
}

// Linux would promise nearly as much as the machine has, more than is free, and kill the process when it is used.
TEST(Buffer, IsEmptyWhenTheMemoryCannotBeHad) {
  constexpr size_t kMost = std::numeric_limits<size_t>::max();
  const size_t nearly_all = QueryMemory(Device::kCpu).total_bytes - (size_t{16} << 20);
  for (size_t bytes : {nearly_all, size_t{1} << 46, kMost / 2, kMost - 1, kMost}) {
    const Buffer buffer = Buffer::Allocate(Device::kCpu, bytes);
    EXPECT_FALSE(buffer) << bytes;
    EXPECT_EQ(buffer.bytes(), 0u);
    EXPECT_EQ(buffer.data(), nullptr);
  }
}

// Pages of this process's address space.
int64_t AddressSpace() {
  int64_t pages = 0;
  std::ifstream("/proc/self/statm") >> pages;
  return pages;
}

TEST(Buffer, GivesBackAllOfItsMemory) {
  for (size_t bytes : {size_t{1}, size_t{12289}, kHugePage, 3 * kHugePage + 1}) {
    const int64_t before = AddressSpace();
    for (int i = 0; i < 1000; ++i) ASSERT_TRUE(Buffer::Allocate(Device::kCpu, bytes));
    EXPECT_LT(AddressSpace(), before + 500) << bytes;
  }
}

TEST(Buffer, MovesWithItsMemory) {
  Buffer first = Buffer::Allocate(Device::kCpu, 100), second = Buffer::Allocate(Device::kCpu, 200), empty;
  void* const data = first.data();
  EXPECT_FALSE(empty);
  Buffer moved = std::move(first);
  EXPECT_EQ(moved.data(), data);
  EXPECT_EQ(moved.bytes(), 100u);
  second = std::move(moved);
  EXPECT_EQ(second.data(), data);
  EXPECT_EQ(second.bytes(), 100u);
  std::memset(second.data(), 1, 100);
  second = Buffer();
  EXPECT_FALSE(second);
}

TEST(Copy, MovesBytesOnTheHost) {
  const auto stream = Stream::Cpu(1);
  const std::string from = "0123456789";
  std::string to(12, '.');
  Copy(*stream, to.data() + 1, Device::kCpu, from.data(), Device::kCpu, from.size());
  EXPECT_EQ(to, ".0123456789.");
  Copy(*stream, nullptr, Device::kCpu, nullptr, Device::kCpu, 0);
}

TEST(CopyDeathTest, DiesOfDeviceMemoryOnACpuStream) {
  const auto stream = Stream::Cpu(1);
  char a = 0, b = 0;
  EXPECT_DEATH(Copy(*stream, &a, Device::kCuda, &b, Device::kCpu, 1), "Copy: device memory on a CPU stream");
  EXPECT_DEATH(Copy(*stream, &a, Device::kCpu, &b, Device::kCuda, 1), "Copy: device memory on a CPU stream");
}

TEST(QueryMemory, IsWhatTheHostHas) {
  const MemoryInfo info = QueryMemory(Device::kCpu);
  const auto physical = static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGESIZE));
  EXPECT_GT(info.free_bytes, 0u);
  EXPECT_LE(info.free_bytes, info.total_bytes);
  EXPECT_LE(info.total_bytes, physical);
}

}  // namespace
}  // namespace altiplano
