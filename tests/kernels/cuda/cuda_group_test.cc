// What communicators of ranks with GPUs have beyond communicator_test.cc: both devices, and NCCL, which is a stand-in.
// The (simulated) GPU is shared by all ranks, or there are two of it.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "kernels/comm/communicator.h"
#include "kernels/comm/nccl_api.h"
#include "tests/kernels/cuda/ranks_testlib.h"
#ifndef ALTIPLANO_ON_GPU
#include "tests/kernels/cuda/simulator_nccl_testlib.h"
#endif

namespace altiplano {
namespace {

using std::chrono::milliseconds;
using testing::HasSubstr;

class CudaGroupTest : public CudaTest {
 protected:
  Members Make(std::vector<int> ordinals, milliseconds patience = kPatient) {
    return Make({.ordinals = std::move(ordinals), .patience = patience});
  }
  Members Make(CudaGroupOptions options) {
    std::string error;
    ordinals_ = options.ordinals;
    Members group = MakeCudaGroup(options, &error);
    EXPECT_EQ(error, "");
    return group;
  }
  void OnEachRank(const Members& group, const std::function<void(size_t, Communicator&, Stream&)>& fn) {
    altiplano::OnEachRank(group, fn, ordinals_);
  }

 private:
  std::vector<int> ordinals_;  // of the group made last
};

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

class CudaGroupNcclTest : public CudaGroupTest {
 protected:
  void SetUp() override {
    CudaGroupTest::SetUp();
    sim::SetGpus(2);
    nccl_stand_in::SetBehaviour({});
  }
  void TearDown() override {
    EXPECT_EQ(nccl_stand_in::Count().communicators, 0) << "communicators were left";
    EXPECT_EQ(nccl_stand_in::Count().memories, 0) << "memory was left";
    sim::SetGpus(1);
    CudaGroupTest::TearDown();
  }
  // Groups in which NCCL takes all messages of more than `own` bytes.
  Members MakeWithNccl(milliseconds patience = kPatient, size_t own = 0, const NcclApi& nccl = nccl_stand_in::Api()) {
    return Make({.ordinals = {0, 1}, .patience = patience, .nccl = &nccl, .capture_nccl = true, .most_own_bytes = own});
  }
};

// What a rank sums: memory as the group would have it, and what is in it.
class Summed {
 public:
  Summed(Communicator& member, Stream& stream, int64_t elements) {
    const size_t bytes = static_cast<size_t>(elements) * sizeof(float);
    void* memory = nullptr;
    EXPECT_TRUE(member.AllocateSummed(stream, bytes, &memory));
    lent_ = memory != nullptr;
    if (!lent_) own_ = Buffer::Allocate(stream, bytes);
    view_ = TensorView::Make(lent_ ? memory : own_.data(), DType::kF32, {elements}, Device::kCuda);
  }
  bool lent() const { return lent_; }
  TensorView view() const { return view_; }
  void Fill(float first) const {
    for (int64_t i = 0; i < view_.elements(); ++i) view_.as<float>()[i] = first + static_cast<float>(i % 100);
  }
  int64_t CountDifferences(float factor, float first) const {
    int64_t wrong = 0;
    for (int64_t i = 0; i < view_.elements(); ++i) {
      wrong += view_.as<float>()[i] != first + factor * static_cast<float>(i % 100);
    }
    return wrong;
  }

