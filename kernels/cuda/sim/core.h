// The state of the block that is being simulated. Private to the simulator.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "kernels/cuda/sim/fiber.h"
#include "kernels/cuda/sim/rng.h"
#include "kernels/cuda/sim/sanitizer.h"
#include "kernels/cuda/sim/sim.h"
#include "kernels/cuda/sim/thread.h"

namespace altiplano::sim {

inline constexpr int kWarpSize = 32;
inline constexpr int kMostThreads = 1024;
inline constexpr int kMostWarps = kMostThreads / kWarpSize;
// The .shared window of a block: the system's part, dynamic shared memory, then one variable after the other, each with
// a guard behind it.
inline constexpr uint32_t kSharedBase = 1024;
inline constexpr uint32_t kSharedLimit = 227 * 1024;  // that a block may ask for on sm_90
inline constexpr uint32_t kSharedWindow = 512 * 1024;
inline constexpr uint32_t kGuard = 256;

struct Cancel {};  // thrown in threads that are stuck, so that their stacks unwind

enum class Wait : uint8_t { kNothing, kWarp, kBarrier, kExited };

// Of a happens-before edge: TSan knows an edge by an address.
struct Token {
  alignas(8) char address[8];
};

using WarpFunction = void (*)(void* const* arguments, uint32_t mask);

struct CpAsyncCopy {
  char* to;
  const char* from;
  int bytes, from_bytes, group;
  void* pc;
};

struct Thread : ThreadView {
  Fiber fiber;
  int index = 0, lane = 0, warp = 0;
  Wait wait = Wait::kExited;
  Site site;  // where it waits
  // The warp-wide operation it waits in.
  WarpFunction function = nullptr;
  void* argument = nullptr;
  uint32_t mask = 0;
  const char* operation = "";
  Token* token = nullptr;
  // Copies issued and not waited for.
  std::vector<CpAsyncCopy> copies;
  int copy_group = 0;
};

struct Warp {
  uint32_t ready = 0, waiting = 0;  // lanes
  unsigned tokens_used = 0;
  std::array<Token, 64> tokens;
};

struct Barrier {
  int arrived = 0;
  unsigned phase = 0;
  // Taken in turn: a thread that runs ahead into the next phase must not hand its later writes to those that still
  // leave this one.
  std::array<Token, 2> tokens;
};

// Threads and shared memory of a block, used again for the next. Under TSan two sets take turns: consecutive blocks
// then have no happens-before edge, and races between blocks are found too.
struct ThreadSet {
  std::vector<std::unique_ptr<Thread>> threads;
  char* window = nullptr;
  Token exits;
};

struct StaticVariable {
  const void* tag;
  char* data;
  size_t bytes;
};

// What a warp-wide operation demands of its lanes beyond the same operation and mask.
enum class Meeting : uint8_t {
  kAnywhere,  // shuffles: each lane may be at another line
  kAligned,   // matrix instructions: all lanes at the same line
  kOrdering,  // __syncwarp: also orders memory, which the others do not
};

class Runner {
 public:
  Runner() { AdoptThread(&host); }

  std::string Run(const Grid& launch, const std::function<void()>& thread_body);

  // ---- for the operations of threads
  void SwitchAway();
  void BlockOn(Wait wait, Site site);
  void Wake(Thread& thread);
  // The last lane of `mask` to arrive runs function for all.
  void Meet(uint32_t mask, WarpFunction function, void* argument, const char* operation, Site site, Meeting meeting);
  [[noreturn]] void Fail(const std::string& what, Site site);
  Thread& ThreadAt(int i) { return *set->threads[static_cast<size_t>(i)]; }
  const Thread& ThreadAt(int i) const { return *set->threads[static_cast<size_t>(i)]; }
  std::string Where() const;  // "kernel X, block (1,0,0), seed 7"

  Fiber host;
  ThreadSet sets[2];
  ThreadSet* set = nullptr;
  Rng rng;
  uint64_t seed = 1, launches = 0;
  int stickiness = 6;  // how often, in eighths, the running warp goes on at a point where another might

  Grid grid = {};
  const std::function<void()>* body = nullptr;
  uint3 block_idx;
  int threads = 0, exited = 0;
  std::array<Warp, kMostWarps> warps;
  uint32_t ready_warps = 0;
  int current_warp = 0;
  Thread* current = nullptr;
  Barrier barrier;
  std::vector<StaticVariable> statics;
  uint32_t shared_end = 0;
  std::string failure;
  bool cancelling = false;
  Token launch_token, end_token;
  bool counting = false;

 private:
  static void ThreadMain(void* thread);
  void Prepare();
  void RunBlock(uint3 index);
  void CheckGuards();
  Thread* Pick();
  void Resume(Thread* next);  // null: the host
  void Suspend(Wait wait, Site site);
  void CancelAll();
  std::string DescribeDeadlock() const;
};

Runner& CurrentRunner();

// Not memset and memcpy: TSan intercepts them and would charge them to the running fiber.
inline void PoisonBytes(void* data, size_t bytes) {
  asm volatile("rep stosb" : "+D"(data), "+c"(bytes) : "a"(0xFF) : "memory");  // NaN as bf16, f16 and f32
}
inline void CopyBytes(void* to, const void* from, size_t bytes) {
  asm volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(bytes) : : "memory");
}

// ---- memory.cc
bool IsDeviceMemory(const void* data, size_t bytes);
uint32_t SharedAddress(const Runner& runner, const void* data);
void CheckShared(Runner& runner, const void* data, int bytes, const char* what, Site site);

// ---- counters.cc
void CountAccess(const Runner& runner, Memory memory, const void* data, int bytes, Site site);
void CountMatrixRows(const Runner& runner, const void* const* rows, int matrices, Site site);
void CountCopy(const Runner& runner, const void* to, const void* from, int bytes, int from_bytes, Site site);
void CountLaunch(const Runner& runner);
void FinishCounting(const Runner& runner);  // after each block

}  // namespace altiplano::sim
