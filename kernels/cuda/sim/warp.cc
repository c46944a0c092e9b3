// The operations in which the threads of a block or the lanes of a warp meet.
#include <algorithm>
#include <bit>

#include "kernels/cuda/sim/core.h"
#include "kernels/tensor.h"

namespace altiplano::sim {

namespace {

constexpr uint32_t kAllLanes = 0xFFFFFFFF;

template <typename Argument, typename Function>
void ForLanes(void* const* arguments, uint32_t mask, const Function& function) {
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (mask >> lane & 1) function(lane, *static_cast<Argument*>(arguments[lane]));
  }
}

struct ShuffleArgument {
  ShuffleKind kind;
  int argument;
  uint64_t in, out;
  bool outside;
};

struct LdMatrixArgument {
  uint32_t* r;
  const uint16_t* row;
  int matrices;
  bool transposed;
  Site site;
};

struct MmaArgument {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

struct NamedBarrierArgument {
  int id, threads;
  bool waits;
  Site site;
  unsigned phase;  // that the warp arrived in
};

// What is wrong with an arrival, or null.
const char* Mistake(const Runner& runner, const NamedBarrierArgument& own) {
  if (runner.together != nullptr) return "not simulated in blocks that run together";
  if (own.id <= 0 || own.id >= kNamedBarriers) return "there are 1 to 15, and 0 is that of __syncthreads";
  if (own.threads <= 0 || own.threads % kWarpSize != 0) return "the count is no multiple of 32";
  if (own.threads > runner.threads) return "the block has fewer threads";
  const NamedBarrier& barrier = runner.set->named_barriers[static_cast<size_t>(own.id)];
  if (barrier.arrived == 0) return nullptr;
  if (barrier.threads != own.threads) return "others came for another count";
  if (barrier.arrived >> runner.current->warp & 1) return "the warp has come already";
  return nullptr;
}

// PTX ISA, bar: a warp arrives as one. The last of its lanes to come does it for all, so that they are of one
// generation. What each of them has done is released, and only those who wait acquire it.
void Arrive(void* const* arguments, uint32_t lanes) {
  Runner& runner = CurrentRunner();
  const auto& first = *static_cast<NamedBarrierArgument*>(arguments[0]);
  const auto fail = [&](const std::string& why) {
    runner.Fail(std::string(first.waits ? "bar.sync" : "bar.arrive") + " at barrier " + std::to_string(first.id) +
                    " for " + std::to_string(first.threads) + " threads: " + why,
                first.site);
  };
  ForLanes<NamedBarrierArgument>(arguments, lanes, [&](int, const NamedBarrierArgument& own) {
    if (own.id != first.id || own.threads != first.threads || own.waits != first.waits) fail("the lanes disagree");
  });
  if (const char* mistake = Mistake(runner, first); mistake != nullptr) {
    fail(mistake + ArrivedAt(runner, first.id));
  }
  NamedBarrier& barrier = runner.set->named_barriers[static_cast<size_t>(first.id)];
  if (barrier.arrived == 0) {
    barrier.threads = first.threads;
    barrier.site = first.site;
  }
  ForLanes<NamedBarrierArgument>(arguments, lanes, [&](int lane, NamedBarrierArgument& own) {
    own.phase = barrier.phase;
    TsanSwitchTo(runner.ThreadAt(runner.current->warp * kWarpSize + lane).fiber.tsan);
    TsanRelease(barrier.tokens[barrier.phase & 1].address);
  });
  TsanSwitchTo(runner.current->fiber.tsan);
  barrier.arrived |= 1u << runner.current->warp;
  if (std::popcount(barrier.arrived) * kWarpSize < barrier.threads) return;
  barrier.arrived = 0;
  ++barrier.phase;
  for (int i = 0; i < runner.threads; ++i) {
    Thread& thread = runner.ThreadAt(i);
    if (thread.wait == Wait::kNamedBarrier && thread.named_barrier == first.id) runner.Wake(thread);
  }
}

float Low(uint32_t pair) {
  return ToFloat(BF16{static_cast<uint16_t>(pair)});
}
float High(uint32_t pair) {
  return ToFloat(BF16{static_cast<uint16_t>(pair >> 16)});
}

}  // namespace

std::string ArrivedAt(const Runner& runner, int id) {
  if (id < 0 || id >= kNamedBarriers) return "";
  const NamedBarrier& barrier = runner.set->named_barriers[static_cast<size_t>(id)];
  if (barrier.arrived == 0) return "";
  std::string out = " (" + std::to_string(std::popcount(barrier.arrived) * kWarpSize) + " of " +
                    std::to_string(barrier.threads) + " arrived, the first at " + ToString(barrier.site) + ": warps";
  for (uint32_t rest = barrier.arrived; rest != 0; rest &= rest - 1) {
    out += " " + std::to_string(std::countr_zero(rest));
  }
  return out + ")";
}

void Runner::Meet(uint32_t mask, WarpFunction function, void* argument, const char* operation, Site site,
                  Meeting meeting) {
  Thread& self = *current;
  Warp& warp = warps[static_cast<size_t>(self.warp)];
  const int first = self.warp * kWarpSize;
  const uint32_t bit = 1u << self.lane;
  if ((mask & bit) == 0) Fail(std::string(operation) + ": the lane is not in its own mask", site);
  self.function = function;
  self.argument = argument;
  self.mask = mask;
  self.operation = operation;
  if (const uint32_t peers = warp.waiting & mask; peers != 0) {
    const Thread& peer = ThreadAt(first + std::countr_zero(peers));
    if (peer.function != function || peer.mask != mask || (meeting == Meeting::kAligned && !(peer.site == site))) {
      Fail("the warp diverged: " + std::string(operation) + " here, but lane " + std::to_string(peer.lane) +
               " waits in " + peer.operation + " at " + ToString(peer.site),
           site);
    }
    self.token = peer.token;
  } else {
    self.token = &warp.tokens[warp.tokens_used++ % warp.tokens.size()];
  }
  Token* token = self.token;
  if (meeting == Meeting::kOrdering) TsanRelease(token->address);
  warp.waiting |= bit;
  if ((warp.waiting & mask) == mask) {
    void* arguments[kWarpSize] = {};
    for (int lane = 0; lane < kWarpSize; ++lane) {
      if (mask >> lane & 1) arguments[lane] = ThreadAt(first + lane).argument;
    }
    if (function != nullptr) function(arguments, mask);
    warp.waiting &= ~mask;
    for (uint32_t rest = mask & ~bit; rest != 0; rest &= rest - 1) Wake(ThreadAt(first + std::countr_zero(rest)));
    SwitchAway();
  } else {
    BlockOn(Wait::kWarp, site);
  }
  if (meeting == Meeting::kOrdering) TsanAcquire(token->address);
}

void SyncWarp(uint32_t mask, Site site) {
  CurrentRunner().Meet(mask, nullptr, nullptr, "__syncwarp", site, Meeting::kOrdering);
}

void SyncThreads(Site site) {
  Runner& runner = CurrentRunner();
  Barrier& barrier = runner.set->barrier;
  char* token = barrier.tokens[barrier.phase & 1].address;
  TsanRelease(token);
  if (++barrier.arrived == runner.threads) {
    barrier.arrived = 0;
    ++barrier.phase;
    uint64_t view = 0;
    for (int i = 0; i < runner.threads; ++i) view = std::max(view, runner.ThreadAt(i).view);
    for (int i = 0; i < runner.threads; ++i) {
      runner.ThreadAt(i).view = view;
      if (runner.ThreadAt(i).wait == Wait::kBarrier) runner.Wake(runner.ThreadAt(i));
    }
    runner.SwitchAway();
  } else {
    runner.BlockOn(Wait::kBarrier, site);
  }
  TsanAcquire(token);
}

void NamedBarrierArrive(int id, int threads, Site site) {
  NamedBarrierArgument own = {id, threads, false, site, 0};
  CurrentRunner().Meet(kAllLanes, Arrive, &own, "bar.arrive", site, Meeting::kAligned);
}

void NamedBarrierSync(int id, int threads, Site site) {
  NamedBarrierArgument own = {id, threads, true, site, 0};
  Runner& runner = CurrentRunner();
  runner.Meet(kAllLanes, Arrive, &own, "bar.sync", site, Meeting::kAligned);
  NamedBarrier& barrier = runner.set->named_barriers[static_cast<size_t>(id)];
  while (barrier.phase == own.phase) {
    runner.current->named_barrier = id;
    runner.BlockOn(Wait::kNamedBarrier, site);
  }
  TsanAcquire(barrier.tokens[own.phase & 1].address);
}

uint64_t Shuffle(ShuffleKind kind, uint32_t mask, uint64_t value, int argument, Site site) {
  ShuffleArgument own = {kind, argument, value, 0, false};
  Runner& runner = CurrentRunner();
  runner.Meet(
      mask,
      [](void* const* arguments, uint32_t lanes) {
        ForLanes<ShuffleArgument>(arguments, lanes, [&](int lane, ShuffleArgument& a) {
          const int from = (a.kind == ShuffleKind::kXor ? lane ^ a.argument : a.argument) & (kWarpSize - 1);
          a.outside = (lanes >> from & 1) == 0;
          if (!a.outside) a.out = static_cast<ShuffleArgument*>(arguments[from])->in;
        });
      },
      &own, "__shfl_sync", site, Meeting::kAnywhere);
  if (own.outside) runner.Fail("__shfl_sync reads a lane outside of the mask", site);
  return own.out;
}

// PTX ISA, ldmatrix: matrix i has its 8 rows of 16 bytes where lanes 8i to 8i+7 say. Lane l receives elements 2(l%4)
// and 2(l%4)+1 of row l/4; with .trans of column l/4.
void LdMatrix(uint32_t* r, int matrices, bool transposed, const void* row, Site site) {
  Runner& runner = CurrentRunner();
  if (runner.current->lane < 8 * matrices) {
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0) runner.Fail("ldmatrix: a row is not aligned to 16 bytes", site);
    CheckShared(runner, row, 16, "a row of ldmatrix", site);
    TsanRead(row, 16, SIM_CALLER);
  }
  LdMatrixArgument own = {r, static_cast<const uint16_t*>(row), matrices, transposed, site};
  runner.Meet(
      kAllLanes,
      [](void* const* arguments, uint32_t lanes) {
        auto at = [&](int lane) -> const LdMatrixArgument& { return *static_cast<LdMatrixArgument*>(arguments[lane]); };
        const void* rows[kWarpSize] = {};
        for (int lane = 0; lane < 8 * at(0).matrices; ++lane) rows[lane] = at(lane).row;
        if (CurrentRunner().counting) CountMatrixRows(CurrentRunner(), rows, at(0).matrices, at(0).site);
        ForLanes<LdMatrixArgument>(arguments, lanes, [&](int lane, LdMatrixArgument& a) {
          const int outer = lane / 4, inner = 2 * (lane % 4);
          for (int i = 0; i < a.matrices; ++i) {
            const uint32_t low = a.transposed ? at(8 * i + inner).row[outer] : at(8 * i + outer).row[inner];
            const uint32_t high = a.transposed ? at(8 * i + inner + 1).row[outer] : at(8 * i + outer).row[inner + 1];
            a.r[i] = low | high << 16;
          }
        });
      },
      &own, transposed ? "ldmatrix.trans" : "ldmatrix", site, Meeting::kAligned);
}

