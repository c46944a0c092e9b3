// The machine's insides: what warps and blocks are made of, and who does what. machine_testlib.cc runs them,
// copies_testlib.cc copies what does not block, matrices_testlib.cc multiplies.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "tests/kernels/cuda/ptx/machine_testlib.h"
#include "tests/kernels/cuda/ptx/program_testlib.h"

namespace altiplano::ptx_machine {

struct AsyncCopy {
  uint32_t lane, to;
  uint64_t from;
  bool inside;
  uint64_t group;
};

// A wgmma under way, of a warp's 16 rows.
struct Product {
  const Instruction* in;
  uint64_t a_descriptor, b_descriptor;
  bool accumulate;
  uint64_t group;
  std::vector<std::array<uint32_t, kLanes>> a;  // 4 registers, or none where it has a descriptor
  std::shared_ptr<std::vector<float>> sums;     // row by row; one for all that are under way for the same registers
};

struct Warp {
  int index = 0;
  std::vector<uint64_t> memory;
  std::byte* registers = nullptr;
  std::array<int, kLanes> at{};  // each lane's next instruction
  uint32_t live = 0;
  uint32_t meeting = 0;   // lanes that wait at an instruction for others of the warp
  uint32_t sleeping = 0;  // until some mbarrier has ended a phase
  int barrier = -1;       // that the warp waits at
  std::vector<AsyncCopy> copies;
  std::array<uint64_t, kLanes> groups{};  // of copies, that each lane has committed
  std::deque<Product> products;
  uint64_t product_groups = 0;   // committed
  std::vector<uint64_t> fenced;  // the registers at the last wgmma.fence, and what wgmma has written since

  uint32_t Runnable() const { return barrier >= 0 ? 0 : live & ~meeting & ~sleeping; }
};

struct Barrier {
  uint32_t arrived = 0;   // threads, by whole warps
  uint32_t expected = 0;  // 0: all that there are
};
struct Mbarrier {
  uint32_t expected = 0, pending = 0;  // arrivals
  int64_t bytes = 0;                   // announced and not there
  uint64_t phase = 0;
};
struct BoxCopy {
  const Instruction* in;
  uint32_t to, mbarrier;
  TiledMatrix matrix;
  int32_t column, row;
};

struct Block {
  std::array<uint32_t, 3> index{};
  std::vector<std::byte> shared;  // from kSharedBegin on
  std::vector<Warp> warps;
  std::array<Barrier, 16> barriers{};
  std::map<uint32_t, Mbarrier> mbarriers;
  std::vector<BoxCopy> boxes;

  uint32_t LiveWarps() const {
    return static_cast<uint32_t>(
        std::count_if(warps.begin(), warps.end(), [](const Warp& warp) { return warp.live != 0; }));
  }
};

class Machine {
 public:
  Machine(const Kernel& kernel, const Launch& launch) : kernel_(kernel), launch_(launch), random_(launch.seed) {}

  std::string RunAll();
  uint64_t issue_slots() const { return issue_slots_; }

 private:
  uint32_t Threads() const { return launch_.block[0] * launch_.block[1] * launch_.block[2]; }

  // ---- machine_testlib.cc: who goes next, and what each lane does for itself
  std::unique_ptr<Block> Start(uint64_t index);
  void StartWarp(Block& block, size_t index);
  uint64_t Special(const std::string& name, const Block& block, uint32_t thread) const;
  void Turn(Block& block);
  void Deadlock(const Block& block);
  void Fault(const Instruction& in, const std::string& what, int lane = -1);
  void RunWarp(int instructions);
  bool Execute(const Instruction& in, uint32_t group, bool alone, int* at);
  bool Together(const Instruction& in, uint32_t group, uint32_t lanes, int* at);
  void AccessWords(const Instruction& in, uint32_t lane);
  void Access(const Instruction& in, uint32_t lane);
  void AtomicAdd(const Instruction& in, uint32_t lane);
  void Move(const Instruction& in, uint32_t lanes);
  void Shuffle(const Instruction& in, uint32_t members);
  // Barriers of the block, and mbarriers.
  void Arrive(const Instruction& in);
  void Complete(int barrier);
  Mbarrier* Find(const Instruction& in, uint32_t address, uint32_t lane);
  void Complete(Mbarrier& mbarrier);
  bool TryWait(const Instruction& in, uint32_t group, uint32_t lanes, int* at);

  // Memory; null, and a fault, where none is.
  std::byte* Shared(const Instruction& in, uint64_t address, uint32_t bytes, uint32_t lane);
  std::byte* Global(const Instruction& in, uint64_t address, uint32_t bytes, uint32_t lane);
  std::byte* At(const Instruction& in, uint32_t lane, Register base, uint32_t bytes);
  // Where TMA puts, and wgmma finds, what would lie at `address` without the swizzle of 128 bytes.
  static uint64_t Swizzled(uint64_t address) { return address ^ (address >> 7 & 7) << 4; }

  // ---- copies_testlib.cc
  void IssueBox(const Instruction& in, uint32_t lane);
  void PerformBox(const BoxCopy& box);
  void IssueCopy(const Instruction& in, uint32_t lane);
  void PerformCopies(const Instruction& in, uint32_t lanes);

  // ---- matrices_testlib.cc
  void Mma(const Instruction& in);
  void LdMatrix(const Instruction& in);
  void IssueProduct(const Instruction& in);
  void PerformProduct();  // the oldest
  // Rows of a, or columns of b, 16 elements each; false, and a fault, where there is none to be read.
  bool ReadMatrix(const Instruction& in, uint64_t descriptor, bool mn_major, uint32_t begin, uint32_t end,
                  std::vector<float>* to);
  void FenceProducts() { warp_->fenced = warp_->memory; }
  void WaitForProducts(uint64_t pending_groups);

  const Kernel& kernel_;
  const Launch& launch_;
  std::mt19937_64 random_;
  std::vector<std::unique_ptr<Block>> free_;
  Block* block_ = nullptr;
  Warp* warp_ = nullptr;
  Region region_ = {0, 0};
  uint64_t issue_slots_ = 0;
  std::string error_;
};

}  // namespace altiplano::ptx_machine
