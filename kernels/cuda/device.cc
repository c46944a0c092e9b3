// The backend's streams and memory on a real GPU, by the CUDA runtime.
#include "kernels/device.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

#include "kernels/cpu/thread_team.h"
#include "kernels/cuda/architectures.h"
#include "kernels/cuda/backend.h"
#include "kernels/cuda/cublaslt.h"

namespace altiplano {

namespace {

std::string CudaVersion() {
  return "CUDA " + std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
}

std::string Sentence(cudaError_t error) {
  if (error == cudaErrorInsufficientDriver) return "no NVIDIA driver, or one too old for " + CudaVersion();
  return std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
}

cudaStream_t StreamOf(void* stream) {
  return static_cast<cudaStream_t>(stream);
}
cudaEvent_t EventOf(void* event) {
  return static_cast<cudaEvent_t>(event);
}

// Empty, or what it says. The caller tells of it, and no later call of the thread that asks for the last error.
std::string Told(cudaError_t result) {
  if (result == cudaSuccess || result == cudaErrorNotReady) return "";
  cudaGetLastError();
  return Sentence(result);
}

// Of the calling thread, and forgotten: that it launched something impossible. What its questions were answered (not
// ready) is no error; CUDA's guide says that it is not told either, PyTorch clears it all the same.
cudaError_t TakeError() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaErrorNotReady ? cudaSuccess : error;
}

// Of the calling thread; -1: it has none. The runtime would say 0 then, and going back to that makes a context there.
thread_local int current_gpu = -1;
// One that some thread has chosen, or -1.
std::atomic<int> some_gpu{-1};

cudaError_t Choose(int ordinal) {
  const cudaError_t result = cudaSetDevice(ordinal);
  if (result == cudaSuccess) some_gpu = current_gpu = ordinal;
  return result;
}

// Before a call for which any GPU will do, since its handle says which is meant: from a thread that has none the
// runtime makes a context on GPU 0 for that.
void NeedAnyGpu() {
  if (current_gpu < 0 && some_gpu >= 0) Told(cudaSetDevice(some_gpu));
}

// The calling thread's current GPU, for as long as this lives.
class CurrentGpu {
 public:
  explicit CurrentGpu(int ordinal) : before_(current_gpu) {
    if (before_ != ordinal) error_ = Told(Choose(ordinal));
  }
  ~CurrentGpu() {
    if (before_ >= 0 && before_ != current_gpu) cudaSetDevice(before_);
    current_gpu = before_;
  }
  CurrentGpu(const CurrentGpu&) = delete;
  CurrentGpu& operator=(const CurrentGpu&) = delete;
  bool good() const { return error_.empty(); }
  const std::string& error() const { return error_; }

 private:
  const int before_;
  std::string error_;
};

// Written once, before the GPU's first stream is handed out; read without a lock by whoever has one.
constexpr int kMostGpus = 256;
cuda::GpuProperties gpu_properties[kMostGpus];
std::mutex gpu_properties_mutex;

// What a refused call returned is told by its caller, not by the stream too.
template <typename Pointer>
Pointer OrNull(cudaError_t result, const Pointer& made) {
  if (result == cudaSuccess) return made;
  cudaGetLastError();
  return nullptr;
}

}  // namespace

std::unique_ptr<Stream> MakeCudaStream(int ordinal, std::string* error) {
  int count = 0;
  cudaError_t result = cudaGetDeviceCount(&count);
  count = std::min(count, kMostGpus);
  if (result == cudaSuccess && (ordinal < 0 || ordinal >= count)) {
    *error = "no GPU " + std::to_string(ordinal) + ", this machine has " + std::to_string(count);
    return nullptr;
  }
  cudaDeviceProp device;
  if (result == cudaSuccess) result = cudaGetDeviceProperties(&device, ordinal);
  if (result == cudaSuccess) {
    const int capability = device.major * 10 + device.minor;
    *error = cuda::WhyRefused(ordinal, device.name, capability, ALTIPLANO_CUDA_ARCHITECTURES);
    if (!error->empty()) return nullptr;
    std::lock_guard lock(gpu_properties_mutex);
    cuda::GpuProperties& known = gpu_properties[ordinal];
    if (known.architecture == nullptr) known = {cuda::FindArchitecture(capability), device.multiProcessorCount};
  }
  cudaStream_t stream = nullptr;
  if (result == cudaSuccess) result = Choose(ordinal);
  if (result == cudaSuccess) result = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  if (result != cudaSuccess) {
    cudaGetLastError();  // the caller learns of it
    *error = "GPU " + std::to_string(ordinal) + ": " + Sentence(result);
    return nullptr;
  }
  return std::unique_ptr<Stream>(new Stream(Device::kCuda, ordinal, nullptr, stream));
}

