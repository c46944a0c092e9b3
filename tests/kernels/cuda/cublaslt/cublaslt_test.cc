// Linear through cuBLASLt, with fake_cublaslt.cc in its place: what is asked of the library and when, and that our own
// kernels do what it will not.
#include "kernels/cuda/cublaslt.h"

#include <dlfcn.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cmath>

#include "tests/kernels/cuda/cuda_testlib.h"

namespace altiplano {
namespace {

class CublasLtTest : public CudaTest {
 protected:
  void SetUp() override {
    CudaTest::SetUp();
    ASSERT_EQ(cuda::DescribeCublasLt(), "cuBLASLt 13.1.0");
    void* library = dlopen("libcublasLt.so.13", RTLD_NOW | RTLD_NOLOAD);
    ASSERT_NE(library, nullptr);
    handles_ = static_cast<std::atomic<int>*>(dlsym(library, "fake_handles"));
    choices_ = static_cast<std::atomic<int>*>(dlsym(library, "fake_choices"));
    products_ = static_cast<std::atomic<int>*>(dlsym(library, "fake_products"));
    refuses_choices_ = static_cast<bool*>(dlsym(library, "fake_refuses_choices"));
    refuses_products_ = static_cast<bool*>(dlsym(library, "fake_refuses_products"));
    *handles_ = *choices_ = *products_ = 0;
    *refuses_choices_ = *refuses_products_ = false;
    PrepareLinear(stream());
  }
  void TearDown() override {
    cuda::ForgetCublasLt(stream().cuda_stream());
    CudaTest::TearDown();
  }

  struct Case {
    int64_t tokens, n, k;
    DType act = DType::kBF16, out = DType::kBF16;
    bool accumulate = false;
    int64_t gap = 0;
    bool batch_invariant = false;
  };
  // Through the library and by our own kernels: near each other, and equal when the library was not used.
  void ExpectSame(const Case& c, int products) {
    Matrix x(c.tokens, c.k, c.act, c.gap), weight(c.n, c.k, c.act, c.gap);
    Matrix out(c.tokens, c.n, c.out, c.gap), own(c.tokens, c.n, c.out, c.gap);
    x.FillNormal(1);
    weight.FillNormal(2);
    out.FillNormal(3);
    own.Fill(out);
    const OnDevice d_x(stream(), x), d_weight(stream(), weight), d_out(stream(), out), d_own(stream(), own);
    LinearArgs args = {.out = d_out.view(),
                       .x = d_x.view(),
                       .weight = d_weight.view(),
                       .accumulate = c.accumulate,
                       .batch_invariant = c.batch_invariant};
    const int before = *products_;
    Linear(stream(), args);
    EXPECT_EQ(*products_ - before, products);
    args.out = d_own.view();
    args.batch_invariant = true;
    Linear(stream(), args);
    EXPECT_EQ(*products_ - before, products);
    d_out.Fetch(out);
    d_own.Fetch(own);
    for (int64_t t = 0; t < c.tokens; ++t) {
      for (int64_t j = 0; j < c.n; ++j) {
        const double expected = own.at(t, j), size = std::sqrt(static_cast<double>(c.k));
        ASSERT_NEAR(out.at(t, j), expected,
                    products == 0           ? 0
                    : c.out == DType::kBF16 ? 0.02 * size
                                            : 1e-5 * size)
            << "token " << t << ", column " << j;
      }
    }
    EXPECT_TRUE(out.GapsUntouched());
  }