// PTX ISA, mma.m16n8k16 of bf16, with g = lane / 4 and t = 2 (lane % 4): A holds (g, t), (g+8, t), (g, t+8), (g+8, t+8)
// and their right neighbours; B holds (t, g), (t+8, g) and the ones below; C and D hold (g, t), (g+8, t) and their
// right neighbours. The sum runs over k in order and is rounded at each step, which a tensor core does not do.
void Mma16816(float* d, const uint32_t* a, const uint32_t* b, Site site) {
  MmaArgument own = {d, a, b};
  CurrentRunner().Meet(
      kAllLanes,
      [](void* const* arguments, uint32_t lanes) {
        float A[16][16], B[16][8], C[16][8];
        ForLanes<MmaArgument>(arguments, lanes, [&](int lane, MmaArgument& x) {
          const int g = lane / 4, t = 2 * (lane % 4);
          for (int i = 0; i < 4; ++i) {
            A[g + 8 * (i & 1)][t + 8 * (i >> 1)] = Low(x.a[i]);
            A[g + 8 * (i & 1)][t + 8 * (i >> 1) + 1] = High(x.a[i]);
            C[g + 8 * (i >> 1)][t + (i & 1)] = x.d[i];
          }
          for (int i = 0; i < 2; ++i) {
            B[t + 8 * i][g] = Low(x.b[i]);
            B[t + 8 * i + 1][g] = High(x.b[i]);
          }
        });
        for (int m = 0; m < 16; ++m) {
          for (int k = 0; k < 16; ++k) {
            for (int n = 0; n < 8; ++n) C[m][n] += A[m][k] * B[k][n];
          }
        }
        ForLanes<MmaArgument>(arguments, lanes, [&](int lane, MmaArgument& x) {
          for (int i = 0; i < 4; ++i) x.d[i] = C[lane / 4 + 8 * (i >> 1)][2 * (lane % 4) + (i & 1)];
        });
      },
      &own, "mma.sync", site, Meeting::kAligned);
}

}  // namespace altiplano::sim
