// Memory that ranks lend each other, and the launches that use it. docs/parallelism.md tells the life of an all-reduce.
#pragma once

#include <atomic>
#include <cstdint>

#include "kernels/comm/all_reduce_plan.h"
#include "kernels/device.h"
#include "kernels/ops.h"
#include "kernels/tensor.h"

namespace altiplano::cuda {

// In a rank's own device memory, zero at first.
struct PeerSignals {
  // [meeting][block][from]: the last call in which that rank's block came. Written by the peers.
  uint32_t arrived[2][kMostPeerBlocks][kMostPeers];
  // The rest is the rank's own.
  uint32_t calls;         // that have ended
  uint32_t blocks_ended;  // of the running call
  uint32_t broken;        // 1: a call has failed, and no later one waits
};

// In host memory that all GPUs reach. 0: all is well.
struct PeerVerdicts {
  uint32_t aborted;           // written by the host
  uint32_t rank[kMostPeers];  // written by that rank's kernels: kGaveUpOn + the peer that did not come, or kLeft
};
inline constexpr uint32_t kLeft = 1;  // because another rank had failed, or the host has aborted
inline constexpr uint32_t kGaveUpOn = 2;
// As the host sees it.
inline bool HasFailed(PeerVerdicts& verdicts) {
  bool failed = std::atomic_ref(verdicts.aborted).load(std::memory_order_relaxed) != 0;
  for (uint32_t& verdict : verdicts.rank) failed |= std::atomic_ref(verdict).load(std::memory_order_relaxed) != 0;
  return failed;
}

// What kernels of rank `rank` know of the group. Pointers are the same for all ranks.
struct Peers {
  PeerSignals* signals[kMostPeers];
  char* mailbox[kMostPeers];  // kMailboxBytes
  PeerVerdicts* verdicts;
  uint64_t patience_ns;  // how long a block waits for a peer
  int rank, ranks;
  // No other rank is on this one's GPU: blocks of the next kernel that have started, and wait, take no room from a peer
  // that this one waits for.
  bool alone;
};

// Each is one call: all ranks make the same, in the same order. Messages have at most kPeerMessageBytes.
void AllReduceOneShot(Stream& stream, const Peers& peers, const TensorView& x);
void AllReduceTwoShots(Stream& stream, const Peers& peers, const TensorView& x);
// One shot of args.x, then AddRmsNorm, to the same bits; args.x is left as it was. Rows of at most kWidestNorm.
void AllReduceAddRmsNorm(Stream& stream, const Peers& peers, const AddRmsNormArgs& args);
// out [R, ranks * n] = everybody's x [R, n]; a rank may bring an empty out.
void PeerGather(Stream& stream, const Peers& peers, const TensorView& out, const TensorView& x);
// x of rank 0 becomes everybody's.
void PeerBroadcast(Stream& stream, const Peers& peers, const TensorView& x);

}  // namespace altiplano::cuda
