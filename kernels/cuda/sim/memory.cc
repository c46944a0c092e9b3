// Shared memory, device memory and cp.async. A copy happens as late as it may, when its thread waits for it; until then
// its destination holds NaN.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <iterator>
#include <map>
#include <string>
#include <utility>

#include "kernels/cuda/sim/core.h"
#include "kernels/cuda/sim/host_copies.h"

namespace altiplano::sim {

namespace {

// All OS threads share the device's memory. Not a mutex: TSan would take it for order between the threads of a kernel.
enum class Kind { kDevice, kPinned };
template <Kind>
class Allocations {
 public:
  Allocations() {
    while (busy_.test_and_set(std::memory_order_acquire)) {
    }
  }
  ~Allocations() { busy_.clear(std::memory_order_release); }
  std::map<uintptr_t, size_t>* operator->() const { return &map(); }
  std::map<uintptr_t, size_t>& operator*() const { return map(); }

  static bool Hold(const void* data, size_t bytes) {
    const auto address = reinterpret_cast<uintptr_t>(data);
    const Allocations allocations;
    auto it = allocations->upper_bound(address);
    if (it == allocations->begin()) return false;
    --it;
    return address + bytes <= it->first + it->second;
  }

 private:
  static std::map<uintptr_t, size_t>& map() {  // alive for the whole process: buffers may be freed late
    static auto* allocations = new std::map<uintptr_t, size_t>();
    return *allocations;
  }
  static inline std::atomic_flag busy_;
};
using DeviceAllocations = Allocations<Kind::kDevice>;
using PinnedAllocations = Allocations<Kind::kPinned>;

// Filled with NaN, as all that nobody has written to.
template <typename Kind>
void* Allocate(size_t bytes) {
  if (bytes == 0) return nullptr;
  // As cudaMalloc aligns. Not rounded up: the sanitizers then see one byte too many.
  void* data = nullptr;
  if (posix_memalign(&data, 256, bytes) != 0) return nullptr;
  PoisonBytes(data, bytes);
  Kind()->emplace(reinterpret_cast<uintptr_t>(data), bytes);
  return data;
}

template <typename Kind>
void Free(void* data) {
  Kind()->erase(reinterpret_cast<uintptr_t>(data));
  std::free(data);
}

// What kernels have loaded before their wait for the kernels before: begins and ends, which do not touch each other.
class EarlyLoads {
 public:
  void Add(const void* data, size_t bytes) {
    if (bytes == 0) return;
    const Guard guard(busy_);
    auto begin = reinterpret_cast<uintptr_t>(data), end = begin + bytes;
    auto it = ranges_.upper_bound(end);
    while (it != ranges_.begin() && std::prev(it)->second >= begin) {
      --it;
      begin = std::min(begin, it->first);
      end = std::max(end, it->second);
      it = ranges_.erase(it);
    }
    ranges_.emplace(begin, end);
    any_.store(true, std::memory_order_relaxed);
  }
  bool Touch(const void* data, size_t bytes) {
    if (!any_.load(std::memory_order_relaxed)) return false;
    const Guard guard(busy_);
    const auto begin = reinterpret_cast<uintptr_t>(data);
    auto it = ranges_.lower_bound(begin + bytes);
    return it != ranges_.begin() && std::prev(it)->second > begin;
  }
  // begin and end: of an allocation, across whose edges no range reaches.
  void Forget(uintptr_t begin, uintptr_t end) {
    const Guard guard(busy_);
    ranges_.erase(ranges_.lower_bound(begin), ranges_.lower_bound(end));
    any_.store(!ranges_.empty(), std::memory_order_relaxed);
  }

