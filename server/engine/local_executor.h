// LocalExecutor: all ranks in this process, a thread each, on the CPU or each on its GPU. They run steps while the
// engine plans: a rank's thread enqueues what was launched, and whoever calls Wait waits for the device. A step that
// waits behind another runs in the pipeline's first stages while that one is in the later ones.
//
// A rank that fails (an error, an exception, or silence where the others wait for it) aborts the group: the step ends
// with the first error, and nothing can be launched any more. So does a step in which no rank gets any further for a
// little longer than `patience`, be the rank the only one or its GPU what hangs.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "kernels/comm/communicator.h"
#include "kernels/comm/link.h"
#include "server/base/status.h"
#include "server/engine/device_memory.h"
#include "server/engine/executor.h"
#include "server/engine/rank_worker.h"
#include "server/engine/start_watch.h"
#include "server/model/checkpoint.h"
#include "server/model/weights.h"
#include "server/scheduler/scheduler.h"

namespace altiplano {

using RankWeights = std::vector<std::shared_ptr<const LlamaWeights>>;  // [stages * ranks]

struct LocalExecutorOptions {
  Device device = Device::kCpu;
  std::vector<int> gpus;       // CUDA: of each rank of this process, those of a stage together; empty: from 0 on.
                               // Ranks that share one: right, and of no use but to tests
  DType dtype = DType::kBF16;  // of weights, activations and KV cache
  int ranks = 1;               // of each tensor-parallel group
  int stages = 1;              // of the pipeline; each is such a group
  // Of the stages, those of this process; 0: all. Then outer_previous and outer_next lead to the processes that have
  // the stages before and after, around the ring: [ranks] each, of CPU memory. CUDA: they introduce ranks to each other
  // that then talk by NCCL.
  int first_stage = 0;
  int local_stages = 0;
  std::vector<std::shared_ptr<Link>> outer_previous, outer_next;
  std::function<Status()> meet;  // waits until all processes have loaded, before the ranks first talk
  int threads = 0;               // CPU: of all ranks together; 0: one for each core this process may use
  int readers = 4;               // threads that read the checkpoint
  int32_t page_size = 16;        // tokens in a KV block
  int32_t max_running = 256;
  int32_t token_budget = 2048;
  int32_t max_context = 0;  // 0: the model's own
  int executors = 1;        // that will share what memory is left, this one included: the host's, or these GPUs'
  uint64_t kv_bytes = 0;    // memory for the KV cache of all ranks; 0: what max_running full contexts could use, but
                            // at most what is free after a step (half of the host's memory, nearly all of a GPU's),
                            // shared out among the executors
  std::shared_ptr<const RankWeights> weights;  // null: its own, from the checkpoint
  bool batch_invariant = false;                // see Llama::Limits
  bool cuda_graphs = true;                     // CUDA: see RankWorker::CaptureDecodeGraphs
  bool nccl_in_graphs = false;                 // with NCCL's calls: see CudaGroupOptions::capture_nccl
  bool overlap_kernels = true;                 // CUDA: see kernels/cuda/overlap.h
  std::function<void(const LoadProgress&)> progress;
  std::function<bool()> cancelled;
  // Of each step, as the rank that samples has it. Wait's thread. Null: steps are not timed.
  std::function<void(const StepTimes&)> on_step_times;
  bool check_ranks = false;  // compare what ranks hold that should be the same, after each call between them
  std::chrono::milliseconds patience = std::chrono::seconds(30);  // how long ranks wait for one another
  // Told when loading and warming up have got nowhere for start_patience (StartWatch). Null: they are waited for.
  std::function<void(const Status&)> on_start_hang;
  std::chrono::milliseconds start_patience = std::chrono::minutes(2);
  std::function<void(const std::string& what)> on_start_phase;  // see StartWatch
  // For tests. Ranks are numbered through the stages. before_step: rank's thread; may throw, or never return. A warm-up
  // is step 0.
  std::function<void(int rank, uint64_t step)> before_step;
  std::function<void(CudaGroupOptions&)> adjust_group;
  std::function<std::unique_ptr<Communicator>(int rank, std::unique_ptr<Communicator>)> wrap_communicator;
  std::function<std::shared_ptr<Link>(int rank, std::shared_ptr<Link>)> wrap_link;
};

class LocalExecutor : public Executor {
 public:
  // For options.weights of several executors. Looks at options.dtype, ranks, stages, readers, progress and cancelled.
  static StatusOr<std::shared_ptr<const RankWeights>> LoadShared(const Checkpoint& checkpoint,
                                                                 const LocalExecutorOptions& options);
  // Loads the weights, allocates everything, warms up. RESOURCE_EXHAUSTED with numbers when something does not fit.
  static StatusOr<std::unique_ptr<LocalExecutor>> Create(const Checkpoint& checkpoint, LocalExecutorOptions options);
  ~LocalExecutor() override;

