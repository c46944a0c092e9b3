// PoolOracle: the blocks of docs/scheduler.md counted naively: who holds how many, what the prefix cache holds and what
// it forgets first. A block that has been taken is a mere number until a plan names it; which of the free ones that is,
// is the scheduler's choice.
#pragma once

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

namespace altiplano::sim {

class PoolOracle {
 public:
  explicit PoolOracle(int32_t num_blocks) : blocks_(static_cast<size_t>(num_blocks)) {}

  int32_t held() const;
  int32_t cached() const;  // published and held by nobody
  int32_t available() const { return static_cast<int32_t>(blocks_.size()) - held(); }
  int32_t free() const { return available() - cached(); }
  int32_t refs(int32_t block) const { return blocks_[static_cast<size_t>(block)].refs; }

  // A block for new contents, which no plan has named yet. False: none is available.
  bool TakeUnnamed();
  void ReturnUnnamed(int32_t count) { unnamed_ -= count; }
  // One that was taken gets its number: what is wrong with that, or null.
  const char* Name(int32_t block);
  void Ref(int32_t block) { ++At(block).refs; }
  void Unref(int32_t block);

  // The block that is published under `name`.
  std::optional<int32_t> Find(uint64_t name) const;
  void Publish(int32_t block, uint64_t name);  // not if the name is taken
  void Withdraw(int32_t block) { At(block).name = 0; }
  void SetValued(int32_t block) { At(block).valued = true; }
  void ResetCache();

 private:
  struct Block {
    int32_t refs = 0;
    uint64_t name = 0;        // 0: not published
    bool valued = false;      // another request has found it
    uint64_t idle_since = 0;  // in Unrefs
    bool idle() const { return name != 0 && refs == 0; }
    std::pair<bool, uint64_t> lasting() const { return {valued, idle_since}; }  // the least goes first
  };
  Block& At(int32_t block) { return blocks_[static_cast<size_t>(block)]; }

  std::vector<Block> blocks_;
  int32_t unnamed_ = 0;  // taken, and not named yet
  uint64_t unrefs_ = 0;
};

}  // namespace altiplano::sim
