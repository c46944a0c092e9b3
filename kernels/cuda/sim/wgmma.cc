// wgmma.mma_async. A product is taken when it is issued and shows when it is waited for: until then its registers hold
// NaN, and what it reads, in shared memory or in registers, must not change. Each warp of a warpgroup works on 16 of
// the 64 rows; that the four issue the same is checked when the block ends.
#include <cstring>

#include "kernels/cuda/sim/core.h"
#include "kernels/cuda/sim/matrix_descriptor.h"
#include "kernels/tensor.h"

namespace altiplano::sim {

namespace {

constexpr uint32_t kAllLanes = 0xFFFFFFFF;
constexpr int kRows = 16;  // of a warp: those of the first matrix from its number in the warpgroup times 16
constexpr int kDepth = 16;
constexpr int kMostColumns = 256;

float Low(uint32_t pair) {
  return ToFloat(BF16{static_cast<uint16_t>(pair)});
}
float High(uint32_t pair) {
  return ToFloat(BF16{static_cast<uint16_t>(pair >> 16)});
}

uint64_t Mixed(uint64_t hash, uint64_t value) {
  hash = (hash ^ value) * 0x9E3779B97F4A7C15;
  return hash ^ hash >> 29;
}

struct Argument {
  WgmmaOperands operands;
  void* pc;
  Site site;
};

// Rows of A or columns of B.
struct SharedMatrix {
  uint64_t descriptor;
  int begin, end;
  bool mn_major;
};
SharedMatrix SharedA(const Runner& runner, const WgmmaOperands& operands) {
  const int begin = runner.current->warp % 4 * kRows;
  return {operands.a_descriptor, begin, begin + kRows, false};
}
SharedMatrix SharedB(const WgmmaOperands& operands) {
  return {operands.b_descriptor, 0, operands.columns, operands.b_mn_major};
}

// Calls function(chunk, mn, k) for each 8 neighbours: along k from (mn, k), or along the rows or columns.
template <typename Function>
void ForChunks(Runner& runner, const SharedMatrix& matrix, Site site, const Function& function) {
  const MatrixDescriptor descriptor(matrix.descriptor);
  if (descriptor.base_offset != 0) runner.Fail("wgmma: a base offset is not modelled", site);
  if (const uint32_t row = descriptor.start & ~0x7Fu; Swizzled(row, descriptor.swizzle) != row) {
    runner.Fail("wgmma: its matrix does not start in the first row of an atom, and has no base offset", site);
  }
  const int mn_step = matrix.mn_major ? 8 : 1, k_step = matrix.mn_major ? 1 : 8;
  for (int k = 0; k < kDepth; k += k_step) {
    for (int mn = matrix.begin; mn < matrix.end; mn += mn_step) {
      const uint32_t offset = descriptor.Offset(static_cast<uint32_t>(mn), static_cast<uint32_t>(k), matrix.mn_major);
      const uint32_t address = Swizzled(descriptor.start + offset, descriptor.swizzle);
      const char* chunk = runner.set->window + address;
      CheckShared(runner, chunk, 16, "the matrix of a wgmma", site);
      CheckProxyFence(runner, address, "wgmma reads", site);
      function(chunk, mn, k);
    }
  }
}

uint64_t HashOf(Runner& runner, const SharedMatrix& matrix, void* pc, Site site) {
  uint64_t hash = 0;
  ForChunks(runner, matrix, site, [&](const char* chunk, int, int) {
    TsanRead(chunk, 16, pc);
    uint64_t words[2];
    CopyBytes(words, chunk, 16);
    hash = Mixed(Mixed(hash, words[0]), words[1]);
  });
  return hash;
}

Accumulator& AccumulatorOf(Warp& warp, void* const* arguments, size_t* index) {
  const auto operands_of = [&](size_t lane) { return static_cast<Argument*>(arguments[lane])->operands; };
  for (size_t i = 0; i < warp.accumulators.size(); ++i) {
    if (warp.accumulators[i].operations > 0 && warp.accumulators[i].registers[0] == operands_of(0).d) {
      *index = i;
      return warp.accumulators[i];
    }
  }
  *index = warp.accumulators.size();
  Accumulator& accumulator = warp.accumulators.emplace_back();
  accumulator.per_lane = static_cast<size_t>(operands_of(0).columns) / 2;
  accumulator.values.resize(kWarpSize * accumulator.per_lane);
  for (size_t lane = 0; lane < kWarpSize; ++lane) {
    accumulator.registers[lane] = operands_of(lane).d;
    CopyBytes(&accumulator.values[lane * accumulator.per_lane], accumulator.registers[lane], 4 * accumulator.per_lane);
    PoisonBytes(accumulator.registers[lane], 4 * accumulator.per_lane);
  }
  return accumulator;
}

// PTX ISA, wgmma.m64nNk16 of bf16, with g = lane / 4 and t = 2 (lane % 4): A is held as by mma.m16n8k16; D holds (g, 8j
// + t), its right neighbour, (g + 8, 8j + t) and its right neighbour, for j = 0, 1, ... The sum runs over k in order.
void Multiply(Runner& runner, const WgmmaOperation& operation, std::vector<float>& values) {
  const WgmmaOperands& operands = operation.operands;
  const int columns = operands.columns;
  float A[kRows][kDepth], B[kDepth][kMostColumns], D[kRows][kMostColumns];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const int g = lane / 4, t = 2 * (lane % 4);
    for (int i = 0; i < 4 && operands.a != nullptr; ++i) {
      A[g + 8 * (i & 1)][t + 8 * (i >> 1)] = Low(operation.a_values[lane][i]);
      A[g + 8 * (i & 1)][t + 8 * (i >> 1) + 1] = High(operation.a_values[lane][i]);
    }
    for (int i = 0; i < columns / 2; ++i) {
      D[g + 8 * (i >> 1 & 1)][8 * (i / 4) + t + (i & 1)] =
          operands.accumulate ? values[static_cast<size_t>(lane * columns / 2 + i)] : 0.0f;
    }
  }
  if (operands.a == nullptr) {
    const SharedMatrix a = SharedA(runner, operands);
    ForChunks(runner, a, operation.site, [&](const char* chunk, int row, int k) {
      BF16 elements[8];
      CopyBytes(elements, chunk, sizeof(elements));
      for (int i = 0; i < 8; ++i) A[row - a.begin][k + i] = ToFloat(elements[i]);
    });
  }
  ForChunks(runner, SharedB(operands), operation.site, [&](const char* chunk, int column, int k) {
    BF16 elements[8];
    CopyBytes(elements, chunk, sizeof(elements));
    for (int i = 0; i < 8; ++i) {
      (operands.b_mn_major ? B[k][column + i] : B[k + i][column]) = ToFloat(elements[i]);
    }
  });
  for (int m = 0; m < kRows; ++m) {
    for (int k = 0; k < kDepth; ++k) {
      for (int n = 0; n < columns; ++n) D[m][n] += A[m][k] * B[k][n];
    }
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    for (int i = 0; i < columns / 2; ++i) {
      values[static_cast<size_t>(lane * columns / 2 + i)] =
          D[lane / 4 + 8 * (i >> 1 & 1)][8 * (i / 4) + 2 * (lane % 4) + (i & 1)];
    }
  }
}

void Issue(void* const* arguments, uint32_t) {
  Runner& runner = CurrentRunner();
  Warp& warp = runner.warps[static_cast<size_t>(runner.current->warp)];
  const auto& first = *static_cast<Argument*>(arguments[0]);
  WgmmaOperation operation;
  operation.operands = first.operands;
  operation.pc = first.pc;
  operation.site = first.site;
  operation.group = warp.wgmma_group;
  for (size_t lane = 0; lane < kWarpSize; ++lane) {
    const WgmmaOperands& own = static_cast<Argument*>(arguments[lane])->operands;
    if (own.a_descriptor != first.operands.a_descriptor || own.b_descriptor != first.operands.b_descriptor ||
        own.accumulate != first.operands.accumulate) {
      runner.Fail("wgmma: the lanes' descriptors or predicates differ", first.site);
    }
    operation.a[lane] = own.a;
    if (own.a != nullptr) CopyBytes(operation.a_values[lane], own.a, sizeof(operation.a_values[lane]));
  }
  if (first.operands.a == nullptr) {
    operation.a_hash = HashOf(runner, SharedA(runner, first.operands), operation.pc, operation.site);
  }
  operation.b_hash = HashOf(runner, SharedB(first.operands), operation.pc, operation.site);
  TsanIgnore ignore;
  Accumulator& accumulator = AccumulatorOf(warp, arguments, &operation.accumulator);
  Multiply(runner, operation, accumulator.values);
  ++accumulator.operations;
  warp.wgmma_history = Mixed(Mixed(Mixed(warp.wgmma_history, first.operands.a_descriptor), first.operands.b_descriptor),
                             static_cast<uint64_t>(first.operands.columns) * 4 + (first.operands.a == nullptr) * 2u +
                                 first.operands.b_mn_major);
  warp.wgmmas.push_back(operation);
}

void Finish(Runner& runner, Warp& warp, const WgmmaOperation& operation) {
  const bool a_is_shared = operation.operands.a == nullptr;
  const auto changed = [&](const SharedMatrix& matrix, uint64_t hash) {
    return HashOf(runner, matrix, operation.pc, operation.site) != hash;
  };
  if (a_is_shared && changed(SharedA(runner, operation.operands), operation.a_hash)) {
    runner.Fail("wgmma: its first matrix in shared memory changed before it was waited for", operation.site);
  }
  if (changed(SharedB(operation.operands), operation.b_hash)) {
    runner.Fail("wgmma: its matrix in shared memory changed before it was waited for", operation.site);
  }
  TsanIgnore ignore;
  for (size_t lane = 0; lane < kWarpSize && !a_is_shared; ++lane) {
    if (std::memcmp(operation.a[lane], operation.a_values[lane], sizeof(operation.a_values[lane])) != 0) {
      runner.Fail("wgmma: its matrix in registers changed before it was waited for", operation.site);
    }
  }
  Accumulator& accumulator = warp.accumulators[operation.accumulator];
  if (--accumulator.operations > 0) return;
  for (size_t lane = 0; lane < kWarpSize; ++lane) {
    CopyBytes(accumulator.registers[lane], &accumulator.values[lane * accumulator.per_lane], 4 * accumulator.per_lane);
  }
}

}  // namespace

