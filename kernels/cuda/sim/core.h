// The state of the block that is being simulated. Private to the simulator.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "kernels/cuda/sim/fiber.h"
#include "kernels/cuda/sim/rng.h"
#include "kernels/cuda/sim/sanitizer.h"
#include "kernels/cuda/sim/sim.h"
#include "kernels/cuda/sim/tensor_map.h"
#include "kernels/cuda/sim/thread.h"

namespace altiplano::sim {

inline constexpr int kWarpSize = 32;
inline constexpr int kMostThreads = 1024;
inline constexpr int kMostWarps = kMostThreads / kWarpSize;
// The .shared window of a block: the system's part, dynamic shared memory, then one variable after the other, each with
// a guard behind it.
inline constexpr uint32_t kSharedBase = 1024;
inline constexpr uint32_t kSharedWindow = 512 * 1024;
inline constexpr uint32_t kGuard = 256;
inline constexpr size_t kMostMbarriers = 64;       // of a block
inline constexpr int kNamedBarriers = 16;          // of a block, the first is that of __syncthreads
inline constexpr int kBlockRegisters = 64 * 1024;  // of a multiprocessor

struct Cancel {};  // thrown in threads that are stuck, so that their stacks unwind

enum class Wait : uint8_t { kNothing, kWarp, kBarrier, kNamedBarrier, kMbarrier, kRegisters, kExited };

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

// Its state is here and not in shared memory, where a word shows whether somebody wrote over it.
struct Mbarrier {
  uint64_t* address = nullptr;
  uint32_t arrivals = 0, pending = 0;
  int64_t bytes = 0;  // expected and not yet copied
  unsigned phase = 0;
  Site site;  // of its initialization
  int thread = 0;
  uint32_t fences = 0;  // of the thread's, by then
  std::array<Token, 2> tokens;
};

// A box that TMA was told to copy.
struct BoxCopy {
  TensorMap map;
  int column, row;
  char* to;
  Mbarrier* barrier;
  Site site;
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
  int named_barrier = 0;               // that it waits for
  const Mbarrier* mbarrier = nullptr;  // likewise
  uint32_t parity = 0;
  int registers = 0, wanted_registers = 0;
  uint32_t proxy_fences = 0;
  bool waited = false;  // for the kernels before
  bool early = false;   // its next access may come before that wait
  // Copies issued and not waited for.
  std::vector<CpAsyncCopy> copies;
  int copy_group = 0;
  // Of blocks that run together: stores of other streams that it must see are those numbered up to `view`; where it
  // polls, and what it polled last and when.
  uint64_t view = 0;
  const void* polls = nullptr;
  const void* polled = nullptr;
  uint64_t polled_at = 0;
};

// Registers of a warp that wgmma writes to: their values when all that was issued is done. The registers hold NaN.
struct Accumulator {
  std::array<float*, kWarpSize> registers;
  size_t per_lane;
  std::vector<float> values;  // lane by lane
  int operations = 0;         // not waited for
};

struct WgmmaOperation {
  WgmmaOperands operands;  // of lane 0
  // Of the first matrix in registers, or in shared memory.
  std::array<const uint32_t*, kWarpSize> a;
  uint32_t a_values[kWarpSize][4];
  uint64_t a_hash, b_hash;
  size_t accumulator;
  int group;
  void* pc;
  Site site;
};

struct Warp {
  uint32_t ready = 0, waiting = 0;  // lanes
  unsigned tokens_used = 0;
  std::array<Token, 64> tokens;
  std::vector<WgmmaOperation> wgmmas;
  std::vector<Accumulator> accumulators;
  int wgmma_group = 0;
  bool wgmma_fenced = false;
  uint64_t wgmma_history = 0;  // must be the same in all warps of a warpgroup
};

struct Barrier {
  int arrived = 0;
  unsigned phase = 0;
  // Taken in turn: a thread that runs ahead into the next phase must not hand its later writes to those that still
  // leave this one.
  std::array<Token, 2> tokens;
};

// Counts threads by whole warps. What waits at it has arrived in the generation that runs.
struct NamedBarrier {
  uint32_t arrived = 0;  // warps
  int threads = 0;       // that the first of them came for
  Site site;             // where it did
  unsigned phase = 0;
  std::array<Token, 2> tokens;  // as those of Barrier
};

// Threads and shared memory of a block, used again for the next. Under TSan two sets take turns: consecutive blocks
// then have no happens-before edge, and races between blocks are found too.
struct ThreadSet {
  std::vector<std::unique_ptr<Thread>> threads;
  char* window = nullptr;
  unsigned uses = 0;           // blocks so far
  std::array<Token, 2> exits;  // of the threads of every other block: those of one are not to order one another
  Barrier barrier;
  std::array<Mbarrier, kMostMbarriers> mbarriers;
  std::array<NamedBarrier, kNamedBarriers> named_barriers;
};

// Of 16 bytes of shared memory: who wrote to them last by other means than the async proxy.
struct GenericWrite {
  uint32_t block = 0;   // 0: nobody
  uint32_t fences = 0;  // of the thread's, by then
  int thread = 0;
};

struct StaticVariable {
  const void* tag;
  char* data;
  size_t bytes;
};

class Together;

// A store that its own thread sees and others may not yet.
struct PendingStore {
  int thread;
  unsigned phase;  // how many barriers the block had passed
  char* to;
  int bytes;
  char value[16];
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
  ~Runner();
  Runner(const Runner&) = delete;
  Runner& operator=(const Runner&) = delete;

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
  std::vector<StaticVariable> statics;
  uint32_t shared_end = 0;
  int pooled_registers = 0;  // that threads have given back
  std::string failure;
  bool cancelling = false;
  Token launch_token, end_token;
  Token* begins = &launch_token;  // what the block's threads acquire first
  Token* ends = &end_token;       // and release last
  bool counting = false;
  size_t mbarriers = 0;
  std::vector<BoxCopy> boxes;
  int eagerness = 0;      // how often, in eighths, a box is copied at a point where it might be
  uint32_t block_id = 0;  // counts blocks
  std::vector<GenericWrite> generic_writes = std::vector<GenericWrite>(kSharedWindow / 16);
  // Of a block that runs together with others.
  Together* together = nullptr;
  int stream = 0;
  bool yielded = false;                                              // it could go on
  uint64_t polls_alone = 0;                                          // of a block that nobody runs beside
  std::unordered_map<uintptr_t, std::vector<PendingStore>> pending;  // of each 16 bytes, oldest first

