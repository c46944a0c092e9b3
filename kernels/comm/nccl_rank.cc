#include "kernels/comm/nccl_rank.h"

#include <thread>
#include <utility>

#include "kernels/cuda/backend.h"

namespace altiplano {

namespace {

// For a call that was aborted to leave the stream alone.
constexpr auto kCallEnds = std::chrono::seconds(1);

}  // namespace

std::string NcclRank::Form(const NcclApi& api, const std::vector<Place>& places, std::chrono::milliseconds patience,
                           std::vector<std::unique_ptr<NcclRank>>* ranks) {
  const size_t first = ranks->size();
  NcclResult result = api.group_start();
  for (size_t i = 0; result == kNcclSuccess && i < places.size(); ++i) {
    ranks->push_back(std::make_unique<NcclRank>(api, places[i].gpu));
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

// NCCL works in a caller's memory, without copies, where all ranks have registered theirs, and hangs where only some
// have: so this fails or it is registered. Memory from anywhere else would be registered in vain.
std::string NcclRank::Allocate(size_t bytes, void** memory) {
  if (api_.comm_register == nullptr) {
    buffers_.push_back(Buffer::Allocate(Device::kCuda, bytes, gpu_));
    *memory = buffers_.back().data();
    return *memory != nullptr ? "" : "no memory";
  }
  cuda::UseGpu(gpu_);
  if (const NcclResult result = api_.allocate(memory, bytes); result != kNcclSuccess) {
    return std::string("NCCL: ") + api_.error_string(result);
  }
  allocated_.push_back(*memory);
  std::lock_guard lock(mutex_);
  if (comm_ == nullptr) return aborted_;
  void* handle = nullptr;  // of no use: the communicator forgets the memory when it ends, and not before
  const NcclResult result = api_.comm_register(comm_, *memory, bytes, &handle);
  return result == kNcclSuccess ? "" : Sentence(result);
}

template <typename Call>
std::string NcclRank::Issue(std::chrono::milliseconds patience, Call call) {
  {
    std::lock_guard lock(mutex_);
    if (comm_ == nullptr) return aborted_;
    const NcclResult result = call(comm_);
    if (result != kNcclSuccess && result != kNcclInProgress) return Sentence(result);
  }
  std::string error = Settle(patience);
  if (!error.empty()) LetEnd(error);
  return error;
}

// A call that has no end, or an error, must not issue anything any more when the caller goes on: what is captured may
// be over then, or the stream. NCCL's abort waits for its call first; of a communicator's last rank it then waits for
// graphs as well, and they for the caller.
void NcclRank::LetEnd(const std::string& error) {
  {
    std::lock_guard lock(mutex_);
    if (comm_ != nullptr) aborted_ = error;
  }
  Abort();
  std::unique_lock lock(mutex_);
  changed_.wait_for(lock, kCallEnds, [&] { return ended_; });
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
  if (comm_ == nullptr) return aborted_;
  NcclResult result = kNcclSuccess;
  const NcclResult asked = api_.get_async_error(comm_, &result);
  if (asked != kNcclSuccess) result = asked;
  *under_way = result == kNcclInProgress;
  return result == kNcclSuccess || result == kNcclInProgress ? "" : Sentence(result);
}

// NCCL's abort first ends the kernels, and of a communicator's last rank it returns when no graph has a call any more.
// Who destroys the graphs may wait for those kernels: so nobody waits for it but End.
void NcclRank::Abort() {
  std::lock_guard lock(mutex_);
  if (comm_ == nullptr) return;
  ending_ = std::thread([this, comm = std::exchange(comm_, nullptr)] {
    api_.abort(comm);
    std::lock_guard ending(mutex_);
    ended_ = true;
    changed_.notify_all();
  });
}

void NcclRank::End() {
  Abort();
  if (ending_.joinable()) ending_.join();
}

NcclRank::~NcclRank() {
  End();
  for (void* memory : allocated_) api_.free(memory);
}

std::string NcclRank::Sentence(NcclResult result) const {
  return std::string("NCCL: ") + api_.error_string(result) + ": " + api_.last_error(comm_);
}

}  // namespace altiplano
