// Ranks as threads: results bit by bit, and how a group ends.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <functional>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "kernels/comm/communicator.h"
#include "tests/kernels/kernels_testlib.h"

namespace altiplano {
namespace {

using Members = std::vector<std::unique_ptr<Communicator>>;
using Matrices = std::vector<std::unique_ptr<Matrix>>;

// Long enough to be no part of a test that does not mean it.
constexpr auto kPatient = std::chrono::minutes(10);
constexpr DType kDTypes[] = {DType::kF32, DType::kBF16, DType::kI32, DType::kI64};

// fn(rank, member, stream) on a thread for each rank; returns when all have returned.
void OnEachRank(const Members& group, const std::function<void(size_t, Communicator&, Stream&)>& fn) {
  std::vector<std::thread> threads;
  for (size_t rank = 0; rank < group.size(); ++rank) {
    threads.emplace_back([&, rank] {
      const auto stream = Stream::Cpu(1);
      fn(rank, *group[rank], *stream);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// Elements that differ in each rank, row and column.
std::unique_ptr<Matrix> Filled(size_t rank, int64_t rows, int64_t columns, DType dtype, int64_t gap) {
  auto matrix = std::make_unique<Matrix>(rows, columns, dtype, gap);
  matrix->FillNormal(static_cast<uint32_t>(17 + rank), 1000);
  return matrix;
}

void ExpectSameRows(const Matrix& actual, const Matrix& expected) {
  for (int64_t i = 0; i < expected.rows(); ++i) EXPECT_EQ(actual.RowBytes(i), expected.RowBytes(i)) << "row " << i;
}

TEST(InProcess, MembersKnowTheirPlace) {
  const Members group = MakeInProcessGroup(3);
  ASSERT_EQ(group.size(), 3u);
  for (int rank = 0; rank < 3; ++rank) {
    EXPECT_EQ(group[static_cast<size_t>(rank)]->rank(), rank);
    EXPECT_EQ(group[static_cast<size_t>(rank)]->size(), 3);
    EXPECT_EQ(group[static_cast<size_t>(rank)]->error(), "");
  }
}

void ExpectSum(int ranks, int64_t rows, int64_t columns, DType dtype, int64_t gap, bool as_vector) {
  SCOPED_TRACE(testing::Message() << ranks << " ranks, " << rows << " x " << columns << ", " << Name(dtype));
  Matrices matrices;
  for (size_t rank = 0; rank < static_cast<size_t>(ranks); ++rank) {
    matrices.push_back(Filled(rank, rows, columns, dtype, gap));
  }
  Matrix expected(rows, columns, dtype);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      auto sum = static_cast<float>(matrices[0]->at(i, j));
      for (size_t rank = 1; rank < matrices.size(); ++rank) sum += static_cast<float>(matrices[rank]->at(i, j));
      expected.set(i, j, static_cast<double>(sum));
    }
  }
  OnEachRank(MakeInProcessGroup(ranks, kPatient), [&](size_t rank, Communicator& member, Stream& stream) {
    EXPECT_TRUE(member.AllReduceSum(stream, as_vector ? matrices[rank]->vector() : matrices[rank]->view()));
  });
  for (const auto& matrix : matrices) {
    ExpectSameRows(*matrix, expected);
    EXPECT_TRUE(matrix->GapsUntouched());
  }
}

TEST(InProcess, AllReduceSumsInTheOrderOfRanksAndRoundsOnce) {
  for (DType dtype : {DType::kF32, DType::kBF16}) {
    for (int ranks : {1, 2, 3, 5, 8}) {
      for (int64_t columns : {1, 2, 31, 32, 33, 64, 255, 1000}) ExpectSum(ranks, 3, columns, dtype, 5, false);
      ExpectSum(ranks, 1, 513, dtype, 0, true);
    }
  }
}

// Each rank brings another number of columns; `in_place`: as the columns of `out` where they belong. A rank that does
// not take brings an empty out.
void ExpectGathered(int ranks, int64_t rows, DType dtype, bool in_place, const std::function<bool(size_t)>& takes) {
  SCOPED_TRACE(testing::Message() << ranks << " ranks, " << rows << " rows, " << Name(dtype) << ", " << in_place);
  std::vector<int64_t> begin = {0};
  Matrices parts, outs;
  for (size_t rank = 0; rank < static_cast<size_t>(ranks); ++rank) {
    const auto columns = static_cast<int64_t>(1 + (rank * 7 + 4) % 11);
    parts.push_back(Filled(rank, rows, columns, dtype, static_cast<int64_t>(rank) % 3));
    begin.push_back(begin.back() + columns);
  }
  Matrix expected(rows, begin.back(), dtype);
  for (size_t rank = 0; rank < parts.size(); ++rank) {
    outs.push_back(std::make_unique<Matrix>(rows, begin.back(), dtype, 3));
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < parts[rank]->columns(); ++j) {
        expected.set(i, begin[rank] + j, parts[rank]->at(i, j));
        if (in_place && takes(rank)) outs[rank]->set(i, begin[rank] + j, parts[rank]->at(i, j));
      }
    }
  }
  OnEachRank(MakeInProcessGroup(ranks, kPatient), [&](size_t rank, Communicator& member, Stream& stream) {
    const TensorView out = outs[rank]->view();
    const bool place = in_place && takes(rank);
    EXPECT_TRUE(member.AllGather(stream, takes(rank) ? out : TensorView(),
                                 place ? out.columns(begin[rank], parts[rank]->columns()) : parts[rank]->view()));
  });
  for (size_t rank = 0; rank < parts.size(); ++rank) {
    if (takes(rank)) ExpectSameRows(*outs[rank], expected);
    EXPECT_TRUE(outs[rank]->GapsUntouched());
    EXPECT_TRUE(parts[rank]->GapsUntouched());
  }
}

TEST(InProcess, AllGatherPutsColumnsSideBySide) {
  const auto all = [](size_t) { return true; };
  for (DType dtype : kDTypes) {
    for (int ranks : {1, 2, 3, 8}) {
      for (bool in_place : {false, true}) {
        ExpectGathered(ranks, 4, dtype, in_place, all);
        ExpectGathered(ranks, 1, dtype, in_place, all);
      }
    }
  }
}

TEST(InProcess, AllGatherGivesToThoseWhoBringAnOut) {
  for (size_t taker : {0, 2, 3}) {
    for (bool in_place : {false, true}) {
      ExpectGathered(4, 3, DType::kF32, in_place, [&](size_t rank) { return rank == taker; });
    }
  }
  ExpectGathered(4, 3, DType::kF32, false, [](size_t rank) { return rank % 2 == 1; });
  ExpectGathered(4, 3, DType::kF32, false, [](size_t) { return false; });
}

TEST(InProcess, BroadcastCopiesRankZero) {
  for (DType dtype : kDTypes) {
    for (int ranks : {1, 2, 3, 8}) {
      Matrices matrices;
      for (size_t rank = 0; rank < static_cast<size_t>(ranks); ++rank) {
        matrices.push_back(Filled(rank, 6, 37, dtype, 0));
      }
      const auto expected = Filled(0, 6, 37, dtype, 0);
      OnEachRank(MakeInProcessGroup(ranks, kPatient), [&](size_t rank, Communicator& member, Stream& stream) {
        EXPECT_TRUE(member.Broadcast(stream, matrices[rank]->pool(2, 3, 1)));
      });
      for (const auto& matrix : matrices) ExpectSameRows(*matrix, *expected);
    }
  }
}

// A step in which nothing is sampled gathers and broadcasts no rows.
TEST(InProcess, NoRowsAreStillAMeeting) {
  OnEachRank(MakeInProcessGroup(3, kPatient), [&](size_t, Communicator& member, Stream& stream) {
    const TensorView none = TensorView::Make(nullptr, DType::kF32, {0, 4});
    float element = 0;
    const TensorView out = TensorView::Make(&element, DType::kF32, {0, 12});
    EXPECT_TRUE(member.AllReduceSum(stream, none));
    EXPECT_TRUE(member.AllGather(stream, out, none));
    EXPECT_TRUE(member.Broadcast(stream, none));
    EXPECT_EQ(element, 0);
  });
}

// Memory that a rank changes right after a call must no longer be read by the others.
TEST(InProcess, CallsFollowEachOtherWithoutMixing) {
  constexpr int kRanks = 3;
  OnEachRank(MakeInProcessGroup(kRanks, kPatient), [&](size_t rank, Communicator& member, Stream& stream) {
    std::mt19937 random(5);  // the same calls on every rank
    int wrong = 0;
    for (int call = 0; call < 1000; ++call) {
      const auto own = static_cast<int32_t>(call * kRanks) + static_cast<int32_t>(rank);
      switch (random() % 3) {
        case 0: {
          auto x = static_cast<float>(own);
          wrong += !member.AllReduceSum(stream, TensorView::Make(&x, DType::kF32, {1}));
          wrong += x != static_cast<float>(call * kRanks * kRanks + 3);
          break;
        }
        case 1: {
          int32_t x = own, out[kRanks] = {};
          wrong += !member.AllGather(stream, TensorView::Make(out, DType::kI32, {1, kRanks}),
                                     TensorView::Make(&x, DType::kI32, {1, 1}));
          for (int32_t r = 0; r < kRanks; ++r) wrong += out[r] != call * kRanks + r;
          break;
        }
        default: {
          int32_t x = own;
          wrong += !member.Broadcast(stream, TensorView::Make(&x, DType::kI32, {1}));
          wrong += x != call * kRanks;
        }
      }
    }
    EXPECT_EQ(wrong, 0);
  });
}

// Each collective, on one element.
bool Call(int which, Communicator& member, Stream& stream) {
  float x = 1;
  const TensorView view = TensorView::Make(&x, DType::kF32, {1, 1});
  if (which == 0) return member.AllReduceSum(stream, view);
  if (which == 1) return member.AllGather(stream, {}, view);
  return member.Broadcast(stream, view);
}

TEST(InProcess, AnAbortEndsEveryWaitAndEveryLaterCall) {
  for (int which : {0, 1, 2}) {
    const Members group = MakeInProcessGroup(4, kPatient);
    OnEachRank(group, [&](size_t rank, Communicator& member, Stream& stream) {
      if (rank == 2) {
        member.Abort("rank 2 has caught fire");
        member.Abort("and drowned");
      } else {
        EXPECT_FALSE(Call(which, member, stream));
      }
      for (int later : {0, 1, 2}) EXPECT_FALSE(Call(later, member, stream));
      EXPECT_EQ(member.error(), "rank 2 has caught fire");
    });
  }
}

TEST(InProcess, AnyThreadMayAbort) {
  const Members group = MakeInProcessGroup(3, kPatient);
  std::thread other([&] { group[1]->Abort(); });
  OnEachRank(group, [&](size_t rank, Communicator& member, Stream& stream) {
    if (rank == 0) return;
    EXPECT_FALSE(Call(0, member, stream));
  });
  other.join();
  EXPECT_EQ(group[0]->error(), "aborted");
}

TEST(InProcess, AMemberThatIsDestroyedEndsTheGroup) {
  Members group = MakeInProcessGroup(3, std::chrono::seconds(20));  // not what ends it
  OnEachRank(group, [&](size_t rank, Communicator& member, Stream& stream) {
    if (rank == 1) {
      group[1].reset();
    } else {
      EXPECT_FALSE(Call(0, member, stream));
      EXPECT_EQ(member.error(), "a rank has left");
    }
  });
}

TEST(InProcess, ARankThatDoesNotComeIsNamed) {
  // A machine that is busy may take a rank for missing in the call that all take part in: then again with more
  // patience.
  for (auto patience = std::chrono::milliseconds(50);; patience *= 2) {
    const Members group = MakeInProcessGroup(4, patience);
    std::atomic<int> met = 0;
    OnEachRank(group, [&](size_t, Communicator& member, Stream& stream) { met += Call(0, member, stream); });
    if (met < 4 && patience < kPatient) continue;
    const auto stream = Stream::Cpu(1);
    EXPECT_FALSE(Call(0, *group[2], *stream));
    const std::string error = "no word for " + std::to_string(patience.count()) + " ms from rank 0 1 3";
    EXPECT_EQ(group[2]->error(), error);
    // Those who come late find the group ended and do not wait in their turn, nor change the reason.
    OnEachRank(group, [&](size_t, Communicator& member, Stream& own) {
      EXPECT_FALSE(Call(0, member, own));
      member.Abort("too late");
      EXPECT_EQ(member.error(), error);
    });
    return;
  }
}

// An abort at any moment of a call: both ranks agree whether it took place, and a rank that has returned may give back
// its memory, as nobody reads it any more. Rank 1 gives and has nothing else to do; rank 0 reads its own part first.
TEST(InProcess, MemoryIsTheRanksOwnAgainHoweverACallEnds) {
  constexpr int64_t kColumns = 1 << 19;
  Matrix taken(1, 2 * kColumns, DType::kI32), own(1, kColumns, DType::kI32);
  for (int round = 0; round < 150; ++round) {
    const Members group = MakeInProcessGroup(2, kPatient);
    std::atomic<int> ready = 0;
    bool together[2];
    std::thread aborter([&] {
      while (ready < 2) std::this_thread::yield();
      for (std::atomic<int> spin = 0; spin < round * 500;) ++spin;
      group[0]->Abort();
    });
    OnEachRank(group, [&](size_t rank, Communicator& member, Stream& stream) {
      std::optional<Matrix> given(std::in_place, 1, kColumns, DType::kI32);
      given->set(0, kColumns - 1, round);
      ++ready;
      while (ready < 2) std::this_thread::yield();
      together[rank] =
          rank == 0 ? member.AllGather(stream, taken.view(), own.view()) : member.AllGather(stream, {}, given->view());
      given.reset();
    });
    aborter.join();
    EXPECT_EQ(together[0], together[1]);
    if (together[0]) {
      EXPECT_EQ(taken.at(0, 2 * kColumns - 1), round);
    }
  }
}

TEST(InProcessDeathTest, DiesOfTensorsThatTheCallsDoNotTake) {
  float memory[8] = {};
  const auto stream = Stream::Cpu(1);
  const Members group = MakeInProcessGroup(1);
  Communicator& one = *group[0];
  const auto view = [&](std::initializer_list<int64_t> shape, DType dtype = DType::kF32, Device device = Device::kCpu) {
    return TensorView::Make(memory, dtype, shape, device);
  };
  const char* reduce = "AllReduceSum: wants an f32 or bf16 vector or matrix on the CPU";
  EXPECT_DEATH(one.AllReduceSum(*stream, view({2}, DType::kI32)), reduce);
  EXPECT_DEATH(one.AllReduceSum(*stream, view({1, 1, 2})), reduce);
  EXPECT_DEATH(one.AllReduceSum(*stream, view({2}, DType::kF32, Device::kCuda)), reduce);
  const char* gather = "AllGather: wants matrices of the same dtype and number of rows on the CPU";
  EXPECT_DEATH(one.AllGather(*stream, view({2, 2}), view({2, 2}, DType::kBF16)), gather);
  EXPECT_DEATH(one.AllGather(*stream, view({3, 2}), view({2, 2})), gather);
  EXPECT_DEATH(one.AllGather(*stream, {}, view({4})), gather);
  EXPECT_DEATH(one.AllGather(*stream, {}, view({2, 2}, DType::kF32, Device::kCuda)), gather);
  EXPECT_DEATH(one.AllGather(*stream, view({2, 1}), view({2, 2})), "AllGather: .* do not fit side by side in out");
  float apart[6] = {};
  const TensorView wide = TensorView::Make(apart, DType::kF32, {2, 3});
  EXPECT_DEATH(one.AllGather(*stream, wide, view({2, 2})), "AllGather: .* do not fill out");
  const char* broadcast = "Broadcast: wants a dense tensor on the CPU";
  EXPECT_DEATH(one.Broadcast(*stream, view({2, 4}).columns(0, 3)), broadcast);
  EXPECT_DEATH(one.Broadcast(*stream, view({2}, DType::kF32, Device::kCuda)), broadcast);
  EXPECT_DEATH(MakeInProcessGroup(0), "MakeInProcessGroup: wants at least one rank");
}

TEST(InProcessDeathTest, DiesOfRanksThatDisagree) {
  const auto bring = [](TensorView first, TensorView second, auto call) {
    float memory[2][8] = {};
    OnEachRank(MakeInProcessGroup(2), [&](size_t rank, Communicator& member, Stream& stream) {
      TensorView x = rank == 0 ? first : second;
      x.data = memory[rank];
      call(member, stream, x);
    });
  };
  const auto reduce = [](Communicator& member, Stream& stream, const TensorView& x) { member.AllReduceSum(stream, x); };
  const auto send = [](Communicator& member, Stream& stream, const TensorView& x) { member.Broadcast(stream, x); };
  const auto shape = [](std::initializer_list<int64_t> n, DType dtype) { return TensorView::Make(nullptr, dtype, n); };
  const TensorView two = shape({2, 2}, DType::kF32);
  const char* differ = "the ranks brought different shapes or dtypes";
  EXPECT_DEATH(bring(two, shape({2, 3}, DType::kF32), reduce), differ);
  EXPECT_DEATH(bring(two, shape({1, 2}, DType::kF32), reduce), differ);
  EXPECT_DEATH(bring(two, shape({2, 2}, DType::kBF16), reduce), differ);
  EXPECT_DEATH(bring(two, shape({2, 3}, DType::kF32), send), differ);
  EXPECT_DEATH(bring(two, shape({2, 2}, DType::kI32), send), differ);
}

}  // namespace
}  // namespace altiplano