 private:
  // Not a mutex, as above.
  struct Guard {
    explicit Guard(std::atomic_flag& flag) : busy(flag) {
      while (busy.test_and_set(std::memory_order_acquire)) {
      }
    }
    ~Guard() { busy.clear(std::memory_order_release); }
    std::atomic_flag& busy;
    TsanIgnore ignore;  // of nodes that one fiber allocates and another frees
  };
  std::atomic_flag busy_;
  std::atomic<bool> any_ = false;
  std::map<uintptr_t, uintptr_t> ranges_;
};
EarlyLoads& early_loads = *new EarlyLoads();  // alive for the whole process: buffers may be freed late

void ForgetEarlyLoads(void* data) {
  const auto begin = reinterpret_cast<uintptr_t>(data);
  size_t bytes = 0;
  {
    const DeviceAllocations allocations;
    if (const auto it = allocations->find(begin); it != allocations->end()) bytes = it->second;
  }
  early_loads.Forget(begin, begin + bytes);
}

}  // namespace

void* AllocateDevice(size_t bytes) {
  return Allocate<DeviceAllocations>(bytes);
}

void FreeDevice(void* data) {
  ForgetEarlyLoads(data);
  Free<DeviceAllocations>(data);
}

void* AllocatePinned(size_t bytes) {
  return Allocate<PinnedAllocations>(bytes);
}

void FreePinned(void* data) {
  const size_t bytes = (*PinnedAllocations())[reinterpret_cast<uintptr_t>(data)];
  FinishCopiesOf(data, bytes);
  Free<PinnedAllocations>(data);
}

bool IsDeviceMemory(const void* data, size_t bytes) {
  return DeviceAllocations::Hold(data, bytes);
}

bool IsPinned(const void* data, size_t bytes) {
  return PinnedAllocations::Hold(data, bytes);
}

size_t LiveDeviceBytes() {
  size_t bytes = 0;
  const DeviceAllocations allocations;
  for (const auto& [begin, size] : *allocations) bytes += size;
  return bytes;
}

void* DynamicShared() {
  return CurrentRunner().set->window + kSharedBase;
}

void* StaticShared(const void* tag, size_t bytes, size_t align) {
  TsanIgnore ignore;
  Runner& runner = CurrentRunner();
  for (const StaticVariable& variable : runner.statics) {
    if (variable.tag == tag) return variable.data;
  }
  align = std::max<size_t>(align, 16);
  const size_t at = (runner.shared_end + align - 1) / align * align;
  if (at + bytes + kGuard > kSharedWindow) runner.Fail("too much static shared memory", Site());
  char* data = runner.set->window + at;
  AsanUnpoison(data, bytes + kGuard);
  PoisonBytes(data, bytes + kGuard);
  AsanPoison(data + bytes, kGuard);
  runner.shared_end = static_cast<uint32_t>(at + bytes + kGuard);
  runner.statics.push_back({tag, data, bytes});
  return data;
}

uint32_t SharedAddress(const Runner& runner, const void* data) {
  return static_cast<uint32_t>(static_cast<const char*>(data) - runner.set->window);
}

uint32_t SharedAddress(const void* data) {
  return SharedAddress(CurrentRunner(), data);
}

void CheckShared(Runner& runner, const void* data, int bytes, const char* what, Site site) {
  const char* address = static_cast<const char*>(data);
  const char* begin = runner.set->window + kSharedBase;
  bool inside = address >= begin && address + bytes <= begin + runner.grid.shared_bytes;
  for (const StaticVariable& variable : runner.statics) {
    if (inside) break;
    inside = address >= variable.data && address + bytes <= variable.data + variable.bytes;
  }
  if (!inside) runner.Fail(std::string(what) + " is outside of the block's shared memory", site);
}

void WaitForKernelsBefore() {
  CurrentRunner().current->waited = true;
}

void LoadsMaybeEarly(const void* data, size_t bytes) {
  Runner& runner = CurrentRunner();
  if (!runner.grid.overlapping || runner.current->waited) return;
  runner.current->early = true;
  early_loads.Add(data, bytes);
  if (runner.counting) CountEarly(runner, bytes, false);
}

void PrefetchL2(const void* from, uint32_t bytes, Site site) {
  Runner& runner = CurrentRunner();
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0 || bytes % 16 != 0) {
    runner.Fail("misaligned prefetch of " + std::to_string(bytes) + " bytes", site);
  }
  if (!IsDeviceMemory(from, bytes)) runner.Fail("a prefetch is outside of device memory", site);
  if (runner.counting) CountEarly(runner, runner.grid.overlapping && !runner.current->waited ? bytes : 0, true);
}

void LetNextKernelStart(Site site) {
  Runner& runner = CurrentRunner();
  if (!runner.grid.shares_gpu) return;
  runner.Fail("it lets the next kernel start, whose blocks may take the room of the peer that it waits for", site);
}

void CheckWaited(Runner& runner, Site site) {
  if (runner.grid.overlapping && !runner.current->waited && !std::exchange(runner.current->early, false)) {
    runner.Fail("global memory is touched before the wait for the kernels before, which may still run", site);
  }
}

