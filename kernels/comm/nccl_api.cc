#include "kernels/comm/nccl_api.h"

#include <dlfcn.h>

namespace altiplano {

namespace {

constexpr int kOldest = 21800;  // knows NcclConfig

template <typename Function>
bool Find(void* library, const char* name, Function** function, std::string* error) {
  *function = reinterpret_cast<Function*>(dlsym(library, name));
  if (*function == nullptr) *error = std::string("libnccl.so.2 has no ") + name;
  return *function != nullptr;
}

// The library stays for the whole process.
const NcclApi* Load(std::string* error) {
  static NcclApi api;
  void* library = dlopen("libnccl.so.2", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* why = dlerror();
    *error = why != nullptr ? why : "libnccl.so.2 cannot be loaded";
    return nullptr;
  }
  if (!Find(library, "ncclGetVersion", &api.get_version, error) ||
      !Find(library, "ncclGetUniqueId", &api.get_unique_id, error) ||
      !Find(library, "ncclCommInitRankConfig", &api.init_rank, error) ||
      !Find(library, "ncclGroupStart", &api.group_start, error) ||
      !Find(library, "ncclGroupEnd", &api.group_end, error) ||
      !Find(library, "ncclCommGetAsyncError", &api.get_async_error, error) ||
      !Find(library, "ncclAllReduce", &api.all_reduce, error) || !Find(library, "ncclSend", &api.send, error) ||
      !Find(library, "ncclRecv", &api.receive, error) || !Find(library, "ncclCommAbort", &api.abort, error) ||
      !Find(library, "ncclGetErrorString", &api.error_string, error) ||
      !Find(library, "ncclGetLastError", &api.last_error, error)) {
    return nullptr;
  }
  std::string none;
  if (!Find(library, "ncclMemAlloc", &api.allocate, &none) || !Find(library, "ncclMemFree", &api.free, &none) ||
      !Find(library, "ncclCommRegister", &api.comm_register, &none)) {
    api.comm_register = nullptr;
  }
  int version = 0;
  if (api.get_version(&version) != kNcclSuccess || version < kOldest) {
    *error = "libnccl.so.2 is of version " + std::to_string(version) + ", at least " + std::to_string(kOldest) +
             " is needed";
    return nullptr;
  }
  return &api;
}

}  // namespace

const NcclApi* LoadNccl(std::string* error) {
  static std::string why_not;
  static const NcclApi* const api = Load(&why_not);
  if (api == nullptr) *error = why_not;
  return api;
}

}  // namespace altiplano
