#include "kernels/tensor.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>
#include <vector>

namespace altiplano {
namespace {

TEST(BF16, WidensExactlyAndComesBack) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const BF16 x = {static_cast<uint16_t>(bits)};
    const float wide = ToFloat(x);
    EXPECT_EQ(std::bit_cast<uint32_t>(wide), bits << 16);
    if (!std::isnan(wide)) {
      EXPECT_EQ(ToBF16(wide).bits, bits);
    }
  }
}

// Between two neighbours the nearer one, halfway the one whose last bit is 0; beyond the largest finite one, infinity
// from the middle of what would be the next step.
TEST(BF16, RoundsToNearestEven) {
  for (uint32_t upper = 0; upper < 0x7F80; ++upper) {
    const double below = ToFloat(BF16{static_cast<uint16_t>(upper)});
    const double above =
        upper == 0x7F7F ? 0x1p128 : static_cast<double>(ToFloat(BF16{static_cast<uint16_t>(upper + 1)}));
    for (uint32_t lower : {0x0000u, 0x0001u, 0x7FFFu, 0x8000u, 0x8001u, 0xFFFFu}) {
      const float x = std::bit_cast<float>(upper << 16 | lower);
      const double down = static_cast<double>(x) - below, up = above - static_cast<double>(x);
      const bool rounds_up = up < down || (up == down && upper % 2 == 1);
      ASSERT_EQ(ToBF16(x).bits, upper + (rounds_up ? 1 : 0)) << x;
      ASSERT_EQ(ToBF16(-x).bits, (upper + (rounds_up ? 1 : 0)) | 0x8000) << -x;
    }
  }
}

TEST(BF16, KeepsNanAndInfinity) {
  EXPECT_EQ(ToBF16(std::numeric_limits<float>::infinity()).bits, 0x7F80);
  EXPECT_EQ(ToBF16(-std::numeric_limits<float>::infinity()).bits, 0xFF80);
  for (uint32_t bits : {0x7F800001u, 0x7F80FFFFu, 0x7FFFFFFFu, 0xFF800001u, 0xFFFFFFFFu}) {
    EXPECT_TRUE(std::isnan(ToFloat(ToBF16(std::bit_cast<float>(bits))))) << std::hex << bits;
  }
}

TEST(TensorView, IsRowMajor) {
  std::vector<float> data(2 * 3 * 4 * 5);
  const TensorView view = TensorView::Make(data.data(), DType::kF32, {2, 3, 4, 5});
  EXPECT_EQ(view.rank, 4);
  EXPECT_EQ(view.elements(), 120);
  EXPECT_EQ(view.stride0, 60);
  EXPECT_EQ(view.row<float>(1), data.data() + 60);
  EXPECT_TRUE(view.contiguous());
  EXPECT_EQ(TensorView().elements(), 0);
  EXPECT_TRUE(TensorView().empty());
}

TEST(TensorView, TakesRangesOfRowsAndColumns) {
  for (DType dtype : {DType::kF32, DType::kBF16, DType::kI32, DType::kI64}) {
    std::vector<char> data(6 * 10 * SizeOf(dtype));
    const TensorView view = TensorView::Make(data.data(), dtype, {6, 10});
    const TensorView part = view.columns(3, 4).first(2);
    EXPECT_EQ(part.dim(0), 2);
    EXPECT_EQ(part.dim(1), 4);
    EXPECT_EQ(part.stride0, 10);
    EXPECT_EQ(part.data, data.data() + 3 * SizeOf(dtype));
    EXPECT_EQ(part.elements(), 8);
    EXPECT_FALSE(part.contiguous());
    EXPECT_TRUE(part.first(1).contiguous());
    EXPECT_TRUE(view.first(3).contiguous());
  }
}

}  // namespace
}  // namespace altiplano
