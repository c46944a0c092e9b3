// WorkPool: a few threads for what gRPC's callback threads must not do: tokenize, render, wait.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace altiplano {

class WorkPool {
 public:
  // Bounds on what waits: jobs, and the sum of their bytes.
  WorkPool(int threads, int32_t max_jobs, int64_t max_bytes);
  // Runs what was taken, then ends.
  ~WorkPool();

  // Any thread, never blocks. False: full, the job was not taken. A single job may exceed max_bytes.
  bool Run(std::function<void()> job, int64_t bytes = 0);

  int64_t jobs() const;  // waiting or running

 private:
  void Loop();

  const int32_t max_jobs_;
  const int64_t max_bytes_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::pair<std::function<void()>, int64_t>> queue_;
  int64_t queued_bytes_ = 0;
  int64_t running_ = 0;
  bool stop_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace altiplano
