#include "tests/kernels/cuda/simulator_nccl_testlib.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <condition_variable>
#include <cstdio>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "kernels/cuda/backend.h"
#include "kernels/cuda/sim/sim.h"
#include "kernels/cuda/sim/stream.h"

namespace altiplano {

namespace {
struct Clique;
}

// All of it is guarded by the stand-in's mutex, but for `job`, which is that of whoever makes the calls or aborts.
struct NcclComm {
  Clique* clique = nullptr;  // that it is one of
  int rank = 0, gpu = 0;
  NcclResult state = kNcclInProgress;
  bool aborted = false;
  std::map<char*, size_t> registered;  // bytes
  std::thread job;
};

namespace nccl_stand_in {
namespace {

constexpr std::chrono::milliseconds kEnding{20};  // of the last abort, for whoever does not wait for it
constexpr auto kInvalidUsage = static_cast<NcclResult>(5);

std::mutex mutex;
std::condition_variable changed;
// Guarded by mutex.
Behaviour behaviour;
Counts counts;
int ids = 0;
std::map<std::string, std::shared_ptr<Clique>> cliques;  // of each unique id; until the last abort
struct Memory {
  int gpu;
  size_t bytes;
};
std::map<void*, Memory> memories;

}  // namespace
}  // namespace nccl_stand_in

namespace {

// Guarded by the stand-in's mutex.
struct Clique : std::enable_shared_from_this<Clique> {
  std::string id;
  std::vector<std::unique_ptr<NcclComm>> comms;  // [ranks]
  size_t formed = 0, aborted = 0;
  int captured = 0;              // calls that graphs hold
  std::vector<float*> messages;  // [ranks]
  size_t arrived = 0, meetings = 0;
};

}  // namespace

namespace nccl_stand_in {
namespace {

void Meet(NcclComm& comm, float* message, size_t count) {
  std::unique_lock lock(mutex);
  Clique& clique = *comm.clique;
  if (comm.aborted) return;
  clique.messages[static_cast<size_t>(comm.rank)] = message;
  const size_t meeting = clique.meetings;
  if (++clique.arrived == clique.messages.size()) {
    for (size_t i = 0; i < count; ++i) {
      float sum = 0;
      for (const float* each : clique.messages) sum += each[i];
      for (float* each : clique.messages) each[i] = sum;
    }
    clique.arrived = 0;
    ++clique.meetings;
    changed.notify_all();
  }
  changed.wait(lock, [&] { return clique.meetings != meeting || comm.aborted; });
}

// The call's thread.
void IssueLater(NcclComm& comm, float* message, size_t count, void* stream, uint64_t capture) {
  Behaviour of_call;
  {
    std::lock_guard lock(mutex);
    of_call = behaviour;
  }
  std::this_thread::sleep_for(std::max(of_call.late, std::chrono::milliseconds(message == nullptr ? 0 : 1)));
  std::shared_ptr<void> reference;
  {
    std::unique_lock lock(mutex);
    if (of_call.hangs) changed.wait(lock, [&] { return comm.aborted; });
    if (comm.aborted && of_call.late.count() == 0) return;
    if (capture != 0) {
      ++comm.clique->captured;
      ++counts.captured_calls;
      reference = std::shared_ptr<void>(nullptr, [clique = comm.clique->shared_from_this()](void*) {
        std::lock_guard destroying(mutex);
        --clique->captured;
        changed.notify_all();
      });
    }
  }
  if (sim::CaptureOf(stream) != capture) ADD_FAILURE() << "the capture of a call under way is over";
  sim::Issue(stream, [&comm, message, count, reference](void*) { Meet(comm, message, count); });
  std::lock_guard lock(mutex);
  comm.state = kNcclSuccess;
}

template <bool kRegisters>
NcclResult AllReduce(const void* from, void* to, size_t count, NcclType type, NcclOp op, NcclComm* comm, void* stream) {
  EXPECT_EQ(from, to);
  EXPECT_EQ(type, kNcclFloat32);
  EXPECT_EQ(op, kNcclSum);
  {
    std::lock_guard lock(mutex);
    ++counts.calls;
    if (comm->state == kNcclInProgress) {
      ADD_FAILURE() << "a call while another one is under way";
      return kInvalidUsage;
    }
    auto* message = static_cast<char*>(to);
    auto within = comm->registered.upper_bound(message);
    if (kRegisters &&
        (within == comm->registered.begin() || (--within)->first + within->second < message + count * sizeof(float))) {
      ADD_FAILURE() << "rank " << comm->rank << " sums memory that is not registered";
    }
    comm->state = kNcclInProgress;
  }
  if (comm->job.joinable()) comm->job.join();
  comm->job = std::thread(IssueLater, std::ref(*comm), static_cast<float*>(to), count, stream, sim::CaptureOf(stream));
  return kNcclInProgress;
}

NcclResult Init(NcclComm** comm, int ranks, NcclUniqueId id, int rank, NcclConfig* config) {
  EXPECT_EQ(config->blocking, 0);
  std::lock_guard lock(mutex);
  if (behaviour.no_init) return kBroken;
  std::shared_ptr<Clique>& clique = cliques[id.bytes];
  if (clique == nullptr) {
    clique = std::make_shared<Clique>();
    clique->id = id.bytes;
    clique->comms.resize(static_cast<size_t>(ranks));
    clique->messages.resize(static_cast<size_t>(ranks));
  }
  auto& made = clique->comms[static_cast<size_t>(rank)];
  made = std::make_unique<NcclComm>();
  made->clique = clique.get();
  made->rank = rank;
  made->gpu = sim::CurrentGpu();
  *comm = made.get();
  ++counts.communicators;
  if (++clique->formed == clique->comms.size()) {
    for (const auto& each : clique->comms) each->state = kNcclSuccess;
  }
  return kNcclInProgress;
}

NcclResult Abort(NcclComm* comm) {
  {
    std::lock_guard lock(mutex);
    comm->aborted = true;
    changed.notify_all();
  }
  if (comm->job.joinable()) comm->job.join();
  std::unique_lock lock(mutex);
  const std::shared_ptr<Clique> clique = comm->clique->shared_from_this();
  if (++clique->aborted < clique->formed) return kNcclSuccess;
  lock.unlock();
  std::this_thread::sleep_for(kEnding);
  lock.lock();
  if (!changed.wait_for(lock, kAbortPatience, [&] { return clique->captured == 0; })) {
    ADD_FAILURE() << "the last abort waits for graphs: " << clique->captured
                  << " calls of the communicator are in some";
  }
  counts.communicators -= static_cast<int>(clique->formed);
  cliques.erase(clique->id);
  return kNcclSuccess;
}

NcclResult Allocate(void** memory, size_t bytes) {
  std::lock_guard lock(mutex);
  *memory = cuda::Allocate(sim::CurrentGpu(), bytes);
  if (*memory == nullptr) return kBroken;
  memories[*memory] = {sim::CurrentGpu(), bytes};
  ++counts.memories;
  return kNcclSuccess;
}

NcclResult Free(void* memory) {
  std::lock_guard lock(mutex);
  for (const auto& [id, clique] : cliques) {
    for (const auto& comm : clique->comms) {
      if (comm != nullptr && comm->registered.contains(static_cast<char*>(memory))) {
        ADD_FAILURE() << "memory is freed that a communicator still knows of";
      }
    }
  }
  memories.erase(memory);
  --counts.memories;
  cuda::Free(memory);
  return kNcclSuccess;
}

NcclResult Register(NcclComm* comm, void* memory, size_t bytes, void** handle) {
  std::lock_guard lock(mutex);
  if (behaviour.rank_without_memory == comm->rank) return kBroken;
  const auto found = memories.find(memory);
  if (found == memories.end() || found->second.bytes != bytes) {
    ADD_FAILURE() << "memory is registered that is not of ncclMemAlloc, or not all of it";
    return kInvalidUsage;
  }
  EXPECT_EQ(found->second.gpu, comm->gpu);
  comm->registered[static_cast<char*>(memory)] = bytes;
  *handle = memory;
  return kNcclSuccess;
}

NcclApi Make(bool registers) {
  NcclApi api = {
      .get_version = [](int* version) { return *version = 22809, kNcclSuccess; },
      .get_unique_id =
          [](NcclUniqueId* id) {
            std::lock_guard lock(mutex);
            *id = {};
            std::snprintf(id->bytes, sizeof(id->bytes), "clique %d", ++ids);
            return kNcclSuccess;
          },
      .init_rank = Init,
      .group_start = [] { return kNcclSuccess; },
      .group_end = [] { return kNcclInProgress; },
      .get_async_error =
          [](NcclComm* comm, NcclResult* result) {
            std::lock_guard lock(mutex);
            return *result = comm->state, kNcclSuccess;
          },
      .all_reduce = registers ? AllReduce<true> : AllReduce<false>,
      .send = nullptr,
      .receive = nullptr,
      .abort = Abort,
      .error_string = [](NcclResult) { return "unhandled system error"; },
      .last_error = [](NcclComm*) { return "a cable was pulled"; },
  };
  if (registers) {
    api.allocate = Allocate;
    api.free = Free;
    api.comm_register = Register;
  }
  return api;
}

}  // namespace

const NcclApi& Api() {
  static const NcclApi api = Make(true);
  return api;
}

const NcclApi& OldApi() {
  static const NcclApi api = Make(false);
  return api;
}

void SetBehaviour(const Behaviour& wanted) {
  std::lock_guard lock(mutex);
  behaviour = wanted;
}

Counts Count() {
  std::lock_guard lock(mutex);
  return counts;
}

}  // namespace nccl_stand_in
}  // namespace altiplano
