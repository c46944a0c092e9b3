// The device side of ptx.h: inline PTX for sm_80 and later.
#pragma once

#include <cstdint>

#include "kernels/tensor.h"

#define PTX_FUNCTION __device__ __forceinline__
#define PTX_UNROLL _Pragma("unroll")
// Before a loop that must stay one, where copies of its body would take too many registers.
#define PTX_KEEP_LOOP _Pragma("unroll 1")
#define PTX_CALLER
#define PTX_PASS_CALLER
// A __shared__ variable, one per place in the source and instantiation.
#define PTX_SHARED(type, name, count) __shared__ type name[count]

namespace altiplano::ptx {

// The launch's dynamic shared memory.
PTX_FUNCTION void* DynamicShared() {
  extern __shared__ __align__(1024) unsigned char dynamic_shared[];
  return dynamic_shared;
}
PTX_FUNCTION uint32_t SharedAddress(const void* data) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(data));
}

// ---- barriers of some of a block's warps, 1 to 15 (__syncthreads has 0). `threads` are whole warps, all lanes of
// which come together, and the same number for all who come. When as many have come, those who wait go on and see what
// all had written before they came, and the barrier is as new.
PTX_FUNCTION void NamedBarrierSync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// Comes without a wait. Before the barrier is as new, the warp must not come again.
PTX_FUNCTION void NamedBarrierArrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- memory. T has 1, 2, 4, 8 or 16 bytes.
template <typename T>
PTX_FUNCTION T LdGlobal(const T* from) {
  return *from;
}
// Of what no kernel writes, so that it may be loaded before the wait for the kernels before, and nobody reads again
// soon: the weights.
PTX_FUNCTION uint4 LdGlobalOnce(const uint4* from) {
  uint4 v;
  // Not .nc: ptxas moves such loads behind a wait for the kernels before.
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from)
               : "memory");
  return v;
}
template <typename T>
PTX_FUNCTION T LdGlobalOnce(const T* from) {
  return *from;
}
template <typename T>
PTX_FUNCTION void StGlobal(T* to, T value) {
  *to = value;
}
// Of vectors nvcc makes single words here and there.
PTX_FUNCTION void StGlobal(uint2* to, uint2 value) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(value.x), "r"(value.y) : "memory");
}
PTX_FUNCTION void StGlobal(uint4* to, uint4 value) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w)
               : "memory");
}
template <typename T>
PTX_FUNCTION T LdShared(const T* from) {
  return *from;
}
template <typename T>
PTX_FUNCTION void StShared(T* to, T value) {
  *to = value;
}

// ---- numbers
// Rounds to nearest even, `low` into the lower half.
PTX_FUNCTION uint32_t PackBF16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
PTX_FUNCTION BF16 RoundBF16(float x) {
  BF16 rounded;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(x));
  return rounded;
}
PTX_FUNCTION float FloatOfBits(uint32_t bits) {
  return __uint_as_float(bits);
}
PTX_FUNCTION uint32_t BitsOfFloat(float x) {
  return __float_as_uint(x);
}
// 2^x within a relative error of 2^-22, exactly 1 for 0; what would be subnormal may be zero.
PTX_FUNCTION float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
PTX_FUNCTION float Divide(float x, float y) {
  return __fdiv_rn(x, y);
}

// Rounded each for itself: never one fused operation.
PTX_FUNCTION float Add(float x, float y) {
  return __fadd_rn(x, y);
}
PTX_FUNCTION float Multiply(float x, float y) {
  return __fmul_rn(x, y);
}
// To nearest, ties to even; x is not negative.
PTX_FUNCTION uint64_t RoundToInteger(double x) {
  return __double2ull_rn(x);
}
// The upper half of the product.
PTX_FUNCTION uint64_t MultiplyHigh(uint64_t x, uint64_t y) {
  return __umul64hi(x, y);
}

// Atomic; orders nothing.
template <typename T>
PTX_FUNCTION void AddShared(T* to, T value) {
  atomicAdd_block(to, value);
}

// ---- between GPUs and with the host
// What was stored before a release is seen by whoever has acquired what it wrote.
PTX_FUNCTION uint32_t LdAcquireSys(const uint32_t* from) {
  uint32_t value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}
PTX_FUNCTION uint32_t LdRelaxedSys(const uint32_t* from) {
  uint32_t value;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}
PTX_FUNCTION void StReleaseSys(uint32_t* to, uint32_t value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}
PTX_FUNCTION void StRelaxedSys(uint32_t* to, uint32_t value) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}
// Atomic on this GPU, whose blocks it orders: a release and an acquire. What was there before.
PTX_FUNCTION uint32_t AddGlobal(uint32_t* to, uint32_t value) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(to), "r"(value) : "memory");
  return before;
}
// Atomic on this GPU; orders nothing.
PTX_FUNCTION void AddGlobalInAnyOrder(unsigned long long* to, unsigned long long value) {
  atomicAdd(to, value);
}
// Nanoseconds, in coarse ticks.
PTX_FUNCTION uint64_t GlobalTimer() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

// ---- asynchronous copies from global to shared memory
// 16 bytes past the L1 cache; zeros when not `inside`, and `from` is then not read.
PTX_FUNCTION void CpAsync16(void* to, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(SharedAddress(to)), "l"(from), "r"(inside ? 16 : 0)
               : "memory");
}
// All copies issued since the last commit are one group.
PTX_FUNCTION void CpAsyncCommit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Until at most the kPending youngest groups of this thread are under way.
template <int kPending>
PTX_FUNCTION void CpAsyncWait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- kernels that overlap (LaunchOverlapping)
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
inline constexpr bool kKernelsOverlap = true;
#else
inline constexpr bool kKernelsOverlap = false;
#endif
// The kernel after this one may start when all blocks have come here, if it was launched to overlap.
PTX_FUNCTION void LetNextKernelStart() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Until the kernels before this one have ended and what they stored is seen. Nothing where the kernel was launched
// without overlap.
PTX_FUNCTION void WaitForKernelsBefore() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Has bytes, a multiple of 16 from such an address on, brought to L2, where a later load finds them. It reads nothing:
// it may come before the wait for the kernels before.
PTX_FUNCTION void PrefetchL2([[maybe_unused]] const void* from, [[maybe_unused]] uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(__cvta_generic_to_global(from)), "r"(bytes)
               : "memory");
#endif
}

// ---- matrices of a warp
// Four 8x8 matrices of 16-bit elements; `row` is one of their 32 rows. A lane receives two neighbours of a row each.
PTX_FUNCTION void LdMatrixX4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(SharedAddress(row))
               : "memory");
}
// The same, of the transposed matrices.
PTX_FUNCTION void LdMatrixX4Transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(SharedAddress(row))
               : "memory");
}
// d += a b, of bf16: a is 16 x 16, b 16 x 8, d 16 x 8 in f32.
PTX_FUNCTION void Mma16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace altiplano::ptx
