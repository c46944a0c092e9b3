// The sender copies into one of two slots in the receiver's memory, over NVLink where there is one; the receiver copies
// from there. Events order the streams, so that no GPU waits for a host:
//
//   sender's stream:    wait for `emptied`, copy in, record `filled`
//   receiver's stream:                               wait for `filled`, copy out, record `emptied`
//
// A host waits for the other one to have issued: an event that was not recorded yet holds nobody back.
#include <array>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <string>
#include <utility>

#include "kernels/comm/arrivals.h"
#include "kernels/comm/die.h"
#include "kernels/comm/link.h"
#include "kernels/cuda/backend.h"

namespace altiplano {

namespace {

class Channel {
 public:
  explicit Channel(const CudaLinkOptions& options) : options_(options) {}

  // Empty, or why it cannot be.
  std::string Open() {
    // Without a way between them the driver takes one through the host's memory.
    if (options_.from != options_.to) cuda::EnablePeerAccess({options_.from, options_.to});
    std::string error;
    const auto sender = Stream::Cuda(options_.from, &error), receiver = Stream::Cuda(options_.to, &error);
    if (sender == nullptr || receiver == nullptr) return error;
    for (Slot& slot : slots_) {
      slot.memory = Buffer::Allocate(*receiver, options_.most_bytes);
      slot.filled = StreamEvent::Create(*sender);
      slot.emptied = StreamEvent::Create(*receiver);
      if (!slot.memory || slot.filled == nullptr || slot.emptied == nullptr) {
        return "no memory on GPU " + std::to_string(options_.to) + " for " + std::to_string(options_.most_bytes) +
               " bytes from " + options_.sender;
      }
    }
    return "";
  }

  bool Send(Stream& stream, const TensorView& x, size_t bytes) {
    if (bytes > options_.most_bytes) Die("Link: a tensor larger than most_bytes");
    std::unique_lock lock(mutex_);
    if (!WaitFor(lock, options_.receiver, [&] { return sent_ - received_ < kCudaLinkSlots; })) return false;
    Watch();
    Slot& slot = slots_[sent_ % kCudaLinkSlots];
    lock.unlock();
    slot.emptied->Precede(stream);
    Copy(stream, slot.memory.data(), Device::kCuda, x.data, Device::kCuda, bytes);
    slot.filled->Record(stream);
    slot.bytes = bytes;
    lock.lock();
    ++sent_;
    changed_.notify_all();
    return error_.empty();
  }

  bool Receive(Stream& stream, const TensorView& x, size_t bytes) {
    std::unique_lock lock(mutex_);
    if (!WaitFor(lock, options_.sender, [&] { return sent_ > received_; })) return false;
    Watch();
    Slot& slot = slots_[received_ % kCudaLinkSlots];
    if (slot.bytes != bytes) {
      End(options_.sender + " sent a tensor of " + std::to_string(slot.bytes) + " bytes where one of " +
          std::to_string(bytes) + " was expected");
      return false;
    }
    lock.unlock();
    slot.filled->Precede(stream);
    Copy(stream, x.data, Device::kCuda, slot.memory.data(), Device::kCuda, bytes);
    slot.emptied->Record(stream);
    lock.lock();
    ++received_;
    arrivals_.Expect();
    changed_.notify_all();
    return error_.empty();
  }

  void Abort(std::string_view reason) {
    std::lock_guard lock(mutex_);
    End(std::string(reason));
  }

  std::string error() {
    std::lock_guard lock(mutex_);
    Watch();
    return error_;
  }

 private:
  struct Slot {
    Buffer memory;  // on the receiver's GPU
    std::unique_ptr<StreamEvent> filled, emptied;
    size_t bytes = 0;  // of what was sent last
  };

  // Under the mutex, as what follows.
  template <typename Ready>
  bool WaitFor(std::unique_lock<std::mutex>& lock, const std::string& peer, Ready ready) {
    const auto ended = [&] { return !error_.empty(); };
    if (!changed_.wait_for(lock, options_.patience, [&] { return ended() || ready(); })) EndForSilence(peer);
    return !ended();
  }
  void End(const std::string& reason) {
    if (error_.empty()) error_ = reason;
    changed_.notify_all();
  }
  void EndForSilence(const std::string& peer) {
    End("no word for " + std::to_string(options_.patience.count()) + " ms from " + peer);
  }
  // Whether the tensor that the receiver's stream waits for has come, or should have.
  void Watch() {
    arrivals_.Look([&](uint64_t n) { return slots_[n % kCudaLinkSlots].filled->Passed(); });
    if (arrivals_.Late(options_.patience)) EndForSilence(options_.sender);
  }

  const CudaLinkOptions options_;
  std::array<Slot, kCudaLinkSlots> slots_;  // those that were sent and not received yet are the receiver's
  std::mutex mutex_;                        // guards what follows
  std::condition_variable changed_;
  uint64_t sent_ = 0, received_ = 0;  // that were issued
  Arrivals arrivals_;                 // of those received
  std::string error_;                 // not empty: ended
};

class CudaLink : public Link {
 public:
  CudaLink(std::shared_ptr<Channel> channel, bool sends) : channel_(std::move(channel)), sends_(sends) {}
  ~CudaLink() override { channel_->Abort("a rank has left"); }

  bool Send(Stream& stream, const TensorView& x) override {
    if (!sends_) Die("Link: this end of a link between GPUs receives");
    return channel_->Send(stream, x, BytesOfDense(x, Device::kCuda));
  }
  bool Receive(Stream& stream, const TensorView& x) override {
    if (sends_) Die("Link: this end of a link between GPUs sends");
    return channel_->Receive(stream, x, BytesOfDense(x, Device::kCuda));
  }
  void Abort(std::string_view reason) override { channel_->Abort(reason); }
  std::string error() const override { return channel_->error(); }

 private:
  const std::shared_ptr<Channel> channel_;
  const bool sends_;
};

}  // namespace

std::pair<std::unique_ptr<Link>, std::unique_ptr<Link>> MakeCudaLink(const CudaLinkOptions& options,
                                                                     std::string* error) {
  auto channel = std::make_shared<Channel>(options);
  if (*error = channel->Open(); !error->empty()) return {};
  return {std::make_unique<CudaLink>(channel, true), std::make_unique<CudaLink>(channel, false)};
}

}  // namespace altiplano
