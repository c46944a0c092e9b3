// A stand-in for NCCL: communicators of this process, between simulated GPUs, that add in the order of ranks. As strict
// as the library where that decides who waits for whom:
// - a call is issued on its stream by a thread of its own, later, and one at a time;
// - a captured call goes into the stream's graph and runs with each launch of it;
// - a rank's call ends when all ranks have come to it, or when its own communicator is aborted;
// - of a clique of communicators the last abort returns when no graph holds a call any more. After kAbortPatience it is
//   a failure of the test;
// - memory that is summed must have been allocated and registered with it, and is freed after its communicator.
#pragma once

#include <chrono>

#include "kernels/comm/nccl_api.h"

namespace altiplano::nccl_stand_in {

inline constexpr auto kBroken = static_cast<NcclResult>(2);  // ncclSystemError
inline constexpr std::chrono::seconds kAbortPatience{20};

const NcclApi& Api();
const NcclApi& OldApi();  // that knows of no memory: before NCCL 2.19

struct Behaviour {
  bool no_init = false;               // init_rank fails
  int rank_without_memory = -1;       // whose registering fails
  bool hangs = false;                 // calls are never issued
  std::chrono::milliseconds late{0};  // that a call takes at least to be issued, be it aborted meanwhile
};
void SetBehaviour(const Behaviour& behaviour);

struct Counts {
  int communicators = 0, memories = 0;  // that are alive
  int calls = 0, captured_calls = 0;    // of all_reduce, so far; those that went into a graph
};
Counts Count();

}  // namespace altiplano::nccl_stand_in
