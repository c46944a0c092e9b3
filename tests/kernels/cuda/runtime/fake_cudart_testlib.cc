#include "tests/kernels/cuda/runtime/fake_cudart_testlib.h"

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <filesystem>
#include <fstream>
#include <future>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>

namespace altiplano::fake_cudart {
namespace {

enum class Kind { kDevice, kPinned };
struct Memory {
  Kind kind;
  int gpu;
  size_t bytes;
};
using Work = std::function<void()>;

// What a stream was given, done in order by a thread of its own.
class Queue {
 public:
  Queue() : thread_([this] { Run(); }) {}
  ~Queue() {
    Push(nullptr);
    thread_.join();
  }
  void Push(Work work) {
    const std::lock_guard lock(mutex_);
    work_.push_back(std::move(work));
    changed_.notify_all();
  }
  bool IsIdle() {
    const std::lock_guard lock(mutex_);
    return work_.empty();
  }
  void WaitUntilIdle() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return work_.empty(); });
  }

 private:
  void Run() {
    std::unique_lock lock(mutex_);
    for (;;) {
      changed_.wait(lock, [this] { return !work_.empty(); });
      const Work work = work_.front();
      lock.unlock();
      if (work) work();
      lock.lock();
      work_.pop_front();
      changed_.notify_all();
      if (!work) return;
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Work> work_;  // the first is being done
  std::thread thread_;
};

struct FakeStream {
  int gpu;
  bool capturing = false, broken = false;
  const void* thread = nullptr;  // that began the capture
  size_t ops = 0;
  std::vector<Work> captured = {};
  std::shared_ptr<Queue> queue = nullptr;
};
struct FakeEvent {
  int gpu;
  bool timed;
  bool recorded = false;
  bool asked = true;  // since it was recorded; who asks first hears that the GPU is not there yet
  std::shared_future<void> passed = {};
};
struct FakeGraph {
  int gpu;
  size_t ops;
  std::vector<Work> work;
};
struct Gpu {
  int capability = 90;
  size_t used = 0;
  bool lost = false;
  std::set<int> peers;
  Counts counts;
};

struct World {
  std::mutex mutex;  // guards all of it
  Machine machine;
  int generation = 0;
  std::map<int, Gpu> gpus;
  std::set<int> contexts;
  std::vector<std::string> refusals;
  std::map<const char*, Memory> memory;
  std::set<FakeStream*> streams;
  std::set<FakeEvent*> events;
  std::set<FakeGraph*> graphs, executables;
  std::map<std::pair<const void*, int>, int> shared_bytes;  // asked for, of each kernel on each GPU
  std::function<void(void*, size_t)> fill;
  Parameters parameters;
  Runner runner;  // null: kernels do nothing
};
World& The() {
  static auto* world = new World();
  return *world;
}
// By the address of its stub: the name. Registered before main.
std::map<const void*, std::string>& Kernels() {
  static auto* kernels = new std::map<const void*, std::string>();
  return *kernels;
}

struct Resources {
  size_t registers = 0, shared_bytes = 0;  // of a thread; of a block, beside what a launch asks for
};
using ResourcesOf = std::map<std::string, Resources>;  // by name and target
// From what ptxas said when the kernels were compiled.
ResourcesOf ReadResources() {
  ResourcesOf all;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(ALTIPLANO_BINARY_DIR "/kernels")) {
    if (entry.path().extension() != ".ptxas") continue;
    std::ifstream file(entry.path());
    std::string name;
    for (std::string line; std::getline(file, line);) {
      if (line.find("Compiling entry function '") != line.npos) {
        const size_t begin = line.find('\'') + 1, end = line.find("' for '", begin);
        name = line.substr(begin, end - begin) + " " + line.substr(end + 7, line.rfind('\'') - end - 7);
      } else if (const size_t used = line.find("Used "); used != line.npos) {
        Resources& of = all[name];
        of.registers = std::strtoul(line.c_str() + used + 5, nullptr, 10);
        if (const size_t shared = line.find(" bytes smem"); shared != line.npos) {
          of.shared_bytes = std::strtoul(line.c_str() + line.rfind(' ', shared - 1), nullptr, 10);
        }
      }
    }
  }
  return all;
}
const Resources& ResourcesOn(int capability, const std::string& kernel) {
  static const auto* all = new ResourcesOf(ReadResources());
  const auto found = all->find(kernel + " sm_" + (capability == 90 ? "90a" : std::to_string(capability)));
  if (found == all->end()) {
    std::fprintf(stderr, "ptxas has said nothing of %s\n", kernel.c_str());
    std::abort();
  }
  return found->second;
}
// Registers are given out to warps, in pieces of 256, and to four warps at once.
bool RegistersSuffice(const Resources& of, uint64_t threads) {
  const uint64_t warps = (threads + 127) / 128 * 4, of_warp = (of.registers * 32 + 255) / 256 * 256;
  return warps * of_warp <= 65536;
}