  // Ends the group as a failed rank does. Any thread.
  void Abort(std::string_view reason) { Fail(Status(Code::kUnavailable, std::string(reason))); }

  // Tells of progress only, of ranks on the CPU, while somebody waits for the step.
  void Watch(ExecutorObserver* observer) override { observer_ = observer; }
  // A process without the last stage gets results without tokens.
  void Launch(std::shared_ptr<const StepPlan> plan) override;
  StepResult Wait() override;
  // A GPU that hangs gives nothing back before the process ends.
  bool replaceable() const override { return !stalled_ || device_ == Device::kCpu; }

  // What the scheduler must be created with to fit this executor.
  SchedulerOptions scheduler_options() const { return scheduler_options_; }
  std::string DescribeDevice() const;
  const std::vector<DeviceMemory>& devices() const { return devices_; }
  uint64_t weight_bytes() const;  // of all ranks, as kv_bytes
  uint64_t kv_bytes() const;
  int ranks() const { return static_cast<int>(ranks_.size()); }

 private:
  // What a rank's thread shares with the executor: a thread that hangs outlives it.
  struct Shared {
    std::mutex mutex;  // guards what follows
    std::condition_variable changed;
    std::vector<std::deque<std::shared_ptr<const StepPlan>>> plans;  // [ranks]
    std::vector<int> enqueued;                                       // [ranks]: steps not collected by Wait yet
    Status failure;                                                  // the first
    int running = 0;                                                 // threads
    int launched = 0;                                                // steps that Wait has not returned
    bool stop = false;
  };
  struct Rank {
    int number = 0;                              // through all stages, those of other processes too
    std::string name;                            // "3", or "3 (GPU 1, PCI 0000:1B:00.0)"
    std::unique_ptr<Communicator> communicator;  // null for one rank
    bool checked = false;                        // it is one of MakeChecked
    std::shared_ptr<Link> previous, next;        // null for one stage
    std::unique_ptr<RankWorker> worker;          // Enqueue is the thread's, Collect the engine's

    void Abort(std::string_view reason) const;  // any thread
    // Why it can go on no more, as far as its calls do not tell; empty while it can. On the CPU a link's do.
    std::string Error() const;
  };
  using Ranks = std::vector<std::shared_ptr<Rank>>;  // [local stages * ranks], those of a stage together

  LocalExecutor(Ranks ranks, SchedulerOptions scheduler_options, std::vector<DeviceMemory> devices,
                const LocalExecutorOptions& options);
  static StatusOr<Ranks> Connect(const ModelConfig& config, const LocalExecutorOptions& options);  // without workers
  // Gives each rank its worker.
  static Status MakeWorkers(const Ranks& ranks, const Checkpoint& checkpoint, const LocalExecutorOptions& options,
                            const std::vector<Shard>& shards, std::vector<LlamaWeights> weights);
  static Status WarmUp(const Ranks& ranks, StartWatch* watch, const LocalExecutorOptions& options,
                       const std::vector<KvCache::Shape>& shapes);
  static Status AllocateCaches(const Ranks& ranks, const std::vector<KvCache::Shape>& shapes);
  // The work of each rank, all at once: they meet in it. The first error ends the group. what: for the watch.
  static Status OnAllRanks(const Ranks& ranks, StartWatch* watch, std::string what,
                           const std::function<Status(size_t index, RankWorker& worker)>& work);
  static std::vector<DeviceMemory> FindDevices(const Ranks& ranks, const LocalExecutorOptions& options);
  static Status CaptureGraphs(const Ranks& ranks, StartWatch* watch, const LocalExecutorOptions& options);
  static void Loop(std::shared_ptr<Shared> shared, Ranks ranks, size_t index,
                   std::function<void(int, uint64_t)> before_step);
  class Standstill;
  uint64_t Progress() const;  // of all ranks
  Status failure() const;
  void Fail(const Status& status) { Fail(*shared_, ranks_, status); }
  static void Fail(Shared& shared, const Ranks& ranks, const Status& status);

  const Device device_;
  const std::chrono::milliseconds patience_;
  const std::function<void(const StepTimes&)> on_step_times_;
  const SchedulerOptions scheduler_options_;
  const std::vector<DeviceMemory> devices_;
  const Ranks ranks_;
  const std::shared_ptr<Shared> shared_;
  bool stalled_ = false;  // of the thread that calls Wait
  std::atomic<ExecutorObserver*> observer_{nullptr};
  std::vector<std::thread> threads_;
};

}  // namespace altiplano
