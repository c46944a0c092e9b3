#include "kernels/device.h"

#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <limits>
#include <sstream>
#include <vector>

#include "kernels/cpu/cpu_features.h"
#include "kernels/cpu/linear.h"
#include "kernels/cpu/thread_team.h"
#include "kernels/cuda/backend.h"

namespace altiplano {

namespace {

constexpr size_t kPage = 4096;
constexpr size_t kHugePage = size_t{2} << 20;
// Below this the system's answer is not worth a look at /proc.
constexpr size_t kCheckedAllocation = size_t{64} << 20;

std::atomic<uint64_t> device_allocations{0};

[[noreturn]] void Die(const char* sentence) {
  std::fprintf(stderr, "%s\n", sentence);
  std::abort();
}

std::string FirstWord(const std::string& path) {
  std::ifstream file(path);
  std::string word;
  file >> word;
  return word;
}

// The control groups (version 2) that this process is in, innermost first, as folders.
std::vector<std::string> ControlGroups() {
  std::ifstream file("/proc/self/cgroup");
  std::vector<std::string> folders;
  for (std::string line; std::getline(file, line);) {
    if (line.rfind("0::", 0) != 0) continue;
    std::string path = line.substr(3);
    while (!path.empty() && path != "/") {
      folders.push_back("/sys/fs/cgroup" + path);
      path.erase(path.find_last_of('/'));
    }
  }
  folders.push_back("/sys/fs/cgroup");
  return folders;
}

// Of a control group: what it may still take. Pages of files that it read can be dropped, so they count as free.
void LimitByControlGroup(const std::string& folder, MemoryInfo* info) {
  const std::string limit_text = FirstWord(folder + "/memory.max");
  if (limit_text.empty() || limit_text == "max") return;
  const size_t limit = std::strtoull(limit_text.c_str(), nullptr, 10);
  size_t used = std::strtoull(FirstWord(folder + "/memory.current").c_str(), nullptr, 10);
  std::ifstream stat(folder + "/memory.stat");
  std::string key;
  for (size_t value = 0; stat >> key >> value;) {
    if (key == "inactive_file") used -= std::min(used, value);
  }
  info->total_bytes = std::min(info->total_bytes, limit);
  info->free_bytes = std::min(info->free_bytes, limit - std::min(limit, used));
}

MemoryInfo QueryHostMemory() {
  MemoryInfo info;
  std::ifstream file("/proc/meminfo");
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    std::string key;
    size_t kilobytes = 0;
    words >> key >> kilobytes;
    if (key == "MemTotal:") info.total_bytes = kilobytes << 10;
    if (key == "MemAvailable:") info.free_bytes = kilobytes << 10;
  }
  for (const std::string& folder : ControlGroups()) LimitByControlGroup(folder, &info);
  return info;
}

size_t RoundUp(size_t n, size_t unit) {
  return (n + unit - 1) / unit * unit;
}

size_t MappedBytes(size_t bytes) {
  return RoundUp(std::max<size_t>(bytes, 1), bytes >= kHugePage ? kHugePage : kPage);
}

void* MapHost(size_t bytes) {
  if (bytes > std::numeric_limits<size_t>::max() / 2) return nullptr;
  if (bytes >= kCheckedAllocation) {
    // Linux grants nearly any size and kills the process later, when the pages are touched.
    const MemoryInfo memory = QueryHostMemory();
    if (memory.total_bytes != 0 && bytes > memory.free_bytes) return nullptr;
  }
  const size_t mapped = MappedBytes(bytes);
  const bool huge = bytes >= kHugePage;
  const size_t reserve = huge ? mapped + kHugePage : mapped;
  void* base = mmap(nullptr, reserve, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED) return nullptr;
  if (!huge) return base;
  // Keep the aligned middle.
  const uintptr_t begin = reinterpret_cast<uintptr_t>(base);
  const uintptr_t aligned = RoundUp(begin, kHugePage);
  if (aligned > begin) munmap(base, aligned - begin);
  if (const size_t tail = begin + reserve - (aligned + mapped); tail > 0) {
    munmap(reinterpret_cast<void*>(aligned + mapped), tail);
  }
  madvise(reinterpret_cast<void*>(aligned), mapped, MADV_HUGEPAGE);  // a wish: without it only the TLB suffers
  return reinterpret_cast<void*>(aligned);
}

}  // namespace

int UsableCores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  double cores = sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : 1;
  for (const std::string& folder : ControlGroups()) {
    std::ifstream file(folder + "/cpu.max");  // "max 100000", or quota and period
    double quota = 0, period = 0;
    if (file >> quota >> period && quota > 0 && period > 0) cores = std::min(cores, quota / period);
  }
  return std::max(1, static_cast<int>(std::ceil(cores)));
}

Stream::Stream(Device device, int ordinal, std::unique_ptr<ThreadTeam> team, void* cuda)
    : device_(device), ordinal_(ordinal), team_(std::move(team)), cuda_(cuda) {}

Stream::~Stream() {
  if (cuda_ != nullptr) cuda::DestroyStream(cuda_);
}

std::unique_ptr<Stream> Stream::Cpu(int threads) {
  if (!CpuIsSupported()) Die("This CPU lacks AVX2, FMA or F16C, which Altiplano's CPU backend needs.");
  if (threads <= 0) threads = UsableCores();
  return std::unique_ptr<Stream>(new Stream(Device::kCpu, 0, std::make_unique<ThreadTeam>(threads), nullptr));
}

std::unique_ptr<Stream> Stream::Cuda(int ordinal, std::string* error) {
  return MakeCudaStream(ordinal, error);
}

std::unique_ptr<Stream> Stream::Open(Device device, int ordinal, int threads, std::string* error) {
  return device == Device::kCuda ? Cuda(ordinal, error) : Cpu(threads);
}

