// Sharing out the rows of the cheap ops.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/cpu/thread_team.h"
#include "kernels/cpu/vec_rows.h"
#include "kernels/tensor.h"

namespace altiplano::cpu {

// Below this many elements the caller is done before the others have woken.
inline constexpr int64_t kElementsWorthThreads = 16384;

// fn(row) for each of `rows`, in equal shares of consecutive rows.
template <typename Fn>
void ForRows(ThreadTeam& team, int64_t rows, int64_t elements_per_row, Fn&& fn) {
  if (rows * elements_per_row < kElementsWorthThreads || rows == 1 || team.size() == 1) {
    for (int64_t row = 0; row < rows; ++row) fn(row);
    return;
  }
  team.Run([&](int worker, int workers) {
    const int64_t end = rows * (worker + 1) / workers;
    for (int64_t row = rows * worker / workers; row < end; ++row) fn(row);
  });
}

// Row i of a matrix (or the vector itself) from `column` on.
inline RowPtr RowOf(const TensorView& x, int64_t i = 0, int64_t column = 0) {
  const int64_t offset = (x.rank > 1 ? i * x.stride0 : 0) + column;
  return {static_cast<char*>(x.data) + offset * static_cast<int64_t>(SizeOf(x.dtype)), x.dtype == DType::kBF16};
}

}  // namespace altiplano::cpu
