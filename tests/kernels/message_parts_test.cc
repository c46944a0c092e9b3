#include "kernels/comm/message_parts.h"

#include <gtest/gtest.h>

#include "tests/kernels/kernels_testlib.h"

namespace altiplano {
namespace {

// Every element is in one part, no part is larger than it may be, and its first row or element is where it says.
void ExpectParts(const TensorView& x, size_t most_bytes, int parts_expected) {
  SCOPED_TRACE(testing::Message() << x.dim(0) << " rows, at most " << most_bytes << " bytes");
  MessageParts parts(x, most_bytes);
  TensorView part;
  int64_t begin, elements = 0;
  int count = 0;
  while (parts.Next(&part, &begin)) {
    ++count;
    EXPECT_LE(static_cast<size_t>(part.elements()) * SizeOf(x.dtype), most_bytes);
    const int64_t at = parts.by_rows() ? begin * x.stride0 : begin;
    EXPECT_EQ(part.data, x.as<float>() + at);
    if (parts.by_rows()) {
      EXPECT_EQ(part.stride0, x.stride0);
      EXPECT_EQ(elements, begin * x.dim(1));
    } else {
      EXPECT_EQ(elements, begin);
    }
    elements += part.elements();
  }
  EXPECT_EQ(elements, x.elements());
  EXPECT_EQ(count, parts_expected);
}

TEST(MessageParts, HoldEveryElementOnce) {
  Matrix apart(7, 5, DType::kF32, 3), dense(7, 5, DType::kF32), empty(1, 5, DType::kF32);
  ExpectParts(apart.view(), 1000, 1);
  ExpectParts(apart.view(), 7 * 5 * 4, 1);
  ExpectParts(apart.view(), 7 * 5 * 4 - 1, 2);
  ExpectParts(apart.view(), 5 * 4, 7);
  ExpectParts(dense.view(), 4 * 4, 9);  // not even a row
  ExpectParts(dense.view().first(0), 100, 0);
  ExpectParts(TensorView::Make(dense.view().data, DType::kF32, {35}), 10 * 4, 4);
  ExpectParts(dense.pool(7, 1, 1), 10 * 4, 4);
}

}  // namespace
}  // namespace altiplano
