// The limit of everything that decode does: reading memory once.
#include <cuda_runtime.h>

#include "tests/gpu/gpu_timer.h"

namespace altiplano::gpu {

namespace {

constexpr int kThreads = 512, kInFlight = 8;

// `nowhere` is null, which the compiler does not know: no load can be dropped.
__global__ void __launch_bounds__(kThreads) ReadMemoryKernel(const uint4* data, size_t count, uint32_t* nowhere) {
  const size_t stride = size_t{gridDim.x} * kThreads;
  uint32_t sum = 0;
  for (size_t at = size_t{blockIdx.x} * kThreads + threadIdx.x; at < count; at += stride * kInFlight) {
    uint4 words[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const size_t from = at + stride * i;
      words[i] = from < count ? __ldcs(data + from) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) sum |= words[i].x ^ words[i].y ^ words[i].z ^ words[i].w;
  }
  if (nowhere != nullptr) *nowhere = sum;
}

}  // namespace

void ReadMemory(Stream& stream, const void* data, size_t bytes) {
  int device = 0, multiprocessors = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  ReadMemoryKernel<<<multiprocessors * 4, kThreads, 0, static_cast<cudaStream_t>(stream.cuda_stream())>>>(
      static_cast<const uint4*>(data), bytes / sizeof(uint4), nullptr);
}

}  // namespace altiplano::gpu
