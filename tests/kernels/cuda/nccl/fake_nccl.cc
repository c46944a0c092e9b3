// libnccl.so.2 for tests, of what links between nodes call: threads of one process whose communicators have the same
// unique id. Memory is the simulated GPU's; what is sent lies in a queue, and a receive is in progress until it comes.
#include <atomic>
#include <cstdio>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "kernels/comm/nccl_api.h"

namespace altiplano {
struct NcclComm {
  std::string id;
  int rank = 0;
  NcclResult state = kNcclInProgress;  // guarded by `mutex`, as what follows
  void* receiving = nullptr;
  size_t bytes = 0;
};
}  // namespace altiplano

namespace {

using namespace altiplano;

constexpr auto kInvalidUsage = static_cast<NcclResult>(5);

std::mutex mutex;
struct Pair {
  NcclComm* ranks[2] = {};
  std::deque<std::string> sent;
};
std::map<std::string, Pair> pairs;  // guarded by mutex
std::atomic<int> ids{0};

// Under the mutex.
void Deliver(Pair& pair) {
  NcclComm* receiver = pair.ranks[1];
  if (receiver == nullptr || receiver->receiving == nullptr || pair.sent.empty()) return;
  const std::string data = std::move(pair.sent.front());
  pair.sent.pop_front();
  if (data.size() == receiver->bytes) std::memcpy(receiver->receiving, data.data(), data.size());
  receiver->state = data.size() == receiver->bytes ? kNcclSuccess : kInvalidUsage;
  receiver->receiving = nullptr;
}

}  // namespace

extern "C" {

NcclResult ncclGetVersion(int* version) {
  *version = 22800;
  return kNcclSuccess;
}
NcclResult ncclGetUniqueId(NcclUniqueId* id) {
  *id = {};
  std::snprintf(id->bytes, sizeof id->bytes, "pair %d", ++ids);
  return kNcclSuccess;
}
NcclResult ncclCommInitRankConfig(NcclComm** comm, int ranks, NcclUniqueId id, int rank, NcclConfig* config) {
  if (ranks != 2 || config->blocking != 0) return kInvalidUsage;
  std::lock_guard lock(mutex);
  *comm = new NcclComm{.id = id.bytes, .rank = rank};
  Pair& pair = pairs[id.bytes];
  pair.ranks[rank] = *comm;
  if (pair.ranks[0] != nullptr && pair.ranks[1] != nullptr) {
    for (NcclComm* each : pair.ranks) each->state = kNcclSuccess;
  }
  return kNcclInProgress;
}
NcclResult ncclGroupStart() {
  return kNcclSuccess;
}
NcclResult ncclGroupEnd() {
  return kNcclInProgress;
}
NcclResult ncclCommGetAsyncError(NcclComm* comm, NcclResult* result) {
  std::lock_guard lock(mutex);
  *result = comm->state;
  return kNcclSuccess;
}
NcclResult ncclAllReduce(const void*, void*, size_t, NcclType, NcclOp, NcclComm*, void*) {
  return kInvalidUsage;
}
NcclResult ncclSend(const void* from, size_t count, NcclType type, int peer, NcclComm* comm, void*) {
  if (type != kNcclInt8 || peer != 1 || comm->rank != 0) return kInvalidUsage;
  std::lock_guard lock(mutex);
  Pair& pair = pairs[comm->id];
  pair.sent.emplace_back(static_cast<const char*>(from), count);
  Deliver(pair);
  return kNcclSuccess;
}
NcclResult ncclRecv(void* to, size_t count, NcclType type, int peer, NcclComm* comm, void*) {
  if (type != kNcclInt8 || peer != 0 || comm->rank != 1) return kInvalidUsage;
  std::lock_guard lock(mutex);
  comm->state = kNcclInProgress;
  comm->receiving = to;
  comm->bytes = count;
  Deliver(pairs[comm->id]);
  return comm->state == kInvalidUsage ? kNcclSuccess : comm->state;  // an asynchronous error
}
NcclResult ncclCommAbort(NcclComm* comm) {
  std::lock_guard lock(mutex);
  pairs[comm->id].ranks[comm->rank] = nullptr;
  delete comm;
  return kNcclSuccess;
}
const char* ncclGetErrorString(NcclResult result) {
  return result == kInvalidUsage ? "invalid usage" : "no error";
}
const char* ncclGetLastError(NcclComm*) {
  return "";
}
}  // extern "C"