struct Thread {
  int generation = 0;
  int gpu = 0;
  cudaError_t last = cudaSuccess;
  FakeStream* capturing = nullptr;
};
Thread& This() {
  thread_local Thread thread;
  if (std::exchange(thread.generation, The().generation) != The().generation) {
    thread = {.generation = The().generation};
  }
  return thread;
}

using Lock = std::lock_guard<std::mutex>;

cudaError_t Refuse(const char* call, cudaError_t error) {
  The().refusals.push_back(std::string(call) + ": " + cudaGetErrorName(error));
  return This().last = error;
}
// Calls that may wait for a GPU: the thread that captures in its own mode is refused, and the capture is void.
bool Unsafe() {
  if (This().capturing != nullptr) This().capturing->broken = true;
  return This().capturing != nullptr;
}
// Whatever needs a GPU makes a context on the thread's, even where a handle says which GPU is meant: on GPU 0, where
// the thread has chosen none.
int NeedGpu() {
  The().contexts.insert(This().gpu);
  return This().gpu;
}
template <typename Handle, typename Object>
Object* Find(const std::set<Object*>& all, Handle handle) {
  auto* object = reinterpret_cast<Object*>(handle);
  return all.contains(object) ? object : nullptr;
}
// unknown: what is said of a handle of nothing.
template <typename Handle, typename Object>
cudaError_t Destroy(const char* call, std::set<Object*>& all, Handle handle, cudaError_t unknown) {
  Object* found = Find(all, handle);
  if (found == nullptr) return Refuse(call, unknown);
  all.erase(found);
  delete found;
  return cudaSuccess;
}
// Null: the memory is nobody's, so pageable.
const Memory* MemoryOf(const void* data, size_t bytes, bool* beyond) {
  const auto* at = static_cast<const char*>(data);
  auto found = The().memory.upper_bound(at);
  if (found == The().memory.begin()) return nullptr;
  --found;
  if (at >= found->first + found->second.bytes) return nullptr;
  *beyond = at + bytes > found->first + found->second.bytes;
  return &found->second;
}
void* Allocate(Kind kind, int gpu, size_t bytes) {
  auto* data = static_cast<char*>(std::aligned_alloc(256, (bytes + 255) / 256 * 256));
  std::memset(data, 0, bytes);
  The().memory[data] = {kind, gpu, bytes};
  return data;
}
size_t MostSharedBytes(int capability) {
  return (capability == 80 ? 163 : capability == 89 ? 99 : 227) * size_t{1024};
}

// To the end of what a stream was given, or all of a GPU's were. Without the world's lock: kernels need it.
void Drain(const std::shared_ptr<Queue>& queue) {
  if (queue != nullptr) queue->WaitUntilIdle();
}
void DrainGpu(int gpu) {
  std::vector<std::shared_ptr<Queue>> queues;
  {
    const Lock lock(The().mutex);
    for (const FakeStream* stream : The().streams) {
      if (stream->gpu == gpu) queues.push_back(stream->queue);
    }
  }
  for (const auto& queue : queues) Drain(queue);
}
// What a stream is given: done at once where no kernels run, kept while it captures.
void Give(FakeStream& stream, Work work) {
  if (stream.capturing) {
    ++stream.ops;
    stream.captured.push_back(std::move(work));
  } else if (stream.queue != nullptr) {
    stream.queue->Push(std::move(work));
  } else {
    work();
  }
}
bool IsLost(int gpu) {
  const Lock lock(The().mutex);
  return The().gpus[gpu].lost;
}
void RunKernel(int gpu, KernelLaunch launch) {
  Runner runner;
  {
    const Lock lock(The().mutex);
    if (The().gpus[gpu].lost) return;
    runner = The().runner;
    for (const auto& [data, memory] : The().memory) {
      const auto begin = reinterpret_cast<uint64_t>(data);
      launch.launch.memory.push_back({begin, begin + memory.bytes});
    }
  }
  const std::string error = runner(launch);
  if (error.empty()) return;
  std::fprintf(stderr, "GPU %d: %s\n", gpu, error.c_str());
  Lose(gpu);
}