void Stream::UseFromThisThread() {
  if (device_ == Device::kCuda) cuda::UseGpu(ordinal_);
}

std::string Stream::Error() {
  return device_ == Device::kCuda ? cuda::Error(cuda_) : std::string();
}

std::string Stream::Synchronize() {
  return device_ == Device::kCuda ? cuda::Synchronize(cuda_) : std::string();  // CPU ops have run when they return
}

std::unique_ptr<StreamEvent> StreamEvent::Create(const Stream& stream, bool timed) {
  if (stream.device() == Device::kCpu) return std::unique_ptr<StreamEvent>(new StreamEvent(nullptr));
  void* event = cuda::CreateEvent(stream.ordinal(), timed);
  return event == nullptr ? nullptr : std::unique_ptr<StreamEvent>(new StreamEvent(event));
}

StreamEvent::~StreamEvent() {
  if (cuda_ != nullptr) cuda::DestroyEvent(cuda_);
}

void StreamEvent::Record(Stream& stream) {
  if (cuda_ == nullptr) {
    recorded_ = std::chrono::steady_clock::now();
  } else {
    cuda::RecordEvent(cuda_, stream.cuda_stream());
  }
}

bool StreamEvent::Passed() const {
  return cuda_ == nullptr || cuda::EventPassed(cuda_);
}

std::string StreamEvent::Wait() const {
  return cuda_ == nullptr ? std::string() : cuda::WaitForEvent(cuda_);
}

void StreamEvent::Precede(Stream& stream) const {
  if (cuda_ != nullptr) cuda::StreamWaitsFor(stream.cuda_stream(), cuda_);
}

std::chrono::nanoseconds StreamEvent::Since(const StreamEvent& earlier) const {
  return cuda_ == nullptr ? recorded_ - earlier.recorded_ : cuda::TimeBetween(earlier.cuda_, cuda_);
}

std::unique_ptr<StepGraph> StepGraph::Capture(Stream& stream, const std::function<bool()>& issue, std::string* error) {
  if (stream.device() != Device::kCuda) Die("StepGraph: the stream is not a GPU's");
  if (*error = cuda::BeginCapture(stream.cuda_stream()); !error->empty()) return nullptr;
  const bool issued = issue();
  size_t ops = 0;
  void* graph = cuda::EndCapture(stream.cuda_stream(), &ops, error);
  std::unique_ptr<StepGraph> captured(graph == nullptr ? nullptr : new StepGraph(graph, ops));
  if (issued) return captured;
  error->clear();
  return nullptr;
}

StepGraph::~StepGraph() {
  cuda::DestroyGraph(cuda_);
}

void StepGraph::Launch(Stream& stream) const {
  cuda::LaunchGraph(cuda_, stream.cuda_stream());
}

Buffer Buffer::Allocate(Device device, size_t bytes, int ordinal) {
  Buffer buffer;
  buffer.data_ = device == Device::kCuda ? cuda::Allocate(ordinal, bytes) : MapHost(bytes);
  if (buffer.data_ == nullptr) return buffer;
  buffer.bytes_ = bytes;
  buffer.device_ = device;
  if (device == Device::kCuda) ++device_allocations;
  return buffer;
}

Buffer Buffer::AllocateHost(const Stream& stream, size_t bytes) {
  if (stream.device() == Device::kCpu) return Allocate(Device::kCpu, bytes);
  Buffer buffer;
  buffer.data_ = cuda::AllocatePinned(stream.ordinal(), bytes);
  if (buffer.data_ == nullptr) return buffer;
  buffer.bytes_ = bytes;
  buffer.pinned_ = true;
  ++device_allocations;
  return buffer;
}

uint64_t Buffer::DeviceAllocations() {
  return device_allocations;
}

Buffer::~Buffer() {
  if (data_ == nullptr) return;
  if (device_ == Device::kCuda) {
    cuda::Free(data_);
  } else if (pinned_) {
    cuda::FreePinned(data_);
  } else {
    munmap(data_, MappedBytes(bytes_));
  }
}

void Copy(Stream& stream, void* to, Device to_device, const void* from, Device from_device, size_t bytes) {
  if (bytes == 0) return;
  if (to_device == Device::kCpu && from_device == Device::kCpu) {
    if (!stream.Synchronize().empty()) return;  // the error is sticky: the caller's own Synchronize reports it
    std::memcpy(to, from, bytes);
    return;
  }
  if (stream.device() != Device::kCuda) Die("Copy: device memory on a CPU stream");
  cuda::Copy(stream.cuda_stream(), to, to_device, from, from_device, bytes);
}

void Zero(Stream& stream, void* data, size_t bytes) {
  if (bytes == 0) return;
  if (stream.device() == Device::kCuda) return cuda::Zero(stream.cuda_stream(), data, bytes);
  std::memset(data, 0, bytes);
}

MemoryInfo QueryMemory(Device device, int ordinal) {
  return device == Device::kCuda ? cuda::QueryMemory(ordinal) : QueryHostMemory();
}

std::string DescribeCuda() {
  return cuda::DescribeBuild();
}

int CountGpus() {
  return cuda::CountGpus();
}

std::string AddressOf(const Stream& stream) {
  return stream.device() == Device::kCuda ? cuda::Address(stream.ordinal()) : "";
}

std::string Describe(const Stream& stream) {
  if (stream.device() == Device::kCuda) return cuda::Describe(stream.ordinal());
  const int threads = stream.team().size();
  return CpuModelName() + ", " + std::to_string(threads) + (threads == 1 ? " thread, " : " threads, ") +
         cpu::LinearBackend();
}

}  // namespace altiplano
