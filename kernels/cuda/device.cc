// The backend's streams and memory on a real GPU, by the CUDA runtime.
#include "kernels/device.h"

#include <cuda_runtime_api.h>

#include <cstring>
#include <string>

#include "kernels/cpu/thread_team.h"
#include "kernels/cuda/backend.h"
#include "kernels/cuda/cublaslt.h"

namespace altiplano {

namespace {

std::string Sentence(cudaError_t error) {
  return std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
}

cudaStream_t StreamOf(void* stream) {
  return static_cast<cudaStream_t>(stream);
}

}  // namespace

std::unique_ptr<Stream> MakeCudaStream(int ordinal, std::string* error) {
  int count = 0;
  cudaError_t result = cudaGetDeviceCount(&count);
  if (result == cudaSuccess && (ordinal < 0 || ordinal >= count)) {
    *error = "no GPU " + std::to_string(ordinal) + ", this machine has " + std::to_string(count);
    return nullptr;
  }
  cudaStream_t stream = nullptr;
  if (result == cudaSuccess) result = cudaSetDevice(ordinal);
  if (result == cudaSuccess) result = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  if (result != cudaSuccess) {
    *error = "GPU " + std::to_string(ordinal) + ": " + Sentence(result);
    return nullptr;
  }
  cuda::PrepareCublasLt(stream);
  return std::unique_ptr<Stream>(new Stream(Device::kCuda, nullptr, stream));
}

namespace cuda {

void DestroyStream(void* stream) {
  ForgetCublasLt(stream);
  cudaStreamDestroy(StreamOf(stream));
}

// A launch that was refused leaves its error with the thread and not with the stream.
std::string Synchronize(void* stream) {
  cudaError_t result = cudaGetLastError();
  if (result == cudaSuccess) result = cudaStreamSynchronize(StreamOf(stream));
  return result == cudaSuccess ? "" : Sentence(result);
}

std::string Describe(void*) {
  int ordinal = 0;
  cudaDeviceProp device;
  if (cudaGetDevice(&ordinal) != cudaSuccess || cudaGetDeviceProperties(&device, ordinal) != cudaSuccess) {
    return "a GPU that does not answer";
  }
  return std::string(device.name) + ", sm_" + std::to_string(device.major) + std::to_string(device.minor) + ", " +
         std::to_string(device.totalGlobalMem / 1000000000) + " GB, " + DescribeCublasLt();
}

void* Allocate(size_t bytes) {
  void* data = nullptr;
  if (cudaMalloc(&data, bytes) == cudaSuccess) return data;
  cudaGetLastError();  // the caller learns of it by the null
  return nullptr;
}

void Free(void* data) {
  cudaFree(data);
}

void* AllocateShared(size_t bytes) {
  void* data = nullptr;
  if (cudaHostAlloc(&data, bytes, cudaHostAllocPortable | cudaHostAllocMapped) == cudaSuccess) {
    std::memset(data, 0, bytes);
    return data;
  }
  cudaGetLastError();
  return nullptr;
}

void FreeShared(void* data) {
  cudaFreeHost(data);
}

void Copy(void* stream, void* to, Device, const void* from, Device, size_t bytes) {
  cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, StreamOf(stream));  // Synchronize tells of its error
}

MemoryInfo QueryMemory(int ordinal) {
  MemoryInfo info;
  if (cudaSetDevice(ordinal) != cudaSuccess || cudaMemGetInfo(&info.free_bytes, &info.total_bytes) != cudaSuccess) {
    cudaGetLastError();
    return {};
  }
  return info;
}

}  // namespace cuda
}  // namespace altiplano