CUresult EncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* data, const cuuint64_t* sizes,
                     const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps,
                     CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                     CUtensorMapFloatOOBfill) {
  const Lock lock(The().mutex);
  bool good = reinterpret_cast<uintptr_t>(map) % 64 == 0 && type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 && rank == 2 &&
              reinterpret_cast<uintptr_t>(data) % 16 == 0 && interleave == CU_TENSOR_MAP_INTERLEAVE_NONE &&
              (swizzle != CU_TENSOR_MAP_SWIZZLE_128B || box[0] * 2 <= 128) && strides[0] % 16 == 0 &&
              strides[0] < (uint64_t{1} << 40) && strides[0] >= sizes[0] * 2 && box[0] * 2 % 16 == 0;
  for (cuuint32_t i = 0; i < rank && good; ++i) {
    good = sizes[i] > 0 && sizes[i] <= (uint64_t{1} << 32) && box[i] > 0 && box[i] <= 256 && steps[i] >= 1 &&
           steps[i] <= 8;
  }
  if (!good) The().refusals.push_back("cuTensorMapEncodeTiled: CUDA_ERROR_INVALID_VALUE");
  if (good) {
    ++The().gpus[This().gpu].counts.tensor_maps;
    const ptx_machine::TiledMatrix matrix = {.data = static_cast<const std::byte*>(data),
                                             .rows = sizes[1],
                                             .columns = sizes[0],
                                             .row_bytes = strides[0],
                                             .box_rows = box[1],
                                             .box_columns = box[0]};
    static_assert(sizeof matrix <= sizeof *map);
    std::memcpy(map, &matrix, sizeof matrix);
  }
  return good ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

}  // namespace

Machine AllArchitectures() {
  return {.capabilities = {90, 90, 90, 80, 80, 80, 89, 89, 89}};
}
int FirstOf(int capability) {
  return capability == 90 ? 0 : capability == 80 ? 3 : 6;
}
void Reset(const Machine& machine) {
  World& world = The();
  const Lock lock(world.mutex);
  world.machine = machine;
  ++world.generation;
  world.gpus.clear();
  for (size_t i = 0; i < machine.capabilities.size(); ++i) {
    world.gpus[static_cast<int>(i)].capability = machine.capabilities[i];
  }
  if (machine.crowded >= 0) world.gpus[machine.crowded].used = machine.bytes / 2;
  world.contexts.clear();
  world.refusals.clear();
  world.fill = nullptr;
}
void Lose(int gpu) {
  const Lock lock(The().mutex);
  The().gpus[gpu].lost = true;
}
std::vector<std::string> Refusals() {
  const Lock lock(The().mutex);
  return The().refusals;
}
std::set<int> Contexts() {
  const Lock lock(The().mutex);
  return The().contexts;
}
int CurrentGpu() {
  const Lock lock(The().mutex);
  return This().gpu;
}
int Left() {
  const Lock lock(The().mutex);
  const World& world = The();
  return static_cast<int>(world.streams.size() + world.events.size() + world.graphs.size() + world.executables.size() +
                          world.memory.size());
}
int Graphs(int gpu) {
  const Lock lock(The().mutex);
  return static_cast<int>(
      std::count_if(The().executables.begin(), The().executables.end(), [&](auto* each) { return each->gpu == gpu; }));
}
Counts Count(int gpu) {
  const Lock lock(The().mutex);
  return The().gpus[gpu].counts;
}
void AfterCopiesToHost(std::function<void(void*, size_t)> fill) {
  const Lock lock(The().mutex);
  The().fill = std::move(fill);
}
void RunKernelsBy(Parameters parameters, Runner runner) {
  const Lock lock(The().mutex);
  The().parameters = std::move(parameters);
  The().runner = std::move(runner);
}

}  // namespace altiplano::fake_cudart

