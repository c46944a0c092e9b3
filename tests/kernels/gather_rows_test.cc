// GatherRows copies bits: any dtype, NaN payloads too.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels/ops.h"
#include "tests/kernels/kernels_testlib.h"

namespace altiplano {
namespace {

TEST(GatherRows, CopiesTheBitsOfEachRow) {
  for (DType dtype : {DType::kF32, DType::kBF16, DType::kI32, DType::kI64}) {
    for (int64_t hidden : {1, 7, 33, 4000}) {
      for (int64_t gap : {0, 5}) {
        Matrix x(9, hidden, dtype, gap);
        x.FillNormal(1, 1000);
        const uint32_t signalling_nan = 0x7FA00001;  // in f32; its upper half is one in bf16
        std::memcpy(x.view().data, &signalling_nan, std::min(sizeof(signalling_nan), x.RowBytes(0).size()));
        std::vector<int32_t> rows = {8, 0, 0, 5, 8, 1, 0};
        const auto wanted = static_cast<int64_t>(rows.size());
        Matrix out(wanted, hidden, dtype, gap);
        const auto stream = Stream::Cpu(2);
        GatherRows(*stream, {.out = out.view(), .x = x.view(), .rows = VectorOf(rows)});
        for (int64_t r = 0; r < wanted; ++r) EXPECT_EQ(out.RowBytes(r), x.RowBytes(rows[static_cast<size_t>(r)])) << r;
        EXPECT_TRUE(out.GapsUntouched());
      }
    }
  }
}

}  // namespace
}  // namespace altiplano
