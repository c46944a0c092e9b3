// ThreadTeam: the threads that work on one CPU op together. Workers spin briefly between ops (a decode step is hundreds
// of short ops; a futex wake costs more than most of them) and then sleep.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace altiplano {

class ThreadTeam {
 public:
  explicit ThreadTeam(int threads);  // >= 1, the calling thread included
  ~ThreadTeam();
  ThreadTeam(const ThreadTeam&) = delete;
  ThreadTeam& operator=(const ThreadTeam&) = delete;

  int size() const { return static_cast<int>(workers_.size()) + 1; }
  // Calls of Run so far. Any thread: one that sees it grow knows that Run's caller does not hang.
  uint64_t runs() const { return runs_.load(std::memory_order_relaxed); }

  // Memory of the team's for an op's packed operands and partial results: 64-byte aligned, contents undefined, good
  // until the next call. Grows when an op needs more than any before it; steps of one size allocate nothing. Run's
  // caller only.
  void* Scratch(size_t bytes);

  // Calls fn(worker, size()) once on each thread, the caller being worker 0, and returns when all have returned.
  // One caller at a time, and not from within fn.
  template <typename F>
  void Run(F&& fn) {
    RunErased([](void* f, int worker, int size) { (*static_cast<std::remove_reference_t<F>*>(f))(worker, size); }, &fn);
  }

 private:
  using Task = void (*)(void* context, int worker, int size);
  void RunErased(Task task, void* context);
  void WorkerLoop(int worker);

  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> scratch_;  // Run's caller only, as its size
  size_t scratch_bytes_ = 0;

  // Written by Run's caller before `generation_` is raised, read by workers after they see it.
  Task task_ = nullptr;
  void* context_ = nullptr;
  bool stop_ = false;
  std::atomic<uint64_t> runs_{0};  // written by Run's caller

  alignas(64) std::atomic<uint64_t> generation_{0};
  alignas(64) std::atomic<int> running_{0};
  alignas(64) std::atomic<int> sleepers_{0};
  std::mutex mutex_;  // guards sleeping and waking only
  std::condition_variable wake_;
  std::vector<std::thread> workers_;
};

}  // namespace altiplano
