// Tensors are copied into a queue: a stage goes on with its next step while the other end is still busy with this one.
#include <array>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "kernels/comm/die.h"
#include "kernels/comm/link.h"

namespace altiplano {

namespace {

// More than there are steps in flight.
constexpr size_t kMostQueued = 4;

struct Shared {
  explicit Shared(std::chrono::milliseconds p) : patience(p) {}

  struct Way {
    std::deque<std::vector<char>> full, empty;  // `empty`: buffers that were used before
  };
  const std::chrono::milliseconds patience;
  mutable std::mutex mutex;
  std::condition_variable changed;
  std::array<Way, 2> ways;  // guarded by mutex, [end that sends]
  std::string error;        // guarded by mutex; not empty: ended

  void Abort(std::string_view reason) {
    std::lock_guard lock(mutex);
    if (error.empty()) error = reason;
    changed.notify_all();
  }
};

class InProcessLink : public Link {
 public:
  InProcessLink(std::shared_ptr<Shared> shared, size_t end, std::string peer)
      : shared_(std::move(shared)), end_(end), peer_(std::move(peer)) {}
  ~InProcessLink() override { shared_->Abort("a rank has left"); }

  bool Send(Stream& stream, const TensorView& x) override {
    const size_t bytes = BytesOfDense(x);
    if (!stream.Synchronize().empty()) return false;
    Shared::Way& way = shared_->ways[end_];
    std::unique_lock lock(shared_->mutex);
    if (!WaitFor(lock, [&] { return way.full.size() < kMostQueued; })) return false;
    std::vector<char> buffer;
    if (!way.empty.empty()) {
      buffer = std::move(way.empty.front());
      way.empty.pop_front();
    }
    lock.unlock();
    buffer.resize(bytes);
    if (!buffer.empty()) std::memcpy(buffer.data(), x.data, buffer.size());
    lock.lock();
    way.full.push_back(std::move(buffer));
    shared_->changed.notify_all();
    return shared_->error.empty();
  }

  bool Receive(Stream& stream, const TensorView& x) override {
    const size_t bytes = BytesOfDense(x);
    if (!stream.Synchronize().empty()) return false;
    Shared::Way& way = shared_->ways[1 - end_];
    std::unique_lock lock(shared_->mutex);
    if (!WaitFor(lock, [&] { return !way.full.empty(); })) return false;
    std::vector<char> buffer = std::move(way.full.front());
    way.full.pop_front();
    lock.unlock();
    if (buffer.size() != bytes) Die("Link: a tensor of another size was sent than is received");
    if (!buffer.empty()) std::memcpy(x.data, buffer.data(), buffer.size());
    lock.lock();
    way.empty.push_back(std::move(buffer));
    shared_->changed.notify_all();
    return true;
  }

  void Abort(std::string_view reason) override { shared_->Abort(reason); }
  std::string error() const override {
    std::lock_guard lock(shared_->mutex);
    return shared_->error;
  }

 private:
  template <typename Ready>
  bool WaitFor(std::unique_lock<std::mutex>& lock, Ready ready) {
    const auto ended = [&] { return !shared_->error.empty(); };
    if (!shared_->changed.wait_for(lock, shared_->patience, [&] { return ended() || ready(); })) {
      shared_->error = "no word for " + std::to_string(shared_->patience.count()) + " ms from " + peer_;
      shared_->changed.notify_all();
    }
    return !ended();
  }

  const std::shared_ptr<Shared> shared_;
  const size_t end_;
  const std::string peer_;
};

}  // namespace

size_t Link::BytesOfDense(const TensorView& x, Device device) {
  if (x.device != device || !x.contiguous()) Die("Link: wants a dense tensor on its own device");
  return static_cast<size_t>(x.elements()) * SizeOf(x.dtype);
}

std::pair<std::unique_ptr<Link>, std::unique_ptr<Link>> MakeInProcessLink(std::string first, std::string second,
                                                                          std::chrono::milliseconds patience) {
  auto shared = std::make_shared<Shared>(patience);
  return {std::make_unique<InProcessLink>(shared, 0, std::move(second)),
          std::make_unique<InProcessLink>(shared, 1, std::move(first))};
}

}  // namespace altiplano
