// Streams side by side: which block goes on next, when a store becomes visible, when everybody waits for ever.
//
// A plain store waits in its block and is performed at a time drawn from the seed, at the latest when a release must
// show it or the next kernel of its stream begins; stores of one place keep their order. A plain load sees what its own
// thread stored, and what the block stored before its last barrier. Of other streams it must see what was performed
// before its block's last acquire, and may see anything performed since, 2 bytes by 2 bytes.
#include <algorithm>
#include <bit>
#include <cstring>
#include <iterator>
#include <memory>
#include <utility>

#include "kernels/cuda/sim/core.h"

namespace altiplano::sim {

namespace {

// A value that 2 bytes had from store `number` on.
struct Version {
  uint64_t number;
  int stream;
  uint16_t value;
};

constexpr uint64_t kHour = 3'600'000'000'000;

}  // namespace

class Together {
 public:
  explicit Together(Runner* own) : rng_(own->seed + 1000003 * ++own->launches), own_(own) {}

  std::string Run(const std::vector<std::vector<Kernel>>& streams);

  // ---- for the running block
  void Load(Runner& block, const char* from, char* value, int bytes);
  void Store(Runner& block, char* to, const char* value, int bytes);
  // Performs what thread `index` of the block has stored, or others before the last barrier.
  void Release(Runner& block, int index);
  void Happened() { ++events_; }
  bool Chance(uint32_t one_in) { return rng_.Below(one_in) == 0; }
  uint64_t stores() const { return stores_; }
  uint64_t events() const { return events_; }
  uint64_t clock() const { return clock_; }

 private:
  struct Stream {
    const std::vector<Kernel>* kernels;
    size_t next = 0;
    uint64_t view = 0;  // what its kernels so far have seen
    std::vector<Runner*> blocks;
    size_t live = 0;
    Token order;  // a kernel follows the one before on its stream, and none of another's
  };

  Runner* NewBlock();
  void Start(int stream);
  void PerformAll(Stream& stream);
  bool Finished(const Runner& block) const { return block.exited == block.threads; }
  Runner* Choose();
  bool Stalled() const;
  // A stall is first the late stores' doing, then a matter of time, then a deadlock.
  bool EndStall();
  bool PerformOne(Runner& block);
  // Performs the first `count` of a line.
  void Perform(Runner& block, uintptr_t line, size_t count);
  std::string Deadlock() const;