using namespace altiplano::fake_cudart;  // NOLINT: the rest is the runtime itself

extern "C" {

// ---- what nvcc's code calls before main
void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  Kernels()[function] = name;
}
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, void*) {
  std::abort();
}
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) {
  std::abort();
}
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) {
  std::abort();
}
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) {
  std::abort();
}

// ---- errors
const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
    case cudaErrorNoDevice:
      return "cudaErrorNoDevice";
    case cudaErrorInsufficientDriver:
      return "cudaErrorInsufficientDriver";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorIllegalAddress:
      return "cudaErrorIllegalAddress";
    case cudaErrorLaunchOutOfResources:
      return "cudaErrorLaunchOutOfResources";
    case cudaErrorInvalidDeviceFunction:
      return "cudaErrorInvalidDeviceFunction";
    case cudaErrorInvalidResourceHandle:
      return "cudaErrorInvalidResourceHandle";
    case cudaErrorPeerAccessAlreadyEnabled:
      return "cudaErrorPeerAccessAlreadyEnabled";
    case cudaErrorPeerAccessUnsupported:
      return "cudaErrorPeerAccessUnsupported";
    case cudaErrorStreamCaptureUnsupported:
      return "cudaErrorStreamCaptureUnsupported";
    case cudaErrorStreamCaptureInvalidated:
      return "cudaErrorStreamCaptureInvalidated";
    case cudaErrorStreamCaptureIsolation:
      return "cudaErrorStreamCaptureIsolation";
    case cudaErrorStreamCaptureWrongThread:
      return "cudaErrorStreamCaptureWrongThread";
    default:
      return "cudaErrorUnknown";
  }
}
const char* cudaGetErrorString(cudaError_t) {
  return "in words";
}
cudaError_t cudaGetLastError() {
  const Lock lock(The().mutex);
  return std::exchange(This().last, cudaSuccess);
}

// ---- GPUs
cudaError_t cudaGetDeviceCount(int* count) {
  const Lock lock(The().mutex);
  *count = 0;
  if (The().machine.old_driver) return Refuse("cudaGetDeviceCount", cudaErrorInsufficientDriver);
  *count = static_cast<int>(The().machine.capabilities.size());
  return *count > 0 ? cudaSuccess : Refuse("cudaGetDeviceCount", cudaErrorNoDevice);
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int gpu) {
  const Lock lock(The().mutex);
  if (!The().gpus.contains(gpu)) return Refuse("cudaGetDeviceProperties", cudaErrorInvalidDevice);
  *properties = {};
  std::snprintf(properties->name, sizeof properties->name, "Fake %d", gpu);
  properties->major = The().gpus[gpu].capability / 10;
  properties->minor = The().gpus[gpu].capability % 10;
  properties->multiProcessorCount = 132;
  properties->pciBusID = 0x1B + gpu;
  properties->totalGlobalMem = The().machine.bytes;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* gpu) {
  const Lock lock(The().mutex);
  *gpu = This().gpu;
  return cudaSuccess;
}
// "This function will also immediately initialize the runtime state on the primary context."
cudaError_t cudaSetDevice(int gpu) {
  const Lock lock(The().mutex);
  if (!The().gpus.contains(gpu)) return Refuse("cudaSetDevice", cudaErrorInvalidDevice);
  This().gpu = gpu;
  NeedGpu();
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
  if (const int gpu = CurrentGpu(); This().capturing == nullptr) DrainGpu(gpu);
  const Lock lock(The().mutex);
  NeedGpu();
  if (Unsafe()) return Refuse("cudaDeviceSynchronize", cudaErrorStreamCaptureUnsupported);
  return The().gpus[This().gpu].lost ? Refuse("cudaDeviceSynchronize", cudaErrorIllegalAddress) : cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int* can, int from, int to) {
  const Lock lock(The().mutex);
  *can = The().machine.peers && from != to;
  return The().gpus.contains(from) && The().gpus.contains(to)
             ? cudaSuccess
             : Refuse("cudaDeviceCanAccessPeer", cudaErrorInvalidDevice);
}
cudaError_t cudaDeviceEnablePeerAccess(int to, unsigned flags) {
  const Lock lock(The().mutex);
  const int from = NeedGpu();
  if (flags != 0) return Refuse("cudaDeviceEnablePeerAccess", cudaErrorInvalidValue);
  if (!The().gpus.contains(to) || from == to) return Refuse("cudaDeviceEnablePeerAccess", cudaErrorInvalidDevice);
  if (!The().machine.peers) return Refuse("cudaDeviceEnablePeerAccess", cudaErrorPeerAccessUnsupported);
  if (!The().gpus[from].peers.insert(to).second) {
    return Refuse("cudaDeviceEnablePeerAccess", cudaErrorPeerAccessAlreadyEnabled);
  }
  return cudaSuccess;
}

