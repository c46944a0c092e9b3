// Runs a grid: which thread goes next, blocks from their first thread to their last, and the report of a deadlock.
#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <numeric>
#include <utility>

#include "kernels/cuda/sim/core.h"

namespace altiplano::sim {

thread_local ThreadView* current_thread = nullptr;

namespace {

// Under the sanitizers frames are larger.
#if defined(ALTIPLANO_SIM_TSAN) || defined(ALTIPLANO_SIM_ASAN)
constexpr size_t kStackBytes = 256 << 10;
#else
constexpr size_t kStackBytes = 64 << 10;
#endif

int RandomBit(Rng& rng, uint32_t mask) {
  const int shift = static_cast<int>(rng() & 31);
  return (std::countr_zero(std::rotr(mask, shift)) + shift) & 31;
}

std::string Coordinates(uint3 index) {
  return "(" + std::to_string(index.x) + "," + std::to_string(index.y) + "," + std::to_string(index.z) + ")";
}

thread_local Runner* runner_of_block = nullptr;

// Of the device, whichever OS thread asks.
std::mutex stuck_mutex;
std::string stuck_error;

}  // namespace

Runner& CurrentRunner() {
  if (runner_of_block != nullptr) return *runner_of_block;
  static thread_local std::unique_ptr<Runner> runner = std::make_unique<Runner>();
  return *runner;
}

void SetCurrentRunner(Runner* runner) {
  runner_of_block = runner;
}

std::string ToString(const Site& site) {
  const std::string_view path = site.file;
  return std::string(path.substr(path.rfind('/') + 1)) + ":" + std::to_string(site.line);
}

void SetSeed(uint64_t seed) {
  CurrentRunner().seed = seed;
  CurrentRunner().launches = 0;
}

std::string RunGrid(const Grid& grid, const std::function<void()>& body) {
  return CurrentRunner().Run(grid, body);
}

void Stick(const std::string& error) {
  std::lock_guard lock(stuck_mutex);
  if (stuck_error.empty()) stuck_error = error;
}

std::string StuckError() {
  std::lock_guard lock(stuck_mutex);
  return stuck_error;
}

std::string TakeError() {
  std::lock_guard lock(stuck_mutex);
  return std::exchange(stuck_error, "");
}

Runner::~Runner() {
  for (ThreadSet& each : sets) {
    for (const auto& thread : each.threads) DestroyFiber(&thread->fiber);
    if (each.window == nullptr) continue;
    AsanUnpoison(each.window, kSharedWindow);
    munmap(each.window, kSharedWindow);
  }
}

std::string Runner::Where() const {
  return "kernel " + std::string(grid.kernel) + ", block " + Coordinates(block_idx) + ", seed " + std::to_string(seed);
}

void Runner::Fail(const std::string& what, Site site) {
  {
    TsanIgnore ignore;
    failure = Where() + ", thread " + std::to_string(current->index) + " at " + ToString(site) + ": " + what;
  }
  throw Cancel{};
}

Thread* Runner::Pick() {
  while (!boxes.empty() && exited < threads && (ready_warps == 0 || static_cast<int>(rng.Below(8)) < eagerness)) {
    CopyOneBox(*this);
  }
  if (ready_warps == 0) return nullptr;  // all have exited, or none can go on
  if ((ready_warps >> current_warp & 1) == 0 || static_cast<int>(rng() & 7) >= stickiness) {
    current_warp = RandomBit(rng, ready_warps);
  }
  return &ThreadAt(current_warp * kWarpSize + RandomBit(rng, warps[static_cast<size_t>(current_warp)].ready));
}

void Runner::Resume(Thread* next) {
  Thread* self = current;
  if (next == self) return;
  current = next;
  if (next != nullptr) current_thread = next;
  SwitchFiber(&self->fiber, next != nullptr ? &next->fiber : &host);
}

void Runner::SwitchAway() {
  current->polls = nullptr;
  Resume(Pick());
  if (cancelling) throw Cancel{};
}

// Unwinds every thread that has not exited, so that nothing on their stacks leaks and the fibers can be used again.
void Runner::CancelAll() {
  cancelling = true;
  for (int i = 0; i < threads; ++i) {
    if (ThreadAt(i).wait == Wait::kExited) continue;
    current = &ThreadAt(i);
    current_thread = current;
    SwitchFiber(&host, &current->fiber);
  }
  cancelling = false;
}

void Runner::Suspend(Wait wait, Site site) {
  current->wait = wait;
  current->site = site;
  Warp& warp = warps[static_cast<size_t>(current->warp)];
  warp.ready &= ~(1u << current->lane);
  if (warp.ready == 0) ready_warps &= ~(1u << current->warp);
}

void Runner::BlockOn(Wait wait, Site site) {
  Suspend(wait, site);
  SwitchAway();
}

void Runner::Wake(Thread& thread) {
  thread.wait = Wait::kNothing;
  warps[static_cast<size_t>(thread.warp)].ready |= 1u << thread.lane;
  ready_warps |= 1u << thread.warp;
}

void Runner::ThreadMain(void* argument) {
  EnterFiber();
  auto& self = *static_cast<Thread*>(argument);
  while (true) {
    Runner& runner = CurrentRunner();
    TsanAcquire(runner.begins->address);
    TsanAcquire(runner.set->exits[(runner.set->uses - 1) & 1].address);
    try {
      if (runner.cancelling) throw Cancel{};
      (*runner.body)();
      CpAsyncWait(0);
      // Its end would tell the kernel after it that all before have ended.
      if (runner.grid.overlapping && !self.waited) runner.Fail("it ends without a wait for the kernels before", Site());
    } catch (const Cancel&) {
      self.wait = Wait::kExited;
    }
    TsanRelease(runner.set->exits[runner.set->uses & 1].address);
    TsanRelease(runner.ends->address);
    if (runner.failure.empty()) {
      ++runner.exited;
      runner.Suspend(Wait::kExited, Site());
      runner.Resume(runner.Pick());
    } else {
      SwitchFiber(&self.fiber, &runner.host);
    }
  }
}

// A fresh block: every thread ready, shared memory poisoned and out of bounds but for what the launch asked for.
void Runner::Prepare() {
  if (set->window == nullptr) {
    void* memory = mmap(nullptr, kSharedWindow, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
      std::perror("simulator: no memory for shared memory");
      std::abort();
    }
    set->window = static_cast<char*>(memory);
  }
  while (static_cast<int>(set->threads.size()) < threads) {
    auto thread = std::make_unique<Thread>();
    thread->index = static_cast<int>(set->threads.size());
    thread->lane = thread->index % kWarpSize;
    thread->warp = thread->index / kWarpSize;
    CreateFiber(&thread->fiber, kStackBytes, ThreadMain, thread.get(), static_cast<unsigned>(thread->index));
    set->threads.push_back(std::move(thread));
  }
  exited = 0;
  polls_alone = 0;
  ready_warps = 0;
  current_warp = 0;
  statics.clear();
  failure.clear();
  ++set->uses;
  set->barrier.arrived = 0;
  for (NamedBarrier& each : set->named_barriers) each.arrived = 0;
  for (Warp& warp : warps) {
    warp.ready = warp.waiting = 0;
    warp.wgmmas.clear();
    warp.accumulators.clear();
    warp.wgmma_group = 0;
    warp.wgmma_fenced = false;
    warp.wgmma_history = 0;
  }
  mbarriers = 0;
  pooled_registers = 0;
  boxes.clear();
  ++block_id;
  AsanUnpoison(set->window, kSharedWindow);
  PoisonBytes(set->window, kSharedBase + grid.shared_bytes + kGuard);
  AsanPoison(set->window, kSharedWindow);
  AsanUnpoison(set->window + kSharedBase, grid.shared_bytes);
  shared_end = kSharedBase + ((grid.shared_bytes + kGuard + 127) & ~127u);
  const dim3& block = grid.block;
  for (int i = 0; i < threads; ++i) {
    Thread& thread = ThreadAt(i);
    const auto u = static_cast<unsigned>(i);
    thread.thread_idx = {u % block.x, u / block.x % block.y, u / (block.x * block.y)};
    thread.block_idx = block_idx;
    thread.block_dim = block;
    thread.grid_dim = grid.grid;
    thread.together = together != nullptr;
    thread.registers = std::min(256, kBlockRegisters / threads / 8 * 8);
    thread.copies.clear();
    thread.copy_group = 0;
    thread.proxy_fences = 0;
    thread.waited = thread.early = false;
    thread.polls = thread.polled = nullptr;
    Wake(thread);
  }
}

void Runner::Begin(uint3 index) {
  block_idx = index;
  Prepare();
}

void Runner::Continue() {
  if (yielded) current_warp = RandomBit(rng, ready_warps);  // a warp that polls must not keep the others from running
  yielded = false;
  current = Pick();
  if (current == nullptr) return;
  current_thread = current;
  SwitchFiber(&host, &current->fiber);
}

void Runner::Yield() {
  yielded = true;
  Resume(nullptr);
  if (cancelling) throw Cancel{};
}

void Runner::End() {
  if (failure.empty() && exited < threads) failure = "deadlock in " + Where() + DescribeThreads();
  if (failure.empty() && !boxes.empty()) {
    failure = Where() + ": the block has ended, and the box that TMA was told to copy at " + ToString(boxes[0].site) +
              " is under way";
  }
  for (int id = 0; id < kNamedBarriers && failure.empty(); ++id) {
    if (std::string arrived = ArrivedAt(*this, id); !arrived.empty()) {
      failure = Where() + ": the block has ended before barrier " + std::to_string(id) + " was passed" + arrived;
    }
  }
  if (failure.empty()) failure = UnfinishedWgmmas(*this);
  if (failure.empty()) failure = UnevenRegisters(*this);
  if (!failure.empty()) CancelAll();
  AsanUnpoison(set->window, kSharedWindow);
  CheckGuards();
  FinishCounting(*this);
}

void Runner::CheckGuards() {
  auto check = [&](const char* guard, const char* what) {
    for (uint32_t i = 0; i < kGuard && failure.empty(); ++i) {
      if (static_cast<unsigned char>(guard[i]) == 0xFF) continue;
      failure = Where() + ": a write " + std::to_string(i) + " bytes past the end of " + what;
    }
  };
  check(set->window + kSharedBase + grid.shared_bytes, "dynamic shared memory");
  for (const StaticVariable& variable : statics) check(variable.data + variable.bytes, "a shared variable");
}

std::string Runner::DescribeThreads() const {
  std::map<std::string, std::pair<int, int>> groups;  // what they wait for -> how many, the first
  for (int i = 0; i < threads; ++i) {
    const Thread& thread = ThreadAt(i);
    std::string wait = "exited";
    if (thread.wait == Wait::kNothing) wait = "polls at " + ToString(thread.site);
    if (thread.wait == Wait::kWarp) wait = std::string(thread.operation) + " at " + ToString(thread.site);
    if (thread.wait == Wait::kBarrier) {
      wait = "__syncthreads at " + ToString(thread.site) + " (" + std::to_string(set->barrier.arrived) + " of " +
             std::to_string(threads) + " arrived)";
    }
    if (thread.wait == Wait::kNamedBarrier) {
      wait = "bar.sync at " + ToString(thread.site) + " for barrier " + std::to_string(thread.named_barrier) +
             ArrivedAt(*this, thread.named_barrier);
    }
    if (thread.wait == Wait::kRegisters) {
      wait = "setmaxnreg.inc at " + ToString(thread.site) + " from " + std::to_string(thread.registers) + " to " +
             std::to_string(thread.wanted_registers) + " registers, and " + std::to_string(pooled_registers) +
             " of the block are free";
    }
    if (thread.wait == Wait::kMbarrier) {
      const Mbarrier& awaited = *thread.mbarrier;
      wait = "mbarrier.try_wait at " + ToString(thread.site) + " for phase " + std::to_string(thread.parity) +
             " of the mbarrier of " + ToString(awaited.site) + ", which is in phase " +
             std::to_string(awaited.phase & 1) + ", " + std::to_string(awaited.pending) + " of " +
             std::to_string(awaited.arrivals) + " arrivals and " + std::to_string(awaited.bytes) + " bytes missing";
    }
    ++groups.try_emplace(wait, 0, i).first->second.first;
  }
  std::string out;
  for (const auto& [wait, group] : groups) {
    out +=
        "\n  " + std::to_string(group.first) + " threads, the first is " + std::to_string(group.second) + ": " + wait;
  }
  return out;
}

std::string RefusalOf(const Grid& launch) {
  const uint64_t size = uint64_t{launch.block.x} * launch.block.y * launch.block.z;
  const std::string kernel = "kernel " + std::string(launch.kernel);
  if (size == 0 || size > kMostThreads) return kernel + ": " + std::to_string(size) + " threads per block, 1 to 1024";
  if (size % kWarpSize != 0) return kernel + ": " + std::to_string(size) + " threads per block, no multiple of 32";
  if (const uint32_t limit = CurrentArchitecture().shared_bytes; launch.shared_bytes > limit) {
    return kernel + ": " + std::to_string(launch.shared_bytes) + " bytes of shared memory, at most " +
           std::to_string(limit);
  }
  const uint64_t blocks = uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z;
  if (blocks == 0 || launch.grid.y > 65535 || launch.grid.z > 65535 || launch.grid.x > 0x7FFFFFFF) {
    return kernel + ": grid " + Coordinates({launch.grid.x, launch.grid.y, launch.grid.z}) +
           ", each at least 1 and at most (2147483647,65535,65535)";
  }
  return "";
}

void Runner::SetGrid(const Grid& launch, const std::function<void()>& thread_body) {
  grid = launch;
  body = &thread_body;
  threads = static_cast<int>(launch.block.x * launch.block.y * launch.block.z);
  rng = Rng(seed + 1000003 * ++launches);
  constexpr int kStickiness[] = {0, 4, 7, 8};
  stickiness = kStickiness[rng.Below(4)];
  constexpr int kEagerness[] = {0, 1, 4};
  eagerness = kEagerness[rng.Below(3)];
}

std::string Runner::Run(const Grid& launch, const std::function<void()>& thread_body) {
  if (std::string refusal = RefusalOf(launch); !refusal.empty()) return refusal;
  SetGrid(launch, thread_body);
  CountLaunch(*this);
  TsanRelease(launch_token.address);
  std::vector<uint32_t> order(uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z);
  std::iota(order.begin(), order.end(), 0u);
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[rng.Below(static_cast<uint32_t>(i))]);
  failure.clear();
  for (size_t i = 0; i < order.size() && failure.empty(); ++i) {
#ifdef ALTIPLANO_SIM_TSAN
    set = &sets[i % 2];
#else
    set = &sets[0];
#endif
    const uint32_t block = order[i];
    const dim3& g = launch.grid;
    Begin({block % g.x, block / g.x % g.y, block / (g.x * g.y)});
    Continue();
    End();
  }
  TsanAcquire(end_token.address);
  return failure;
}

}  // namespace altiplano::sim