void WgmmaFence(Site site) {
  CurrentRunner().Meet(
      kAllLanes,
      [](void* const*, uint32_t) {
        Runner& runner = CurrentRunner();
        runner.warps[static_cast<size_t>(runner.current->warp)].wgmma_fenced = true;
      },
      nullptr, "wgmma.fence", site, Meeting::kAligned);
}

void Wgmma(const WgmmaOperands& operands, Site site) {
  Runner& runner = CurrentRunner();
  if (runner.threads < (runner.current->warp / 4 + 1) * 4 * kWarpSize) {
    runner.Fail("wgmma in a warpgroup of less than 128 threads", site);
  }
  if (!runner.warps[static_cast<size_t>(runner.current->warp)].wgmma_fenced) {
    runner.Fail("wgmma without a wgmma.fence since the last wait", site);
  }
  Argument own = {operands, SIM_CALLER, site};
  runner.Meet(kAllLanes, Issue, &own, "wgmma.mma_async", site, Meeting::kAligned);
}

void WgmmaCommit(Site site) {
  CurrentRunner().Meet(
      kAllLanes,
      [](void* const*, uint32_t) {
        Runner& runner = CurrentRunner();
        ++runner.warps[static_cast<size_t>(runner.current->warp)].wgmma_group;
        CountWgmmaCommit(runner);
      },
      nullptr, "wgmma.commit_group", site, Meeting::kAligned);
}

