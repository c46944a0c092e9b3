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

void UseGpu(int ordinal) {
  cudaSetDevice(ordinal);  // it worked when the stream was opened
}

void SynchronizeGpu(int ordinal) {
  cudaSetDevice(ordinal);
  cudaDeviceSynchronize();  // its error is the streams'
}

std::string EnablePeerAccess(const std::vector<int>& ordinals) {
  int count = 0;
  if (cudaError_t result = cudaGetDeviceCount(&count); result != cudaSuccess) return Sentence(result);
  for (int from : ordinals) {
    if (from < 0 || from >= count) {
      return "no GPU " + std::to_string(from) + ", this machine has " + std::to_string(count);
    }
  }
  for (int from : ordinals) {
    for (int to : ordinals) {
      if (from == to) continue;
      const std::string pair = "GPU " + std::to_string(from) + " and the memory of GPU " + std::to_string(to) + ": ";
      int can = 0;
      cudaError_t result = cudaDeviceCanAccessPeer(&can, from, to);
      if (result == cudaSuccess && can == 0) return pair + "no way between them";
      if (result == cudaSuccess) result = cudaSetDevice(from);
      if (result == cudaSuccess) result = cudaDeviceEnablePeerAccess(to, 0);
      if (result == cudaErrorPeerAccessAlreadyEnabled) result = cudaSuccess;
      cudaGetLastError();  // also what was enabled before is told as an error
      if (result != cudaSuccess) return pair + Sentence(result);
    }
  }
  return "";
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
