#include "tests/kernels/cuda/ptx/machine_testlib.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <chrono>
#include <cstring>
#include <limits>
#include <memory>
#include <set>
#include <thread>
#include <utility>

#include "tests/kernels/cuda/ptx/lanes_testlib.h"
#include "tests/kernels/cuda/ptx/machine_block_testlib.h"

namespace altiplano::ptx_machine {
namespace {

constexpr int kNowhere = std::numeric_limits<int>::max();
std::atomic<uint64_t> issue_slots = 0;

}  // namespace

std::string Machine::RunAll() {
  const auto& [x, y, z] = launch_.grid;
  const uint64_t blocks = uint64_t{x} * y * z;
  if (launch_.parameters.size() != kernel_.parameter_bytes) return "parameters of another size than the kernel's";
  if (Threads() > kernel_.most_threads) return "more threads than the kernel was compiled for";
  // Blocks that wait for other GPUs' must all be there at once; those have at most so many. A few are enough for
  // others.
  const bool waits =
      std::any_of(kernel_.code.begin(), kernel_.code.end(), [](const auto& in) { return in.among_gpus; });
  const uint64_t most_resident = waits ? 16 : 2;
  std::vector<uint64_t> order(blocks);
  for (uint64_t i = 0; i < blocks; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), random_);
  std::vector<std::unique_ptr<Block>> resident;
  for (uint64_t turns = 1; !order.empty() || !resident.empty(); ++turns) {
    while (!order.empty() && resident.size() < most_resident) {
      resident.push_back(Start(order.back()));
      order.pop_back();
    }
    const size_t which = random_() % resident.size();
    Turn(*resident[which]);
    if (!error_.empty()) return kernel_.name + ": " + error_;
    if (resident[which]->LiveWarps() == 0) {
      free_.push_back(std::move(resident[which]));
      resident.erase(resident.begin() + static_cast<ptrdiff_t>(which));
    }
    if (turns % 64 == 0 && waits) std::this_thread::yield();
  }
  return "";
}

std::unique_ptr<Block> Machine::Start(uint64_t index) {
  std::unique_ptr<Block> block;
  if (free_.empty()) {
    block = std::make_unique<Block>();
  } else {
    block = std::move(free_.back());
    free_.pop_back();
  }
  block->index = {static_cast<uint32_t>(index % launch_.grid[0]),
                  static_cast<uint32_t>(index / launch_.grid[0] % launch_.grid[1]),
                  static_cast<uint32_t>(index / launch_.grid[0] / launch_.grid[1])};
  block->barriers = {};
  block->mbarriers.clear();
  block->boxes.clear();
  // NaN, whichever its type.
  block->shared.assign(DynamicSharedBegin(kernel_.shared_bytes) - kSharedBegin + launch_.dynamic_shared_bytes,
                       std::byte{0xff});
  block->warps.resize((Threads() + kLanes - 1) / kLanes);
  for (size_t i = 0; i < block->warps.size(); ++i) StartWarp(*block, i);
  return block;
}

// Registers hold nothing of use at first: NaNs, or what an earlier block has left.
void Machine::StartWarp(Block& block, size_t index) {
  Warp& warp = block.warps[index];
  std::vector<uint64_t> memory = std::move(warp.memory);
  const bool first_time = memory.empty();
  if (first_time) memory.assign((kernel_.register_bytes + 7) / 8, 0x7ff7dead7fc0dead);
  warp = {};
  warp.index = static_cast<int>(index);
  warp.memory = std::move(memory);
  warp.registers = reinterpret_cast<std::byte*>(warp.memory.data());
  const uint32_t first = static_cast<uint32_t>(index) * kLanes, threads = std::min(Threads() - first, kLanes);
  warp.live = threads == kLanes ? ~uint32_t{0} : (uint32_t{1} << threads) - 1;
  if (first_time) {
    for (const Kernel::Constant& constant : kernel_.constants) {
      for (uint32_t lane = 0; lane < kLanes; ++lane) {
        PutBits(warp.registers, constant.at, lane, constant.wide, constant.bits);
      }
    }
  }
  for (const auto& [special, at] : kernel_.special) {
    const auto& [name, wide] = special;
    for (uint32_t lane = 0; lane < kLanes; ++lane) {
      PutBits(warp.registers, at, lane, wide, Special(name, block, first + lane));
    }
  }
}