  std::atomic<int>*handles_ = nullptr, *choices_ = nullptr, *products_ = nullptr;
  bool *refuses_choices_ = nullptr, *refuses_products_ = nullptr;
};

TEST_F(CublasLtTest, ManyTokensAreTheLibrarys) {
  for (DType out : {DType::kBF16, DType::kF32}) {
    for (bool accumulate : {false, true}) {
      for (int64_t gap : {0, 8}) {
        ExpectSame({.tokens = 70, .n = 40, .k = 24, .out = out, .accumulate = accumulate, .gap = gap}, 1);
      }
    }
  }
}

TEST_F(CublasLtTest, AChoiceIsMadeOnceForAShape) {
  for (int i = 0; i < 3; ++i) ExpectSame({.tokens = 65, .n = 16, .k = 8}, 1);
  EXPECT_EQ(*choices_, 1);
  ExpectSame({.tokens = 66, .n = 16, .k = 8}, 1);
  EXPECT_EQ(*choices_, 2);
}

TEST_F(CublasLtTest, WhatItIsNotFor) {
  ExpectSame({.tokens = 64, .n = 16, .k = 8}, 0);  // few tokens
  ExpectSame({.tokens = 70, .n = 16, .k = 8, .act = DType::kF32, .out = DType::kF32}, 0);
  ExpectSame({.tokens = 70, .n = 16, .k = 12}, 0);  // rows not aligned
  ExpectSame({.tokens = 70, .n = 12, .k = 8}, 0);
  ExpectSame({.tokens = 70, .n = 16, .k = 8, .batch_invariant = true}, 0);
  EXPECT_EQ(*choices_, 0);
}

TEST_F(CublasLtTest, WhatItRefusesIsOurs) {
  *refuses_choices_ = true;
  testing::internal::CaptureStderr();
  ExpectSame({.tokens = 70, .n = 16, .k = 8}, 0);
  EXPECT_EQ(testing::internal::GetCapturedStderr(),
            "cuBLASLt 13.1.0 refuses to choose a kernel for a product (status 15): what it refuses our own kernels "
            "multiply\n");
  testing::internal::CaptureStderr();
  ExpectSame({.tokens = 70, .n = 16, .k = 8}, 0);
  ExpectSame({.tokens = 72, .n = 16, .k = 8}, 0);
  EXPECT_EQ(testing::internal::GetCapturedStderr(), "") << "a stream's is told once";
  EXPECT_EQ(*choices_, 2);  // and it is not asked again
  *refuses_choices_ = false;
  *refuses_products_ = true;
  cuda::ForgetCublasLt(stream().cuda_stream());
  PrepareLinear(stream());
  testing::internal::CaptureStderr();
  ExpectSame({.tokens = 71, .n = 16, .k = 8}, 0);
  EXPECT_EQ(testing::internal::GetCapturedStderr().find("cuBLASLt 13.1.0 refuses a product that it had chosen"), 0u);
  *refuses_products_ = false;
  ExpectSame({.tokens = 71, .n = 16, .k = 8}, 0);
}

TEST_F(CublasLtTest, GateAndUpAreAProductAndSiluMul) {
  constexpr int64_t kTokens = 70, kFfn = 16, kK = 24;
  Matrix x(kTokens, kK, DType::kBF16), weight(2 * kFfn, kK, DType::kBF16), gate_up(kTokens, 2 * kFfn, DType::kBF16);
  Matrix one(kTokens, kFfn, DType::kBF16), two(kTokens, kFfn, DType::kBF16);
  x.FillNormal(1);
  weight.FillNormal(2, 0.3f);
  const OnDevice d_x(stream(), x), d_weight(stream(), weight), d_gate_up(stream(), gate_up);
  const OnDevice d_one(stream(), one), d_two(stream(), two);
  Linear(stream(), {.out = d_gate_up.view(), .x = d_x.view(), .weight = d_weight.view()});
  SiluMul(stream(), {.out = d_two.view(), .gate_up = d_gate_up.view()});
  LinearSiluMul(stream(),
                {.out = d_one.view(), .x = d_x.view(), .weight = d_weight.view(), .gate_up = d_gate_up.view()});
  EXPECT_EQ(*products_, 2);
  d_one.Fetch(one);
  d_two.Fetch(two);
  for (int64_t t = 0; t < kTokens; ++t) EXPECT_EQ(one.RowBytes(t), two.RowBytes(t)) << t;
}

TEST_F(CublasLtTest, AStreamTakesWhatItNeedsBeforeItsFirstProduct) {
  for (int i = 0; i < 2; ++i) {
    PrepareLinear(stream());
    EXPECT_EQ(*handles_, 1);
    ExpectSame({.tokens = 70, .n = 16, .k = 8}, 1);
  }
  // Another stream may come to lie where one was.
  cuda::ForgetCublasLt(stream().cuda_stream());
  EXPECT_EQ(*handles_, 0);
  ExpectSame({.tokens = 70, .n = 16, .k = 8}, 0);
  EXPECT_EQ(*handles_, 0);
  PrepareLinear(stream());
  ExpectSame({.tokens = 70, .n = 16, .k = 8}, 1);
  EXPECT_EQ(*handles_, 1);
  EXPECT_EQ(*choices_, 2);
}

// A rank that allocates may wait for another one's all-reduce, which waits for it.
TEST_F(CublasLtTest, AProductTakesNoMemory) {
  Matrix x(70, 8, DType::kBF16), weight(16, 8, DType::kBF16), out(70, 16, DType::kBF16);
  x.FillNormal(1);
  weight.FillNormal(2);
  const OnDevice d_x(stream(), x), d_weight(stream(), weight), d_out(stream(), out);
  const uint64_t allocations = Buffer::DeviceAllocations();
  Linear(stream(), {.out = d_out.view(), .x = d_x.view(), .weight = d_weight.view()});
  EXPECT_EQ(*products_, 1);
  EXPECT_EQ(Buffer::DeviceAllocations(), allocations);
}

}  // namespace
}  // namespace altiplano
