// Communicators of ranks with GPUs: the (simulated) GPU is shared by all of them. NCCL is a stand-in that adds in the
// order of ranks.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <condition_variable>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "kernels/comm/communicator.h"
#include "kernels/comm/nccl_api.h"
#include "tests/kernels/cuda/cuda_testlib.h"

namespace altiplano {

// A communicator of the stand-in.
struct NcclComm {
  int rank = 0, ranks = 0;
  std::atomic<NcclResult> state = kNcclSuccess;
};

namespace {

using std::chrono::milliseconds;
using testing::HasSubstr;
using Members = std::vector<std::unique_ptr<Communicator>>;

// On a machine that is busy a simulated kernel may take long; a rank that does not come is none of these tests' matter.
constexpr auto kPatient = std::chrono::minutes(10);

class CudaGroupTest : public CudaTest {
 protected:
  Members Make(std::vector<int> ordinals, milliseconds patience = kPatient, const NcclApi* nccl = nullptr) {
    std::string error;
    ordinals_ = ordinals;
    Members group = MakeCudaGroup({.ordinals = std::move(ordinals), .patience = patience, .nccl = nccl}, &error);
    EXPECT_EQ(error, "");
    return group;
  }
  // fn(rank, member, stream) on a thread for each rank.
  void OnEachRank(const Members& group, const std::function<void(size_t, Communicator&, Stream&)>& fn) {
    std::vector<std::thread> threads;
    for (size_t rank = 0; rank < group.size(); ++rank) {
      threads.emplace_back([&, rank] {
        std::string error;
        const auto stream = Stream::Cuda(ordinals_[rank], &error);
        ASSERT_NE(stream, nullptr) << error;
        fn(rank, *group[rank], *stream);
      });
    }
    for (std::thread& thread : threads) thread.join();
  }

