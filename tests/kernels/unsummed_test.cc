// Ranks that leave out their sums do all else.
#include "kernels/comm/unsummed.h"

#include <gtest/gtest.h>

#include <array>
#include <chrono>
#include <memory>
#include <thread>
#include <vector>

#include "kernels/ops.h"
#include "tests/kernels/kernels_testlib.h"

namespace altiplano {
namespace {

std::unique_ptr<Matrix> Filled(uint32_t seed, int64_t rows) {
  auto matrix = std::make_unique<Matrix>(rows, 32, DType::kF32, 0);
  matrix->FillNormal(seed, 1);
  return matrix;
}

TEST(Unsummed, EachRankGoesOnWithItsOwnPart) {
  auto group = MakeInProcessGroup(2);
  std::array<std::unique_ptr<Communicator>, 2> ranks = {MakeUnsummed(std::move(group[0])),
                                                        MakeUnsummed(std::move(group[1]))};
  // Nobody comes to the other's call: a sum that met would wait for ever.
  const auto stream = Stream::Cpu(1);
  auto x = Filled(1, 3), same = Filled(1, 3), weight = Filled(2, 1);
  EXPECT_TRUE(ranks[1]->AllReduceSum(*stream, x->view()));
  for (int64_t i = 0; i < 3; ++i) EXPECT_EQ(x->RowBytes(i), same->RowBytes(i));

  auto residual = Filled(3, 3), expected_residual = Filled(3, 3), out = Filled(4, 3), expected_out = Filled(5, 3);
  const TensorView row = weight->vector();
  EXPECT_TRUE(ranks[1]->AllReduceAddRmsNorm(
      *stream, {.out = out->view(), .residual = residual->view(), .x = x->view(), .weight = row, .eps = 1e-5f}));
  AddRmsNorm(*stream, {.out = expected_out->view(),
                       .residual = expected_residual->view(),
                       .x = same->view(),
                       .weight = row,
                       .eps = 1e-5f});
  for (int64_t i = 0; i < 3; ++i) {
    EXPECT_EQ(out->RowBytes(i), expected_out->RowBytes(i));
    EXPECT_EQ(residual->RowBytes(i), expected_residual->RowBytes(i));
  }
}

TEST(Unsummed, RanksStillGatherBroadcastAndEnd) {
  auto group = MakeInProcessGroup(2);
  std::vector<int32_t> ids = {7, 8}, gathered(2);
  std::vector<std::thread> threads;
  for (int i = 0; i < 2; ++i) {
    threads.emplace_back([&, i] {
      const auto rank = MakeUnsummed(std::move(group[static_cast<size_t>(i)]));
      EXPECT_EQ(rank->rank(), i);
      EXPECT_EQ(rank->size(), 2);
      const auto stream = Stream::Cpu(1);
      int32_t own = 10 + i;
      TensorView out;
      if (i == 0) out = TensorView::Make(gathered.data(), DType::kI32, {1, 2}, Device::kCpu);
      EXPECT_TRUE(rank->AllGather(*stream, out, TensorView::Make(&own, DType::kI32, {1, 1}, Device::kCpu)));
      EXPECT_TRUE(
          rank->Broadcast(*stream, TensorView::Make(&ids[static_cast<size_t>(i)], DType::kI32, {1}, Device::kCpu)));
      // Until the other has come through too.
      EXPECT_TRUE(
          rank->Broadcast(*stream, TensorView::Make(&ids[static_cast<size_t>(i)], DType::kI32, {1}, Device::kCpu)));
      if (i == 0) rank->Abort("enough");
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(ids, (std::vector<int32_t>{7, 7}));
  EXPECT_EQ(gathered, (std::vector<int32_t>{10, 11}));

  auto others = MakeInProcessGroup(2);
  const auto rank = MakeUnsummed(std::move(others[0]));
  others[1]->Abort("lost");
  EXPECT_EQ(rank->error(), "lost");
  auto x = Filled(1, 1);
  EXPECT_FALSE(rank->AllReduceSum(*Stream::Cpu(1), x->view()));
}

}  // namespace
}  // namespace altiplano
