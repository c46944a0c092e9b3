// The kernel simulator as tests see it: its whims, what it found and what it counted. docs/kernels.md explains it.
//
// Each OS thread that launches has its own whims, seed and counters; memory and the error that stuck are the device's.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "kernels/cuda/architectures.h"
#include "kernels/cuda/sim/cuda_language.h"

namespace altiplano::sim {

// Every choice that a GPU is free to make is drawn from this. Also forgets how many launches there were, so that a
// failing seed replays alone.
void SetSeed(uint64_t seed);

struct Grid {
  const char* kernel;
  dim3 grid, block;
  unsigned shared_bytes = 0;
  bool overlapping = false;  // may start before its predecessors have ended
  bool shares_gpu = false;   // with the same launch of another rank, for which it waits
};
// Runs body once per thread, every block to its end. Empty, or what the kernel did that CUDA forbids, or how its
// threads wait for each other for ever: kernel, block, thread, file and line.
std::string RunGrid(const Grid& grid, const std::function<void()>& body);

// Streams side by side, each with its kernels one after the other. The blocks of the kernels that run at one time are
// interleaved and may wait for each other; a store becomes visible to other streams late, until it is released and
// acquired. All blocks are resident at once: they must fit a GPU. Empty, or what went wrong, a wait for ever included.
struct Kernel {
  Grid grid;
  std::function<void()> body;
};
inline constexpr uint64_t kMultiprocessors = 132;
std::string RunTogether(const std::vector<std::vector<Kernel>>& streams);

// As a launch on rank `rank`'s stream of a kernel that waits for the same launch of the `ranks` ranks of `group`. While
// an OS thread collects, its launches wait for RunCollected. Otherwise the ranks' threads come together here; those who
// have waited for `patience`, or until the group has `ended`, go on without the others. Errors stick as LaunchGrid's.
struct PeerLaunch {
  const void* group;
  int rank, ranks;
  std::chrono::nanoseconds patience;
  std::function<bool()> ended;
};
void LaunchWithPeers(void* stream, const PeerLaunch& launch, const Kernel& kernel);
void Collect();
std::string RunCollected();

// An error sticks, and what is launched after it does not run.
void Launch(void* stream, const Kernel& kernel);
void Stick(const std::string& error);  // unless there is one already
// The error that stuck, if any; TakeError also forgets it.
std::string StuckError();
std::string TakeError();

// Which GPU the calling thread has chosen, as cudaGetDevice.
int CurrentGpu();

// Of graphs, so far.
uint64_t GraphLaunches();
// Of the host, for a stream or an event, so far.
uint64_t HostWaits();

// What a kernel asked of the memories while counting was on.
struct Traffic {
  uint64_t launches = 0;
  uint64_t load_bytes = 0, store_bytes = 0;        // of global memory, each thread's counted
  uint64_t sectors = 0, ideal_sectors = 0;         // of 32 bytes, that warps touched, and the fewest for those bytes
  uint64_t wavefronts = 0, ideal_wavefronts = 0;   // of shared memory: bank conflicts make the former larger
  uint64_t early_bytes = 0, prefetched_bytes = 0;  // loaded, and asked of L2, before the wait for the kernels before
};
void CountTraffic(bool on);  // also forgets what was counted
Traffic TrafficOf(const std::string& kernel);
std::string TrafficByLine();
// The warps that committed groups of wgmmas while counting was on, in order.
std::vector<int> WgmmaCommits();

// How many GPUs there are, 1 at first and at most 8. Each has a memory of its own, of 1 GiB; kernels reach all.
void SetGpus(int gpus);
// What they are, kHopper at first: a block's shared memory, and whether wgmma and TMA are there.
void SetArchitecture(const cuda::Architecture& architecture);
const cuda::Architecture& CurrentArchitecture();
// From now on whoever asks a stream or an event of that GPU hears `error`. Empty: it is found again.
void LoseGpu(int ordinal, const std::string& error);

// ---- device memory: what kernels may reach with global accesses. Starts as NaN.
void* AllocateDevice(size_t bytes);
void FreeDevice(void* data);
size_t LiveDeviceBytes();

}  // namespace altiplano::sim
