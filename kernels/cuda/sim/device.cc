// The backend's streams and memory, of a GPU that is simulated: Stream::Cuda gives one in programs linked with
// cuda_simulator in place of kernels.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "kernels/cpu/thread_team.h"
#include "kernels/cuda/backend.h"
#include "kernels/cuda/sim/core.h"

namespace altiplano {

namespace {
constexpr size_t kTotalBytes = size_t{1} << 30;
// What is issued runs at once, so that streams and events have no state.
char the_stream, the_event;
std::atomic<int> gpus{1};
}  // namespace

void sim::SetGpus(int n) {
  gpus = n;
}

std::unique_ptr<Stream> MakeCudaStream(int ordinal, std::string* error) {
  if (ordinal < 0 || ordinal >= gpus) {
    *error = "no simulated GPU " + std::to_string(ordinal) + ", only 0";
    if (gpus > 1) *error += " to " + std::to_string(gpus - 1);
    return nullptr;
  }
  return std::unique_ptr<Stream>(new Stream(Device::kCuda, ordinal, nullptr, &the_stream));
}

namespace cuda {

void DestroyStream(void*) {}

std::string Synchronize(void*) {
  return sim::StuckError();
}

std::string Error(void*) {
  return sim::StuckError();
}

std::string Describe(int) {
  return "simulated GPU";
}

void UseGpu(int) {}

void* CreateEvent(int) {
  return &the_event;
}

void DestroyEvent(void*) {}

void RecordEvent(void*, void*) {}

bool EventPassed(void*) {
  return true;
}

std::string WaitForEvent(void*) {
  return sim::StuckError();
}

void* Allocate(int, size_t bytes) {
  return bytes > QueryMemory(0).free_bytes ? nullptr : sim::AllocateDevice(bytes);
}

void Free(void* data) {
  sim::FreeDevice(data);
}

void SynchronizeGpu(int) {}

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
  return std::malloc(bytes);
}

void FreePinned(void* data) {
  std::free(data);
}

void Copy(void*, void* to, Device to_device, const void* from, Device from_device, size_t bytes) {
  if (to_device == Device::kCuda && !sim::IsDeviceMemory(to, bytes)) {
    return sim::Stick("a copy of " + std::to_string(bytes) + " bytes to outside of device memory");
  }
  if (from_device == Device::kCuda && !sim::IsDeviceMemory(from, bytes)) {
    return sim::Stick("a copy of " + std::to_string(bytes) + " bytes from outside of device memory");
  }
  if (sim::StuckError().empty()) std::memcpy(to, from, bytes);
}

void Zero(void*, void* data, size_t bytes) {
  if (!sim::IsDeviceMemory(data, bytes)) {
    return sim::Stick("zeros for " + std::to_string(bytes) + " bytes outside of device memory");
  }
  if (sim::StuckError().empty()) std::memset(data, 0, bytes);
}

MemoryInfo QueryMemory(int) {
  return {.free_bytes = kTotalBytes - std::min(kTotalBytes, sim::LiveDeviceBytes()), .total_bytes = kTotalBytes};
}

}  // namespace cuda
}  // namespace altiplano