uint64_t Machine::Special(const std::string& name, const Block& block, uint32_t thread) const {
  if (name == "%parameters") return reinterpret_cast<uint64_t>(launch_.parameters.data());
  if (name == "%dynamic") return DynamicSharedBegin(kernel_.shared_bytes);
  if (name == "%laneid") return thread % kLanes;
  const size_t axis = static_cast<size_t>(name.back() - 'x');
  if (name.starts_with("%ntid")) return launch_.block[axis];
  if (name.starts_with("%nctaid")) return launch_.grid[axis];
  if (name.starts_with("%ctaid")) return block.index[axis];
  const auto& [x, y, z] = launch_.block;
  return axis == 0 ? thread % x : axis == 1 ? thread / x % y : thread / x / y;
}

// Some instructions of some warp, or a copy or a product that was under way.
void Machine::Turn(Block& block) {
  block_ = &block;
  std::array<Warp*, kLanes> ready;
  size_t count = 0;
  for (Warp& warp : block.warps) {
    if (warp.Runnable() != 0) ready[count++] = &warp;
  }
  if (!block.boxes.empty() && (count == 0 || random_() % 8 == 0)) {
    const size_t which = random_() % block.boxes.size();
    const BoxCopy box = block.boxes[which];
    block.boxes.erase(block.boxes.begin() + static_cast<ptrdiff_t>(which));
    PerformBox(box);
    return;
  }
  if (count == 0) return Deadlock(block);
  warp_ = ready[random_() % count];
  if (!warp_->products.empty() && random_() % 8 == 0) return PerformProduct();
  RunWarp(8 + static_cast<int>(random_() % 256));
}

void Machine::Deadlock(const Block& block) {
  error_ = "a deadlock of block " + std::to_string(block.index[0]) + ", " + std::to_string(block.index[1]);
  for (const Warp& warp : block.warps) {
    std::set<std::string> places;
    ForLanes(warp.live, [&](uint32_t lane) {
      places.insert("line " + std::to_string(kernel_.code[static_cast<size_t>(warp.at[lane])].line) +
                    (warp.barrier >= 0                 ? " behind barrier " + std::to_string(warp.barrier)
                     : (warp.meeting >> lane & 1) != 0 ? " for other lanes"
                                                       : " for an mbarrier"));
    });
    for (const std::string& place : places) error_ += "; warp " + std::to_string(warp.index) + " waits at " + place;
  }
  error_ += " of " + kernel_.file;
}

void Machine::Fault(const Instruction& in, const std::string& what, int lane) {
  if (!error_.empty()) return;
  error_ = kernel_.file + ":" + std::to_string(in.line) + ": " + what + " (block " + std::to_string(block_->index[0]) +
           ", " + std::to_string(block_->index[1]) + ", " + std::to_string(block_->index[2]) + ", warp " +
           std::to_string(warp_->index) + (lane >= 0 ? ", lane " + std::to_string(lane) : "") + ")";
}

// Lanes at the same instruction go together. Those that are furthest behind go first, mostly, so that what diverged
// meets again; now and then others do, so that nobody who is waited for waits for ever.
void Machine::RunWarp(int instructions) {
  Warp& warp = *warp_;
  while (instructions > 0 && error_.empty()) {
    const uint32_t runnable = warp.Runnable();
    if (runnable == 0) return;
    int at = kNowhere;
    ForLanes(runnable, [&](uint32_t lane) { at = std::min(at, warp.at[lane]); });
    if (random_() % 8 == 0) {
      uint32_t skip = static_cast<uint32_t>(random_()) % static_cast<uint32_t>(std::popcount(runnable));
      ForLanes(runnable, [&](uint32_t lane) {
        if (skip-- == 0) at = warp.at[lane];
      });
    }
    uint32_t group = 0;
    int stop = kNowhere;  // where others are, who join
    ForLanes(warp.live & ~warp.sleeping, [&](uint32_t lane) {
      if (warp.at[lane] == at) {
        group |= uint32_t{1} << lane;
      } else if (warp.at[lane] > at) {
        stop = std::min(stop, warp.at[lane]);
      }
    });
    warp.meeting &= ~group;
    const bool alone = group == (warp.live & ~warp.sleeping);
    bool on = true;
    while (on && instructions-- > 0 && error_.empty()) {
      on = Execute(kernel_.code[static_cast<size_t>(at)], group, alone, &at);
      if (on && at == stop) break;
    }
    if (on) {
      ForLanes(group, [&](uint32_t lane) { warp.at[lane] = at; });
    }
  }
}

