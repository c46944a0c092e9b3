#include "kernels/comm/nccl_rank.h"

#include <thread>
#include <utility>

#include "kernels/cuda/backend.h"

namespace altiplano {

std::string NcclRank::Form(const NcclApi& api, const std::vector<Place>& places, std::chrono::milliseconds patience,
                           std::vector<std::unique_ptr<NcclRank>>* ranks) {
  const size_t first = ranks->size();
  NcclResult result = api.group_start();
  for (size_t i = 0; result == kNcclSuccess && i < places.size(); ++i) {
    ranks->push_back(std::make_unique<NcclRank>(api));
    cuda::UseGpu(places[i].gpu);
    NcclConfig config;
    config.blocking = 0;
    result = api.init_rank(&ranks->back()->comm_, places[i].ranks, places[i].id, places[i].rank, &config);
    if (result == kNcclInProgress) result = kNcclSuccess;
  }
  const NcclResult ended = api.group_end();
  if (result == kNcclSuccess && ended != kNcclInProgress) result = ended;
  if (result != kNcclSuccess) return std::string("NCCL: ") + api.error_string(result);
  for (size_t i = first; i < ranks->size(); ++i) {
    if (std::string error = (*ranks)[i]->Settle(patience); !error.empty()) return error;
  }
  return "";
}

std::string NcclRank::AllReduce(Stream& stream, const TensorView& x, std::chrono::milliseconds patience) {
  return Issue(patience, [&](NcclComm* comm) {
    return api_.all_reduce(x.data, x.data, static_cast<size_t>(x.elements()),
                           x.dtype == DType::kF32 ? kNcclFloat32 : kNcclBFloat16, kNcclSum, comm, stream.cuda_stream());
  });
}

std::string NcclRank::Send(Stream& stream, const void* data, size_t bytes, int to, std::chrono::milliseconds patience) {
  return Issue(patience,
               [&](NcclComm* comm) { return api_.send(data, bytes, kNcclInt8, to, comm, stream.cuda_stream()); });
}

std::string NcclRank::Receive(Stream& stream, void* data, size_t bytes, int from, std::chrono::milliseconds patience) {
  return Issue(patience,
               [&](NcclComm* comm) { return api_.receive(data, bytes, kNcclInt8, from, comm, stream.cuda_stream()); });
}

void NcclRank::Register(const Buffer& memory) {
  if (api_.comm_register == nullptr || api_.comm_deregister == nullptr) return;
  std::lock_guard lock(mutex_);
  void* handle = nullptr;
  if (comm_ == nullptr || api_.comm_register(comm_, memory.data(), memory.bytes(), &handle) != kNcclSuccess) return;
  registered_.push_back(handle);
}

template <typename Call>
std::string NcclRank::Issue(std::chrono::milliseconds patience, Call call) {
  {
    std::lock_guard lock(mutex_);
    if (comm_ == nullptr) return "aborted";
    const NcclResult result = call(comm_);
    if (result != kNcclSuccess && result != kNcclInProgress) return Sentence(result);
  }
  return Settle(patience);
}

std::string NcclRank::Settle(std::chrono::milliseconds patience) {
  const auto until = std::chrono::steady_clock::now() + patience;
  for (;;) {
    bool under_way = false;
    std::string error = Error(&under_way);
    if (!error.empty() || !under_way) return error;
    if (std::chrono::steady_clock::now() > until) {
      return "NCCL: no end to a call for " + std::to_string(patience.count()) + " ms";
    }
    std::this_thread::yield();
  }
}

std::string NcclRank::Error(bool* under_way) {
  std::lock_guard lock(mutex_);
  if (comm_ == nullptr) return "aborted";
  NcclResult result = kNcclSuccess;
  const NcclResult asked = api_.get_async_error(comm_, &result);
  if (asked != kNcclSuccess) result = asked;
  *under_way = result == kNcclInProgress;
  return result == kNcclSuccess || result == kNcclInProgress ? "" : Sentence(result);
}

void NcclRank::Abort() {
  std::lock_guard lock(mutex_);
  if (comm_ == nullptr) return;
  for (void* handle : registered_) api_.comm_deregister(comm_, handle);
  registered_.clear();
  api_.abort(std::exchange(comm_, nullptr));
}

std::string NcclRank::Sentence(NcclResult result) const {
  return std::string("NCCL: ") + api_.error_string(result) + ": " + api_.last_error(comm_);
}

}  // namespace altiplano