// ---- memory
cudaError_t cudaMalloc(void** data, size_t bytes) {
  const Lock lock(The().mutex);
  *data = nullptr;
  const int gpu = NeedGpu();
  if (Unsafe()) return Refuse("cudaMalloc", cudaErrorStreamCaptureUnsupported);
  if (bytes > The().machine.bytes - The().gpus[gpu].used) return Refuse("cudaMalloc", cudaErrorMemoryAllocation);
  if (bytes == 0) return cudaSuccess;
  The().gpus[gpu].used += bytes;
  *data = Allocate(Kind::kDevice, gpu, bytes);
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** data, size_t bytes, unsigned) {
  const Lock lock(The().mutex);
  *data = nullptr;
  const int gpu = NeedGpu();
  if (Unsafe()) return Refuse("cudaHostAlloc", cudaErrorStreamCaptureUnsupported);
  if (bytes > 0) *data = Allocate(Kind::kPinned, gpu, bytes);
  return cudaSuccess;
}
// Waits for the GPU: what is under way may use the memory.
static cudaError_t FreeMemory(const char* call, void* data, Kind kind) {
  int gpu = -1;
  {
    const Lock lock(The().mutex);
    bool beyond = false;
    const Memory* memory = MemoryOf(data, 1, &beyond);
    if (memory != nullptr && This().capturing == nullptr) gpu = memory->gpu;
  }
  if (gpu >= 0) DrainGpu(gpu);
  const Lock lock(The().mutex);
  NeedGpu();
  if (Unsafe()) return Refuse(call, cudaErrorStreamCaptureUnsupported);
  if (data == nullptr) return cudaSuccess;
  const auto found = The().memory.find(static_cast<char*>(data));
  if (found == The().memory.end() || found->second.kind != kind) return Refuse(call, cudaErrorInvalidValue);
  if (kind == Kind::kDevice) The().gpus[found->second.gpu].used -= found->second.bytes;
  The().memory.erase(found);
  std::free(data);
  return cudaSuccess;
}
cudaError_t cudaFree(void* data) {
  return FreeMemory("cudaFree", data, Kind::kDevice);
}
cudaError_t cudaFreeHost(void* data) {
  return FreeMemory("cudaFreeHost", data, Kind::kPinned);
}
cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total) {
  const Lock lock(The().mutex);
  *free_bytes = The().machine.bytes - The().gpus[NeedGpu()].used;
  *total = The().machine.bytes;
  return cudaSuccess;
}

// ---- streams
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  const Lock lock(The().mutex);
  auto* made = new FakeStream{.gpu = NeedGpu()};
  if (The().runner) made->queue = std::make_shared<Queue>();
  The().streams.insert(made);
  *stream = reinterpret_cast<cudaStream_t>(made);
  return cudaSuccess;
}
static std::shared_ptr<Queue> QueueOf(cudaStream_t stream) {
  const Lock lock(The().mutex);
  const FakeStream* found = Find(The().streams, stream);
  return found == nullptr ? nullptr : found->queue;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  // Outlives the lock below: its last piece of work may need it.
  const std::shared_ptr<Queue> queue = QueueOf(stream);
  const Lock lock(The().mutex);
  NeedGpu();
  return Destroy("cudaStreamDestroy", The().streams, stream, cudaErrorInvalidResourceHandle);
}
static cudaError_t AskStream(const char* call, cudaStream_t stream) {
  const Lock lock(The().mutex);
  NeedGpu();
  FakeStream* found = Find(The().streams, stream);
  if (found == nullptr) return Refuse(call, cudaErrorInvalidResourceHandle);
  if (found->capturing) found->broken = true;
  if (Unsafe() || found->capturing) return Refuse(call, cudaErrorStreamCaptureUnsupported);
  ++The().gpus[found->gpu].counts.questions;
  return The().gpus[found->gpu].lost ? Refuse(call, cudaErrorIllegalAddress) : cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  Drain(QueueOf(stream));
  return AskStream("cudaStreamSynchronize", stream);
}
cudaError_t cudaStreamQuery(cudaStream_t stream) {
  const std::shared_ptr<Queue> queue = QueueOf(stream);
  const cudaError_t result = AskStream("cudaStreamQuery", stream);
  return result == cudaSuccess && queue != nullptr && !queue->IsIdle() ? This().last = cudaErrorNotReady : result;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  const Lock lock(The().mutex);
  NeedGpu();
  FakeStream* found = Find(The().streams, stream);
  FakeEvent* of = Find(The().events, event);
  if (found == nullptr || of == nullptr) return Refuse("cudaStreamWaitEvent", cudaErrorInvalidResourceHandle);
  if (!found->capturing && of->recorded) Give(*found, [passed = of->passed] { passed.wait(); });
  if (!found->capturing || !of->recorded) return cudaSuccess;
  found->broken = true;  // the event is of no op in the graph
  return Refuse("cudaStreamWaitEvent", cudaErrorStreamCaptureIsolation);
}

