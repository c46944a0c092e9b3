// What kernel code sees of the simulator: the running thread's indices and what the wrappers of ptx.h call. Kept thin:
// under TSan this header is compiled with instrumentation and the library behind it is not.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/sim/cuda_language.h"
#include "kernels/cuda/sim/site.h"
#include "kernels/cuda/sim/tensor_map.h"

namespace altiplano::sim {

struct ThreadView {
  uint3 thread_idx, block_idx;
  dim3 block_dim, grid_dim;
  bool together = false;  // the block runs together with others, of other streams too
};
// Set at every switch. A block stays on one OS thread, so that the variable's address may be kept.
extern thread_local ThreadView* current_thread;
inline ThreadView& Self() {
  return *current_thread;
}

// ---- memory
void* DynamicShared();
// One variable per tag and block.
void* StaticShared(const void* tag, size_t bytes, size_t align);

enum class Memory : uint8_t { kGlobalLoad, kGlobalStore, kSharedLoad, kSharedStore };
// Before an access of the thread's: checks where it goes and its alignment, and counts it.
void Access(Memory memory, const void* data, int bytes, Site site);
// Before an atomic operation on shared memory: also a point where other threads may run.
void BeforeAtomic(const void* data, int bytes, Site site);

// ---- blocks that run together: what they load and store
// Global memory as others see it in their time; `value` has `bytes`, at most 16.
void LoadTogether(const void* from, void* value, int bytes);
void StoreTogether(void* to, const void* value, int bytes);
// Around accesses of flags. A poll lets other blocks run first; after an acquiring one the block sees all that was
// released. A release makes visible what the thread, or others before the block's last barrier, have stored.
void BeforePoll(const void* flag, int bytes, Site site);
void AfterPoll(const void* flag, bool acquire);
void BeforeRelease();
void AfterStoringFlag();
void AfterAcquire();
// Nanoseconds. Passes only when all threads wait for each other.
uint64_t Clock();

// ---- threads meeting
void SyncThreads(Site site);
void SyncWarp(uint32_t mask, Site site);
void NamedBarrierSync(int id, int threads, Site site);
void NamedBarrierArrive(int id, int threads, Site site);
enum class ShuffleKind : uint8_t { kXor, kIndex };
uint64_t Shuffle(ShuffleKind kind, uint32_t mask, uint64_t value, int argument, Site site);

// ---- kernels that overlap
void WaitForKernelsBefore();
// The next access, a load of what no kernel stores to, may come before that wait. From then on a store there fails.
void LoadsMaybeEarly(const void* data, size_t bytes);
void LetNextKernelStart(Site site);
void PrefetchL2(const void* from, uint32_t bytes, Site site);

// ---- matrices of a warp
void LdMatrix(uint32_t* r, int matrices, bool transposed, const void* row, Site site);
void Mma16816(float* d, const uint32_t* a, const uint32_t* b, Site site);

// ---- asynchronous copies
void CpAsync(void* to, const void* from, int bytes, int from_bytes, Site site);
void CpAsyncCommit();
void CpAsyncWait(int pending);

// ---- mbarriers and TMA
void MbarrierInit(uint64_t* barrier, uint32_t arrivals, Site site);
void MbarrierArrive(uint64_t* barrier, uint32_t expected_bytes, Site site);
void MbarrierWait(uint64_t* barrier, uint32_t parity, Site site);
void FenceProxyAsync();
// As LoadsMaybeEarly, of what the next CopyBox reads.
void BoxMaybeEarly(const TensorMap& map, int column, int row);
void CopyBox(void* to, const TensorMap& map, int column, int row, uint64_t* barrier, Site site);
uint32_t SharedAddress(const void* data);

// ---- matrices of a warpgroup
struct WgmmaOperands {
  float* d;           // columns / 2 registers
  const uint32_t* a;  // 4 registers, or null: a_descriptor tells of it
  uint64_t a_descriptor, b_descriptor;
  int columns;
  bool b_mn_major, accumulate;

  bool operator==(const WgmmaOperands&) const = default;
};
void WgmmaFence(Site site);
void Wgmma(const WgmmaOperands& operands, Site site);
void WgmmaCommit(Site site);
void WgmmaWait(int pending, Site site);

// `exact`, off by as much as an approximate instruction may be. The same for the same number, always.
float Inexact(float exact, float relative_error);

}  // namespace altiplano::sim
