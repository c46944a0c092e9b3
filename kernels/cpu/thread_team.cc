#include "kernels/cpu/thread_team.h"

#include <immintrin.h>
#include <sys/mman.h>

#include <chrono>
#include <cstdio>

namespace altiplano {

namespace {
constexpr auto kSpin = std::chrono::microseconds(200);
}

ThreadTeam::ThreadTeam(int threads) {
  for (int worker = 1; worker < threads; ++worker) workers_.emplace_back([this, worker] { WorkerLoop(worker); });
}

ThreadTeam::~ThreadTeam() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
    generation_.fetch_add(1, std::memory_order_release);
  }
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void* ThreadTeam::Scratch(size_t bytes) {
  if (bytes <= scratch_bytes_) return scratch_.get();
  constexpr size_t kHugePage = size_t{2} << 20;
  const size_t rounded = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  scratch_.reset();
  scratch_.reset(std::aligned_alloc(kHugePage, rounded));
  if (scratch_ == nullptr) {
    std::fprintf(stderr, "out of memory: %zu bytes of scratch for a CPU op\n", rounded);
    std::abort();
  }
  madvise(scratch_.get(), rounded, MADV_HUGEPAGE);  // a wish
  scratch_bytes_ = rounded;
  return scratch_.get();
}

void ThreadTeam::RunErased(Task task, void* context) {
  runs_.store(runs() + 1, std::memory_order_relaxed);
  if (workers_.empty()) {
    task(context, 0, 1);
    return;
  }
  task_ = task;
  context_ = context;
  running_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
  generation_.fetch_add(1, std::memory_order_seq_cst);
  // A worker counts itself a sleeper before it looks at generation_ for the last time, so either it sees the new
  // generation or we see it sleeping.
  if (sleepers_.load(std::memory_order_seq_cst) > 0) {
    std::lock_guard lock(mutex_);
    wake_.notify_all();
  }
  task(context, 0, size());
  for (int spins = 0; running_.load(std::memory_order_acquire) > 0; ++spins) {
    if (spins < 4096) {
      _mm_pause();
    } else {
      std::this_thread::yield();  // more threads than cores: let the worker run
    }
  }
}

void ThreadTeam::WorkerLoop(int worker) {
  uint64_t seen = 0;
  for (;;) {
    auto spin_until = std::chrono::steady_clock::now() + kSpin;
    int spins = 0;
    while (generation_.load(std::memory_order_acquire) == seen) {
      _mm_pause();
      if (++spins % 64 != 0 || std::chrono::steady_clock::now() < spin_until) continue;
      std::unique_lock lock(mutex_);
      sleepers_.fetch_add(1, std::memory_order_seq_cst);
      wake_.wait(lock, [&] { return generation_.load(std::memory_order_seq_cst) != seen; });
      sleepers_.fetch_sub(1, std::memory_order_relaxed);
    }
    ++seen;
    if (stop_) return;
    task_(context_, worker, size());
    running_.fetch_sub(1, std::memory_order_release);
  }
}

}  // namespace altiplano