// ---- graphs
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  const Lock lock(The().mutex);
  FakeStream* found = Find(The().streams, stream);
  if (found == nullptr || mode != cudaStreamCaptureModeThreadLocal || found->capturing || This().capturing != nullptr) {
    return Refuse("cudaStreamBeginCapture", cudaErrorInvalidValue);
  }
  *found = {.gpu = found->gpu, .capturing = true, .thread = &This(), .queue = found->queue};
  This().capturing = found;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  const Lock lock(The().mutex);
  *graph = nullptr;
  FakeStream* found = Find(The().streams, stream);
  if (found == nullptr || !found->capturing) return Refuse("cudaStreamEndCapture", cudaErrorInvalidValue);
  if (found->thread != &This()) return Refuse("cudaStreamEndCapture", cudaErrorStreamCaptureWrongThread);
  This().capturing = nullptr;
  found->capturing = false;
  if (found->broken) return Refuse("cudaStreamEndCapture", cudaErrorStreamCaptureInvalidated);
  auto* made = new FakeGraph{.gpu = found->gpu, .ops = found->ops, .work = std::move(found->captured)};
  The().graphs.insert(made);
  *graph = reinterpret_cast<cudaGraph_t>(made);
  return cudaSuccess;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
  const Lock lock(The().mutex);
  *count = reinterpret_cast<FakeGraph*>(graph)->ops;
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  const Lock lock(The().mutex);
  if (Unsafe()) return Refuse("cudaGraphInstantiate", cudaErrorStreamCaptureUnsupported);
  const FakeGraph& of = *reinterpret_cast<FakeGraph*>(graph);
  size_t& used = The().gpus[of.gpu].used;
  const size_t bytes = of.ops * The().machine.graph_bytes;
  if (bytes > The().machine.bytes - used) return Refuse("cudaGraphInstantiate", cudaErrorMemoryAllocation);
  used += bytes;
  auto* made = new FakeGraph(of);
  The().executables.insert(made);
  *executable = reinterpret_cast<cudaGraphExec_t>(made);
  return cudaSuccess;
}
cudaError_t cudaGraphUpload(cudaGraphExec_t, cudaStream_t) {
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  const Lock lock(The().mutex);
  NeedGpu();
  return Destroy("cudaGraphDestroy", The().graphs, graph, cudaErrorInvalidValue);
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  const Lock lock(The().mutex);
  NeedGpu();
  if (const FakeGraph* found = Find(The().executables, executable); found != nullptr) {
    The().gpus[found->gpu].used -= found->ops * The().machine.graph_bytes;
  }
  return Destroy("cudaGraphExecDestroy", The().executables, executable, cudaErrorInvalidValue);
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  const Lock lock(The().mutex);
  NeedGpu();
  FakeStream* found = Find(The().streams, stream);
  FakeGraph* of = Find(The().executables, executable);
  if (found == nullptr || of == nullptr) return Refuse("cudaGraphLaunch", cudaErrorInvalidResourceHandle);
  if (found->capturing) return Refuse("cudaGraphLaunch", cudaErrorStreamCaptureUnsupported);
  ++The().gpus[of->gpu].counts.graph_launches;
  for (const Work& work : of->work) Give(*found, work);
  return cudaSuccess;
}

