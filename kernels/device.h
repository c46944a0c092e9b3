// Devices as the model sees them: streams that run ops in order, buffers that own memory, events that order streams.
//
// A CPU stream owns a fixed team of threads and runs each op to its end before returning. A CUDA stream returns at
// once. Errors: what the operator can cause (no device, out of memory) is reported by value; a broken invariant dies.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>

#include "kernels/tensor.h"

namespace altiplano {

class ThreadTeam;  // kernels/cpu/thread_team.h

// Owner: one thread issues ops on a stream at a time.
class Stream {
 public:
  // threads: the team that works on each op, the calling thread included. 0: one for each core this process may use.
  static std::unique_ptr<Stream> Cpu(int threads = 0);
  // Null with *error set when there is no usable GPU `ordinal`, or when the program was built without CUDA.
  static std::unique_ptr<Stream> Cuda(int ordinal, std::string* error);
  // Either of the two.
  static std::unique_ptr<Stream> Open(Device device, int ordinal, int threads, std::string* error);
  ~Stream();

  Device device() const { return device_; }
  int ordinal() const { return ordinal_; }     // CUDA only: of its GPU
  ThreadTeam& team() const { return *team_; }  // CPU only
  void* cuda_stream() const { return cuda_; }  // CUDA only: a cudaStream_t
  // Each thread but the one that opened the stream calls this before it issues ops: they go to the stream's GPU.
  void UseFromThisThread();
  // Waits until all ops issued so far are done. Empty string, or the device's (sticky) error.
  std::string Synchronize();
  // What is known without waiting: that this thread issued something impossible, or the device's (sticky) error.
  std::string Error();

 private:
  Stream(Device device, int ordinal, std::unique_ptr<ThreadTeam> team, void* cuda);
  friend std::unique_ptr<Stream> MakeCudaStream(int, std::string*);

  const Device device_;
  const int ordinal_;
  const std::unique_ptr<ThreadTeam> team_;
  void* const cuda_;
};

// A point in a stream's work, set again and again. On the CPU it has been passed when Record returns. Record: the
// stream's owner; the others: any thread, once Record has returned.
class StreamEvent {
 public:
  // Null when the device has no more. timed: Since may be asked; such events cost a GPU a little more.
  static std::unique_ptr<StreamEvent> Create(const Stream& stream, bool timed = false);
  ~StreamEvent();

  void Record(Stream& stream);
  bool Passed() const;       // also after an error
  std::string Wait() const;  // empty, or the device's (sticky) error
  // What is issued on `stream`, of whichever GPU, from now on waits there for the point; the caller does not.
  void Precede(Stream& stream) const;
  // Both are timed, of streams of one GPU (or the CPU), and have been passed.
  std::chrono::nanoseconds Since(const StreamEvent& earlier) const;

 private:
  explicit StreamEvent(void* cuda) : cuda_(cuda) {}
  void* const cuda_;                                // null on the CPU
  std::chrono::steady_clock::time_point recorded_;  // on the CPU
};

// Ops that a stream has recorded instead of running them, and that one call then starts again and again, on the same
// arguments: what is to change from one launch to the next must lie in memory that they point to. CUDA only.
class StepGraph {
 public:
  // Records what `issue` issues on the stream from the calling thread. It must neither allocate nor wait, nor copy from
  // or to host memory that is not pinned, and every op of its kind should have run before: drivers load code lazily.
  // Null with *error, which is empty when issue returned false.
  static std::unique_ptr<StepGraph> Capture(Stream& stream, const std::function<bool()>& issue, std::string* error);
  ~StepGraph();
  StepGraph(const StepGraph&) = delete;
  StepGraph& operator=(const StepGraph&) = delete;

  // As an op of the stream: returns at once, and errors are the stream's.
  void Launch(Stream& stream) const;
  size_t ops() const { return ops_; }

 private:
  StepGraph(void* cuda, size_t ops) : cuda_(cuda), ops_(ops) {}
  void* const cuda_;
  const size_t ops_;
};

// Device memory, 64-byte aligned (CPU: huge pages where the system grants them), released on destruction. Contents
// start undefined except on the CPU, where they are zero.
class Buffer {
 public:
  Buffer() = default;
  // An empty Buffer when the memory cannot be had. `ordinal`: of the GPU.
  static Buffer Allocate(Device device, size_t bytes, int ordinal = 0);
  static Buffer Allocate(const Stream& stream, size_t bytes) {
    return Allocate(stream.device(), bytes, stream.ordinal());
  }
  // Host memory for Copy to and from the stream's device: pinned for a GPU, so that copies do not wait.
  static Buffer AllocateHost(const Stream& stream, size_t bytes);
  // How many buffers there have ever been that a GPU knows of, pinned ones too.
  static uint64_t DeviceAllocations();
  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    std::swap(device_, other.device_);
    std::swap(pinned_, other.pinned_);
    return *this;
  }
  ~Buffer();

  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  Device device() const { return device_; }
  explicit operator bool() const { return data_ != nullptr; }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
  Device device_ = Device::kCpu;
  bool pinned_ = false;  // host memory that a GPU knows of
};

// Host <-> device or device <-> device, in stream order. Host memory must stay valid until Synchronize.
void Copy(Stream& stream, void* to, Device to_device, const void* from, Device from_device, size_t bytes);
// Memory of the stream's device, in stream order.
void Zero(Stream& stream, void* data, size_t bytes);

// Cores that this process may use: its affinity and its control group's quota.
int UsableCores();

struct MemoryInfo {
  size_t free_bytes = 0;  // CPU: what the system (or the cgroup) would still give
  size_t total_bytes = 0;
};
MemoryInfo QueryMemory(Device device, int ordinal = 0);

// "CUDA 13.0, kernels for sm_80, sm_89 and sm_90a", or "built without CUDA".
std::string DescribeCuda();

// That the driver shows; 0 without one, and without CUDA.
int CountGpus();

// One line for logs: "AMD EPYC 9B14, 2 threads, avx512_bf16" or "NVIDIA H200, sm_90, 141 GB".
std::string Describe(const Stream& stream);
// Which of the machine's GPUs it is: "PCI 0000:1B:00.0". Empty on the CPU.
std::string AddressOf(const Stream& stream);

}  // namespace altiplano