namespace cuda {

std::string DescribeBuild() {
  return CudaVersion() + ", kernels for " + TargetNames(ALTIPLANO_CUDA_ARCHITECTURES);
}

int CountGpus() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();
  return 0;
}

void DestroyStream(void* stream) {
  NeedAnyGpu();
  ForgetCublasLt(stream);
  cudaStreamDestroy(StreamOf(stream));
}

// A launch that was refused leaves its error with the thread and not with the stream.
std::string Synchronize(void* stream) {
  NeedAnyGpu();
  cudaError_t result = TakeError();
  if (result == cudaSuccess) result = cudaStreamSynchronize(StreamOf(stream));
  return Told(result);
}

std::string Error(void* stream) {
  NeedAnyGpu();
  cudaError_t result = TakeError();
  if (result == cudaSuccess) result = cudaStreamQuery(StreamOf(stream));
  return Told(result);
}

void UseGpu(int ordinal) {
  Choose(ordinal);  // it worked when the stream was opened
}

// To ask may load the kernel, and so wait for the GPU and for a kernel there that waits for another GPU's rank, which
// must not wait for this: each GPU has a lock of its own.
void AskForShared(const void* kernel, int ordinal, uint32_t bytes) {
  struct OfGpu {
    std::mutex mutex;
    std::map<const void*, uint32_t> asked;  // guarded by mutex
  };
  static auto& of_gpus = *new std::array<OfGpu, kMostGpus>();
  OfGpu& of = of_gpus[static_cast<size_t>(ordinal)];
  std::lock_guard lock(of.mutex);
  uint32_t& before = of.asked[kernel];
  if (bytes <= before) return;
  const cudaError_t result =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (result == cudaSuccess) before = bytes;  // else Synchronize and Error tell of it
}

const GpuProperties& PropertiesOf(const Stream& stream) {
  return gpu_properties[stream.ordinal()];
}

// An ordinal is not enough: it counts what CUDA_VISIBLE_DEVICES leaves.
std::string Address(int ordinal) {
  cudaDeviceProp device;
  if (cudaGetDeviceProperties(&device, ordinal) != cudaSuccess) return "a GPU that does not answer";
  char address[32];
  std::snprintf(address, sizeof address, "PCI %04X:%02X:%02X.0", static_cast<unsigned>(device.pciDomainID),
                static_cast<unsigned>(device.pciBusID), static_cast<unsigned>(device.pciDeviceID));
  return address;
}

std::string Describe(int ordinal) {
  cudaDeviceProp device;
  if (cudaGetDeviceProperties(&device, ordinal) != cudaSuccess) return "a GPU that does not answer";
  return std::string(device.name) + ", sm_" + std::to_string(device.major) + std::to_string(device.minor) + ", " +
         std::to_string(device.totalGlobalMem / 1000000000) + " GB, " + DescribeCublasLt();
}

void* CreateEvent(int ordinal, bool timed) {
  const CurrentGpu gpu(ordinal);
  cudaEvent_t event = nullptr;
  const unsigned flags = cudaEventBlockingSync | (timed ? 0 : cudaEventDisableTiming);
  return gpu.good() ? OrNull(cudaEventCreateWithFlags(&event, flags), event) : nullptr;
}

void DestroyEvent(void* event) {
  NeedAnyGpu();
  cudaEventDestroy(EventOf(event));
}

void RecordEvent(void* event, void* stream) {
  cudaEventRecord(EventOf(event), StreamOf(stream));  // Error tells of its error
}

bool EventPassed(void* event) {
  NeedAnyGpu();
  const cudaError_t result = cudaEventQuery(EventOf(event));
  Told(result);  // by WaitForEvent
  return result != cudaErrorNotReady;
}

std::string WaitForEvent(void* event) {
  NeedAnyGpu();
  return Told(cudaEventSynchronize(EventOf(event)));
}

std::chrono::nanoseconds TimeBetween(void* earlier, void* later) {
  NeedAnyGpu();
  float milliseconds = 0;
  if (cudaEventElapsedTime(&milliseconds, EventOf(earlier), EventOf(later)) != cudaSuccess) cudaGetLastError();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::duration<float, std::milli>(milliseconds));
}