// ---- events
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  const Lock lock(The().mutex);
  auto* made = new FakeEvent{.gpu = NeedGpu(), .timed = (flags & cudaEventDisableTiming) == 0};
  The().events.insert(made);
  *event = reinterpret_cast<cudaEvent_t>(made);
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  const Lock lock(The().mutex);
  NeedGpu();
  return Destroy("cudaEventDestroy", The().events, event, cudaErrorInvalidResourceHandle);
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  const Lock lock(The().mutex);
  NeedGpu();
  FakeStream* found = Find(The().streams, stream);
  FakeEvent* of = Find(The().events, event);
  if (found == nullptr || of == nullptr || of->gpu != found->gpu) {
    return Refuse("cudaEventRecord", cudaErrorInvalidResourceHandle);
  }
  of->recorded = true;
  of->asked = false;
  auto passed = std::make_shared<std::promise<void>>();
  of->passed = passed->get_future();
  if (found->capturing) {
    passed->set_value();
  } else {
    Give(*found, [passed] { passed->set_value(); });
  }
  return cudaSuccess;
}
// Whether cudaGetLastError tells that something is not ready, documentation and users disagree: it does here.
cudaError_t cudaEventQuery(cudaEvent_t event) {
  const Lock lock(The().mutex);
  NeedGpu();
  FakeEvent* found = Find(The().events, event);
  if (found == nullptr) return Refuse("cudaEventQuery", cudaErrorInvalidResourceHandle);
  if (Unsafe()) return Refuse("cudaEventQuery", cudaErrorStreamCaptureUnsupported);
  if (The().gpus[found->gpu].lost) return Refuse("cudaEventQuery", cudaErrorIllegalAddress);
  const bool passed = !found->recorded || found->passed.wait_for(std::chrono::seconds(0)) == std::future_status::ready;
  if (std::exchange(found->asked, true) && passed) return cudaSuccess;
  return This().last = cudaErrorNotReady;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  std::shared_future<void> passed;
  {
    const Lock lock(The().mutex);
    const FakeEvent* found = Find(The().events, event);
    if (found != nullptr && found->recorded && This().capturing == nullptr) passed = found->passed;
  }
  if (passed.valid()) passed.wait();
  const Lock lock(The().mutex);
  NeedGpu();
  FakeEvent* found = Find(The().events, event);
  if (found == nullptr) return Refuse("cudaEventSynchronize", cudaErrorInvalidResourceHandle);
  found->asked = true;
  if (Unsafe()) return Refuse("cudaEventSynchronize", cudaErrorStreamCaptureUnsupported);
  return The().gpus[found->gpu].lost ? Refuse("cudaEventSynchronize", cudaErrorIllegalAddress) : cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end) {
  const Lock lock(The().mutex);
  NeedGpu();
  FakeEvent *first = Find(The().events, begin), *last = Find(The().events, end);
  if (first == nullptr || last == nullptr || !first->timed || !last->timed || !first->recorded || !last->recorded ||
      first->gpu != last->gpu) {
    return Refuse("cudaEventElapsedTime", cudaErrorInvalidResourceHandle);
  }
  *milliseconds = 1;
  return cudaSuccess;
}