// Whether the group goes on together at *at; else its lanes' places are written.
bool Machine::Execute(const Instruction& in, uint32_t group, bool alone, int* at) {
  Warp& warp = *warp_;
  issue_slots_ += in.issue_slots;
  uint32_t lanes = group;
  if (in.guarded) {
    uint32_t guard;
    std::memcpy(&guard, warp.registers + in.guard, sizeof guard);
    lanes &= in.guard_negated ? ~guard : guard;
  }
  const int next = *at + 1;
  switch (in.op) {
    case Op::kEachLane:
      if (lanes != 0) in.function(warp.registers, in.operands.data(), lanes);
      break;
    case Op::kNothing:
      break;
    case Op::kMove:
      Move(in, lanes);
      break;
    case Op::kTimer:
      ForLanes(lanes, [&](uint32_t lane) {
        Put<uint64_t>(warp.registers, in.operands[0], lane,
                      static_cast<uint64_t>(std::chrono::steady_clock::now().time_since_epoch().count()));
      });
      break;
    case Op::kTrap:
      if (lanes != 0) Fault(in, "a trap");
      break;
    case Op::kLoad:
    case Op::kStore:
      if (in.bytes == 4 && in.register_bytes == 4 && !in.among_gpus) {
        ForLanes(lanes, [&](uint32_t lane) { AccessWords(in, lane); });
      } else {
        ForLanes(lanes, [&](uint32_t lane) { Access(in, lane); });
      }
      break;
    case Op::kAtomicAdd:
      ForLanes(lanes, [&](uint32_t lane) { AtomicAdd(in, lane); });
      break;
    case Op::kBranch:
      if (lanes == 0) break;
      if (lanes == group) {
        *at = in.target;
        // Where lanes are apart, who goes next is chosen anew.
        if (alone) return true;
        ForLanes(group, [&](uint32_t lane) { warp.at[lane] = in.target; });
        return false;
      }
      ForLanes(group, [&](uint32_t lane) { warp.at[lane] = (lanes >> lane & 1) != 0 ? in.target : next; });
      return false;
    case Op::kExit:
      if (lanes == 0) break;
      ForLanes(group & ~lanes, [&](uint32_t lane) { warp.at[lane] = next; });
      warp.live &= ~lanes;
      if (warp.live == 0) {
        for (size_t i = 0; i < block_->barriers.size(); ++i) Complete(static_cast<int>(i));
      }
      return false;
    case Op::kMbarrierInit:
      ForLanes(lanes, [&](uint32_t lane) {
        const uint32_t address = Get<uint32_t>(warp.registers, in.operands[0], lane);
        const uint32_t arrivals = Get<uint32_t>(warp.registers, in.operands[1], lane);
        if (Shared(in, address, 8, lane) != nullptr) {
          block_->mbarriers[address] = {.expected = arrivals, .pending = arrivals};
        }
      });
      break;
    case Op::kMbarrierArrive:
      ForLanes(lanes, [&](uint32_t lane) {
        Mbarrier* mbarrier = Find(in, Get<uint32_t>(warp.registers, in.operands[0], lane), lane);
        if (mbarrier == nullptr) return;
        mbarrier->bytes += Get<uint32_t>(warp.registers, in.operands[1], lane);
        if (mbarrier->pending-- == 0) Fault(in, "more arrivals than the mbarrier waits for", static_cast<int>(lane));
        Complete(*mbarrier);
      });
      break;
    case Op::kMbarrierTryWait:
      return TryWait(in, group, lanes, at);
    case Op::kCopyBox:
      ForLanes(lanes, [&](uint32_t lane) { IssueBox(in, lane); });
      break;
    case Op::kCopyAsync:
      ForLanes(lanes, [&](uint32_t lane) { IssueCopy(in, lane); });
      break;
    case Op::kCopyCommit:
      ForLanes(lanes, [&](uint32_t lane) { ++warp.groups[lane]; });
      break;
    case Op::kCopyWait:
      PerformCopies(in, lanes);
      break;
    default:
      if (lanes == 0) break;
      return Together(in, group, lanes, at);
  }
  *at = next;
  return true;
}

