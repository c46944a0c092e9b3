// The calls between ranks: to the same bits on the CPU, in the simulator and on a GPU that the ranks share.
#include "kernels/comm/communicator.h"

#include <gtest/gtest.h>

#include <chrono>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "kernels/comm/all_reduce_plan.h"
#include "tests/kernels/cuda/ranks_testlib.h"

namespace altiplano {
namespace {

using Matrices = std::vector<std::unique_ptr<Matrix>>;

class CudaCommunicatorTest : public CudaTest {
 protected:
  static Members Make(int ranks, std::chrono::milliseconds patience = kPatient) {
    if (kDevice == Device::kCpu) return MakeInProcessGroup(ranks, patience);
    std::string error;
    Members group =
        MakeCudaGroup({.ordinals = std::vector<int>(static_cast<size_t>(ranks)), .patience = patience}, &error);
    EXPECT_EQ(error, "");
    return group;
  }
};

// What each rank brings; elements differ in each rank, row and column.
Matrices Brought(int ranks, int64_t rows, int64_t columns, DType dtype, int64_t gap) {
  Matrices x;
  for (int rank = 0; rank < ranks; ++rank) {
    x.push_back(std::make_unique<Matrix>(rows, columns, dtype, gap));
    x.back()->FillNormal(static_cast<uint32_t>(17 + rank), 1000);
  }
  return x;
}

// In f32, in the order of ranks, rounded once.
std::unique_ptr<Matrix> SumOf(const Matrices& x) {
  auto sum = std::make_unique<Matrix>(x[0]->rows(), x[0]->columns(), x[0]->dtype());
  for (int64_t i = 0; i < sum->rows(); ++i) {
    for (int64_t j = 0; j < sum->columns(); ++j) {
      auto total = static_cast<float>(x[0]->at(i, j));
      for (size_t rank = 1; rank < x.size(); ++rank) total += static_cast<float>(x[rank]->at(i, j));
      sum->set(i, j, static_cast<double>(total));
    }
  }
  return sum;
}

void ExpectSameRows(const Matrix& actual, const Matrix& expected, size_t rank) {
  for (int64_t i = 0; i < expected.rows(); ++i) {
    ASSERT_EQ(actual.RowBytes(i), expected.RowBytes(i)) << "rank " << rank << ", row " << i;
  }
  EXPECT_TRUE(actual.GapsUntouched()) << "rank " << rank;
}

struct Shape {
  int ranks;
  int64_t rows, columns, gap;
};
// The large ones go in two shots on a GPU, the last of them in pieces; all_reduce_test has small ones in two shots.
const std::vector<Shape>& Shapes() {
  static const std::vector<Shape> shapes = [] {
    std::vector<Shape> all = {{1, 2, 8, 0}, {2, 3, 64, 0}, {2, 1, 1, 0}, {3, 5, 33, 2}, {5, 2, 7, 1}, {8, 2, 40, 0}};
#ifndef ALTIPLANO_IN_SIMULATOR
    all.insert(all.end(), {{2, 16, 8192, 8}, {8, 17, 4096, 0}, {3, 300, 8192, 0}});
#endif
    return all;
  }();
  return shapes;
}

TEST_F(CudaCommunicatorTest, SumsInTheOrderOfRanksAndRoundsOnce) {
  for (const auto& [ranks, rows, columns, gap] : Shapes()) {
    for (DType dtype : {DType::kF32, DType::kBF16}) {
      SCOPED_TRACE(testing::Message() << ranks << " ranks, " << rows << " x " << columns << ", " << Name(dtype));
      const Matrices x = Brought(ranks, rows, columns, dtype, gap);
      const auto expected = SumOf(x);
      OnEachRank(Make(ranks), [&](size_t rank, Communicator& member, Stream& stream) {
        EXPECT_EQ(member.rank(), static_cast<int>(rank));
        EXPECT_EQ(member.size(), static_cast<int>(x.size()));
        const OnDevice on_device(stream, *x[rank]);
        EXPECT_TRUE(member.AllReduceSum(stream, rows == 1 && gap == 0 ? on_device.vector() : on_device.view()));
        on_device.Fetch(*x[rank]);
        ExpectSameRows(*x[rank], *expected, rank);
        EXPECT_EQ(member.error(), "");
      });
    }
  }
}

// The residual to the bit, what is normed of it near the oracle and the same on all ranks.
TEST_F(CudaCommunicatorTest, NormsTheResidualWithTheSumAdded) {
  const auto bound = [](int64_t n, double exact, DType dtype) {
    const double before = static_cast<double>(n / 32 + 40) * kUnitF32 * std::abs(exact) + 0x1p-126;
    return before + RoundingBound(dtype, exact, before);
  };
  std::vector<Shape> shapes = {{1, 2, 64, 0}, {2, 3, 96, 0}, {3, 2, 7, 0}, {8, 1, 520, 0}};
#ifndef ALTIPLANO_IN_SIMULATOR
  shapes.insert(shapes.end(), {{2, 40, 4096, 0}, {8, 16, 8192, 0}});  // the latter by two ops
#endif
  for (const auto& [ranks, rows, columns, gap] : shapes) {
    for (DType dtype : {DType::kF32, DType::kBF16}) {
      SCOPED_TRACE(testing::Message() << ranks << " ranks, " << rows << " x " << columns << ", " << Name(dtype));
      const Matrices x = Brought(ranks, rows, columns, dtype, gap);
      const auto sum = SumOf(x);
      Matrix residual(rows, columns, DType::kF32), weight(1, columns, DType::kF32);
      residual.FillNormal(1, 1000);
      weight.FillNormal(2);
      Matrices residuals, outs;
      for (int rank = 0; rank < ranks; ++rank) {
        residuals.push_back(std::make_unique<Matrix>(rows, columns, DType::kF32));
        outs.push_back(std::make_unique<Matrix>(rows, columns, dtype));
      }
      OnEachRank(Make(ranks), [&](size_t rank, Communicator& member, Stream& stream) {
        const OnDevice d_x(stream, *x[rank]), d_residual(stream, residual), d_weight(stream, weight);
        const OnDevice d_out(stream, *outs[rank]);
        EXPECT_TRUE(member.AllReduceAddRmsNorm(stream, {.out = d_out.view(),
                                                        .residual = d_residual.view(),
                                                        .x = d_x.view(),
                                                        .weight = d_weight.vector(),
                                                        .eps = 1e-5f}));
        d_out.Fetch(*outs[rank]);
        d_residual.Fetch(*residuals[rank]);
        EXPECT_EQ(member.error(), "");
      });
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < columns; ++j) {
          residual.set(i, j,
                       static_cast<double>(static_cast<float>(residual.at(i, j)) + static_cast<float>(sum->at(i, j))));
        }
      }
      for (size_t rank = 0; rank < x.size(); ++rank) {
        ExpectSameRows(*residuals[rank], residual, rank);
        ExpectSameRows(*outs[rank], *outs[0], rank);
      }
      for (int64_t i = 0; i < rows; ++i) ExpectRmsNorm(residual, weight, 1e-5f, *outs[0], i, bound);
    }
  }
}