// ---- what streams do
// A side that is pageable is read or written before the call returns.
static cudaError_t Issue(const char* call, cudaStream_t stream,
                         std::initializer_list<std::pair<const void*, bool>> sides, size_t bytes,
                         const std::function<void(const Memory* first)>& run) {
  std::shared_ptr<Queue> wait_for;
  {
    const Lock lock(The().mutex);
    NeedGpu();
    FakeStream* found = Find(The().streams, stream);
    if (found == nullptr) return Refuse(call, cudaErrorInvalidResourceHandle);
    const Memory* first = nullptr;
    for (const auto& [data, may_be_pageable] : sides) {
      bool beyond = false;
      const Memory* memory = MemoryOf(data, bytes, &beyond);
      if (data == sides.begin()->first) first = memory;
      if (beyond || (memory == nullptr && !may_be_pageable)) return Refuse(call, cudaErrorInvalidValue);
      if (memory == nullptr && found->capturing) {
        found->broken = true;
        return Refuse(call, cudaErrorStreamCaptureUnsupported);
      }
      if (memory == nullptr) wait_for = found->queue;
    }
    Give(*found, [run, first, gpu = found->gpu, queued = found->queue != nullptr] {
      if (!queued || !IsLost(gpu)) run(first);
    });
  }
  Drain(wait_for);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  if (kind != cudaMemcpyDefault) std::abort();  // by that alone the runtime knows which side is where
  return Issue("cudaMemcpyAsync", stream, {{to, true}, {from, true}}, bytes, [=](const Memory* memory) {
    std::memcpy(to, from, bytes);
    if (memory != nullptr && memory->kind == Kind::kPinned && The().fill) The().fill(to, bytes);
  });
}
cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t stream) {
  return Issue("cudaMemsetAsync", stream, {{data, false}}, bytes,
               [=](const Memory*) { std::memset(data, value, bytes); });
}
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  const Lock lock(The().mutex);
  const int gpu = NeedGpu();
  const int capability = The().gpus[gpu].capability;
  if (!Kernels().contains(function)) return Refuse("cudaFuncSetAttribute", cudaErrorInvalidDeviceFunction);
  // "The sum of this and the function attribute sharedSizeBytes cannot exceed" what a block may have.
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 ||
      static_cast<size_t>(value) + ResourcesOn(capability, Kernels()[function]).shared_bytes >
          MostSharedBytes(capability)) {
    return Refuse("cudaFuncSetAttribute", cudaErrorInvalidValue);
  }
  int& before = The().shared_bytes[{function, gpu}];
  if (value < std::exchange(before, value)) ++The().gpus[gpu].counts.asked_for_less;
  return cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
  const Lock lock(The().mutex);
  const char* const call = "cudaLaunchKernelExC";
  FakeStream* found = Find(The().streams, config->stream);
  // "Kernel launch will fail if issued to a stream that is not associated to the current device."
  if (found == nullptr || found->gpu != NeedGpu()) return Refuse(call, cudaErrorInvalidResourceHandle);
  if (!Kernels().contains(function)) return Refuse(call, cudaErrorInvalidDeviceFunction);
  Gpu& gpu = The().gpus[found->gpu];
  const dim3 &grid = config->gridDim, &block = config->blockDim;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535 ||
      threads == 0 || threads > 1024 || block.z > 64) {
    return Refuse(call, cudaErrorInvalidConfiguration);
  }
  const Resources& resources = ResourcesOn(gpu.capability, Kernels()[function]);
  const auto asked = The().shared_bytes.find({function, found->gpu});
  const size_t may = asked == The().shared_bytes.end() ? 0 : static_cast<size_t>(asked->second);
  if (config->dynamicSmemBytes > may && config->dynamicSmemBytes + resources.shared_bytes > 48 * 1024) {
    return Refuse(call, cudaErrorInvalidValue);
  }
  if (!RegistersSuffice(resources, threads)) return Refuse(call, cudaErrorLaunchOutOfResources);
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    if (config->attrs[i].id != cudaLaunchAttributeProgrammaticStreamSerialization || gpu.capability < 90) {
      return Refuse(call, cudaErrorInvalidValue);
    }
    ++gpu.counts.overlapping;
  }
  ++gpu.counts.launches;
  if (found->capturing) ++gpu.counts.captured;
  KernelLaunch launch = {.kernel = Kernels()[function],
                         .capability = gpu.capability,
                         .launch = {.grid = {grid.x, grid.y, grid.z},
                                    .block = {block.x, block.y, block.z},
                                    .dynamic_shared_bytes = static_cast<uint32_t>(config->dynamicSmemBytes),
                                    .parameters = {},
                                    .memory = {}}};
  if (The().runner) launch.launch.parameters = The().parameters(launch.kernel, launch.capability, arguments);
  Give(*found, [launch, gpu = found->gpu, runs = The().runner != nullptr] {
    if (runs) RunKernel(gpu, launch);
  });
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned version, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  const bool found = std::strcmp(symbol, "cuTensorMapEncodeTiled") == 0 && version >= 12000;
  *function = found ? reinterpret_cast<void*>(&EncodeTiled) : nullptr;
  *result = found ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

}  // extern "C"