 private:
  std::vector<int> ordinals_;  // of the group made last
};

// x of each rank on the host, all-reduced by ranks on the CPU.
std::vector<std::unique_ptr<Matrix>> SumsOnTheCpu(size_t ranks, int64_t rows, int64_t columns, DType dtype) {
  std::vector<std::unique_ptr<Matrix>> x;
  const Members group = MakeInProcessGroup(static_cast<int>(ranks), kPatient);
  std::vector<std::thread> threads;
  for (size_t rank = 0; rank < ranks; ++rank) {
    x.push_back(std::make_unique<Matrix>(rows, columns, dtype));
    x.back()->FillNormal(static_cast<uint32_t>(rank), 100);
  }
  for (size_t rank = 0; rank < ranks; ++rank) {
    threads.emplace_back([&, rank] {
      const auto stream = Stream::Cpu(1);
      EXPECT_TRUE(group[rank]->AllReduceSum(*stream, x[rank]->view()));
    });
  }
  for (std::thread& thread : threads) thread.join();
  return x;
}

TEST_F(CudaGroupTest, SumsToTheBitsOfRanksOnTheCpu) {
  for (int ranks : {1, 2, 3}) {
    for (DType dtype : {DType::kF32, DType::kBF16}) {
      for (int64_t columns : {7, 128}) {
        SCOPED_TRACE(testing::Message() << ranks << " ranks, " << columns << " columns, " << Name(dtype));
        const auto sums = SumsOnTheCpu(static_cast<size_t>(ranks), 3, columns, dtype);
        OnEachRank(Make(std::vector<int>(static_cast<size_t>(ranks))),
                   [&](size_t rank, Communicator& member, Stream& stream) {
                     EXPECT_EQ(member.rank(), static_cast<int>(rank));
                     EXPECT_EQ(member.size(), ranks);
                     Matrix x(3, columns, dtype);
                     x.FillNormal(static_cast<uint32_t>(rank), 100);
                     const OnDevice on_device(stream, x);
                     EXPECT_TRUE(member.AllReduceSum(stream, on_device.view()));
                     on_device.Fetch(x);
                     for (int64_t i = 0; i < 3; ++i) EXPECT_EQ(x.RowBytes(i), sums[rank]->RowBytes(i));
                     EXPECT_EQ(member.error(), "");
                   });
      }
    }
  }
}

TEST_F(CudaGroupTest, EveryCallWorksOnBothDevices) {
  OnEachRank(Make({0, 0}), [&](size_t rank, Communicator& member, Stream& stream) {
    const auto cpu = Stream::Cpu(1);
    Matrix x(2, 8, DType::kF32), residual(2, 8, DType::kF32), weight(1, 8, DType::kF32), out(2, 8, DType::kF32),
        all(2, 16, DType::kF32);
    x.FillNormal(static_cast<uint32_t>(rank));
    residual.FillNormal(10);
    weight.FillNormal(11);
    const OnDevice d_x(stream, x), d_residual(stream, residual), d_weight(stream, weight), d_out(stream, out),
        d_all(stream, all), d_sent(stream, x);
    // On the GPU.
    EXPECT_TRUE(member.AllGather(stream, rank == 0 ? d_all.view() : TensorView(), d_x.view()));
    EXPECT_TRUE(member.Broadcast(stream, d_sent.view()));
    EXPECT_TRUE(member.AllReduceAddRmsNorm(stream, {.out = d_out.view(),
                                                    .residual = d_residual.view(),
                                                    .x = d_x.view(),
                                                    .weight = d_weight.vector(),
                                                    .eps = 1e-5f}));
    Matrix gathered(2, 16, DType::kF32), sent(2, 8, DType::kF32), normed(2, 8, DType::kF32), summed(2, 8, DType::kF32);
    d_all.Fetch(gathered);
    d_sent.Fetch(sent);
    d_out.Fetch(normed);
    d_residual.Fetch(summed);
    // The same on the CPU.
    Matrix cpu_sent(2, 8, DType::kF32);
    cpu_sent.Fill(x);
    EXPECT_TRUE(member.AllGather(*cpu, rank == 0 ? all.view() : TensorView(), x.view()));
    EXPECT_TRUE(member.Broadcast(*cpu, cpu_sent.view()));
    EXPECT_TRUE(member.AllReduceAddRmsNorm(
        *cpu,
        {.out = out.view(), .residual = residual.view(), .x = x.view(), .weight = weight.vector(), .eps = 1e-5f}));
    for (int64_t i = 0; i < 2; ++i) {
      if (rank == 0) {
        EXPECT_EQ(gathered.RowBytes(i), all.RowBytes(i));
      }
      EXPECT_EQ(sent.RowBytes(i), cpu_sent.RowBytes(i));
      EXPECT_EQ(summed.RowBytes(i), residual.RowBytes(i));
      for (int64_t j = 0; j < 8; ++j) EXPECT_NEAR(normed.at(i, j), out.at(i, j), 1e-5);
    }
  });
}

// Nothing is sampled in a step: no rows on any rank.
TEST_F(CudaGroupTest, NoRowsAreNoWork) {
  OnEachRank(Make({0, 0}), [&](size_t, Communicator& member, Stream& stream) {
    const TensorView none = TensorView::Make(nullptr, DType::kF32, {0, 4}, Device::kCuda);
    EXPECT_TRUE(member.AllReduceSum(stream, none));
    EXPECT_TRUE(member.AllGather(stream, {}, none));
    EXPECT_TRUE(member.Broadcast(stream, none));
    EXPECT_EQ(stream.Synchronize(), "");
  });
}

bool Reduce(Communicator& member, Stream& stream) {
  Matrix x(1, 8, DType::kF32);
  x.FillNormal(1);
  const OnDevice on_device(stream, x);
  const bool issued = member.AllReduceSum(stream, on_device.view());
  EXPECT_EQ(stream.Synchronize(), "");
  return issued && member.error().empty();
}

TEST_F(CudaGroupTest, ARankThatDoesNotComeIsNamed) {
  const Members group = Make({0, 0, 0}, milliseconds(200));
  OnEachRank(group, [&](size_t rank, Communicator& member, Stream& stream) {
    if (rank == 1) return;
    EXPECT_FALSE(Reduce(member, stream));
    EXPECT_EQ(member.error(), "no word for 200 ms from rank 1");
    EXPECT_FALSE(Reduce(member, stream));  // and nobody waits again
  });
  const auto cpu = Stream::Cpu(1);
  float one = 1;
  EXPECT_FALSE(group[1]->AllReduceSum(*cpu, TensorView::Make(&one, DType::kF32, {1})));
  EXPECT_EQ(group[1]->error(), "no word for 200 ms from rank 1");
}

TEST_F(CudaGroupTest, AnAbortEndsEveryWaitAndEveryLaterCall) {
  const Members group = Make({0, 0, 0});
  OnEachRank(group, [&](size_t rank, Communicator& member, Stream& stream) {
    if (rank == 2) {
      member.Abort("rank 2 has caught fire");
      member.Abort("and drowned");
    }
    EXPECT_FALSE(Reduce(member, stream));
    EXPECT_EQ(member.error(), "rank 2 has caught fire");
  });
}

TEST_F(CudaGroupTest, AMemberThatIsDestroyedEndsTheGroup) {
  Members group = Make({0, 0});
  OnEachRank(group, [&](size_t rank, Communicator& member, Stream& stream) {
    if (rank == 1) {
      group[1].reset();
    } else {
      EXPECT_FALSE(Reduce(member, stream));
      EXPECT_EQ(member.error(), "a rank has left");
    }
  });
}

TEST_F(CudaGroupTest, RefusesWhatCannotBe) {
  std::string error;
  EXPECT_TRUE(MakeCudaGroup({.ordinals = std::vector<int>(9)}, &error).empty());
  EXPECT_EQ(error, "9 ranks, at most 8 on GPUs");
#ifndef ALTIPLANO_ON_GPU
  EXPECT_TRUE(MakeCudaGroup({.ordinals = {0, 1}}, &error).empty());
  EXPECT_EQ(error, "no simulated GPU 1, only 0");
#endif
}

#ifndef ALTIPLANO_ON_GPU

// ---- NCCL

// Of the group that runs in a test.
struct StandIn {
  std::mutex mutex;
  std::condition_variable changed;
  std::vector<float*> messages;
  size_t arrived = 0, meetings = 0, count = 0;
  int comms = 0, calls = 0;
  NcclResult init_result = kNcclInProgress;  // as of a call that does not block
  bool hangs = false;
} nccl;

constexpr auto kBroken = static_cast<NcclResult>(2);  // ncclSystemError

const NcclApi kStandIn = {
    .get_version = [](int* version) { return *version = 22809, kNcclSuccess; },
    .get_unique_id = [](NcclUniqueId* id) { return std::memset(id, 1, sizeof(*id)), kNcclSuccess; },
    .init_rank =
        [](NcclComm** comm, int ranks, NcclUniqueId id, int rank, NcclConfig* config) {
          EXPECT_EQ(id.bytes[127], 1);
          EXPECT_EQ(config->blocking, 0);
          if (nccl.init_result == kBroken) return kBroken;
          *comm = new NcclComm{rank, ranks};
          ++nccl.comms;
          return nccl.init_result;
        },
    .group_start = [] { return kNcclSuccess; },
    .group_end = [] { return nccl.init_result; },
    .get_async_error = [](NcclComm* comm, NcclResult* result) { return *result = comm->state, kNcclSuccess; },
    .all_reduce =
        [](const void* from, void* to, size_t count, NcclType type, NcclOp op, NcclComm* comm, void*) {
          EXPECT_EQ(from, to);
          EXPECT_EQ(type, kNcclFloat32);
          EXPECT_EQ(op, kNcclSum);
          if (nccl.hangs) return comm->state = kNcclInProgress, kNcclInProgress;
          std::unique_lock lock(nccl.mutex);
          ++nccl.calls;
          nccl.messages.resize(static_cast<size_t>(comm->ranks));
          nccl.messages[static_cast<size_t>(comm->rank)] = static_cast<float*>(to);
          const size_t meeting = nccl.meetings;
          if (++nccl.arrived == nccl.messages.size()) {
            for (size_t i = 0; i < count; ++i) {
              float sum = 0;
              for (const float* message : nccl.messages) sum += message[i];
              for (float* message : nccl.messages) message[i] = sum;
            }
            nccl.arrived = 0;
            ++nccl.meetings;
            nccl.changed.notify_all();
          }
          nccl.changed.wait(lock, [&] { return nccl.meetings != meeting; });
          return kNcclSuccess;
        },
    .send = nullptr,
    .receive = nullptr,
    .abort =
        [](NcclComm* comm) {
          delete comm;
          --nccl.comms;
          return kNcclSuccess;
        },
    .error_string = [](NcclResult) { return "unhandled system error"; },
    .last_error = [](NcclComm*) { return "a cable was pulled"; },
};

class CudaGroupNcclTest : public CudaGroupTest {
 protected:
  void SetUp() override {
    CudaGroupTest::SetUp();
    sim::SetGpus(2);
    nccl.calls = 0;
    nccl.init_result = kNcclInProgress;
    nccl.hangs = false;
  }
  void TearDown() override {
    EXPECT_EQ(nccl.comms, 0) << "communicators were left";
    sim::SetGpus(1);
    CudaGroupTest::TearDown();
  }
  static TensorView ViewOf(const Buffer& buffer) {
    return TensorView::Make(buffer.data(), DType::kF32, {static_cast<int64_t>(buffer.bytes() / sizeof(float))},
                            Device::kCuda);
  }
};

// The table says which messages are large.
constexpr size_t kLarge = (size_t{8} << 20) + 4;

TEST_F(CudaGroupNcclTest, TakesLargeMessagesAndNoOthers) {
  OnEachRank(Make({0, 1}, kPatient, &kStandIn), [&](size_t rank, Communicator& member, Stream& stream) {
    const Buffer x = Buffer::Allocate(Device::kCuda, kLarge);
    auto* data = static_cast<float*>(x.data());
    for (size_t i = 0; i < kLarge / 4; ++i) data[i] = static_cast<float>(i % 100 + rank);
    EXPECT_TRUE(member.AllReduceSum(stream, ViewOf(x)));
    EXPECT_EQ(stream.Synchronize(), "");
    size_t wrong = 0;
    for (size_t i = 0; i < kLarge / 4; ++i) wrong += data[i] != static_cast<float>(2 * (i % 100) + 1);
    EXPECT_EQ(wrong, 0u);
    EXPECT_EQ(nccl.calls, 2);
    EXPECT_TRUE(Reduce(member, stream));
    EXPECT_EQ(nccl.calls, 2);
  });
}

TEST_F(CudaGroupNcclTest, WhatItFindsOutEndsTheGroup) {
  Members group = Make({0, 1}, kPatient, &kStandIn);
  nccl.hangs = true;
  std::thread first([&] {
    std::string error;
    const auto stream = Stream::Cuda(0, &error);
    const Buffer x = Buffer::Allocate(Device::kCuda, kLarge);
    EXPECT_FALSE(group[0]->AllReduceSum(*stream, ViewOf(x)));
  });
  group[1]->Abort("rank 1 has caught fire");  // ends the wait of rank 0
  first.join();
  EXPECT_EQ(group[0]->error(), "rank 1 has caught fire");
}

TEST_F(CudaGroupNcclTest, ACallWithoutEndIsNotWaitedFor) {
  Members group = Make({0, 1}, milliseconds(50), &kStandIn);
  nccl.hangs = true;
  std::string error;
  const auto stream = Stream::Cuda(0, &error);
  const Buffer x = Buffer::Allocate(Device::kCuda, kLarge);
  EXPECT_FALSE(group[0]->AllReduceSum(*stream, ViewOf(x)));
  EXPECT_EQ(group[1]->error(), "rank 0: NCCL: no end to a call for 50 ms");
}

TEST_F(CudaGroupNcclTest, RefusesAGroupThatItCannotForm) {
  nccl.init_result = kBroken;
  std::string error;
  EXPECT_TRUE(MakeCudaGroup({.ordinals = {0, 1}, .nccl = &kStandIn}, &error).empty());
  EXPECT_EQ(error, "NCCL: unhandled system error");
}

// Which it does not take: all goes by our own kernels.
TEST_F(CudaGroupNcclTest, IsNotAskedForRanksThatShareAGpu) {
  OnEachRank(Make({1, 1}, kPatient, &kStandIn), [&](size_t, Communicator& member, Stream& stream) {
    EXPECT_EQ(nccl.comms, 0);
    EXPECT_TRUE(Reduce(member, stream));
  });
}

#endif

}  // namespace
}  // namespace altiplano
