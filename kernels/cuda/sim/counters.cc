// Traffic per source line. A warp's access is the n-th execution of a line by each of its lanes.
#include <algorithm>
#include <bit>
#include <cstdio>
#include <deque>
#include <map>
#include <vector>

#include "kernels/cuda/sim/core.h"

namespace altiplano::sim {

namespace {

constexpr uint32_t kAllLanes = 0xFFFFFFFF;

struct LineCount {
  bool global = false, store = false;
  uint64_t accesses = 0, bytes = 0, cost = 0, ideal = 0;  // cost: sectors or wavefronts
};

struct WarpAccess {
  uint32_t mask = 0;
  uint64_t address[kWarpSize];
};

// The executions of one line by one warp that not all lanes have reached.
struct OpenLine {
  uint32_t seen[kWarpSize] = {};
  uint32_t first = 0;
  std::deque<WarpAccess> accesses;
  Memory memory = Memory::kGlobalLoad;
  int bytes = 0;
  Site site;
};

struct Key {
  const Runner* block;
  int warp;
  const char* file;
  int line;
  Memory memory;
  auto operator<=>(const Key&) const = default;
};

struct Early {
  uint64_t loaded = 0, prefetched = 0;  // bytes
};

struct Counts {
  std::map<std::string, std::map<std::string, LineCount>> lines;  // of each kernel
  std::map<std::string, Early> early;
  std::map<std::string, uint64_t> launches;
  std::map<Key, OpenLine> open;
  std::vector<int> wgmma_commits;
};
Counts& ThisThread() {
  static thread_local Counts counts;
  return counts;
}

uint64_t Distinct(std::vector<uint64_t>& values) {
  std::sort(values.begin(), values.end());
  return static_cast<uint64_t>(std::unique(values.begin(), values.end()) - values.begin());
}

// 16-byte accesses go by quarter warps, 8-byte ones by halves; within a group distinct words of one bank take turns.
uint64_t Wavefronts(const uint64_t* address, uint32_t mask, int bytes) {
  const int group = bytes >= 16 ? 8 : bytes == 8 ? 16 : 32;
  uint64_t total = 0;
  for (int first = 0; first < kWarpSize; first += group) {
    std::vector<uint64_t> words;
    for (int lane = first; lane < first + group; ++lane) {
      if ((mask >> lane & 1) == 0) continue;
      for (int b = 0; b < std::max(bytes, 4); b += 4) words.push_back((address[lane] + static_cast<unsigned>(b)) / 4);
    }
    words.resize(Distinct(words));
    int of_bank[32] = {}, worst = 0;
    for (uint64_t word : words) worst = std::max(worst, ++of_bank[word % 32]);
    total += static_cast<uint64_t>(worst);
  }
  return total;
}

void Close(const Runner& runner, const OpenLine& open, const WarpAccess& access) {
  constexpr const char* kNames[] = {"global load", "global store", "shared load", "shared store"};
  LineCount& line =
      ThisThread().lines[runner.grid.kernel][ToString(open.site) + " " + kNames[static_cast<int>(open.memory)]];
  const auto lanes = static_cast<uint64_t>(std::popcount(access.mask));
  const auto bytes = static_cast<uint64_t>(open.bytes);
  ++line.accesses;
  line.bytes += lanes * bytes;
  line.global = open.memory == Memory::kGlobalLoad || open.memory == Memory::kGlobalStore;
  line.store = open.memory == Memory::kGlobalStore || open.memory == Memory::kSharedStore;
  std::vector<uint64_t> addresses;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (access.mask >> lane & 1) addresses.push_back(access.address[lane]);
  }
  if (line.global) {
    std::vector<uint64_t> sectors;
    for (uint64_t address : addresses) sectors.push_back(address / 32);
    line.cost += Distinct(sectors);
    line.ideal += (Distinct(addresses) * bytes + 31) / 32;
  } else {
    line.cost += Wavefronts(access.address, access.mask, open.bytes);
    line.ideal += (Distinct(addresses) * std::max<uint64_t>(bytes, 4) + 127) / 128;
  }
}

}  // namespace

void CountAccess(const Runner& runner, Memory memory, const void* data, int bytes, Site site) {
  TsanIgnore ignore;
  const Thread& thread = *runner.current;
  OpenLine& open = ThisThread().open[{&runner, thread.warp, site.file, site.line, memory}];
  open.memory = memory;
  open.bytes = bytes;
  open.site = site;
  const uint32_t index = open.seen[thread.lane]++ - open.first;
  while (open.accesses.size() <= index) open.accesses.emplace_back();
  WarpAccess& access = open.accesses[index];
  access.mask |= 1u << thread.lane;
  access.address[thread.lane] = memory == Memory::kSharedLoad || memory == Memory::kSharedStore
                                    ? SharedAddress(runner, data)
                                    : reinterpret_cast<uintptr_t>(data);
  while (!open.accesses.empty() && open.accesses.front().mask == kAllLanes) {
    Close(runner, open, open.accesses.front());
    open.accesses.pop_front();
    ++open.first;
  }
}