 private:
  bool lent_ = false;
  Buffer own_;
  TensorView view_;
};

// The table says which messages are large.
constexpr int64_t kLarge = ((int64_t{8} << 20) + 4) / 4;

TEST_F(CudaGroupNcclTest, TakesLargeMessagesInItsMemoryAndNoOthers) {
  const Members group = MakeWithNccl(kPatient, SIZE_MAX);
  const int before = nccl_stand_in::Count().calls;
  OnEachRank(group, [&](size_t rank, Communicator& member, Stream& stream) {
    const Summed x(member, stream, kLarge), small(member, stream, 8);
    EXPECT_TRUE(x.lent());
    EXPECT_FALSE(small.lent());
    x.Fill(static_cast<float>(rank));
    EXPECT_TRUE(member.AllReduceSum(stream, x.view()));
    EXPECT_EQ(stream.Synchronize(), "");
    EXPECT_EQ(x.CountDifferences(2, 1), 0);
    EXPECT_TRUE(Reduce(member, stream));
  });
  EXPECT_EQ(nccl_stand_in::Count().calls - before, 2);
}

TEST_F(CudaGroupNcclTest, TakesAnyMemoryWhereTheLibraryHasNone) {
  OnEachRank(MakeWithNccl(kPatient, 0, nccl_stand_in::OldApi()),
             [&](size_t rank, Communicator& member, Stream& stream) {
               const Summed x(member, stream, 100);
               EXPECT_TRUE(x.lent()) << "of the group, whoever it has it from";
               x.Fill(static_cast<float>(rank));
               EXPECT_TRUE(member.AllReduceSum(stream, x.view()));
               EXPECT_EQ(stream.Synchronize(), "");
               EXPECT_EQ(x.CountDifferences(2, 1), 0);
             });
}

// Where some ranks' messages are registered and others' are not, NCCL hangs.
TEST_F(CudaGroupNcclTest, ARankWithoutItsMemoryEndsTheGroup) {
  const Members group = MakeWithNccl();
  nccl_stand_in::SetBehaviour({.rank_without_memory = 1});
  for (const int rank : {0, 1}) {
    std::string error;
    const auto stream = Stream::Cuda(rank, &error);
    void* memory = nullptr;
    EXPECT_EQ(group[static_cast<size_t>(rank)]->AllocateSummed(*stream, 64, &memory), rank == 0);
  }
  EXPECT_EQ(group[0]->error(), "rank 1: 64 bytes that NCCL sums: NCCL: unhandled system error: a cable was pulled");
}

TEST_F(CudaGroupNcclTest, CallsAreReplayedFromGraphsBesideOthers) {
  const Members group = MakeWithNccl();
  const int before = nccl_stand_in::Count().captured_calls;
  OnEachRank(group, [&](size_t rank, Communicator& member, Stream& stream) {
    EXPECT_EQ(member.most_captured_bytes(), SIZE_MAX);
    const Summed x(member, stream, 100), y(member, stream, 100);
    std::string error;
    const auto graph = StepGraph::Capture(
        stream,
        [&] {
          return member.AllReduceSum(stream, x.view()) && member.AllReduceSum(stream, y.view()) &&
                 member.AllReduceSum(stream, x.view());
        },
        &error);
    ASSERT_NE(graph, nullptr) << error;
    EXPECT_EQ(graph->ops(), 3u);
    for (int launch = 0; launch < 3; ++launch) {
      x.Fill(static_cast<float>(rank));
      y.Fill(static_cast<float>(2 * rank));
      graph->Launch(stream);
      EXPECT_TRUE(member.AllReduceSum(stream, y.view()));
      EXPECT_EQ(stream.Synchronize(), "");
      EXPECT_EQ(x.CountDifferences(4, 2), 0) << launch;
      EXPECT_EQ(y.CountDifferences(4, 4), 0) << launch;
    }
  });
  EXPECT_EQ(nccl_stand_in::Count().captured_calls - before, 2 * 3);
}

TEST_F(CudaGroupNcclTest, CallsAreCapturedOnRequestOnly) {
  const auto most = [&](bool nccl, bool capture) {
    return Make({.ordinals = {0, 1},
                 .patience = kPatient,
                 .nccl = nccl ? &nccl_stand_in::Api() : nullptr,
                 .capture_nccl = capture})[0]
        ->most_captured_bytes();
  };
  EXPECT_EQ(most(true, false), size_t{8} << 20);
  EXPECT_EQ(most(true, true), SIZE_MAX);
  EXPECT_EQ(most(false, false), SIZE_MAX);
  setenv("NCCL_GRAPH_MIXING_SUPPORT", "0", 1);
  std::string error;
  EXPECT_TRUE(MakeCudaGroup({.ordinals = {0, 1}, .nccl = &nccl_stand_in::Api(), .capture_nccl = true}, &error).empty());
  EXPECT_EQ(error, "NCCL_GRAPH_MIXING_SUPPORT=0 rules graphs with NCCL's calls out");
  unsetenv("NCCL_GRAPH_MIXING_SUPPORT");
}

// A rank that does not come to a graph's calls: the others' kernels end with the abort, those who launched them destroy
// their graphs, and only then NCCL can give its communicators up.
TEST_F(CudaGroupNcclTest, AnAbortWhileAGraphRunsWaitsForNoGraph) {
  Members group = MakeWithNccl();
  std::atomic<int> captured = 0;
  std::atomic<bool> aborted = false;
  OnEachRank(group, [&](size_t rank, Communicator& member, Stream& stream) {
    const Summed x(member, stream, 100);
    x.Fill(0);
    std::string error;
    const auto graph = StepGraph::Capture(
        stream, [&] { return member.AllReduceSum(stream, x.view()); }, &error);
    ASSERT_NE(graph, nullptr) << error;
    ++captured;
    while (captured < 2) std::this_thread::yield();
    if (rank == 0) {
      graph->Launch(stream);  // returns with the abort: what is issued runs at once here
      EXPECT_TRUE(aborted);
    } else {
      std::this_thread::sleep_for(milliseconds(20));
      aborted = true;
      member.Abort("rank 1 has caught fire");
    }
    EXPECT_EQ(member.error(), "rank 1 has caught fire");
    EXPECT_FALSE(member.AllReduceSum(stream, x.view()));
  });
}

TEST_F(CudaGroupNcclTest, ACaptureThatIsAbortedEndsAfterItsCall) {
  Members group = MakeWithNccl();
  nccl_stand_in::SetBehaviour({.late = milliseconds(200)});
  OnEachRank(group, [&](size_t rank, Communicator& member, Stream& stream) {
    const Summed x(member, stream, 100);
    x.Fill(0);
    if (rank == 1) {
      std::this_thread::sleep_for(milliseconds(50));
      member.Abort("rank 1 has caught fire");
      return;
    }
    std::string error;
    const auto issue = [&] {
      const bool issued = member.AllReduceSum(stream, x.view());
      nccl_stand_in::Count();  // where only time tells that the call has ended, TSan wants to see more
      return issued;
    };
    EXPECT_EQ(StepGraph::Capture(stream, issue, &error), nullptr);
    EXPECT_EQ(error, "");
  });
}

TEST_F(CudaGroupNcclTest, WhatItFindsOutEndsTheGroup) {
  Members group = MakeWithNccl();
  nccl_stand_in::SetBehaviour({.hangs = true});
  std::string error;
  const auto stream = Stream::Cuda(0, &error);
  const Summed x(*group[0], *stream, 100);
  std::thread first([&] { EXPECT_FALSE(group[0]->AllReduceSum(*stream, x.view())); });
  group[1]->Abort("rank 1 has caught fire");  // ends the wait of rank 0
  first.join();
  EXPECT_EQ(group[0]->error(), "rank 1 has caught fire");
}

TEST_F(CudaGroupNcclTest, ACallWithoutEndIsNotWaitedFor) {
  Members group = MakeWithNccl(milliseconds(50));
  nccl_stand_in::SetBehaviour({.hangs = true});
  std::string error;
  const auto stream = Stream::Cuda(0, &error);
  const Summed x(*group[0], *stream, 100);
  EXPECT_FALSE(group[0]->AllReduceSum(*stream, x.view()));
  EXPECT_EQ(group[1]->error(), "rank 0: NCCL: no end to a call for 50 ms");
}

TEST_F(CudaGroupNcclTest, RefusesAGroupThatItCannotForm) {
  nccl_stand_in::SetBehaviour({.no_init = true});
  std::string error;
  EXPECT_TRUE(MakeCudaGroup({.ordinals = {0, 1}, .nccl = &nccl_stand_in::Api()}, &error).empty());
  EXPECT_EQ(error, "NCCL: unhandled system error");
}

// Which it does not take: all goes by our own kernels.
TEST_F(CudaGroupNcclTest, IsNotAskedForRanksThatShareAGpu) {
  const Members group =
      Make({.ordinals = {1, 1}, .patience = kPatient, .nccl = &nccl_stand_in::Api(), .most_own_bytes = 0});
  OnEachRank(group, [&](size_t, Communicator& member, Stream& stream) {
    EXPECT_EQ(nccl_stand_in::Count().communicators, 0);
    EXPECT_FALSE(Summed(member, stream, 100).lent());
    EXPECT_TRUE(Reduce(member, stream));
  });
}

#endif

}  // namespace
}  // namespace altiplano