void WgmmaWait(int pending, Site site) {
  CurrentRunner().Meet(
      kAllLanes,
      [](void* const* arguments, uint32_t) {
        Runner& runner = CurrentRunner();
        Warp& warp = runner.warps[static_cast<size_t>(runner.current->warp)];
        const int done = warp.wgmma_group - *static_cast<int*>(arguments[0]);
        size_t finished = 0;
        while (finished < warp.wgmmas.size() && warp.wgmmas[finished].group < done) {
          Finish(runner, warp, warp.wgmmas[finished++]);
        }
        TsanIgnore ignore;
        warp.wgmmas.erase(warp.wgmmas.begin(), warp.wgmmas.begin() + static_cast<std::ptrdiff_t>(finished));
        if (warp.wgmmas.empty()) warp.accumulators.clear();
        warp.wgmma_fenced = false;
      },
      &pending, "wgmma.wait_group", site, Meeting::kAligned);
}

std::string UnfinishedWgmmas(const Runner& runner) {
  for (int w = 0; w < runner.threads / kWarpSize; ++w) {
    const Warp& warp = runner.warps[static_cast<size_t>(w)];
    if (!warp.wgmmas.empty()) {
      return runner.Where() + ": the block has ended, and the wgmma at " + ToString(warp.wgmmas[0].site) +
             " was not waited for";
    }
    if (warp.wgmma_history != runner.warps[static_cast<size_t>(w / 4 * 4)].wgmma_history) {
      return runner.Where() + ": warps " + std::to_string(w / 4 * 4) + " and " + std::to_string(w) +
             " of a warpgroup issued different wgmmas";
    }
  }
  return "";
}

}  // namespace altiplano::sim