void Access(Memory memory, const void* data, int bytes, Site site) {
  Runner& runner = CurrentRunner();
  if (reinterpret_cast<uintptr_t>(data) % static_cast<unsigned>(bytes) != 0) {
    runner.Fail("misaligned access of " + std::to_string(bytes) + " bytes", site);
  }
  if (memory == Memory::kSharedLoad || memory == Memory::kSharedStore) {
    CheckShared(runner, data, bytes, memory == Memory::kSharedLoad ? "a shared load" : "a shared store", site);
  } else if (CheckWaited(runner, site); !IsDeviceMemory(data, static_cast<size_t>(bytes))) {
    runner.Fail(std::string(memory == Memory::kGlobalLoad ? "a global load" : "a global store") + " of " +
                    std::to_string(bytes) + " bytes is outside of device memory",
                site);
  } else if (memory == Memory::kGlobalStore && early_loads.Touch(data, static_cast<size_t>(bytes))) {
    runner.Fail("a store to what a kernel loads before its wait for the kernels before, of which this may be one",
                site);
  }
  if (memory == Memory::kSharedStore) NoteGenericWrite(runner, data, bytes);
  if (runner.counting) CountAccess(runner, memory, data, bytes, site);
}

void NoteGenericWrite(Runner& runner, const void* data, int bytes) {
  const uint32_t first = SharedAddress(runner, data);
  for (uint32_t i = first / 16; i <= (first + static_cast<uint32_t>(bytes) - 1) / 16; ++i) {
    runner.generic_writes[i] = {runner.block_id, runner.current->proxy_fences, runner.current->index};
  }
}

void BeforeAtomic(const void* data, int bytes, Site site) {
  Runner& runner = CurrentRunner();
  CheckShared(runner, data, bytes, "an atomic operation", site);
  NoteGenericWrite(runner, data, bytes);
  runner.SwitchAway();
}

void CpAsync(void* to, const void* from, int bytes, int from_bytes, Site site) {
  Runner& runner = CurrentRunner();
  const auto size = static_cast<unsigned>(bytes);
  if (reinterpret_cast<uintptr_t>(to) % size != 0 || reinterpret_cast<uintptr_t>(from) % size != 0) {
    runner.Fail("misaligned cp.async of " + std::to_string(bytes) + " bytes", site);
  }
  CheckWaited(runner, site);
  CheckShared(runner, to, bytes, "the destination of cp.async", site);
  if (from_bytes > 0 && !IsDeviceMemory(from, static_cast<size_t>(from_bytes))) {
    runner.Fail("the source of cp.async is outside of device memory", site);
  }
  if (runner.counting) CountCopy(runner, to, from, bytes, from_bytes, site);
  TsanWrite(to, size, SIM_CALLER);
  PoisonBytes(to, size);
  TsanIgnore ignore;
  Thread& thread = *runner.current;
  thread.copies.push_back(
      {static_cast<char*>(to), static_cast<const char*>(from), bytes, from_bytes, thread.copy_group, SIM_CALLER});
}

void CpAsyncCommit() {
  ++CurrentRunner().current->copy_group;
}

void CpAsyncWait(int pending) {
  Thread& thread = *CurrentRunner().current;
  size_t done = 0;
  for (; done < thread.copies.size() && thread.copies[done].group < thread.copy_group - pending; ++done) {
    const CpAsyncCopy& copy = thread.copies[done];
    const auto from_bytes = static_cast<size_t>(copy.from_bytes);
    TsanRead(copy.from, from_bytes, copy.pc);
    TsanWrite(copy.to, static_cast<size_t>(copy.bytes), copy.pc);
    CopyBytes(copy.to, copy.from, from_bytes);
    for (size_t i = from_bytes; i < static_cast<size_t>(copy.bytes); ++i) copy.to[i] = 0;
  }
  TsanIgnore ignore;
  thread.copies.erase(thread.copies.begin(), thread.copies.begin() + static_cast<std::ptrdiff_t>(done));
}

float Inexact(float exact, float relative_error) {
  const uint32_t hash = __builtin_bit_cast(uint32_t, exact) * 2654435761u;
  const float error = (static_cast<float>(hash >> 8) * 0x1p-23f - 1) * relative_error;
  return exact + exact * error;
}

}  // namespace altiplano::sim
