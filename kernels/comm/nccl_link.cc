// Each link is a communicator of two. What is sent is copied first, and sent from the copy on a stream of the link's
// own: a stage goes on with its next step while the other end is still busy with this one, and two stages that send to
// each other never wait for each other.
#include "kernels/comm/nccl_link.h"

#include <array>
#include <cstdint>
#include <mutex>
#include <utility>

#include "kernels/comm/arrivals.h"
#include "kernels/comm/die.h"
#include "kernels/comm/nccl_rank.h"

namespace altiplano {

namespace {

constexpr int kSender = 0, kReceiver = 1;  // ranks

class NcclLink : public Link {
 public:
  NcclLink(const NcclLinkEnd& end, std::chrono::milliseconds patience, std::unique_ptr<NcclRank> rank)
      : end_(end), patience_(patience), rank_(std::move(rank)) {}
  ~NcclLink() override { Abort("a rank has left"); }

  // Empty, or why it cannot be.
  std::string Open() {
    std::string error;
    stream_ = Stream::Cuda(end_.gpu, &error);
    if (stream_ == nullptr) return error;
    for (Slot& slot : slots_) {
      slot.filled = StreamEvent::Create(*stream_);
      slot.emptied = StreamEvent::Create(*stream_);
      error = slot.filled != nullptr && slot.emptied != nullptr ? "" : "no events";
      if (error.empty() && end_.sends) error = rank_->Allocate(end_.most_bytes, &slot.memory);
      if (!error.empty()) {
        return "GPU " + std::to_string(end_.gpu) + " has no room for " + std::to_string(end_.most_bytes) +
               " bytes to " + end_.peer + ": " + error;
      }
    }
    return "";
  }

  bool Send(Stream& stream, const TensorView& x) override {
    const size_t bytes = BytesOfDense(x, Device::kCuda);
    if (!end_.sends || bytes > end_.most_bytes) Die("Link: this end receives, or the tensor is too large");
    const Slot& slot = slots_[issued_++ % kCudaLinkSlots];
    slot.emptied->Precede(stream);
    Copy(stream, slot.memory, Device::kCuda, x.data, Device::kCuda, bytes);
    slot.filled->Record(stream);
    slot.filled->Precede(*stream_);
    const std::string failed = rank_->Send(*stream_, slot.memory, bytes, kReceiver, patience_);
    slot.emptied->Record(*stream_);
    return Ended(failed);
  }

  bool Receive(Stream& stream, const TensorView& x) override {
    const size_t bytes = BytesOfDense(x, Device::kCuda);
    if (end_.sends) Die("Link: this end sends");
    const std::string failed = rank_->Receive(stream, x.data, bytes, kSender, patience_);
    slots_[issued_++ % kCudaLinkSlots].filled->Record(stream);
    {
      std::lock_guard lock(mutex_);
      Watch();
      arrivals_.Expect();
    }
    return Ended(failed);
  }

  void Abort(std::string_view reason) override { End(std::string(reason)); }

  std::string error() const override {
    std::string found;
    {
      std::lock_guard lock(mutex_);
      if (!error_.empty()) return error_;
      Watch();
      if (arrivals_.Late(patience_)) {
        found = "no word for " + std::to_string(patience_.count()) + " ms from " + end_.peer;
      }
    }
    bool under_way = false;
    if (found.empty()) found = end_.wire->error();
    if (found.empty()) found = rank_->Error(&under_way);
    if (!found.empty()) End(found);
    std::lock_guard lock(mutex_);
    return error_;
  }

 private:
  // Of an end that sends: a tensor on its way. Of one that receives `filled` alone is used.
  struct Slot {
    void* memory = nullptr;  // rank_'s
    std::unique_ptr<StreamEvent> filled, emptied;
  };

  // The first reason stays; both ends learn of it.
  void End(const std::string& reason) const {
    {
      std::lock_guard lock(mutex_);
      if (!error_.empty()) return;
      error_ = reason;
    }
    rank_->Abort();
    end_.wire->Abort(reason);
  }
  // After a call that failed, if it did. Whether the link is still good.
  bool Ended(const std::string& failed) const {
    if (!failed.empty()) End(end_.peer + ": " + failed);
    std::lock_guard lock(mutex_);
    return error_.empty();
  }
  // Under the mutex: which of the tensors received have come.
  void Watch() const {
    arrivals_.Look([&](uint64_t n) { return slots_[n % kCudaLinkSlots].filled->Passed(); });
  }

  const NcclLinkEnd end_;
  const std::chrono::milliseconds patience_;
  std::unique_ptr<Stream> stream_;  // on which an end that sends does so
  std::array<Slot, kCudaLinkSlots> slots_;
  uint64_t issued_ = 0;                   // calls, of the one thread that makes them
  mutable std::mutex mutex_;              // guards what follows
  mutable std::string error_;             // not empty: ended
  mutable Arrivals arrivals_;             // of what is received
  const std::unique_ptr<NcclRank> rank_;  // goes first
};

// Each communicator's id, made by the end that sends.
std::string Introduce(const NcclApi& api, const std::vector<NcclLinkEnd>& ends, std::vector<NcclRank::Place>* places) {
  const auto cpu = Stream::Cpu(1);
  const auto view = [](NcclUniqueId& id) {
    return TensorView::Make(&id, DType::kI32, {sizeof(NcclUniqueId) / sizeof(int32_t)});
  };
  for (size_t i = 0; i < ends.size(); ++i) {
    NcclRank::Place& place = (*places)[i];
    place = {.gpu = ends[i].gpu, .id = {}, .rank = ends[i].sends ? kSender : kReceiver, .ranks = 2};
    if (!ends[i].sends) continue;
    if (const NcclResult result = api.get_unique_id(&place.id); result != kNcclSuccess) {
      return std::string("NCCL: ") + api.error_string(result);
    }
    if (!ends[i].wire->Send(*cpu, view(place.id))) return ends[i].wire->error();
  }
  for (size_t i = 0; i < ends.size(); ++i) {
    if (!ends[i].sends && !ends[i].wire->Receive(*cpu, view((*places)[i].id))) return ends[i].wire->error();
  }
  return "";
}

}  // namespace

std::vector<std::shared_ptr<Link>> MakeNcclLinks(const NcclApi& api, const std::vector<NcclLinkEnd>& ends,
                                                 std::chrono::milliseconds patience, std::string* error) {
  std::vector<NcclRank::Place> places(ends.size());
  std::vector<std::unique_ptr<NcclRank>> ranks;
  if (*error = Introduce(api, ends, &places); !error->empty()) return {};
  if (*error = NcclRank::Form(api, places, patience, &ranks); !error->empty()) return {};
  std::vector<std::shared_ptr<Link>> links;
  for (size_t i = 0; i < ends.size(); ++i) {
    auto link = std::make_shared<NcclLink>(ends[i], patience, std::move(ranks[i]));
    if (*error = link->Open(); !error->empty()) return {};
    links.push_back(std::move(link));
  }
  return links;
}

}  // namespace altiplano