// Other threads may allocate and wait meanwhile: they serve other GPUs.
std::string BeginCapture(void* stream) {
  cudaError_t result = TakeError();
  if (result == cudaSuccess) result = cudaStreamBeginCapture(StreamOf(stream), cudaStreamCaptureModeThreadLocal);
  return Told(result);
}

void* EndCapture(void* stream, size_t* ops, std::string* error) {
  const cudaError_t refused = TakeError();  // a launch, before it was recorded
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  cudaError_t result = cudaStreamEndCapture(StreamOf(stream), &graph);
  if (refused != cudaSuccess) result = refused;
  if (result == cudaSuccess) result = cudaGraphGetNodes(graph, nullptr, ops);
  if (result == cudaSuccess) result = cudaGraphInstantiate(&executable, graph, 0);
  if (result == cudaSuccess) result = cudaGraphUpload(executable, StreamOf(stream));
  if (graph != nullptr) cudaGraphDestroy(graph);
  if (result == cudaSuccess) return executable;
  cudaGetLastError();  // the caller learns of it
  *error = Sentence(result);
  if (executable != nullptr) cudaGraphExecDestroy(executable);
  return nullptr;
}

void LaunchGraph(void* graph, void* stream) {
  cudaGraphLaunch(static_cast<cudaGraphExec_t>(graph), StreamOf(stream));  // Error tells of its error
}

void DestroyGraph(void* graph) {
  NeedAnyGpu();
  cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(graph));
}

void StreamWaitsFor(void* stream, void* event) {
  cudaStreamWaitEvent(StreamOf(stream), EventOf(event), 0);  // Error tells of its error
}

void* Allocate(int ordinal, size_t bytes) {
  const CurrentGpu gpu(ordinal);
  void* data = nullptr;
  return gpu.good() ? OrNull(cudaMalloc(&data, bytes), data) : nullptr;
}

void Free(void* data) {
  NeedAnyGpu();
  cudaFree(data);
}

void SynchronizeGpu(int ordinal) {
  const CurrentGpu gpu(ordinal);
  if (gpu.good()) Told(cudaDeviceSynchronize());  // its error is the streams'
}

std::string EnablePeerAccess(const std::vector<int>& ordinals) {
  int count = 0;
  if (std::string error = Told(cudaGetDeviceCount(&count)); !error.empty()) return error;
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
      const CurrentGpu gpu(from);
      if (!gpu.good()) return pair + gpu.error();
      cudaError_t result = cudaDeviceCanAccessPeer(&can, from, to);
      if (result == cudaSuccess && can == 0) return pair + "no way between them";
      if (result == cudaSuccess) result = cudaDeviceEnablePeerAccess(to, 0);
      const std::string error = Told(result);
      if (!error.empty() && result != cudaErrorPeerAccessAlreadyEnabled) return pair + error;
    }
  }
  return "";
}

void* AllocateShared(size_t bytes) {
  NeedAnyGpu();
  void* data = nullptr;
  if (cudaHostAlloc(&data, bytes, cudaHostAllocPortable | cudaHostAllocMapped) == cudaSuccess) {
    std::memset(data, 0, bytes);
    return data;
  }
  cudaGetLastError();
  return nullptr;
}

void FreeShared(void* data) {
  NeedAnyGpu();
  cudaFreeHost(data);
}

void* AllocatePinned(int ordinal, size_t bytes) {
  const CurrentGpu gpu(ordinal);
  void* data = nullptr;
  return gpu.good() ? OrNull(cudaHostAlloc(&data, bytes, cudaHostAllocPortable), data) : nullptr;
}

void FreePinned(void* data) {
  NeedAnyGpu();
  cudaFreeHost(data);
}

void Copy(void* stream, void* to, Device, const void* from, Device, size_t bytes) {
  cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, StreamOf(stream));  // Synchronize tells of its error
}

void Zero(void* stream, void* data, size_t bytes) {
  cudaMemsetAsync(data, 0, bytes, StreamOf(stream));
}

MemoryInfo QueryMemory(int ordinal) {
  const CurrentGpu gpu(ordinal);
  MemoryInfo info;
  if (!gpu.good() || cudaMemGetInfo(&info.free_bytes, &info.total_bytes) != cudaSuccess) {
    cudaGetLastError();
    return {};
  }
  return info;
}

}  // namespace cuda
}  // namespace altiplano
