// What the tests of the CUDA ops share: operands in device memory, filled from and fetched into a Matrix. One body runs
// in the simulator, on a GPU where ALTIPLANO_ON_GPU is defined, and by the CPU's twins where ALTIPLANO_ON_CPU is.
#pragma once

#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "kernels/cuda/architectures.h"
#include "kernels/device.h"
#include "kernels/ops.h"
#include "tests/kernels/kernels_testlib.h"
#if !defined(ALTIPLANO_ON_GPU) && !defined(ALTIPLANO_ON_CPU)
#define ALTIPLANO_IN_SIMULATOR
#include "kernels/cuda/sim/sim.h"
#endif

namespace altiplano {

// Under ThreadSanitizer the simulator is ten times slower, and races do not depend on every size.
#ifdef __SANITIZE_THREAD__
inline constexpr bool kUnderTsan = true;
#else
inline constexpr bool kUnderTsan = false;
#endif

#ifdef ALTIPLANO_ON_CPU
inline constexpr Device kDevice = Device::kCpu;
#else
inline constexpr Device kDevice = Device::kCuda;
#endif

// A stream of the device. An error that an op left behind fails the test that it belongs to.
class CudaTest : public testing::Test {
 protected:
  void SetUp() override {
    std::string error;
    stream_ = kDevice == Device::kCpu ? Stream::Cpu(2) : Stream::Cuda(0, &error);
#ifdef ALTIPLANO_ON_GPU
    if (stream_ == nullptr) GTEST_SKIP() << error;
#endif
    ASSERT_NE(stream_, nullptr) << error;
#ifdef ALTIPLANO_IN_SIMULATOR
    sim::SetSeed(1);
#endif
  }
  void TearDown() override {
    if (stream_ == nullptr) return;
    EXPECT_EQ(stream_->Synchronize(), "");
#ifdef ALTIPLANO_IN_SIMULATOR
    sim::TakeError();
#endif
  }
  Stream& stream() {
    return *stream_;
  }
  // The CPU's twins take no notice of what is planned for a GPU.
  const cuda::Architecture& architecture() {
    return kDevice == Device::kCpu ? cuda::kHopper : *cuda::PropertiesOf(*stream_).architecture;
  }

 private:
  std::unique_ptr<Stream> stream_;
};

#ifdef ALTIPLANO_IN_SIMULATOR
// What the simulated GPU is, for as long as this lives.
class SimulatedArchitecture {
 public:
  explicit SimulatedArchitecture(int capability) { sim::SetArchitecture(*cuda::FindArchitecture(capability)); }
  ~SimulatedArchitecture() { sim::SetArchitecture(cuda::kHopper); }
  SimulatedArchitecture(const SimulatedArchitecture&) = delete;
};
#endif

// A copy of a matrix on the device, of exactly its size, so that an access beyond it is found.
class OnDevice {
 public:
  OnDevice(Stream& stream, const Matrix& matrix) : OnDevice(stream, matrix.view()) {}
  OnDevice(Stream& stream, const std::vector<int32_t>& values)
      : OnDevice(stream, TensorView::Make(const_cast<int32_t*>(values.data()), DType::kI32,
                                          {static_cast<int64_t>(values.size())})) {}

  TensorView view() const { return view_; }
  // Of one row.
  TensorView vector() const { return TensorView::Make(view_.data, view_.dtype, {view_.dim(1)}, kDevice); }
  // Of pages * heads * page_size rows without gaps: a pool [P, Hkv, S, D].
  TensorView pool(int64_t pages, int64_t heads, int64_t page_size) const {
    return TensorView::Make(view_.data, view_.dtype, {pages, heads, page_size, view_.dim(1)}, kDevice);
  }
  std::vector<int32_t> Values() const {  // of an i32 vector
    std::vector<int32_t> values(static_cast<size_t>(view_.dim(0)));
    Copy(stream_, values.data(), Device::kCpu, view_.data, kDevice, buffer_.bytes());
    EXPECT_EQ(stream_.Synchronize(), "");
    return values;
  }
  void Fetch(const Matrix& to) const {
    Copy(stream_, to.view().data, Device::kCpu, view_.data, kDevice, buffer_.bytes());
    ASSERT_EQ(stream_.Synchronize(), "");
  }

 private:
  OnDevice(Stream& stream, const TensorView& host) : stream_(stream), view_(host) {
    const int64_t width = host.rank > 1 ? host.dim(1) : 1;
    const auto elements = static_cast<size_t>((host.dim(0) - 1) * host.stride0 + width);
    buffer_ = Buffer::Allocate(kDevice, elements * SizeOf(host.dtype));
    view_.data = buffer_.data();
    view_.device = kDevice;
    Copy(stream, view_.data, kDevice, host.data, Device::kCpu, buffer_.bytes());
  }

  Stream& stream_;
  Buffer buffer_;
  TensorView view_;
};

}  // namespace altiplano