// What lanes do at once: only when all have come.
bool Machine::Together(const Instruction& in, uint32_t group, uint32_t lanes, int* at) {
  Warp& warp = *warp_;
  if (lanes != group) {
    Fault(in, "some lanes are to do together what others skip");
    return false;
  }
  uint32_t members = warp.live;
  const bool masked = in.op == Op::kShuffle || (in.op == Op::kMeet && !in.operands.empty());
  if (masked) {
    const Register mask = in.operands[in.op == Op::kShuffle ? 4 : 0];
    members &= Get<uint32_t>(warp.registers, mask, static_cast<uint32_t>(std::countr_zero(group)));
  }
  if ((group & ~members) != 0) Fault(in, "a lane that its own mask leaves out");
  if (group != members) {
    ForLanes(group, [&](uint32_t lane) { warp.at[lane] = *at; });
    warp.meeting |= group;
    if (warp.Runnable() == 0 && warp.sleeping == 0) {
      Fault(in, "lanes that wait for others, who wait elsewhere or have ended");
    }
    return false;
  }
  switch (in.op) {
    case Op::kMeet:
      break;
    case Op::kShuffle:
      Shuffle(in, group);
      break;
    case Op::kMma:
      Mma(in);
      break;
    case Op::kLdMatrix:
      LdMatrix(in);
      break;
    case Op::kWgmma:
      IssueProduct(in);
      break;
    case Op::kWgmmaFence:
      FenceProducts();
      break;
    case Op::kWgmmaCommit:
      ++warp.product_groups;
      break;
    case Op::kWgmmaWait:
      WaitForProducts(static_cast<uint64_t>(in.offset));
      break;
    case Op::kBarrierSync:
    case Op::kBarrierArrive:
      Arrive(in);
      if (in.op == Op::kBarrierSync) {
        ForLanes(group, [&](uint32_t lane) { warp.at[lane] = *at + 1; });
        if (warp.barrier >= 0) Complete(warp.barrier);  // else it was no barrier
        return false;
      }
      break;
    default:
      Fault(in, "an instruction that this machine does not run");
  }
  ++*at;
  return true;
}

// ---- memory
std::byte* Machine::Shared(const Instruction& in, uint64_t address, uint32_t bytes, uint32_t lane) {
  if (address < kSharedBegin || address + bytes > kSharedBegin + block_->shared.size()) {
    Fault(in, "shared memory's " + std::to_string(address) + ", outside of what the block has", static_cast<int>(lane));
    return nullptr;
  }
  return block_->shared.data() + (address - kSharedBegin);
}
std::byte* Machine::Global(const Instruction& in, uint64_t address, uint32_t bytes, uint32_t lane) {
  if (address < region_.begin || address + bytes > region_.end) {
    const auto found = std::upper_bound(launch_.memory.begin(), launch_.memory.end(), address,
                                        [](uint64_t a, const Region& region) { return a < region.begin; });
    if (found == launch_.memory.begin() || address + bytes > (found - 1)->end) {
      std::string near = found == launch_.memory.begin() || address - (found - 1)->end > 4096
                             ? "memory that was not allocated"
                             : std::to_string(address - (found - 1)->end) + " bytes behind memory of " +
                                   std::to_string((found - 1)->end - (found - 1)->begin);
      Fault(in, near, static_cast<int>(lane));
      return nullptr;
    }
    region_ = *(found - 1);
  }
  return reinterpret_cast<std::byte*>(address);
}
std::byte* Machine::At(const Instruction& in, uint32_t lane, Register base, uint32_t bytes) {
  const uint64_t address = GetBits(warp_->registers, base, lane, in.wide_address) + static_cast<uint64_t>(in.offset);
  if ((address & (bytes - 1)) != 0) {  // bytes are a power of two
    Fault(in, "a misaligned address", static_cast<int>(lane));
    return nullptr;
  }
  switch (in.space) {
    case Space::kShared:
      return Shared(in, address, bytes, lane);
    case Space::kParam:
      if (address + bytes > launch_.parameters.size()) {
        Fault(in, "beyond the parameters", static_cast<int>(lane));
        return nullptr;
      }
      return const_cast<std::byte*>(launch_.parameters.data()) + address;
    default:
      return Global(in, address, bytes, lane);
  }
}

