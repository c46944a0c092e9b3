#include "server/frontend/work_pool.h"

#include <algorithm>
#include <utility>

#include "server/base/crash.h"

namespace altiplano {

WorkPool::WorkPool(int threads, int32_t max_jobs, int64_t max_bytes) : max_jobs_(max_jobs), max_bytes_(max_bytes) {
  for (int i = 0; i < std::max(1, threads); ++i) threads_.emplace_back([this] { Loop(); });
}

WorkPool::~WorkPool() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  changed_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

bool WorkPool::Run(std::function<void()> job, int64_t bytes) {
  {
    std::lock_guard lock(mutex_);
    if (queue_.size() >= static_cast<size_t>(max_jobs_)) return false;
    if (!queue_.empty() && queued_bytes_ + bytes > max_bytes_) return false;
    queued_bytes_ += bytes;
    queue_.emplace_back(std::move(job), bytes);
  }
  changed_.notify_one();
  return true;
}

int64_t WorkPool::jobs() const {
  std::lock_guard lock(mutex_);
  return static_cast<int64_t>(queue_.size()) + running_;
}

void WorkPool::Loop() {
  const crash::SignalStack signal_stack;
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [&] { return stop_ || !queue_.empty(); });
    if (queue_.empty()) return;
    auto [job, bytes] = std::move(queue_.front());
    queue_.pop_front();
    queued_bytes_ -= bytes;
    ++running_;
    lock.unlock();
    job();
    job = nullptr;  // what it holds goes before it counts as done
    lock.lock();
    --running_;
  }
}

}  // namespace altiplano
