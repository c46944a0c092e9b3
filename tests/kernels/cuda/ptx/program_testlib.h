// PTX as nvcc writes it, read into what machine_testlib.h runs. After the PTX ISA, "Syntax" and "State Spaces, Types
// and Variables". It knows what this project's kernels are compiled to, and refuses whatever else it meets, by line.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace altiplano::ptx_machine {

inline constexpr uint32_t kLanes = 32;

// A warp's registers are one piece of memory. A register is an offset into it: 32 words of 4 bytes, or of 8 for 64
// bits, one for each lane; a predicate is one word with a bit for each lane. Constants and special registers live there
// too.
using Register = uint32_t;
using LaneFunction = void (*)(std::byte* registers, const Register* operands, uint32_t lanes);

enum class Op : uint8_t {
  kEachLane,  // for itself, by `function`
  kMove,      // of parts of a register into several, or the other way around
  kBranch,
  kExit,
  kTrap,
  kNothing,  // hints and fences: this machine's memory has one order
  kTimer,
  kLoad,
  kStore,
  kAtomicAdd,
  kCopyAsync,
  kCopyCommit,
  kCopyWait,
  kCopyBox,
  kMbarrierInit,
  kMbarrierArrive,
  kMbarrierTryWait,
  // All lanes of a warp at once, or those of a mask:
  kMeet,
  kShuffle,
  kMma,
  kLdMatrix,
  kWgmma,
  kWgmmaFence,
  kWgmmaCommit,
  kWgmmaWait,
  kBarrierSync,
  kBarrierArrive,
};
enum class Space : uint8_t { kGlobal, kShared, kParam };

struct Instruction {
  Op op = Op::kNothing;
  LaneFunction function = nullptr;
  bool guarded = false, guard_negated = false;
  Register guard = 0;
  std::vector<Register> operands;  // what is written first
  int64_t offset = 0;              // of the address; the number that the instruction names
  int target = 0;                  // of a branch
  Space space = Space::kGlobal;
  uint8_t count = 1;           // elements of a vector, or of a matrix of wgmma: columns
  uint8_t bytes = 4;           // of each in memory
  uint8_t register_bytes = 4;  // of each in its register
  uint8_t issue_slots = 1;     // that machine code takes for it, roughly
  bool is_signed = false;
  bool among_gpus = false;    // relaxed, acquire or release: threads of other GPUs are about
  bool orders = false;        // acquire or release
  bool transposed = false;    // ldmatrix; b of wgmma
  bool a_is_shared = false;   // of wgmma: found by its descriptor, as b is
  bool wide_address = false;  // of 8 bytes, as all of global memory
  bool apart = false;         // a move of the whole into its parts
  bool exchange = false;      // a shuffle by exclusive or, else from a lane
  int line = 0;               // in the file of PTX
};

struct Kernel {
  std::string name, file;
  std::vector<uint32_t> parameters;       // bytes of each
  std::vector<uint32_t> parameter_begin;  // of each among them all
  uint32_t parameter_bytes = 0;
  uint32_t shared_bytes = 0;  // what it declares
  uint32_t most_threads = 1024;
  std::vector<Instruction> code;
  uint32_t register_bytes = 0;  // of a warp
  struct Constant {
    Register at;
    uint64_t bits;
    bool wide;
  };
  std::vector<Constant> constants;
  // Special registers that it reads, by name and whether they are wide: those of the ISA, "%parameters" (where they
  // lie) and "%dynamic" (where dynamic shared memory begins).
  std::map<std::pair<std::string, bool>, Register> special;
};

// Static shared memory begins here, as behind what sm_90 keeps for itself; dynamic memory at the next multiple of 1024.
inline constexpr uint32_t kSharedBegin = 1024;
inline constexpr uint32_t DynamicSharedBegin(uint32_t static_bytes) {
  return (kSharedBegin + static_bytes + 1023) / 1024 * 1024;
}

// Kernels of one file, by name with WithoutHashes. What is wrong is added to `errors`, with file and line.
std::map<std::string, Kernel> ReadPtx(const std::string& file, std::string_view text, std::vector<std::string>* errors);
// Names of what is in an anonymous namespace hold hashes of the command by which nvcc compiled them.
std::string WithoutHashes(std::string name);

// What each lane does for itself: "add.s32" and the like; null for what is none of these. operand_bytes: of each
// operand, 0 for a predicate.
struct LaneOperation {
  LaneFunction function = nullptr;
  std::vector<uint8_t> operand_bytes;
};
const LaneOperation* FindLaneOperation(const std::string& name);

}  // namespace altiplano::ptx_machine