// Access of plain words, which most are: a tenth of the tests' time.
void Machine::AccessWords(const Instruction& in, uint32_t lane) {
  std::byte* memory = At(in, lane, in.operands[in.count], uint32_t{in.count} * 4);
  if (memory == nullptr) return;
  for (size_t i = 0; i < in.count; ++i) {
    std::byte* of_lane = warp_->registers + in.operands[i] + lane * 4;
    std::memcpy(in.op == Op::kLoad ? of_lane : memory + i * 4, in.op == Op::kLoad ? memory + i * 4 : of_lane, 4);
  }
}
void Machine::Access(const Instruction& in, uint32_t lane) {
  std::byte* memory = At(in, lane, in.operands[in.count], uint32_t{in.count} * in.bytes);
  if (memory == nullptr) return;
  if (in.among_gpus) {
    auto& word = *reinterpret_cast<uint32_t*>(memory);
    if (in.bytes != 4 || in.count != 1) return Fault(in, "an ordered access of more than a word");
    if (in.op == Op::kLoad) {
      Put(warp_->registers, in.operands[0], lane,
          std::atomic_ref(word).load(in.orders ? std::memory_order_acquire : std::memory_order_relaxed));
    } else {
      std::atomic_ref(word).store(Get<uint32_t>(warp_->registers, in.operands[0], lane),
                                  in.orders ? std::memory_order_release : std::memory_order_relaxed);
    }
    return;
  }
  const bool wide = in.register_bytes == 8;
  for (size_t i = 0; i < in.count; ++i, memory += in.bytes) {
    if (in.op == Op::kStore) {
      const uint64_t value = GetBits(warp_->registers, in.operands[i], lane, wide);
      std::memcpy(memory, &value, in.bytes);
      continue;
    }
    uint64_t value = 0;
    std::memcpy(&value, memory, in.bytes);
    if (in.is_signed) {
      const int unused = 64 - in.bytes * 8;
      value = static_cast<uint64_t>(static_cast<int64_t>(value << unused) >> unused);
    }
    PutBits(warp_->registers, in.operands[i], lane, wide, value);
  }
}

void Machine::AtomicAdd(const Instruction& in, uint32_t lane) {
  std::byte* memory = At(in, lane, in.operands[2], in.bytes);
  if (memory == nullptr) return;
  const auto add = [&]<typename T>(T value) {
    Put(warp_->registers, in.operands[0], lane, std::atomic_ref(*reinterpret_cast<T*>(memory)).fetch_add(value));
  };
  if (in.bytes == 8) {
    add(Get<uint64_t>(warp_->registers, in.operands[1], lane));
  } else {
    add(Get<uint32_t>(warp_->registers, in.operands[1], lane));
  }
}

void Machine::Move(const Instruction& in, uint32_t lanes) {
  const uint32_t bits = in.bytes * 8U;
  const uint64_t of_part = (uint64_t{1} << bits) - 1;
  const bool wide = in.register_bytes == 8;
  ForLanes(lanes, [&](uint32_t lane) {
    uint64_t whole = in.apart ? GetBits(warp_->registers, in.operands[0], lane, wide) : 0;
    for (uint32_t i = 0; i < 2; ++i) {
      const Register part = in.operands[1 + i];
      if (in.apart) {
        Put(warp_->registers, part, lane, static_cast<uint32_t>(whole >> (i * bits) & of_part));
      } else {
        whole |= (Get<uint32_t>(warp_->registers, part, lane) & of_part) << (i * bits);
      }
    }
    if (!in.apart) PutBits(warp_->registers, in.operands[0], lane, wide, whole);
  });
}