// The last rank gives without taking; the first brings the very columns of its out.
TEST_F(CudaCommunicatorTest, GathersColumnsSideBySide) {
  for (int ranks : {1, 2, 3}) {
    for (DType dtype : {DType::kF32, DType::kBF16, DType::kI32, DType::kI64}) {
      for (const auto& [rows, columns] : {std::pair<int64_t, int64_t>{3, 16}, {2, 5}, {1, 6}}) {
        SCOPED_TRACE(testing::Message() << ranks << " ranks, " << rows << " x " << columns << ", " << Name(dtype));
        const Matrices x = Brought(ranks, rows, columns, dtype, 1);
        Matrix expected(rows, ranks * columns, dtype);
        Matrices outs;
        for (size_t rank = 0; rank < x.size(); ++rank) {
          outs.push_back(std::make_unique<Matrix>(rows, ranks * columns, dtype, 2));
          for (int64_t i = 0; i < rows; ++i) {
            for (int64_t j = 0; j < columns; ++j) {
              expected.set(i, static_cast<int64_t>(rank) * columns + j, x[rank]->at(i, j));
              if (rank == 0) outs[0]->set(i, j, x[0]->at(i, j));
            }
          }
        }
        OnEachRank(Make(ranks), [&](size_t rank, Communicator& member, Stream& stream) {
          const bool takes = rank + 1 < x.size() || rank == 0;
          const OnDevice d_x(stream, *x[rank]), d_out(stream, *outs[rank]);
          EXPECT_TRUE(member.AllGather(stream, takes ? d_out.view() : TensorView(),
                                       rank == 0 ? d_out.view().columns(0, columns) : d_x.view()));
          d_out.Fetch(*outs[rank]);
          if (takes) ExpectSameRows(*outs[rank], expected, rank);
        });
      }
    }
  }
}

