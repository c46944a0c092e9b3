// The backend's streams and memory, of a GPU that is simulated: Stream::Cuda gives one in programs linked with
// cuda_simulator in place of kernels.
#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <map>
#include <mutex>
#include <utility>

#include "kernels/cpu/thread_team.h"
#include "kernels/cuda/backend.h"
#include "kernels/cuda/sim/core.h"
#include "kernels/cuda/sim/host_copies.h"
#include "kernels/cuda/sim/stream.h"
#include "kernels/trace.h"

namespace altiplano {

namespace {
constexpr size_t kTotalBytes = size_t{1} << 30;
constexpr int kMostGpus = 8;
std::atomic<int> gpus{1};
std::atomic<uint64_t> host_waits{0};
std::atomic<const cuda::Architecture*> architecture{&cuda::kHopper};

struct Gpu {
  std::string lost;  // guarded by mutex: the error that it was lost with
} all_gpus[kMostGpus];
// But for the host's copies what is issued runs at once, and an event has been passed when it is recorded, by the
// host's clock. Who asks first, and soon, may hear that it has not been.
struct Event {
  explicit Event(const Gpu& of) : gpu(of) {}
  const Gpu& gpu;
  std::chrono::steady_clock::time_point recorded;
  bool unanswered = false;  // guarded by mutex
};
constexpr std::chrono::milliseconds kSoon{1};  // nobody's patience is as short
thread_local int current_gpu = 0;
Event& EventOf(void* event) {
  return *static_cast<Event*>(event);
}
std::mutex mutex;
struct Allocation {
  int gpu;
  size_t bytes;
};
// Guarded by mutex. Alive for the whole process: buffers and streams may be released late.
std::map<const void*, Allocation>& allocations = *new std::map<const void*, Allocation>();
std::map<const void*, const Gpu*>& gpu_of_stream = *new std::map<const void*, const Gpu*>();

// Under the mutex.
std::string ErrorOf(const Gpu& gpu) {
  return gpu.lost.empty() ? sim::StuckError() : gpu.lost;
}
std::string ErrorOfStream(const void* stream) {
  std::lock_guard lock(mutex);
  return ErrorOf(*gpu_of_stream.at(stream));
}
}  // namespace

uint64_t sim::HostWaits() {
  return host_waits;
}
void sim::SetGpus(int n) {
  gpus = std::min(n, kMostGpus);
}

void sim::LoseGpu(int ordinal, const std::string& error) {
  std::lock_guard lock(mutex);
  all_gpus[ordinal].lost = error;
}

int sim::CurrentGpu() {
  return current_gpu;
}

const void* sim::GpuOfStream(const void* stream) {
  std::lock_guard lock(mutex);
  return gpu_of_stream.at(stream);
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
  current_gpu = ordinal;
  void* stream = sim::CreateStream();
  std::lock_guard lock(mutex);
  gpu_of_stream[stream] = &all_gpus[ordinal];
  return std::unique_ptr<Stream>(new Stream(Device::kCuda, ordinal, nullptr, stream));
}

namespace cuda {

std::string DescribeBuild() {
  return "a simulator of CUDA's GPUs";
}

int CountGpus() {
  return gpus;
}

void DestroyStream(void* stream) {
  {
    std::lock_guard lock(mutex);
    gpu_of_stream.erase(stream);
  }
  sim::ForgetPoint(stream);
  sim::DestroyStream(stream);
}

std::string Synchronize(void* stream) {
  if (sim::ForbiddenInCapture("a wait for the stream")) return "a wait for a stream that is captured";
  ++host_waits;
  sim::HostHasWaitedFor(stream);
  return ErrorOfStream(stream);
}

std::string Error(void* stream) {
  if (sim::ForbiddenInCapture("a look at the stream")) return "a look at a stream that is captured";
  return ErrorOfStream(stream);
}

const GpuProperties& PropertiesOf(const Stream&) {
  static constexpr auto kAll = [] {
    std::array<GpuProperties, std::size(kArchitectures)> all;
    for (size_t i = 0; i < all.size(); ++i) all[i] = {&kArchitectures[i], sim::kMultiprocessors};
    return all;
  }();
  return kAll[static_cast<size_t>(&sim::CurrentArchitecture() - kArchitectures)];
}

std::string Address(int ordinal) {
  return "PCI simulated " + std::to_string(ordinal);
}

std::string Describe(int) {
  return "simulated GPU";
}

void UseGpu(int ordinal) {
  current_gpu = ordinal;
}

void* CreateEvent(int ordinal, bool) {
  return new Event(all_gpus[ordinal]);
}

void DestroyEvent(void* event) {
  sim::ForgetPoint(event);
  delete &EventOf(event);
}

void RecordEvent(void* event, void* stream) {
  if (sim::ForbiddenInCapture("an event that the host waits for")) return;
  sim::RecordPoint(event, stream);
  std::lock_guard lock(mutex);
  EventOf(event).unanswered = sim::CurrentRunner().rng.Below(2) == 0;
  EventOf(event).recorded = std::chrono::steady_clock::now();
}

bool EventPassed(void* event) {
  sim::ForbiddenInCapture("a look at an event");
  {
    std::lock_guard lock(mutex);
    Event& asked = EventOf(event);
    const bool soon = std::chrono::steady_clock::now() - asked.recorded < kSoon;
    if (std::exchange(asked.unanswered, false) && soon && ErrorOf(asked.gpu).empty()) return false;
  }
  sim::HostHasWaitedFor(event);
  return true;
}

std::string WaitForEvent(void* event) {
  sim::ForbiddenInCapture("a wait for an event");
  ++host_waits;
  sim::HostHasWaitedFor(event);
  std::lock_guard lock(mutex);
  EventOf(event).unanswered = false;
  return ErrorOf(EventOf(event).gpu);
}

void StreamWaitsFor(void* stream, void* event) {
  if (!sim::ForbiddenInCapture("an event of another stream")) sim::FollowPoint(stream, event);
}

std::chrono::nanoseconds TimeBetween(void* earlier, void* later) {
  return EventOf(later).recorded - EventOf(earlier).recorded;
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

void* Allocate(int ordinal, size_t bytes) {
  if (sim::ForbiddenInCapture("an allocation") || bytes > QueryMemory(ordinal).free_bytes) return nullptr;
  void* data = sim::AllocateDevice(bytes);
  std::lock_guard lock(mutex);
  if (data != nullptr) allocations[data] = {ordinal, bytes};
  return data;
}

void Free(void* data) {
  sim::ForbiddenInCapture("a release of memory");
  {
    std::lock_guard lock(mutex);
    const auto freed = allocations.find(data);
    if (freed != allocations.end()) {
      sim::FinishCopiesOf(data, freed->second.bytes);
      allocations.erase(freed);
    }
  }
  sim::FreeDevice(data);
}

void SynchronizeGpu(int) {
  if (!sim::ForbiddenInCapture("a wait for the GPU")) sim::HostHasWaitedForAll();
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
  sim::Issue(stream, [=](void* on) {
    if (to_device == Device::kCuda && !sim::IsDeviceMemory(to, bytes)) {
      return sim::Stick("a copy of " + std::to_string(bytes) + " bytes to outside of device memory");
    }
    if (from_device == Device::kCuda && !sim::IsDeviceMemory(from, bytes)) {
      return sim::Stick("a copy of " + std::to_string(bytes) + " bytes from outside of device memory");
    }
    if (!sim::StuckError().empty()) return;
    if (to_device == Device::kCpu) return sim::CopyToHost(on, to, from, bytes);
    if (from_device == Device::kCpu) return sim::CopyFromHost(on, to, from, bytes);
    sim::CopyOnDevice(on, to, from, bytes);
  });
}

void Zero(void* stream, void* data, size_t bytes) {
  sim::Issue(stream, [=](void*) {
    if (!sim::IsDeviceMemory(data, bytes)) {
      return sim::Stick("zeros for " + std::to_string(bytes) + " bytes outside of device memory");
    }
    if (sim::StuckError().empty()) std::memset(data, 0, bytes);
  });
}

MemoryInfo QueryMemory(int ordinal) {
  size_t used = 0;
  std::lock_guard lock(mutex);
  for (const auto& [data, allocation] : allocations) {
    if (allocation.gpu == ordinal) used += allocation.bytes;
  }
  return {.free_bytes = kTotalBytes - std::min(kTotalBytes, used), .total_bytes = kTotalBytes};
}

}  // namespace cuda
}  // namespace altiplano