// ---- barriers of the block
void Machine::Arrive(const Instruction& in) {
  std::array<uint32_t, 2> of = {0, 0};  // which, and threads
  for (size_t i = 0; i < in.operands.size(); ++i) {
    of[i] = Get<uint32_t>(warp_->registers, in.operands[i], static_cast<uint32_t>(std::countr_zero(warp_->live)));
  }
  if (of[0] >= block_->barriers.size() || of[1] % kLanes != 0) return Fault(in, "no such barrier");
  Barrier& barrier = block_->barriers[of[0]];
  if (barrier.arrived > 0 && barrier.expected != of[1]) Fault(in, "a barrier of another number of threads");
  barrier.expected = of[1];
  barrier.arrived += kLanes;
  if (barrier.expected != 0 && barrier.arrived > barrier.expected) Fault(in, "more threads than a barrier waits for");
  if (in.op == Op::kBarrierSync) {
    warp_->barrier = static_cast<int>(of[0]);
  } else {
    Complete(static_cast<int>(of[0]));
  }
}
void Machine::Complete(int which) {
  Barrier& barrier = block_->barriers[static_cast<size_t>(which)];
  const uint32_t expected = barrier.expected != 0 ? barrier.expected : block_->LiveWarps() * kLanes;
  if (barrier.arrived == 0 || barrier.arrived < expected) return;
  barrier = {};
  for (Warp& warp : block_->warps) {
    if (warp.barrier == which) warp.barrier = -1;
  }
}

// ---- mbarriers
Mbarrier* Machine::Find(const Instruction& in, uint32_t address, uint32_t lane) {
  const auto found = block_->mbarriers.find(address);
  if (found != block_->mbarriers.end()) return &found->second;
  Fault(in, "no mbarrier at " + std::to_string(address), static_cast<int>(lane));
  return nullptr;
}
void Machine::Complete(Mbarrier& mbarrier) {
  if (mbarrier.pending != 0 || mbarrier.bytes != 0) return;
  mbarrier.pending = mbarrier.expected;
  ++mbarrier.phase;
  for (Warp& warp : block_->warps) warp.sleeping = 0;
}
// Says no for a while, and then sleeps.
bool Machine::TryWait(const Instruction& in, uint32_t group, uint32_t lanes, int* at) {
  uint32_t asleep = 0;
  ForLanes(lanes, [&](uint32_t lane) {
    const Mbarrier* mbarrier = Find(in, Get<uint32_t>(warp_->registers, in.operands[1], lane), lane);
    if (mbarrier == nullptr) return;
    const uint32_t parity = Get<uint32_t>(warp_->registers, in.operands[2], lane);
    if (parity > 1) Fault(in, "a parity that is none", static_cast<int>(lane));
    const bool over = (mbarrier->phase & 1) != parity;
    if (!over && random_() % 2 == 0) asleep |= uint32_t{1} << lane;
    Put(warp_->registers, in.operands[0], lane, over);
  });
  if (asleep == 0) {
    ++*at;
    return true;
  }
  ForLanes(group, [&](uint32_t lane) { warp_->at[lane] = (asleep >> lane & 1) != 0 ? *at : *at + 1; });
  warp_->sleeping |= asleep;
  return false;
}

// ---- what a warp does at once
void Machine::Shuffle(const Instruction& in, uint32_t members) {
  std::array<uint32_t, kLanes> given{};
  for (uint32_t lane = 0; lane < kLanes; ++lane) {
    given[lane] = Get<uint32_t>(warp_->registers, in.operands[1], lane);
  }
  ForLanes(members, [&](uint32_t lane) {
    const uint32_t b = Get<uint32_t>(warp_->registers, in.operands[2], lane) & 31;
    const uint32_t c = Get<uint32_t>(warp_->registers, in.operands[3], lane);
    const uint32_t segment = c >> 8 & 31, clamp = c & 31;
    const uint32_t most = (lane & segment) | (clamp & ~segment);
    const uint32_t from = in.exchange ? lane ^ b : ((lane & segment) | (b & ~segment));
    const bool inside = from <= most;
    if (inside && (members >> from & 1) == 0) Fault(in, "a shuffle from a lane that is not there", int(lane));
    Put(warp_->registers, in.operands[0], lane, given[inside ? from : lane]);
    if (in.operands.size() > 5) Put(warp_->registers, in.operands[5], lane, inside);
  });
}

std::string Run(const Kernel& kernel, const Launch& launch) {
  Machine machine(kernel, launch);
  std::string error = machine.RunAll();
  issue_slots += machine.issue_slots();
  return error;
}
uint64_t IssueSlots() {
  return issue_slots;
}

}  // namespace altiplano::ptx_machine
