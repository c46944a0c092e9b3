// What we call of NCCL, declared here and found at run time: the program builds and starts where there is none.
// tests/kernels/nccl_api_test.cc compares the declarations with nccl.h.
#pragma once

#include <cstddef>
#include <string>

namespace altiplano {

struct NcclComm;  // ncclComm

struct NcclUniqueId {
  char bytes[128];
};

enum NcclResult : int { kNcclSuccess = 0, kNcclInProgress = 7 };
enum NcclType : int { kNcclInt8 = 0, kNcclFloat32 = 7, kNcclBFloat16 = 9 };
enum NcclOp : int { kNcclSum = 0 };

// As of NCCL 2.17: later ones go by the size and the version.
struct NcclConfig {
  static constexpr int kUndefined = -2147483647 - 1;
  size_t size = sizeof(NcclConfig);
  unsigned magic = 0xcafebeef;
  unsigned version = 21700;
  int blocking = kUndefined;
  int cga_cluster_size = kUndefined;
  int min_ctas = kUndefined;
  int max_ctas = kUndefined;
  const char* net_name = nullptr;
  int split_share = kUndefined;
};

struct NcclApi {
  NcclResult (*get_version)(int* version);
  NcclResult (*get_unique_id)(NcclUniqueId* id);
  NcclResult (*init_rank)(NcclComm** comm, int ranks, NcclUniqueId id, int rank, NcclConfig* config);
  NcclResult (*group_start)();
  NcclResult (*group_end)();
  NcclResult (*get_async_error)(NcclComm* comm, NcclResult* result);
  NcclResult (*all_reduce)(const void* from, void* to, size_t count, NcclType type, NcclOp op, NcclComm* comm,
                           void* stream);
  NcclResult (*send)(const void* from, size_t count, NcclType type, int peer, NcclComm* comm, void* stream);
  NcclResult (*receive)(void* to, size_t count, NcclType type, int peer, NcclComm* comm, void* stream);
  NcclResult (*abort)(NcclComm* comm);
  const char* (*error_string)(NcclResult result);
  const char* (*last_error)(NcclComm* comm);
  // As of NCCL 2.19, all of them; null before.
  NcclResult (*allocate)(void** memory, size_t bytes) = nullptr;  // on the thread's GPU
  NcclResult (*free)(void* memory) = nullptr;
  NcclResult (*comm_register)(NcclComm* comm, void* memory, size_t bytes, void** handle) = nullptr;
};

// That of libnccl.so.2; null with *error where there is none, or one that is too old.
const NcclApi* LoadNccl(std::string* error);

}  // namespace altiplano
