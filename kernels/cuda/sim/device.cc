// The backend's streams and memory, of a GPU that is simulated: Stream::Cuda gives one in programs linked with
// cuda_simulator in place of kernels.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "kernels/cpu/thread_team.h"
#include "kernels/cuda/backend.h"
#include "kernels/cuda/sim/core.h"
#include "kernels/cuda/sim/stream.h"
#include "kernels/trace.h"

namespace altiplano {

namespace {
constexpr size_t kTotalBytes = size_t{1} << 30;
char the_event;  // what is issued runs at once, so that events have no state
std::atomic<int> gpus{1};
std::atomic<const cuda::Architecture*> architecture{&cuda::kHopper};
}  // namespace

void sim::SetGpus(int n) {
  gpus = n;
}

void sim::SetArchitecture(const cuda::Architecture& simulated) {
  architecture = &simulated;
}

const cuda::Architecture& sim::CurrentArchitecture() {
  return *architecture;
}

std::unique_ptr<Stream> MakeCudaStream(int ordinal, std::string* error) {
  if (ordinal < 0 || ordinal >= gpus) {
    *error = "no simulated GPU " + std::to_string(ordinal) + ", only 0";
    if (gpus > 1) *error += " to " + std::to_string(gpus - 1);
    return nullptr;
  }
  return std::unique_ptr<Stream>(new Stream(Device::kCuda, ordinal, nullptr, sim::CreateStream()));
}

namespace cuda {

void DestroyStream(void* stream) {
  sim::DestroyStream(stream);
}

std::string Synchronize(void*) {
  if (sim::ForbiddenInCapture("a wait for the stream")) return "a wait for a stream that is captured";
  return sim::StuckError();
}

std::string Error(void*) {
  if (sim::ForbiddenInCapture("a look at the stream")) return "a look at a stream that is captured";
  return sim::StuckError();
}

const Architecture& ArchitectureOf(const Stream&) {
  return sim::CurrentArchitecture();
}

std::string Describe(int) {
  return "simulated GPU";
}

void UseGpu(int) {}

void* CreateEvent(int) {
  return &the_event;
}

void DestroyEvent(void*) {}

void RecordEvent(void*, void*) {
  sim::ForbiddenInCapture("an event that the host waits for");
}

bool EventPassed(void*) {
  sim::ForbiddenInCapture("a look at an event");
  return true;
}

std::string WaitForEvent(void*) {
  sim::ForbiddenInCapture("a wait for an event");
  return sim::StuckError();
}

std::string BeginCapture(void* stream) {
  return sim::BeginCapture(stream);
}

void* EndCapture(void* stream, size_t* ops, std::string* error) {
  return sim::EndCapture(stream, ops, error);
}

void LaunchGraph(void* graph, void* stream) {
  sim::LaunchGraph(graph, stream);
}

void DestroyGraph(void* graph) {
  sim::DestroyGraph(graph);
}

void* Allocate(int, size_t bytes) {
  if (sim::ForbiddenInCapture("an allocation")) return nullptr;
  return bytes > QueryMemory(0).free_bytes ? nullptr : sim::AllocateDevice(bytes);
}

void Free(void* data) {
  sim::ForbiddenInCapture("a release of memory");
  sim::FreeDevice(data);
}

void SynchronizeGpu(int) {
  sim::ForbiddenInCapture("a wait for the GPU");
}

void BeginTraceRange(const char*, uint64_t) {}
void EndTraceRange() {}

std::string EnablePeerAccess(const std::vector<int>& ordinals) {
  std::string error;
  for (int ordinal : ordinals) {
    if (MakeCudaStream(ordinal, &error) == nullptr) break;
  }
  return error;
}

void* AllocateShared(size_t bytes) {
  void* data = sim::AllocateDevice(bytes);
  std::memset(data, 0, bytes);
  return data;
}

void FreeShared(void* data) {
  sim::FreeDevice(data);
}

void* AllocatePinned(int, size_t bytes) {
  return sim::ForbiddenInCapture("an allocation") ? nullptr : sim::AllocatePinned(bytes);
}

void FreePinned(void* data) {
  sim::ForbiddenInCapture("a release of memory");
  sim::FreePinned(data);
}

void Copy(void* stream, void* to, Device to_device, const void* from, Device from_device, size_t bytes) {
  for (const auto& [device, data] :
       {std::pair(to_device, static_cast<const void*>(to)), std::pair(from_device, from)}) {
    if (device == Device::kCpu && !sim::IsPinned(data, bytes)) {
      sim::ForbiddenInCapture("a copy of host memory that is not pinned");
    }
  }
  sim::Issue(stream, [=] {
    if (to_device == Device::kCuda && !sim::IsDeviceMemory(to, bytes)) {
      return sim::Stick("a copy of " + std::to_string(bytes) + " bytes to outside of device memory");
    }
    if (from_device == Device::kCuda && !sim::IsDeviceMemory(from, bytes)) {
      return sim::Stick("a copy of " + std::to_string(bytes) + " bytes from outside of device memory");
    }
    if (sim::StuckError().empty()) std::memcpy(to, from, bytes);
  });
}

void Zero(void* stream, void* data, size_t bytes) {
  sim::Issue(stream, [=] {
    if (!sim::IsDeviceMemory(data, bytes)) {
      return sim::Stick("zeros for " + std::to_string(bytes) + " bytes outside of device memory");
    }
    if (sim::StuckError().empty()) std::memset(data, 0, bytes);
  });
}

MemoryInfo QueryMemory(int) {
  return {.free_bytes = kTotalBytes - std::min(kTotalBytes, sim::LiveDeviceBytes()), .total_bytes = kTotalBytes};
}

}  // namespace cuda
}  // namespace altiplano
