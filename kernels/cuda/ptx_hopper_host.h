// The host side of ptx_hopper.h. ptx_hopper_device.h says what each does.
#pragma once

#include <cstdint>

#include "kernels/cuda/ptx_host.h"
#include "kernels/cuda/sim/registers.h"
#include "kernels/cuda/sim/tensor_map.h"
#include "kernels/cuda/sim/thread.h"

#define PTX_GRID_CONSTANT

namespace altiplano::ptx {

using TensorMap = sim::TensorMap;
inline TensorMap MakeTensorMap(const BF16* data, int64_t rows, int64_t columns, int64_t stride, uint32_t box_rows) {
  return {.data = data,
          .rows = static_cast<uint64_t>(rows),
          .columns = static_cast<uint64_t>(columns),
          .stride_bytes = static_cast<uint64_t>(stride) * sizeof(BF16),
          .box_rows = box_rows};
}

inline void MbarrierInit(uint64_t* barrier, uint32_t arrivals, PTX_SITE) {
  sim::MbarrierInit(barrier, arrivals, site);
}
inline void MbarrierArrive(uint64_t* barrier, PTX_SITE) {
  sim::MbarrierArrive(barrier, 0, site);
}
inline void MbarrierArriveExpecting(uint64_t* barrier, uint32_t bytes, PTX_SITE) {
  sim::MbarrierArrive(barrier, bytes, site);
}
inline void MbarrierWait(uint64_t* barrier, uint32_t parity, PTX_SITE) {
  sim::MbarrierWait(barrier, parity, site);
}

inline void FenceProxyAsync() {
  sim::FenceProxyAsync();
}
inline void CopyBox(void* to, const TensorMap& map, int column, int row, uint64_t* barrier, PTX_SITE) {
  sim::CopyBox(to, map, column, row, barrier, site);
}
inline void CopyBoxOnce(void* to, const TensorMap& map, int column, int row, uint64_t* barrier, PTX_SITE) {
  sim::BoxMaybeEarly(map, column, row);
  sim::CopyBox(to, map, column, row, barrier, site);
}

inline uint32_t SharedAddress(const void* data) {
  return sim::SharedAddress(data);
}
template <int kRegisters>
void GiveRegistersBack(PTX_SITE) {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0);
  sim::GiveRegistersBack(kRegisters, site);
}
template <int kRegisters>
void TakeRegisters(PTX_SITE) {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0);
  sim::TakeRegisters(kRegisters, site);
}

// As many registers as kernels pass, and not a pack: the place of the call comes after them.
inline void WgmmaFence(PTX_SITE) {
  sim::WgmmaFence(site);
}
template <typename A>
void WgmmaFence(A&, PTX_SITE) {
  sim::WgmmaFence(site);
}
template <typename A, typename B>
void WgmmaFence(A&, B&, PTX_SITE) {
  sim::WgmmaFence(site);
}
template <typename A, typename B, typename C>
void WgmmaFence(A&, B&, C&, PTX_SITE) {
  sim::WgmmaFence(site);
}
inline void WgmmaCommit(PTX_SITE) {
  sim::WgmmaCommit(site);
}
template <int kPending>
void WgmmaWait(PTX_SITE) {
  sim::WgmmaWait(kPending, site);
}
template <int kPending, typename A>
void WgmmaWait(A&, PTX_SITE) {
  sim::WgmmaWait(kPending, site);
}
template <int kPending, typename A, typename B>
void WgmmaWait(A&, B&, PTX_SITE) {
  sim::WgmmaWait(kPending, site);
}
template <bool kMnMajor, int kRegisters>
void Wgmma(float (&d)[kRegisters], const uint32_t (&a)[4], uint64_t b, bool accumulate, PTX_SITE) {
  static_assert(kRegisters == 32 || kRegisters == 64, "64 or 128 columns, as in ptx_hopper_device.h");
  sim::Wgmma({.d = d,
              .a = a,
              .a_descriptor = 0,
              .b_descriptor = b,
              .columns = 2 * kRegisters,
              .b_mn_major = kMnMajor,
              .accumulate = accumulate},
             site);
}
template <int kRegisters>
void Wgmma(float (&d)[kRegisters], uint64_t a, uint64_t b, bool accumulate, PTX_SITE) {
  static_assert(kRegisters == 8 || kRegisters == 16 || kRegisters == 32, "as in ptx_hopper_device.h");
  sim::Wgmma({.d = d,
              .a = nullptr,
              .a_descriptor = a,
              .b_descriptor = b,
              .columns = 2 * kRegisters,
              .b_mn_major = false,
              .accumulate = accumulate},
             site);
}

}  // namespace altiplano::ptx
