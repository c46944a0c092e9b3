// The device side of ptx_hopper.h: inline PTX, and tensor maps by the driver. Compiled for anything but sm_90a,
// whatever reaches these instructions traps.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "kernels/cuda/ptx_device.h"

#define PTX_GRID_CONSTANT __grid_constant__
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define PTX_SM90A(...) asm volatile(__VA_ARGS__)
#else
#define PTX_SM90A(...) __trap()
#endif

namespace altiplano::ptx {

// How TMA sees a matrix of bf16: boxes of 64 columns and `box_rows` rows, zero where they reach beyond the matrix. A
// parameter of kernels, PTX_GRID_CONSTANT.
struct TensorMap {
  CUtensorMap map;
};
// Rows begin at multiples of 16 bytes. The driver is asked for at run time, so that nothing is linked with it.
inline TensorMap MakeTensorMap(const BF16* data, int64_t rows, int64_t columns, int64_t stride, uint32_t box_rows) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    return found == cudaDriverEntryPointSuccess ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function)
                                                : nullptr;
  }();
  TensorMap map;
  CUresult result = CUDA_ERROR_NOT_FOUND;
  if (encode != nullptr) {
    const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
    const cuuint64_t strides[] = {static_cast<cuuint64_t>(stride) * sizeof(BF16)};
    const cuuint32_t box[] = {64, box_rows}, steps[] = {1, 1};
    result = encode(&map.map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<BF16*>(data), sizes, strides, box, steps,
                    CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                    CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  }
  if (result != CUDA_SUCCESS) {
    std::fprintf(stderr, "cuTensorMapEncodeTiled: error %d for %lld rows of %lld columns\n", static_cast<int>(result),
                 static_cast<long long>(rows), static_cast<long long>(columns));
    std::abort();
  }
  return map;
}

