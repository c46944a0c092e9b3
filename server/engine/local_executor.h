// LocalExecutor: all ranks in this process. Today one rank on the CPU; its thread runs steps while the engine plans.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "server/base/status.h"
#include "server/engine/executor.h"
#include "server/engine/rank_worker.h"
#include "server/model/checkpoint.h"
#include "server/model/weights.h"
#include "server/scheduler/scheduler.h"

namespace altiplano {

struct LocalExecutorOptions {
  DType dtype = DType::kBF16;  // of weights, activations and KV cache
  int threads = 0;             // 0: one for each core this process may use
  int readers = 4;             // threads that read the checkpoint
  int32_t page_size = 16;      // tokens in a KV block
  int32_t max_running = 256;
  int32_t token_budget = 2048;
  int32_t max_context = 0;  // 0: the model's own
  uint64_t kv_bytes = 0;    // memory for the KV cache; 0: what max_running full contexts could use, but at most half
                            // of the memory that is free after loading
  std::function<void(const LoadProgress&)> progress;
  std::function<bool()> cancelled;
};

class LocalExecutor : public Executor {
 public:
  // Loads the weights, allocates everything, warms up. RESOURCE_EXHAUSTED with numbers when something does not fit.
  static StatusOr<std::unique_ptr<LocalExecutor>> Create(const Checkpoint& checkpoint, LocalExecutorOptions options);
  ~LocalExecutor() override;

  void Launch(std::shared_ptr<const StepPlan> plan) override;
  StepResult Wait() override;

  // What the scheduler must be created with to fit this executor.
  SchedulerOptions scheduler_options() const { return scheduler_options_; }
  std::string DescribeDevice() { return Describe(worker_->stream()); }
  uint64_t weight_bytes() const { return worker_->llama().weight_bytes(); }
  uint64_t kv_bytes() const {
    return worker_->cache().shape().page_bytes() * static_cast<uint64_t>(worker_->cache().shape().pages);
  }

 private:
  LocalExecutor(std::unique_ptr<RankWorker> worker, SchedulerOptions scheduler_options);
  void Loop();

  const SchedulerOptions scheduler_options_;
  const std::unique_ptr<RankWorker> worker_;  // the thread's, after construction

  std::mutex mutex_;  // guards what follows
  std::condition_variable changed_;
  std::deque<std::shared_ptr<const StepPlan>> plans_;
  std::deque<StepResult> results_;
  bool stop_ = false;

  std::thread thread_;
};

}  // namespace altiplano
