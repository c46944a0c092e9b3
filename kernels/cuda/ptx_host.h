// The host side of ptx.h: CUDA's own functions under their names, and ours, as calls of the simulator that pass on
// where they were called. ptx_device.h says what each does.
#pragma once

#include <atomic>
#include <cmath>  // also for kernels: sqrtf, fmaf
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels/cuda/sim/cuda_language.h"
#include "kernels/cuda/sim/thread.h"
#include "kernels/tensor.h"

#define threadIdx (::altiplano::sim::Self().thread_idx)
#define blockIdx (::altiplano::sim::Self().block_idx)
#define blockDim (::altiplano::sim::Self().block_dim)
#define gridDim (::altiplano::sim::Self().grid_dim)

#define PTX_FUNCTION inline
#define PTX_UNROLL
#define PTX_KEEP_LOOP
// For functions of ours that kernels call: the last parameter and the argument that carry the place of the call.
#define PTX_CALLER , ::altiplano::sim::Site site = ::altiplano::sim::Site::Current()
#define PTX_PASS_CALLER , site
// A __shared__ variable, one per place in the source and instantiation.
#define PTX_SHARED(type, name, count)                             \
  auto* name = static_cast<type*>(::altiplano::sim::StaticShared( \
      [] {                                                        \
        static const char tag = 0;                                \
        return static_cast<const void*>(&tag);                    \
      }(),                                                        \
      sizeof(type) * (count), alignof(type)))
#define PTX_SITE ::altiplano::sim::Site site = ::altiplano::sim::Site::Current()

inline void __syncthreads(PTX_SITE) {
  altiplano::sim::SyncThreads(site);
}
inline void __syncwarp(unsigned mask = 0xFFFFFFFF, PTX_SITE) {
  altiplano::sim::SyncWarp(mask, site);
}