  // ---- a block: Begin, then Continue while it yields, then End
  void Begin(uint3 index);
  void Continue();
  void End();
  // Lets other blocks run. Only of a block that runs together with others.
  void Yield();
  std::string DescribeThreads() const;
  void SetGrid(const Grid& launch, const std::function<void()>& thread_body);

 private:
  static void ThreadMain(void* thread);
  void Prepare();
  void CheckGuards();
  Thread* Pick();
  void Resume(Thread* next);  // null: the host
  void Suspend(Wait wait, Site site);
  void CancelAll();
};

// Of the block that runs.
Runner& CurrentRunner();
// Makes `runner` the current one; null: the OS thread's own, whose blocks run one after the other.
void SetCurrentRunner(Runner* runner);
// Empty, or why a GPU refuses the launch.
std::string RefusalOf(const Grid& launch);

// Not memset and memcpy: TSan intercepts them and would charge them to the running fiber.
inline void PoisonBytes(void* data, size_t bytes) {
  asm volatile("rep stosb" : "+D"(data), "+c"(bytes) : "a"(0xFF) : "memory");  // NaN as bf16, f16 and f32
}
inline void CopyBytes(void* to, const void* from, size_t bytes) {
  asm volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(bytes) : : "memory");
}

// ---- memory.cc
bool IsDeviceMemory(const void* data, size_t bytes);
void* AllocatePinned(size_t bytes);
void FreePinned(void* data);
bool IsPinned(const void* data, size_t bytes);
uint32_t SharedAddress(const Runner& runner, const void* data);
void CheckShared(Runner& runner, const void* data, int bytes, const char* what, Site site);

// Of an access of global memory: the kernels before must have ended.
void CheckWaited(Runner& runner, Site site);
void NoteGenericWrite(Runner& runner, const void* data, int bytes);

// ---- async.cc
void CopyOneBox(Runner& runner);
// Fails if the async proxy may not see what threads wrote to the 16 bytes at this address.
void CheckProxyFence(Runner& runner, uint32_t address, const char* what, Site site);

// ---- warp.cc
std::string ArrivedAt(const Runner& runner, int id);  // who has at a named barrier; empty: nobody

// ---- registers.cc
std::string UnevenRegisters(const Runner& runner);  // of a warpgroup's warps, when the block ends

// ---- wgmma.cc
std::string UnfinishedWgmmas(const Runner& runner);  // what is wrong with them when the block ends

// ---- counters.cc
void CountAccess(const Runner& runner, Memory memory, const void* data, int bytes, Site site);
void CountMatrixRows(const Runner& runner, const void* const* rows, int matrices, Site site);
void CountCopy(const Runner& runner, const void* to, const void* from, int bytes, int from_bytes, Site site);
void CountBox(const Runner& runner, const char* row, uint64_t rows, uint64_t stride_bytes, uint64_t row_bytes,
              Site site);
// What was loaded, or asked for by a prefetch, before the wait for the kernels before.
void CountEarly(const Runner& runner, uint64_t bytes, bool prefetch);
void CountLaunch(const Runner& runner);
void CountWgmmaCommit(const Runner& runner);
void FinishCounting(const Runner& runner);  // after each block

}  // namespace altiplano::sim