  Rng rng_;
  Runner* const own_;
  std::vector<Stream> streams_;
  std::vector<Runner*> live_;
  size_t pool_used_ = 0;
  int slow_stream_ = -1;
  uint32_t eagerness_ = 0;  // one in how many stores is followed by the performance of another; 0: none
  std::unordered_map<uintptr_t, std::vector<Version>> versions_;
  uint64_t stores_ = 0, events_ = 1, clock_ = 1;
  uint64_t stalled_at_ = 0, stalled_checks_ = 0;
};

// Blocks, with their fibers, are used again by the next launch of this OS thread.
Runner* Together::NewBlock() {
  static thread_local std::vector<std::unique_ptr<Runner>> pool;
  if (pool_used_ == pool.size()) pool.push_back(std::make_unique<Runner>());
  return pool[pool_used_++].get();
}

void Together::Start(int index) {
  Stream& stream = streams_[static_cast<size_t>(index)];
  const Kernel& kernel = (*stream.kernels)[stream.next++];
  const dim3& g = kernel.grid.grid;
  stream.live = size_t{g.x} * g.y * g.z;
  while (stream.blocks.size() < stream.live) stream.blocks.push_back(NewBlock());
  for (unsigned i = 0; i < stream.live; ++i) {
    Runner& block = *stream.blocks[i];
    block.seed = own_->seed;
    block.launches = rng_();
    block.together = this;
    block.counting = own_->counting;
    block.stream = index;
    block.set = &block.sets[0];
    block.SetGrid(kernel.grid, kernel.body);
    if (i == 0) CountLaunch(block);
    block.begins = block.ends = &stream.order;
    SetCurrentRunner(&block);
    block.Begin({i % g.x, i / g.x % g.y, i / (g.x * g.y)});
    for (int t = 0; t < block.threads; ++t) block.ThreadAt(t).view = stream.view;
    live_.push_back(&block);
  }
}

// The end of a kernel shows its stores to the next one of its stream. Others may see them later still.
void Together::PerformAll(Stream& stream) {
  for (Runner* block : stream.blocks) {
    while (PerformOne(*block)) {
    }
    for (int t = 0; t < block->threads; ++t) stream.view = std::max(stream.view, block->ThreadAt(t).view);
  }
}

Runner* Together::Choose() {
  Runner* block = live_[rng_.Below(static_cast<uint32_t>(live_.size()))];
  if (block->stream == slow_stream_ && rng_.Below(16) != 0) {
    block = live_[rng_.Below(static_cast<uint32_t>(live_.size()))];
  }
  return block;
}

std::string Together::Run(const std::vector<std::vector<Kernel>>& streams) {
  uint64_t resident = 0;
  for (const auto& kernels : streams) {
    uint64_t most = 0;
    for (const Kernel& kernel : kernels) {
      if (std::string refusal = RefusalOf(kernel.grid); !refusal.empty()) return refusal;
      most = std::max(most, uint64_t{kernel.grid.grid.x} * kernel.grid.grid.y * kernel.grid.grid.z);
    }
    resident += most;
  }
  if (resident > kMultiprocessors) {
    return std::to_string(resident) + " blocks that wait for each other are not all resident on " +
           std::to_string(kMultiprocessors) + " multiprocessors: a deadlock";
  }
  constexpr uint32_t kEagerness[] = {0, 1, 4, 32};
  eagerness_ = kEagerness[rng_.Below(4)];
  slow_stream_ = static_cast<int>(rng_.Below(static_cast<uint32_t>(2 * streams.size())));  // none, half of the time
  streams_.resize(streams.size());
  for (size_t i = 0; i < streams.size(); ++i) {
    streams_[i].kernels = &streams[i];
    TsanRelease(streams_[i].order.address);
    if (!streams[i].empty()) Start(static_cast<int>(i));
  }
  std::string failure;
  for (uint64_t turn = 0; !live_.empty() && failure.empty(); ++turn) {
    Runner& block = *Choose();
    SetCurrentRunner(&block);
    block.Continue();
    if (block.failure.empty() && block.yielded) {
      if (turn % (4 * live_.size()) == 0 && Stalled() && !EndStall()) failure = Deadlock();
      continue;
    }
    block.End();
    failure = block.failure;
    live_.erase(std::find(live_.begin(), live_.end(), &block));
    Happened();
    Stream& stream = streams_[static_cast<size_t>(block.stream)];
    if (failure.empty() && --stream.live == 0 && stream.next < stream.kernels->size()) {
      PerformAll(stream);
      Start(block.stream);
    }
  }
  // Fibers that are left in the middle of a kernel are unwound.
  for (Runner* block : live_) {
    SetCurrentRunner(block);
    block->failure = "another block has failed";
    block->End();
  }
  SetCurrentRunner(nullptr);
  for (Stream& stream : streams_) {
    PerformAll(stream);
    TsanAcquire(stream.order.address);
  }
  return failure;
}

bool Together::Stalled() const {
  for (const Runner* block : live_) {
    for (int warp = 0; warp < block->threads / kWarpSize; ++warp) {
      for (uint32_t ready = block->warps[static_cast<size_t>(warp)].ready; ready != 0; ready &= ready - 1) {
        const Thread& thread = block->ThreadAt(warp * kWarpSize + std::countr_zero(ready));
        if (thread.polls == nullptr || thread.polls != thread.polled || thread.polled_at != events_) return false;
      }
    }
  }
  return true;
}

bool Together::EndStall() {
  for (Stream& stream : streams_) {
    for (Runner* block : stream.blocks) {
      if (PerformOne(*block)) return true;
    }
  }
  if (stalled_at_ != events_) stalled_checks_ = 0;
  stalled_at_ = events_;
  clock_ += kHour;
  return ++stalled_checks_ < 2000;  // who is patient for a bounded time looks at the clock now and then
}

std::string Together::Deadlock() const {
  std::string out = "deadlock of blocks that wait for each other, seed " + std::to_string(own_->seed);
  for (const Runner* block : live_) {
    out += "\n stream " + std::to_string(block->stream) + ", " + block->Where() + block->DescribeThreads();
  }
  return out;
}

void Together::Perform(Runner& block, uintptr_t line, size_t count) {
  auto& stores = block.pending.at(line);
  for (size_t i = 0; i < count; ++i) {
    const PendingStore& store = stores[i];
    ++stores_;
    for (int at = 0; at < store.bytes; at += 2) {
      auto& versions = versions_[reinterpret_cast<uintptr_t>(store.to + at)];
      uint16_t value;
      std::memcpy(&value, store.to + at, 2);
      if (versions.empty()) versions.push_back({0, -1, value});
      std::memcpy(&value, store.value + at, 2);
      versions.push_back({stores_, block.stream, value});
    }
    std::memcpy(store.to, store.value, static_cast<size_t>(store.bytes));
  }
  stores.erase(stores.begin(), stores.begin() + static_cast<std::ptrdiff_t>(count));
  if (stores.empty()) block.pending.erase(line);
  Happened();
}

bool Together::PerformOne(Runner& block) {
  if (block.pending.empty()) return false;
  const uint32_t which = rng_.Below(static_cast<uint32_t>(block.pending.size()));
  Perform(block, std::next(block.pending.begin(), which)->first, 1);
  return true;
}

namespace {

// How many stores of a line, the oldest first, contain all that thread `index` must see.
size_t MustSee(const Runner& block, const std::vector<PendingStore>& line, int index, const char* begin,
               const char* end) {
  for (size_t i = line.size(); i > 0; --i) {
    const PendingStore& store = line[i - 1];
    const bool ordered = store.thread == index || store.phase != block.set->barrier.phase;
    if (ordered && store.to < end && begin < store.to + store.bytes) return i;
  }
  return 0;
}

constexpr uintptr_t kLine = 16;  // no access is larger, and all are aligned

uintptr_t LineOf(const char* data) {
  return reinterpret_cast<uintptr_t>(data) / kLine;
}

}  // namespace

void Together::Release(Runner& block, int index) {
  std::vector<std::pair<uintptr_t, size_t>> lines;
  for (const auto& [line, stores] : block.pending) {
    const auto* begin = reinterpret_cast<const char*>(line * kLine);
    if (const size_t n = MustSee(block, stores, index, begin, begin + kLine); n > 0) lines.emplace_back(line, n);
  }
  for (const auto& [line, n] : lines) Perform(block, line, n);
}

void Together::Store(Runner& block, char* to, const char* value, int bytes) {
  PendingStore store = {block.current->index, block.set->barrier.phase, to, bytes, {}};
  std::memcpy(store.value, value, static_cast<size_t>(bytes));
  block.pending[LineOf(to)].push_back(store);
  if (eagerness_ > 0 && Chance(eagerness_)) PerformOne(block);
}

void Together::Load(Runner& block, const char* from, char* value, int bytes) {
  if (const auto line = block.pending.find(LineOf(from)); line != block.pending.end()) {
    if (const size_t n = MustSee(block, line->second, block.current->index, from, from + bytes); n > 0) {
      Perform(block, line->first, n);
    }
  }
  std::memcpy(value, from, static_cast<size_t>(bytes));
  for (int at = 0; at < bytes; at += 2) {
    const auto found = versions_.find(reinterpret_cast<uintptr_t>(from + at));
    if (found == versions_.end()) continue;
    const std::vector<Version>& versions = found->second;
    size_t oldest = versions.size() - 1;
    while (versions[oldest].number > block.current->view && versions[oldest].stream != block.stream) --oldest;
    if (oldest + 1 == versions.size()) continue;
    const size_t seen = oldest + rng_.Below(static_cast<uint32_t>(versions.size() - oldest));
    if (seen + 1 < versions.size()) std::memcpy(value + at, &versions[seen].value, 2);
  }
}

// ---- what kernels call

namespace {

// Lets others run now and then. The thread does not poll: it has gone on.
void GoOn(Runner& runner) {
  runner.current->polls = nullptr;
  if (runner.together->Chance(32)) runner.Yield();
}

}  // namespace

void LoadTogether(const void* from, void* value, int bytes) {
  Runner& runner = CurrentRunner();
  GoOn(runner);
  runner.together->Load(runner, static_cast<const char*>(from), static_cast<char*>(value), bytes);
}

void StoreTogether(void* to, const void* value, int bytes) {
  Runner& runner = CurrentRunner();
  if (bytes % 2 != 0) runner.Fail("stores of single bytes are not simulated in blocks that run together", Site());
  GoOn(runner);
  runner.together->Store(runner, static_cast<char*>(to), static_cast<const char*>(value), bytes);
}

void BeforePoll(const void* flag, int bytes, Site site) {
  Access(Memory::kGlobalLoad, flag, bytes, site);
  Runner& runner = CurrentRunner();
  if (runner.together == nullptr) {
    if (++runner.polls_alone > 1'000'000) runner.Fail("polls for ever", site);
    return runner.SwitchAway();
  }
  runner.current->polls = flag;
  runner.current->site = site;
  runner.Yield();
}

void AfterPoll(const void* flag, bool acquire) {
  Runner& runner = CurrentRunner();
  if (runner.together == nullptr) return;
  runner.current->polled = flag;
  runner.current->polled_at = runner.together->events();
  if (acquire) AfterAcquire();
}

void AfterAcquire() {
  Runner& runner = CurrentRunner();
  if (runner.together != nullptr) runner.current->view = runner.together->stores();
}

void BeforeRelease() {
  Runner& runner = CurrentRunner();
  if (runner.together == nullptr) return;
  GoOn(runner);
  runner.together->Release(runner, runner.current->index);
}

void AfterStoringFlag() {
  Runner& runner = CurrentRunner();
  if (runner.together == nullptr) return;
  runner.together->Happened();
  GoOn(runner);
}

uint64_t Clock() {
  Runner& runner = CurrentRunner();
  return runner.together == nullptr ? 0 : runner.together->clock();
}

std::string RunTogether(const std::vector<std::vector<Kernel>>& streams) {
  return Together(&CurrentRunner()).Run(streams);
}

}  // namespace altiplano::sim
