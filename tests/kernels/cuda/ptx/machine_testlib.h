// Runs kernels as nvcc has compiled them to PTX, on the host. The simulator (kernels/cuda/sim) runs their source as the
// host's compiler understands it; here nvcc's own work is run: the inline PTX of ptx_device.h, what nvcc fused and
// moved, how it lays out parameters. The other way around, this machine is no hostile one: it finds wrong results,
// accesses outside of memory, misaligned ones, deadlocks and divergence, and few races.
//
// Warps and blocks are interleaved at random. Copies that do not block leave NaNs until they are waited for, and so
// does wgmma in its sums; it reads shared memory at any moment until then. What ptxas makes of the PTX is not seen.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "tests/kernels/cuda/ptx/program_testlib.h"

namespace altiplano::ptx_machine {

struct Region {  // of memory that kernels may touch
  uint64_t begin, end;
};

// What a CUtensorMap holds here: a matrix of 16-bit elements in boxes, swizzled by 128 bytes.
struct TiledMatrix {
  static constexpr uint64_t kMark = 0x70614d726f736e54;
  uint64_t mark = kMark;
  const std::byte* data = nullptr;
  uint64_t rows = 0, columns = 0, row_bytes = 0;
  uint32_t box_rows = 0, box_columns = 0;
};

struct Launch {
  std::array<uint32_t, 3> grid = {1, 1, 1}, block = {1, 1, 1};
  uint32_t dynamic_shared_bytes = 0;
  std::vector<std::byte> parameters;  // as the kernel lays them out
  std::vector<Region> memory;         // sorted
  uint64_t seed = 1;
};

// To its end, on this thread. Kernels of other streams may run meanwhile on other threads. What went wrong, with the
// line of PTX; empty if nothing did.
std::string Run(const Kernel& kernel, const Launch& launch);
// Issue slots that all of them have taken, so far: warps' instructions, weighted by Instruction::issue_slots.
uint64_t IssueSlots();

}  // namespace altiplano::ptx_machine
