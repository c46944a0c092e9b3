// A tensor in parts that fit where they are laid out for the peers.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/tensor.h"

namespace altiplano {

// A matrix goes by whole rows, or by elements when a row is too large; the latter, and all else, must be dense.
class MessageParts {
 public:
  MessageParts(const TensorView& x, size_t most_bytes) : x_(x) {
    const auto most = std::max<int64_t>(1, static_cast<int64_t>(most_bytes / SizeOf(x.dtype)));
    by_rows_ = x.rank == 2 && x.dim(1) <= most;
    end_ = by_rows_ ? x.dim(0) : x.elements();
    step_ = by_rows_ ? most / std::max<int64_t>(1, x.dim(1)) : most;
  }
  bool by_rows() const { return by_rows_; }
  // False: there are no more. *begin: the part's first row, or element.
  bool Next(TensorView* part, int64_t* begin) {
    if (next_ >= end_) return false;
    *begin = next_;
    const int64_t n = std::min(step_, end_ - next_);
    const int64_t stride = by_rows_ ? x_.stride0 : 1;
    *part = by_rows_ ? x_.first(n) : TensorView::Make(x_.data, x_.dtype, {n}, x_.device);
    part->data = static_cast<char*>(x_.data) + next_ * stride * static_cast<int64_t>(SizeOf(x_.dtype));
    next_ += n;
    return true;
  }

 private:
  const TensorView x_;
  bool by_rows_;
  int64_t step_, end_, next_ = 0;
};

}  // namespace altiplano
