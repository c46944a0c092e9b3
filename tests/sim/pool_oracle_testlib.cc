#include "tests/sim/pool_oracle_testlib.h"

#include <algorithm>

namespace altiplano::sim {

int32_t PoolOracle::held() const {
  return unnamed_ + static_cast<int32_t>(std::ranges::count_if(blocks_, [](const Block& b) { return b.refs > 0; }));
}

int32_t PoolOracle::cached() const {
  return static_cast<int32_t>(std::ranges::count_if(blocks_, &Block::idle));
}

// While none is free, the cached one that has been in no use for longest; of those that several requests have found
// only when there is no other.
bool PoolOracle::TakeUnnamed() {
  if (free() == 0) {
    Block* first = nullptr;
    for (Block& block : blocks_) {
      if (block.idle() && (first == nullptr || block.lasting() < first->lasting())) first = &block;
    }
    if (first == nullptr) return false;
    *first = {};
  }
  ++unnamed_;
  return true;
}

const char* PoolOracle::Name(int32_t block) {
  if (refs(block) > 0) return "is somebody else's";
  if (At(block).name != 0) return "was to be kept for the cache";
  Ref(block);
  --unnamed_;
  return nullptr;
}

// What several have found is kept for longer, but half of the pool at most.
void PoolOracle::Unref(int32_t id) {
  Block& block = At(id);
  if (--block.refs > 0) return;
  if (block.name == 0) block.valued = false;
  block.idle_since = ++unrefs_;
  Block* oldest = nullptr;
  size_t valued = 0;
  for (Block& other : blocks_) {
    if (!other.valued || !other.idle()) continue;
    ++valued;
    if (oldest == nullptr || other.idle_since < oldest->idle_since) oldest = &other;
  }
  if (valued <= blocks_.size() / 2) return;
  oldest->valued = false;
  oldest->idle_since = ++unrefs_;
}

std::optional<int32_t> PoolOracle::Find(uint64_t name) const {
  const auto block = std::ranges::find(blocks_, name, &Block::name);
  if (block == blocks_.end()) return std::nullopt;
  return static_cast<int32_t>(block - blocks_.begin());
}

void PoolOracle::Publish(int32_t block, uint64_t name) {
  if (!Find(name)) At(block).name = name;
}

void PoolOracle::ResetCache() {
  for (Block& block : blocks_) {
    if (block.idle()) block = {};
  }
}

}  // namespace altiplano::sim
