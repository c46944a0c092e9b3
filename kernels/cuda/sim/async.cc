// mbarriers, and the boxes that TMA copies. A box is copied at a moment of the simulator's choice, at the latest when
// no thread can go on; until then its destination holds NaN.
#include <algorithm>

#include "kernels/cuda/sim/core.h"
#include "kernels/cuda/sim/matrix_descriptor.h"

namespace altiplano::sim {

namespace {

constexpr uint64_t kMark = 0x726569727261626D;  // of an initialized mbarrier
constexpr uint32_t kRowBytes = 128;             // of a box
constexpr int64_t kMostBytes = (1 << 20) - 1;   // that an mbarrier can expect

uint64_t Peek(const uint64_t* word) {
  uint64_t value;
  CopyBytes(&value, word, sizeof(value));
  return value;
}

Mbarrier& Find(Runner& runner, uint64_t* address, Site site) {
  for (size_t i = 0; i < runner.mbarriers; ++i) {
    Mbarrier& barrier = runner.set->mbarriers[i];
    if (barrier.address != address) continue;
    if (Peek(address) != kMark) runner.Fail("the mbarrier of " + ToString(barrier.site) + " was written over", site);
    return barrier;
  }
  runner.Fail("an mbarrier that was not initialized", site);
}

char* TokenOf(Mbarrier& barrier, unsigned phase) {
  return barrier.tokens[phase & 1].address;
}

void CompleteIfDone(Runner& runner, Mbarrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  barrier.pending = barrier.arrivals;
  ++barrier.phase;
  for (int i = 0; i < runner.threads; ++i) {
    Thread& thread = runner.ThreadAt(i);
    if (thread.wait == Wait::kMbarrier && thread.mbarrier == &barrier && (barrier.phase & 1) != thread.parity) {
      runner.Wake(thread);
    }
  }
}

// The part of a box that lies inside of the matrix.
struct Inside {
  int64_t first_row, rows, first_column, columns;
};
Inside Clip(const TensorMap& map, int column, int row) {
  const int64_t first_row = std::max(row, 0), first_column = std::max(column, 0);
  const int64_t last_row = std::min<int64_t>(int64_t{row} + map.box_rows, static_cast<int64_t>(map.rows));
  const int64_t last_column = std::min<int64_t>(int64_t{column} + kRowBytes / 2, static_cast<int64_t>(map.columns));
  return {first_row, std::max<int64_t>(0, last_row - first_row), first_column,
          std::max<int64_t>(0, last_column - first_column)};
}

const char* Source(const TensorMap& map, int64_t row, int64_t column) {
  return static_cast<const char*>(map.data) + row * static_cast<int64_t>(map.stride_bytes) + column * 2;
}

}  // namespace

void MbarrierInit(uint64_t* address, uint32_t arrivals, Site site) {
  Runner& runner = CurrentRunner();
  if (reinterpret_cast<uintptr_t>(address) % 8 != 0) runner.Fail("mbarrier.init: not aligned to 8 bytes", site);
  CheckShared(runner, address, 8, "an mbarrier", site);
  if (arrivals == 0 || arrivals > kMostBytes) runner.Fail("mbarrier.init: no count of arrivals, 1 to 1048575", site);
  if (runner.mbarriers == kMostMbarriers) runner.Fail("more mbarriers than the simulator has room for", site);
  for (size_t i = 0; i < runner.mbarriers; ++i) {
    if (runner.set->mbarriers[i].address == address) runner.Fail("mbarrier.init of an mbarrier in use", site);
  }
  TsanWrite(address, 8, SIM_CALLER);
  CopyBytes(address, &kMark, 8);
  Mbarrier& barrier = runner.set->mbarriers[runner.mbarriers++];
  barrier.address = address;
  barrier.arrivals = barrier.pending = arrivals;
  barrier.bytes = 0;
  barrier.phase = 0;
  barrier.site = site;
  barrier.thread = runner.current->index;
  barrier.fences = runner.current->proxy_fences;
}

void MbarrierArrive(uint64_t* address, uint32_t expected_bytes, Site site) {
  Runner& runner = CurrentRunner();
  TsanRead(address, 8, SIM_CALLER);
  Mbarrier& barrier = Find(runner, address, site);
  if (barrier.pending == 0) runner.Fail("more arrivals at an mbarrier than it counts in a phase", site);
  barrier.bytes += expected_bytes;
  if (barrier.bytes > kMostBytes) runner.Fail("an mbarrier expects more than 1048575 bytes", site);
  TsanRelease(TokenOf(barrier, barrier.phase));
  --barrier.pending;
  CompleteIfDone(runner, barrier);
}

// By parity: true once the phase of that parity is over, which is when the one of the other runs.
void MbarrierWait(uint64_t* address, uint32_t parity, Site site) {
  Runner& runner = CurrentRunner();
  TsanRead(address, 8, SIM_CALLER);
  Mbarrier& barrier = Find(runner, address, site);
  if (parity > 1) runner.Fail("mbarrier.try_wait: a parity is 0 or 1", site);
  runner.SwitchAway();
  while ((barrier.phase & 1) == parity) {
    runner.current->mbarrier = &barrier;
    runner.current->parity = parity;
    runner.BlockOn(Wait::kMbarrier, site);
  }
  TsanAcquire(TokenOf(barrier, parity));
}

void FenceProxyAsync() {
  ++CurrentRunner().current->proxy_fences;
}

void CheckProxyFence(Runner& runner, uint32_t address, const char* what, Site site) {
  const GenericWrite& write = runner.generic_writes[address / 16];
  if (write.block == runner.block_id && runner.ThreadAt(write.thread).proxy_fences == write.fences) {
    runner.Fail(std::string(what) + " shared memory that thread " + std::to_string(write.thread) +
                    " wrote without a fence.proxy.async after it",
                site);
  }
}

void BoxMaybeEarly(const TensorMap& map, int column, int row) {
  const Inside inside = Clip(map, column, row);
  LoadsMaybeEarly(map.data, 0);  // nothing may be inside
  for (int64_t r = 0; r < inside.rows; ++r) {
    LoadsMaybeEarly(Source(map, inside.first_row + r, inside.first_column), static_cast<size_t>(inside.columns) * 2);
  }
}

void CopyBox(void* to, const TensorMap& map, int column, int row, uint64_t* address, Site site) {
  Runner& runner = CurrentRunner();
  const uint32_t at = SharedAddress(runner, to), bytes = map.box_rows * kRowBytes;
  if (map.box_rows == 0 || map.box_rows > 256) runner.Fail("a box has 1 to 256 rows", site);
  if (at % 1024 != 0) runner.Fail("the destination of a swizzled box is not aligned to 1024 bytes", site);
  CheckWaited(runner, site);
  CheckShared(runner, to, static_cast<int>(bytes), "the destination of a box", site);
  if (!IsDeviceMemory(map.data, (map.rows - 1) * map.stride_bytes + map.columns * 2)) {
    runner.Fail("the matrix of a tensor map is outside of device memory", site);
  }
  Mbarrier& barrier = Find(runner, address, site);
  if (runner.ThreadAt(barrier.thread).proxy_fences == barrier.fences) {
    runner.Fail("TMA is to signal an mbarrier that was initialized without a fence.proxy.async after it", site);
  }
  for (uint32_t i = 0; i < bytes; i += 16) CheckProxyFence(runner, at + i, "TMA writes to", site);
  const Inside inside = Clip(map, column, row);
  const auto row_bytes = static_cast<uint64_t>(inside.columns) * 2;
  if (runner.counting && row_bytes > 0) {
    CountBox(runner, Source(map, inside.first_row, inside.first_column), static_cast<uint64_t>(inside.rows),
             map.stride_bytes, row_bytes, site);
  }
  // The copy is ordered after what its thread did, and before those that wait for the phase.
  for (int64_t r = 0; r < inside.rows; ++r) {
    TsanRead(Source(map, inside.first_row + r, inside.first_column), row_bytes, SIM_CALLER);
  }
  TsanWrite(to, bytes, SIM_CALLER);
  TsanRelease(TokenOf(barrier, barrier.phase));
  PoisonBytes(to, bytes);
  {
    TsanIgnore ignore;
    runner.boxes.push_back({map, column, row, static_cast<char*>(to), &barrier, site});
  }
  runner.SwitchAway();
}

void CopyOneBox(Runner& runner) {
  TsanIgnore ignore;
  const size_t index = runner.rng.Below(static_cast<uint32_t>(runner.boxes.size()));
  const BoxCopy box = runner.boxes[index];
  runner.boxes.erase(runner.boxes.begin() + static_cast<std::ptrdiff_t>(index));
  const Inside inside = Clip(box.map, box.column, box.row);
  char* window = runner.set->window;
  const uint32_t at = SharedAddress(runner, box.to);
  for (int64_t r = 0; r < box.map.box_rows; ++r) {
    char row[kRowBytes] = {};
    const int64_t from = box.row + r;
    if (from >= inside.first_row && from < inside.first_row + inside.rows) {
      CopyBytes(row + (inside.first_column - box.column) * 2, Source(box.map, from, inside.first_column),
                static_cast<size_t>(inside.columns) * 2);
    }
    for (uint32_t chunk = 0; chunk < kRowBytes; chunk += 16) {
      const uint32_t address = at + static_cast<uint32_t>(r) * kRowBytes + chunk;
      CopyBytes(window + Swizzled(address, Swizzle::k128Bytes), row + chunk, 16);
      runner.generic_writes[address / 16] = {};
    }
  }
  box.barrier->bytes -= box.map.box_rows * kRowBytes;
  CompleteIfDone(runner, *box.barrier);
}

}  // namespace altiplano::sim
