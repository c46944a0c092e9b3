// Communicator: what tensor-parallel ranks ask of each other between ops. One object per rank, used by that rank's
// thread; Abort may come from any thread.
//
// Every rank makes the same calls in the same order with the same shapes and dtypes. Each call is a meeting of all
// ranks. A rank that fails calls Abort (destroying its Communicator does too): whoever waits then, and every later
// call, returns false, and the contents of the tensors involved are undefined. Nobody waits for ever.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/device.h"
#include "kernels/ops.h"
#include "kernels/tensor.h"

namespace altiplano {

class Communicator {
 public:
  virtual ~Communicator() = default;
  Communicator() = default;
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;

  virtual int rank() const = 0;
  virtual int size() const = 0;

  // x [T, N] or [N], f32 or bf16, in place: the sum over all ranks, added in the order of ranks in f32 and rounded
  // once, so that every rank holds the same bits. False: the group was aborted.
  virtual bool AllReduceSum(Stream& stream, const TensorView& x) = 0;

  // AllReduceSum of args.x, then AddRmsNorm, to the same bits. What x holds afterwards is undefined. Here: one after
  // the other.
  virtual bool AllReduceAddRmsNorm(Stream& stream, const AddRmsNormArgs& args);

  // out [R, n0 + n1 + ...] = the ranks' x [R, n_rank] side by side in the order of ranks; any dtype. x may be the very
  // columns of out where it belongs, and nothing else of out. A rank may bring an empty out: it gives without taking.
  // False: the group was aborted.
  virtual bool AllGather(Stream& stream, const TensorView& out, const TensorView& x) = 0;

  // x of rank 0 becomes x of every rank. Dense, any dtype. False: the group was aborted.
  virtual bool Broadcast(Stream& stream, const TensorView& x) = 0;

  // Memory of the stream's device for the tensors that AllReduceSum sums, where a kind of its own serves that better;
  // *memory is null where any will do. For as long as this member lives. At the start, of all ranks alike: what one
  // has such memory for, all have. False: it cannot be had, and the group was aborted.
  virtual bool AllocateSummed(const Stream& stream, size_t bytes, void** memory);

  // AllReduceSum and AllReduceAddRmsNorm of f32 tensors up to this size may be captured in a StepGraph, which all ranks
  // then launch in the place of the call. 0: none.
  virtual size_t most_captured_bytes() const { return 0; }

  // In groups of MakeChecked: all ranks bring the same hash of `what`, or the group ends and names who does not. In
  // others nothing, and always true.
  virtual bool CheckSame(std::string_view what, uint64_t hash);

  // Ends the group. Idempotent, never waits. The first reason stays.
  virtual void Abort(std::string_view reason = "aborted") = 0;
  // Why the group ended; empty while it lives. Any thread.
  virtual std::string error() const = 0;
};

// Ranks as threads of this process, with CPU memory: element r belongs to rank r. A rank that has waited for the others
// for `patience` aborts the group: ranks compute in step, so that one who does not come has failed.
std::vector<std::unique_ptr<Communicator>> MakeInProcessGroup(
    int ranks, std::chrono::milliseconds patience = std::chrono::seconds(30));

// The same ranks, but what each call leaves in their memory is compared by hashes: the sums of AllReduceSum, the
// residual stream and what is normed of it, what was broadcast. Ranks that differ end the group, with a reason that
// names them. Slow, and each call waits for the device: for finding out which rank computes something else.
std::unique_ptr<Communicator> MakeChecked(std::unique_ptr<Communicator> member);

struct NcclApi;  // kernels/comm/nccl_api.h

struct CudaGroupOptions {
  // Of each rank's GPU. Up to 8 ranks may name the same one: right, and of no use but to tests.
  std::vector<int> ordinals;
  std::chrono::milliseconds patience = std::chrono::seconds(30);
  const NcclApi* nccl = nullptr;  // for messages that are too large for our own kernels; null: they take all
  // NCCL's part may be captured in StepGraphs: docs/adr/0008-nccl-in-graphs.md. Those are destroyed before the members.
  bool capture_nccl = false;
  size_t most_own_bytes = SIZE_MAX;  // for tests: what else is too large for our own kernels
};

// Ranks as threads of this process, each with a GPU. Calls with tensors on the CPU are those of MakeInProcessGroup.
// With tensors on GPUs
// - calls return when they are issued. True then means that nothing was wrong yet: ask error() once the stream has come
//   to the call.
// - AllGather wants the same number of columns of every rank.
// - what goes through NCCL is summed in an order of NCCL's, to the same bits on every rank.
// Empty with *error: GPUs that are not there or do not reach each other, no memory.
std::vector<std::unique_ptr<Communicator>> MakeCudaGroup(const CudaGroupOptions& options, std::string* error);

}  // namespace altiplano
