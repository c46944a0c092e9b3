#include "server/frontend/egress.h"

#include "server/base/check.h"

namespace altiplano {

void EgressQueue::Post(CallKey key, Notice notice) {
  {
    std::lock_guard lock(mutex_);
    notices_.emplace_back(key, std::move(notice));
    awake_ = true;
  }
  wake_.notify_one();
}

void EgressQueue::PostEvent(CallKey key, Event event) {
  std::lock_guard lock(mutex_);
  if (stop_) return;  // the engine outlives the reader
  notices_.emplace_back(key, std::move(event));
}

void EgressQueue::PostToAll(const Status& why) {
  Post(kAll, Killed{why});
}

void EgressQueue::Wake() {
  {
    std::lock_guard lock(mutex_);
    awake_ = true;
  }
  wake_.notify_one();
}

void EgressQueue::Stop() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_one();
}

Egress::Egress() : thread_([this] { Loop(); }) {}

Egress::~Egress() {
  queue_->Stop();
  thread_.join();
  CHECK(calls_.empty());
}

void Egress::Loop() {
  std::vector<std::pair<CallKey, Notice>> notices;
  while (Take(&notices)) {
    TimePoint now = Clock::Real().Now();
    for (auto& [key, notice] : notices) Deliver(key, std::move(notice), now);
    notices.clear();
    FireTimers(now);
    FlushDirty(now);
  }
}

bool Egress::Take(std::vector<std::pair<CallKey, Notice>>* notices) {
  EgressQueue& queue = *queue_;
  std::unique_lock lock(queue.mutex_);
  auto ready = [&] { return queue.awake_ || queue.stop_; };
  if (timers_.empty()) {
    queue.wake_.wait(lock, ready);
  } else {
    queue.wake_.wait_until(lock, timers_.begin()->first, ready);
  }
  notices->swap(queue.notices_);
  queue.awake_ = false;
  return !queue.stop_ || !notices->empty();
}

void Egress::Deliver(CallKey key, Notice notice, TimePoint now) {
  if (auto* started = std::get_if<Started>(&notice)) {
    calls_[key].call = std::move(started->call);
    return;
  }
  if (key == EgressQueue::kAll) {
    for (auto& [each, slot] : calls_) {
      slot.call->OnNotice(std::get<Killed>(notice), now);
      Touch(each, &slot);
    }
    return;
  }
  auto it = calls_.find(key);
  if (it == calls_.end()) return;  // an event that was under way when its call ended
  if (std::holds_alternative<CallDone>(notice)) {
    timers_.erase({it->second.timer, key});
    calls_.erase(it);
    return;
  }
  it->second.call->OnNotice(std::move(notice), now);
  Touch(key, &it->second);
}

void Egress::Touch(CallKey key, Slot* slot) {
  if (slot->dirty) return;
  slot->dirty = true;
  dirty_.push_back(key);
}

void Egress::FireTimers(TimePoint now) {
  for (auto it = timers_.begin(); it != timers_.end() && it->first <= now; ++it) {
    Touch(it->second, &calls_.at(it->second));
  }
}

void Egress::FlushDirty(TimePoint now) {
  for (CallKey key : dirty_) {
    auto it = calls_.find(key);
    if (it == calls_.end()) continue;
    Slot& slot = it->second;
    slot.dirty = false;
    slot.call->Flush(now);
    TimePoint timer = slot.call->next_timer();
    if (timer == slot.timer) continue;
    timers_.erase({slot.timer, key});
    slot.timer = timer;
    if (timer != kNever) timers_.emplace(timer, key);
  }
  dirty_.clear();
}

}  // namespace altiplano
