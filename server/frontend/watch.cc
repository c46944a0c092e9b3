#include "server/frontend/watch.h"

#include <algorithm>
#include <utility>

#include "server/frontend/error_mapping.h"

namespace altiplano {

namespace {
constexpr Duration kTurn = std::chrono::milliseconds(100);  // while anyone watches
}  // namespace

WatchHub::WatchHub(std::shared_ptr<LiveCounters> live, std::function<TimePoint(TimePoint)> poll)
    : live_(std::move(live)), poll_(std::move(poll)), thread_([this] { Loop(); }) {}

WatchHub::~WatchHub() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_one();
  thread_.join();
}

void WatchHub::Wake() {
  {
    std::lock_guard lock(mutex_);
    awake_ = true;
  }
  wake_.notify_one();
}

void WatchHub::FinishAll(const Status& status) {
  std::lock_guard lock(mutex_);
  if (finished_.ok()) finished_ = status;
  for (WatchReactor* watcher : watchers_) watcher->End(status);
}

bool WatchHub::Add(WatchReactor* watcher) {
  std::lock_guard lock(mutex_);
  ++live_->watchers;
  watchers_.insert(watcher);
  if (!finished_.ok()) return false;
  awake_ = true;
  wake_.notify_one();
  return true;
}

void WatchHub::Remove(WatchReactor* watcher) {
  std::lock_guard lock(mutex_);
  --live_->watchers;
  watchers_.erase(watcher);
}

void WatchHub::Loop() {
  std::unique_lock lock(mutex_);
  while (!stop_) {
    lock.unlock();
    TimePoint now = Clock::Real().Now();
    TimePoint next = poll_(now);
    lock.lock();
    for (WatchReactor* watcher : watchers_) watcher->Look(now);
    if (!watchers_.empty()) next = std::min(next, now + kTurn);
    auto ready = [&] { return stop_ || awake_; };
    if (next == kNever) {
      wake_.wait(lock, ready);
    } else {
      wake_.wait_until(lock, next, ready);
    }
    awake_ = false;
  }
}

WatchReactor::WatchReactor(WatchHub* hub, Next next) : hub_(hub), next_(std::move(next)) {
  if (!hub_->Add(this)) End(hub_->finished_);
}

void WatchReactor::Look(TimePoint now) {
  std::lock_guard lock(mutex_);
  if (writing_ || ended_) return;
  std::optional<grpc::ByteBuffer> message = next_(now);
  if (!message) return;
  outgoing_ = std::move(*message);
  writing_ = true;
  StartWrite(&outgoing_);
}

void WatchReactor::End(const Status& status) {
  std::lock_guard lock(mutex_);
  if (std::exchange(ended_, true)) return;
  Finish(ToGrpcStatus(status));
}

void WatchReactor::OnWriteDone(bool ok) {
  if (!ok) return End(Status(Code::kCancelled, "the client went away"));
  {
    std::lock_guard lock(mutex_);
    writing_ = false;
  }
  hub_->Wake();
}

void WatchReactor::OnCancel() {
  End(Status(Code::kCancelled, "the client cancelled the watch"));
}

void WatchReactor::OnDone() {
  hub_->Remove(this);
  delete this;
}

}  // namespace altiplano
