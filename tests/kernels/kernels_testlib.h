// What the tests of the ops share: operands that notice every access beyond them, and the machine's instruction sets.
#pragma once

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "kernels/cpu/cpu_features.h"
#include "kernels/tensor.h"

namespace altiplano {

// Unit roundoffs: half a unit in the last place of 1.
inline constexpr double kUnitF32 = 0x1p-24;
inline constexpr double kUnitBF16 = 0x1p-8;

// A matrix whose last element ends where an unreadable page begins, so that a read or write beyond it dies. Gaps
// between rows hold NaN, which would spread if they were read and must still be there afterwards; so do elements that
// were never set.
class Matrix {
 public:
  Matrix(int64_t rows, int64_t columns, DType dtype, int64_t gap = 0)
      : rows_(rows), columns_(columns), stride_(columns + gap), dtype_(dtype) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t bytes = static_cast<size_t>((rows - 1) * stride_ + columns) * SizeOf(dtype);
    mapped_ = (bytes + page - 1) / page * page;
    base_ =
        static_cast<char*>(mmap(nullptr, mapped_ + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    EXPECT_NE(base_, MAP_FAILED);
    EXPECT_EQ(mprotect(base_ + mapped_, page, PROT_NONE), 0);
    data_ = base_ + (mapped_ - bytes);
    std::memset(data_, 0xFF, bytes);
    mapped_ += page;
  }
  ~Matrix() { munmap(base_, mapped_); }
  Matrix(const Matrix&) = delete;
  Matrix& operator=(const Matrix&) = delete;

  int64_t rows() const { return rows_; }
  int64_t columns() const { return columns_; }
  DType dtype() const { return dtype_; }

  TensorView view() const {
    TensorView view = TensorView::Make(data_, dtype_, {rows_, columns_});
    view.stride0 = stride_;
    return view;
  }
  // Of one row.
  TensorView vector() const { return TensorView::Make(data_, dtype_, {columns_}); }
  // Of pages * heads * page_size rows without gaps: a pool [P, Hkv, S, D].
  TensorView pool(int64_t pages, int64_t heads, int64_t page_size) const {
    EXPECT_EQ(rows_, pages * heads * page_size);
    return TensorView::Make(data_, dtype_, {pages, heads, page_size, columns_});
  }

  double at(int64_t i, int64_t j) const {
    switch (dtype_) {
      case DType::kF32:
        return view().row<float>(i)[j];
      case DType::kBF16:
        return ToFloat(view().row<BF16>(i)[j]);
      case DType::kI32:
        return view().row<int32_t>(i)[j];
      case DType::kI64:
        return static_cast<double>(view().row<int64_t>(i)[j]);
    }
    return 0;
  }
  // Rounds to the matrix's dtype.
  void set(int64_t i, int64_t j, double value) {
    switch (dtype_) {
      case DType::kF32:
        view().row<float>(i)[j] = static_cast<float>(value);
        break;
      case DType::kBF16:
        view().row<BF16>(i)[j] = ToBF16(static_cast<float>(value));
        break;
      case DType::kI32:
        view().row<int32_t>(i)[j] = static_cast<int32_t>(value);
        break;
      case DType::kI64:
        view().row<int64_t>(i)[j] = static_cast<int64_t>(value);
        break;
    }
  }
  void FillNormal(uint32_t seed, float deviation = 1) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal(0, deviation);
    for (int64_t i = 0; i < rows_; ++i) {
      for (int64_t j = 0; j < columns_; ++j) set(i, j, normal(random));
    }
  }
  // The other matrix's elements, rounded to this one's dtype.
  void Fill(const Matrix& from) {
    for (int64_t i = 0; i < rows_; ++i) {
      for (int64_t j = 0; j < columns_; ++j) set(i, j, from.at(i, j));
    }
  }
  std::string RowBytes(int64_t i) const {
    return std::string(data_ + i * stride_ * static_cast<int64_t>(SizeOf(dtype_)),
                       static_cast<size_t>(columns_) * SizeOf(dtype_));
  }
  bool GapsUntouched() const {
    const size_t size = SizeOf(dtype_);
    for (int64_t i = 0; i + 1 < rows_; ++i) {
      const char* row = data_ + static_cast<size_t>(i * stride_) * size;
      for (size_t j = static_cast<size_t>(columns_) * size; j < static_cast<size_t>(stride_) * size; ++j) {
        if (row[j] != '\xFF') return false;
      }
    }
    return true;
  }

 private:
  const int64_t rows_, columns_, stride_;
  const DType dtype_;
  char* base_ = nullptr;
  char* data_ = nullptr;
  size_t mapped_ = 0;
};

// A vector of ids, positions or the like.
inline TensorView VectorOf(std::vector<int32_t>& values) {
  return TensorView::Make(values.data(), DType::kI32, {static_cast<int64_t>(values.size())});
}

// What rounding to `dtype` may add to the distance from `exact` when the result before it lies within `bound`.
inline double RoundingBound(DType dtype, double exact, double bound) {
  return (dtype == DType::kBF16 ? kUnitBF16 : kUnitF32) * (std::abs(exact) + bound) + 0x1p-149;
}

// out's row t is x's, divided by its root mean square and times weight. bound(n, exact, dtype): how far off it may be.
template <typename Bound>
void ExpectRmsNorm(const Matrix& x, const Matrix& weight, float eps, const Matrix& out, int64_t t, Bound bound) {
  const int64_t n = x.columns();
  double squares = 0;
  for (int64_t j = 0; j < n; ++j) squares += x.at(t, j) * x.at(t, j);
  const double rms = std::sqrt(squares / static_cast<double>(n) + static_cast<double>(eps));
  for (int64_t j = 0; j < n; ++j) {
    const double exact = x.at(t, j) / rms * weight.at(0, j);
    ASSERT_NEAR(out.at(t, j), exact, bound(n, exact, out.dtype()))
        << "token " << t << ", column " << j << " of " << n << ", x " << Name(x.dtype()) << ", weight "
        << Name(weight.dtype()) << ", out " << Name(out.dtype());
  }
}

// A test that runs on each instruction set of the machine.
class IsaTest : public testing::TestWithParam<Isa> {
 protected:
  void SetUp() override {
    scope_.emplace(GetParam());
    if (!scope_->available()) GTEST_SKIP() << "this machine lacks " << Name(GetParam());
  }

 private:
  std::optional<ScopedIsa> scope_;
};

inline std::string IsaTestName(const testing::TestParamInfo<Isa>& info) {
  return Name(info.param);
}

}  // namespace altiplano