TEST_F(CudaCommunicatorTest, BroadcastsRankZeros) {
  for (int ranks : {1, 2, 3}) {
    for (DType dtype : {DType::kF32, DType::kBF16, DType::kI32, DType::kI64}) {
      for (const auto& [rows, columns] : {std::pair<int64_t, int64_t>{3, 16}, {1, 5}}) {
        SCOPED_TRACE(testing::Message() << ranks << " ranks, " << rows << " x " << columns << ", " << Name(dtype));
        const Matrices x = Brought(ranks, rows, columns, dtype, 0), sent = Brought(1, rows, columns, dtype, 0);
        OnEachRank(Make(ranks), [&](size_t rank, Communicator& member, Stream& stream) {
          const OnDevice on_device(stream, *x[rank]);
          EXPECT_TRUE(member.Broadcast(stream, on_device.view()));
          on_device.Fetch(*x[rank]);
          ExpectSameRows(*x[rank], *sent[0], rank);
        });
      }
    }
  }
}

// Of all kinds, issued behind each other without a wait of the host's.
TEST_F(CudaCommunicatorTest, CallsFollowEachOther) {
  constexpr int kCalls = kUnderTsan ? 4 : 12, kRanks = 3;
  std::vector<Matrices> x;
  std::vector<std::unique_ptr<Matrix>> sums;
  for (int call = 0; call < kCalls; ++call) {
    x.push_back(Brought(kRanks, 1 + call % 2, 4 + 13 * call, call % 3 == 0 ? DType::kBF16 : DType::kF32, 0));
    sums.push_back(SumOf(x.back()));
  }
  OnEachRank(Make(kRanks), [&](size_t rank, Communicator& member, Stream& stream) {
    std::vector<std::unique_ptr<OnDevice>> on_device;
    for (const Matrices& of_call : x) on_device.push_back(std::make_unique<OnDevice>(stream, *of_call[rank]));
    for (size_t call = 0; call < x.size(); ++call) {
      EXPECT_TRUE(call % 4 == 1 ? member.Broadcast(stream, on_device[call]->view())
                                : member.AllReduceSum(stream, on_device[call]->view()));
    }
    for (size_t call = 0; call < x.size(); ++call) {
      SCOPED_TRACE(testing::Message() << "call " << call);
      Matrix result(x[call][0]->rows(), x[call][0]->columns(), x[call][0]->dtype());
      on_device[call]->Fetch(result);
      ExpectSameRows(result, call % 4 == 1 ? *x[call][0] : *sums[call], rank);
    }
  });
}

// Nothing is sampled in a step: no rows on any rank.
TEST_F(CudaCommunicatorTest, NoRowsAreNoWork) {
  OnEachRank(Make(2), [&](size_t, Communicator& member, Stream& stream) {
    const TensorView none = TensorView::Make(nullptr, DType::kF32, {0, 4}, kDevice);
    EXPECT_TRUE(member.AllReduceSum(stream, none));
    EXPECT_TRUE(member.AllGather(stream, {}, none));
    EXPECT_TRUE(member.Broadcast(stream, none));
    EXPECT_EQ(stream.Synchronize(), "");
  });
}

// ---- nobody waits for ever

TEST_F(CudaCommunicatorTest, ARankThatDoesNotComeIsNamed) {
  const Members group = Make(3, std::chrono::milliseconds(200));
  OnEachRank(group, [&](size_t rank, Communicator& member, Stream& stream) {
    if (rank == 1) return;
    EXPECT_FALSE(Reduce(member, stream));
    EXPECT_EQ(member.error(), "no word for 200 ms from rank 1");
    EXPECT_FALSE(Reduce(member, stream));  // and nobody waits again
  });
  EXPECT_FALSE(Reduce(*group[1], stream()));
  EXPECT_EQ(group[1]->error(), "no word for 200 ms from rank 1");
}

TEST_F(CudaCommunicatorTest, AnAbortEndsEveryWaitAndEveryLaterCall) {
  const Members group = Make(3);
  OnEachRank(group, [&](size_t rank, Communicator& member, Stream& stream) {
    if (rank == 2) {
      member.Abort("rank 2 has caught fire");
      member.Abort("and drowned");
    }
    EXPECT_FALSE(Reduce(member, stream));
    EXPECT_EQ(member.error(), "rank 2 has caught fire");
  });
}

TEST_F(CudaCommunicatorTest, AMemberThatIsDestroyedEndsTheGroup) {
  Members group = Make(2);
  OnEachRank(group, [&](size_t rank, Communicator& member, Stream& stream) {
    if (rank == 1) {
      group[1].reset();
    } else {
      EXPECT_FALSE(Reduce(member, stream));
      EXPECT_EQ(member.error(), "a rank has left");
    }
  });
}

}  // namespace
}  // namespace altiplano