// ---- mbarriers: each phase ends when `arrivals` threads have arrived and all bytes that they announced are there.
PTX_FUNCTION void MbarrierInit(uint64_t* barrier, uint32_t arrivals) {
  PTX_SM90A("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(SharedAddress(barrier)), "r"(arrivals) : "memory");
}
PTX_FUNCTION void MbarrierArrive(uint64_t* barrier) {
  PTX_SM90A("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(SharedAddress(barrier)) : "memory");
}
PTX_FUNCTION void MbarrierArriveExpecting(uint64_t* barrier, uint32_t bytes) {
  PTX_SM90A("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(SharedAddress(barrier)), "r"(bytes)
            : "memory");
}
// Until a phase of this parity is over; the first is 0.
PTX_FUNCTION void MbarrierWait(uint64_t* barrier, uint32_t parity) {
  uint32_t over = 0;
  while (over == 0) {
    PTX_SM90A("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
              : "=r"(over)
              : "r"(SharedAddress(barrier)), "r"(parity)
              : "memory");
  }
}

// ---- TMA
// Between this thread's writes to shared memory and what TMA and wgmma do there after a barrier.
PTX_FUNCTION void FenceProxyAsync() {
  PTX_SM90A("fence.proxy.async.shared::cta;" ::: "memory");
}
// The box whose corner is (row, column), into rows of 128 bytes at `to`, swizzled. Takes from the bytes that `barrier`
// waits for.
PTX_FUNCTION void CopyBox(void* to, const TensorMap& map, int column, int row, uint64_t* barrier) {
  PTX_SM90A(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
          "r"(SharedAddress(to)),
      "l"(&map), "r"(column), "r"(row), "r"(SharedAddress(barrier))
      : "memory");
}
// The same of what no kernel writes: it may come before the wait for the kernels before.
PTX_FUNCTION void CopyBoxOnce(void* to, const TensorMap& map, int column, int row, uint64_t* barrier) {
  CopyBox(to, map, column, row, barrier);
}

// ---- registers, which all warps of a warpgroup give back, or take from what others have given back
template <int kRegisters>
PTX_FUNCTION void GiveRegistersBack() {
  PTX_SM90A("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
PTX_FUNCTION void TakeRegisters() {
  PTX_SM90A("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- matrices of a warpgroup
template <int kSize>
PTX_FUNCTION void Touch(float (&registers)[kSize]) {
  PTX_UNROLL
  for (int i = 0; i < kSize; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}
template <int kCount, int kSize>
PTX_FUNCTION void Touch(float (&registers)[kCount][kSize]) {
  PTX_UNROLL
  for (int i = 0; i < kCount; ++i) Touch(registers[i]);
}
template <int kCount, int kSize>
PTX_FUNCTION void Touch(uint32_t (&registers)[kCount][kSize]) {
  PTX_UNROLL
  for (int i = 0; i < kCount * kSize; ++i) asm volatile("" : "+r"(registers[i / kSize][i % kSize])::"memory");
}
// Before the first wgmma, and after a wait before the next: between other accesses to these registers and wgmma's.
template <typename... Registers>
PTX_FUNCTION void WgmmaFence(Registers&... registers) {
  (Touch(registers), ...);
  PTX_SM90A("wgmma.fence.sync.aligned;" ::: "memory");
}
PTX_FUNCTION void WgmmaCommit() {
  PTX_SM90A("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until at most the kPending youngest groups are under way. `registers` are what the others wrote and read.
template <int kPending, typename... Registers>
PTX_FUNCTION void WgmmaWait(Registers&... registers) {
  PTX_SM90A("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
  (Touch(registers), ...);
}

#define PTX_8(d, i)                                                                                           \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])

// d = a b, or d += a b, of bf16: a is 64 x 16, b 16 x N. A lane's registers hold of each matrix of 16 rows what
// Mma16816's do, d for 8 columns after the other. b is found by its descriptor: K-major as it is, else MN-major.
template <bool kMnMajor>
PTX_FUNCTION void Wgmma(float (&d)[32], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  PTX_SM90A(
      "{ .reg .pred p; setp.ne.b32 p, %37, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
      "%24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, p, 1, 1, %38; }"
      : PTX_8(d, 0), PTX_8(d, 8), PTX_8(d, 16), PTX_8(d, 24)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)),
        "n"(static_cast<int>(kMnMajor)));
}
template <bool kMnMajor>
PTX_FUNCTION void Wgmma(float (&d)[64], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  PTX_SM90A(
      "{ .reg .pred p; setp.ne.b32 p, %69, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
      "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, "
      "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "{%64, %65, %66, %67}, %68, p, 1, 1, %70; }"
      : PTX_8(d, 0), PTX_8(d, 8), PTX_8(d, 16), PTX_8(d, 24), PTX_8(d, 32), PTX_8(d, 40), PTX_8(d, 48), PTX_8(d, 56)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)),
        "n"(static_cast<int>(kMnMajor)));
}

// The same with a, too, found by its descriptor, both K-major. A warp has the sums of the 16 rows that begin at its
// number in the warpgroup times 16.
template <int kRegisters>
PTX_FUNCTION void Wgmma(float (&d)[kRegisters], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(kRegisters == 8 || kRegisters == 16 || kRegisters == 32, "16, 32 or 64 columns");
  if constexpr (kRegisters == 8) {
    PTX_SM90A(
        "{ .reg .pred p; setp.ne.b32 p, %10, 0; wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7}, %8, %9, p, 1, 1, 0, 0; }"
        : PTX_8(d, 0)
        : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
  } else if constexpr (kRegisters == 16) {
    PTX_SM90A(
        "{ .reg .pred p; setp.ne.b32 p, %18, 0; wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, %16, %17, p, 1, 1, 0, 0; }"
        : PTX_8(d, 0), PTX_8(d, 8)
        : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
  } else {
    PTX_SM90A(
        "{ .reg .pred p; setp.ne.b32 p, %34, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "
        "%23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, p, 1, 1, 0, 0; }"
        : PTX_8(d, 0), PTX_8(d, 8), PTX_8(d, 16), PTX_8(d, 24)
        : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
  }
}
#undef PTX_8
#undef PTX_SM90A

}  // namespace altiplano::ptx
