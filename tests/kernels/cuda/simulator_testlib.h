// What the tests of the simulator share: device memory that they may look into, and kernels run under many seeds.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include "kernels/cuda/ptx.h"
#include "kernels/cuda/sim/sim.h"

namespace altiplano {

template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t n) : data_(static_cast<T*>(sim::AllocateDevice(n * sizeof(T)))), n_(n) {}
  DeviceArray(size_t n, const std::function<T(size_t)>& value) : DeviceArray(n) {
    for (size_t i = 0; i < n; ++i) data_[i] = value(i);
  }
  ~DeviceArray() { sim::FreeDevice(data_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  T* data() { return data_; }
  size_t size() const { return n_; }
  T& operator[](size_t i) { return data_[i]; }

 private:
  T* data_;
  size_t n_;
};

inline int Thread() {
  return static_cast<int>(threadIdx.x);
}

inline constexpr int kSeeds = 32;

// How many seeds find `wrong` after running the kernel, an error of the simulator's included.
inline int SeedsThatNotice(const sim::Grid& grid, const std::function<void()>& body,
                           const std::function<bool()>& wrong) {
  int noticed = 0;
  for (int seed = 1; seed <= kSeeds; ++seed) {
    sim::SetSeed(static_cast<uint64_t>(seed));
    noticed += !sim::RunGrid(grid, body).empty() || wrong();
  }
  return noticed;
}

}  // namespace altiplano