namespace altiplano::ptx {

template <typename T>
T Shuffle(sim::ShuffleKind kind, unsigned mask, T value, int argument, sim::Site site) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = sim::Shuffle(kind, mask, bits, argument, site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace altiplano::ptx

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, PTX_SITE) {
  return altiplano::ptx::Shuffle(altiplano::sim::ShuffleKind::kXor, mask, value, lanes, site);
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, PTX_SITE) {
  return altiplano::ptx::Shuffle(altiplano::sim::ShuffleKind::kIndex, mask, value, lane, site);
}

namespace altiplano::ptx {

inline void* DynamicShared() {
  return sim::DynamicShared();
}

inline void NamedBarrierSync(int id, int threads, PTX_SITE) {
  sim::NamedBarrierSync(id, threads, site);
}
inline void NamedBarrierArrive(int id, int threads, PTX_SITE) {
  sim::NamedBarrierArrive(id, threads, site);
}

template <typename T>
T LdGlobal(const T* from, PTX_SITE) {
  sim::Access(sim::Memory::kGlobalLoad, from, sizeof(T), site);
#ifndef __SANITIZE_THREAD__  // which sees what was not ordered, and needs no values that show it
  if (sim::Self().together) {
    T value;
    sim::LoadTogether(from, &value, sizeof(T));
    return value;
  }
#endif
  return *from;
}
template <typename T>
T LdGlobalOnce(const T* from, PTX_SITE) {
  sim::LoadsMaybeEarly(from, sizeof(T));
  return LdGlobal(from, site);
}
template <typename T>
void StGlobal(T* to, T value, PTX_SITE) {
  sim::Access(sim::Memory::kGlobalStore, to, sizeof(T), site);
#ifndef __SANITIZE_THREAD__
  if (sim::Self().together) return sim::StoreTogether(to, &value, sizeof(T));
#endif
  *to = value;
}
template <typename T>
T LdShared(const T* from, PTX_SITE) {
  sim::Access(sim::Memory::kSharedLoad, from, sizeof(T), site);
  return *from;
}
template <typename T>
void StShared(T* to, T value, PTX_SITE) {
  sim::Access(sim::Memory::kSharedStore, to, sizeof(T), site);
  *to = value;
}

inline uint32_t PackBF16(float low, float high) {
  return ToBF16(low).bits | static_cast<uint32_t>(ToBF16(high).bits) << 16;
}
inline BF16 RoundBF16(float x) {
  return ToBF16(x);
}
inline float FloatOfBits(uint32_t bits) {
  return __builtin_bit_cast(float, bits);
}
inline uint32_t BitsOfFloat(float x) {
  return __builtin_bit_cast(uint32_t, x);
}
inline float Exp2(float x) {
  return x == 0 ? 1.0f : sim::Inexact(std::exp2(x), 0x1p-22f);
}
inline float Divide(float x, float y) {
  return x / y;
}

inline float Add(float x, float y) {
  return x + y;
}
inline float Multiply(float x, float y) {
  return x * y;
}
inline uint64_t RoundToInteger(double x) {
  return static_cast<uint64_t>(std::llrint(x));
}
inline uint64_t MultiplyHigh(uint64_t x, uint64_t y) {
  return static_cast<uint64_t>(static_cast<unsigned __int128>(x) * y >> 64);
}

template <typename T>
void AddShared(T* to, T value, PTX_SITE) {
  sim::BeforeAtomic(to, sizeof(T), site);
  std::atomic_ref<T>(*to).fetch_add(value, std::memory_order_relaxed);
}

inline uint32_t LdAcquireSys(const uint32_t* from, PTX_SITE) {
  sim::BeforePoll(from, sizeof(*from), site);
  const uint32_t value = std::atomic_ref<uint32_t>(*const_cast<uint32_t*>(from)).load(std::memory_order_acquire);
  sim::AfterPoll(from, true);
  return value;
}
inline uint32_t LdRelaxedSys(const uint32_t* from, PTX_SITE) {
  sim::BeforePoll(from, sizeof(*from), site);
  const uint32_t value = std::atomic_ref<uint32_t>(*const_cast<uint32_t*>(from)).load(std::memory_order_relaxed);
  sim::AfterPoll(from, false);
  return value;
}
inline void StReleaseSys(uint32_t* to, uint32_t value, PTX_SITE) {
  sim::Access(sim::Memory::kGlobalStore, to, sizeof(value), site);
  sim::BeforeRelease();
  std::atomic_ref<uint32_t>(*to).store(value, std::memory_order_release);
  sim::AfterStoringFlag();
}
inline void StRelaxedSys(uint32_t* to, uint32_t value, PTX_SITE) {
  sim::Access(sim::Memory::kGlobalStore, to, sizeof(value), site);
  std::atomic_ref<uint32_t>(*to).store(value, std::memory_order_relaxed);
  sim::AfterStoringFlag();
}
inline uint32_t AddGlobal(uint32_t* to, uint32_t value, PTX_SITE) {
  sim::Access(sim::Memory::kGlobalStore, to, sizeof(value), site);
  sim::BeforeRelease();
  const uint32_t before = std::atomic_ref<uint32_t>(*to).fetch_add(value, std::memory_order_acq_rel);
  sim::AfterStoringFlag();
  sim::AfterAcquire();
  return before;
}
inline void AddGlobalInAnyOrder(unsigned long long* to, unsigned long long value, PTX_SITE) {
  sim::Access(sim::Memory::kGlobalStore, to, sizeof(value), site);
  std::atomic_ref<unsigned long long>(*to).fetch_add(value, std::memory_order_relaxed);
}
inline uint64_t GlobalTimer() {
  return sim::Clock();
}

inline void CpAsync16(void* to, const void* from, bool inside, PTX_SITE) {
  sim::CpAsync(to, from, 16, inside ? 16 : 0, site);
}
inline void CpAsyncCommit() {
  sim::CpAsyncCommit();
}
template <int kPending>
void CpAsyncWait() {
  sim::CpAsyncWait(kPending);
}

inline constexpr bool kKernelsOverlap = true;
inline void WaitForKernelsBefore() {
  sim::WaitForKernelsBefore();
}
inline void LetNextKernelStart(PTX_SITE) {
  sim::LetNextKernelStart(site);
}
inline void PrefetchL2(const void* from, uint32_t bytes, PTX_SITE) {
  sim::PrefetchL2(from, bytes, site);
}

inline void LdMatrixX4(uint32_t (&r)[4], const void* row, PTX_SITE) {
  sim::LdMatrix(r, 4, false, row, site);
}
inline void LdMatrixX4Transposed(uint32_t (&r)[4], const void* row, PTX_SITE) {
  sim::LdMatrix(r, 4, true, row, site);
}
inline void Mma16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], PTX_SITE) {
  sim::Mma16816(d, a, b, site);
}

}  // namespace altiplano::ptx