void CountCopy(const Runner& runner, const void* to, const void* from, int bytes, int from_bytes, Site site) {
  if (from_bytes > 0) CountAccess(runner, Memory::kGlobalLoad, from, bytes, site);
  CountAccess(runner, Memory::kSharedStore, to, bytes, site);
}

void CountMatrixRows(const Runner& runner, const void* const* rows, int matrices, Site site) {
  TsanIgnore ignore;
  LineCount& line = ThisThread().lines[runner.grid.kernel][ToString(site) + " ldmatrix"];
  uint64_t address[kWarpSize] = {};
  for (int lane = 0; lane < 8 * matrices; ++lane) address[lane] = SharedAddress(runner, rows[lane]);
  ++line.accesses;
  line.bytes += static_cast<uint64_t>(128 * matrices);
  line.cost += Wavefronts(address, matrices == 4 ? kAllLanes : (1u << 8 * matrices) - 1, 16);
  line.ideal += static_cast<uint64_t>(matrices);
}

void CountBox(const Runner& runner, const char* row, uint64_t rows, uint64_t stride_bytes, uint64_t row_bytes,
              Site site) {
  TsanIgnore ignore;
  LineCount& line = ThisThread().lines[runner.grid.kernel][ToString(site) + " box"];
  line.global = true;
  ++line.accesses;
  line.bytes += rows * row_bytes;
  for (uint64_t r = 0; r < rows; ++r) {
    const auto begin = reinterpret_cast<uintptr_t>(row + r * stride_bytes);
    line.cost += (begin + row_bytes - 1) / 32 - begin / 32 + 1;
  }
  line.ideal += (rows * row_bytes + 31) / 32;
}

void FinishCounting(const Runner& runner) {
  for (const auto& [key, open] : ThisThread().open) {
    if (key.block != &runner) continue;
    for (const WarpAccess& access : open.accesses) Close(runner, open, access);
  }
  std::erase_if(ThisThread().open, [&](const auto& entry) { return entry.first.block == &runner; });
}

void CountEarly(const Runner& runner, uint64_t bytes, bool prefetch) {
  TsanIgnore ignore;
  Early& early = ThisThread().early[runner.grid.kernel];
  (prefetch ? early.prefetched : early.loaded) += bytes;
}

void CountLaunch(const Runner& runner) {
  if (runner.counting) ++ThisThread().launches[runner.grid.kernel];
}

void CountWgmmaCommit(const Runner& runner) {
  TsanIgnore ignore;
  if (runner.counting) ThisThread().wgmma_commits.push_back(runner.current->warp);
}

std::vector<int> WgmmaCommits() {
  return ThisThread().wgmma_commits;
}

void CountTraffic(bool on) {
  CurrentRunner().counting = on;
  ThisThread() = {};
}

Traffic TrafficOf(const std::string& kernel) {
  Traffic traffic;
  traffic.launches = ThisThread().launches[kernel];
  traffic.early_bytes = ThisThread().early[kernel].loaded;
  traffic.prefetched_bytes = ThisThread().early[kernel].prefetched;
  for (const auto& [name, line] : ThisThread().lines[kernel]) {
    if (line.global) {
      (line.store ? traffic.store_bytes : traffic.load_bytes) += line.bytes;
      traffic.sectors += line.cost;
      traffic.ideal_sectors += line.ideal;
    } else {
      traffic.wavefronts += line.cost;
      traffic.ideal_wavefronts += line.ideal;
    }
  }
  return traffic;
}

std::string TrafficByLine() {
  std::string out;
  for (const auto& [kernel, lines] : ThisThread().lines) {
    for (const auto& [name, line] : lines) {
      char text[256];
      std::snprintf(text, sizeof(text), "%s %-40s %8llu accesses %10llu bytes, %8llu %s, ideal %llu\n", kernel.c_str(),
                    name.c_str(), static_cast<unsigned long long>(line.accesses),
                    static_cast<unsigned long long>(line.bytes), static_cast<unsigned long long>(line.cost),
                    line.global ? "sectors" : "wavefronts", static_cast<unsigned long long>(line.ideal));
      out += text;
    }
  }
  return out;
}

}  // namespace altiplano::sim
