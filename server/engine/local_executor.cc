#include "server/engine/local_executor.h"

#include <algorithm>
#include <exception>
#include <utility>

#include "server/base/log.h"
#include "server/base/strings.h"

namespace altiplano {

namespace {

constexpr auto kJoinPatience = std::chrono::seconds(5);

// Pages for the KV cache of each rank: as asked, or as much as could be used within half of the free memory.
StatusOr<int32_t> ChoosePages(const LocalExecutorOptions& options, const KvCache::Shape& shape, int32_t max_context) {
  const uint64_t page_bytes = shape.page_bytes() * static_cast<uint64_t>(options.ranks);
  const int64_t pages_for_one = (max_context + options.page_size - 1) / options.page_size;
  const uint64_t free_bytes = QueryMemory(Device::kCpu).free_bytes;
  uint64_t bytes = options.kv_bytes;
  if (bytes == 0) {
    uint64_t useful = page_bytes * static_cast<uint64_t>(pages_for_one) * static_cast<uint64_t>(options.max_running);
    bytes = std::min(free_bytes / 2 / static_cast<uint64_t>(options.executors), useful);
  } else if (bytes > free_bytes) {
    return Status(Code::kResourceExhausted, StrCat("the KV cache was given ", HumanBytes(bytes), ", but only ",
                                                   HumanBytes(free_bytes), " of memory are free"));
  }
  uint64_t pages = std::min<uint64_t>(bytes / page_bytes, INT32_MAX / static_cast<uint64_t>(options.page_size));
  if (pages < 2) {
    return Status(Code::kResourceExhausted,
                  StrCat("the KV cache of ", HumanBytes(bytes), " holds ", pages, " blocks of ", options.page_size,
                         " tokens (", HumanBytes(page_bytes), " each); at least 2 are needed"));
  }
  return static_cast<int32_t>(pages);
}

StatusOr<std::vector<LlamaWeights>> Load(const Checkpoint& checkpoint, const LocalExecutorOptions& options) {
  LoadOptions load;
  load.dtype = options.dtype;
  load.readers = options.readers;
  load.progress = options.progress;
  load.cancelled = options.cancelled;
  return LoadAllRanks(checkpoint, load, options.ranks);
}

}  // namespace

StatusOr<std::shared_ptr<const RankWeights>> LocalExecutor::LoadShared(const Checkpoint& checkpoint,
                                                                       const LocalExecutorOptions& options) {
  ASSIGN_OR_RETURN(std::vector<LlamaWeights> loaded, Load(checkpoint, options));
  auto weights = std::make_shared<RankWeights>();
  for (LlamaWeights& rank : loaded) weights->push_back(std::make_shared<const LlamaWeights>(std::move(rank)));
  return std::shared_ptr<const RankWeights>(std::move(weights));
}

StatusOr<std::unique_ptr<LocalExecutor>> LocalExecutor::Create(const Checkpoint& checkpoint,
                                                               LocalExecutorOptions options) {
  const ModelConfig& config = checkpoint.config();
  int32_t max_context = static_cast<int32_t>(std::min<int64_t>(config.max_position, INT32_MAX / 2));
  if (options.max_context > max_context) {
    return Status(Code::kInvalidArgument, StrCat("max_context is ", options.max_context, ", the model was made for ",
                                                 max_context, " positions"));
  }
  if (options.max_context > 0) max_context = options.max_context;

  std::vector<LlamaWeights> weights;
  if (options.weights != nullptr) {
    for (const auto& rank : *options.weights) weights.push_back(Share(rank));
  } else {
    ASSIGN_OR_RETURN(weights, Load(checkpoint, options));
  }

  KvCache::Shape shape;
  shape.layers = config.layers;
  ASSIGN_OR_RETURN(const Shard first, Shard::Make(config, 0, options.ranks));
  shape.kv_heads = first.kv_heads(config);
  shape.page_size = options.page_size;
  shape.head_dim = config.head_dim;
  shape.dtype = options.dtype;

  // Activations before KV: the pool takes a part of what is left.
  Llama::Limits limits;
  limits.max_tokens = options.token_budget;
  limits.max_logit_rows = std::min<int64_t>(limits.max_logit_rows, options.token_budget);
  std::vector<std::unique_ptr<Communicator>> group(1);
  if (options.ranks > 1) group = MakeInProcessGroup(options.ranks, options.patience);
  std::vector<std::unique_ptr<Llama>> models;
  for (int rank = 0; rank < options.ranks; ++rank) {
    const auto at = static_cast<size_t>(rank);
    ASSIGN_OR_RETURN(const Shard shard, Shard::Make(config, rank, options.ranks));
    models.push_back(Llama::Create(config, shard, std::move(weights[at]), limits, group[at].get()));
    if (models.back() == nullptr) {
      return Status(Code::kResourceExhausted,
                    StrCat("no memory for the activations of ", options.token_budget, " tokens in one step"));
    }
  }
  ASSIGN_OR_RETURN(int32_t pages, ChoosePages(options, shape, max_context));
  shape.pages = pages;

  SchedulerOptions scheduler;
  scheduler.num_blocks = pages;
  scheduler.block_size = options.page_size;
  scheduler.max_running = options.max_running;
  scheduler.token_budget = options.token_budget;
  scheduler.max_context = max_context;
  scheduler.eos_ids = checkpoint.generation_defaults().eos_ids;

  const int threads = options.threads > 0 ? options.threads : UsableCores();
  std::vector<std::shared_ptr<Rank>> ranks;
  for (int rank = 0; rank < options.ranks; ++rank) {
    const auto at = static_cast<size_t>(rank);
    std::optional<KvCache> cache = KvCache::Create(shape, Device::kCpu);
    std::unique_ptr<RankWorker> worker;
    if (cache) {
      worker = RankWorker::Create(Stream::Cpu(std::max(1, threads / options.ranks)), std::move(models[at]),
                                  std::move(*cache), RankWorker::Limits{options.max_running, max_context},
                                  scheduler.eos_ids, group[at].get());
    }
    if (worker == nullptr) {
      return Status(Code::kResourceExhausted, StrCat("no memory for the KV cache and the logits: ",
                                                     HumanBytes(shape.page_bytes() * static_cast<uint64_t>(pages) *
                                                                static_cast<uint64_t>(options.ranks))));
    }
    ranks.push_back(std::make_shared<Rank>(Rank{std::move(group[at]), std::move(worker)}));
  }
  RETURN_IF_ERROR(WarmUp(ranks));
  return std::unique_ptr<LocalExecutor>(
      new LocalExecutor(std::move(ranks), std::move(scheduler), std::move(options.before_step)));
}

// On all ranks at once: they meet in it.
Status LocalExecutor::WarmUp(const std::vector<std::shared_ptr<Rank>>& ranks) {
  std::vector<Status> statuses(ranks.size());
  std::vector<std::thread> threads;
  for (size_t i = 1; i < ranks.size(); ++i) {
    threads.emplace_back([&, i] { statuses[i] = ranks[i]->worker->WarmUp(); });
  }
  statuses[0] = ranks[0]->worker->WarmUp();
  for (std::thread& thread : threads) thread.join();
  for (const Status& status : statuses) RETURN_IF_ERROR(status);
  return OkStatus();
}

LocalExecutor::LocalExecutor(std::vector<std::shared_ptr<Rank>> ranks, SchedulerOptions scheduler_options,
                             std::function<void(int, uint64_t)> before_step)
    : scheduler_options_(std::move(scheduler_options)), ranks_(std::move(ranks)), shared_(std::make_shared<Shared>()) {
  shared_->plans.resize(ranks_.size());
  shared_->running = this->ranks();
  for (int i = 0; i < this->ranks(); ++i) {
    threads_.emplace_back(Loop, shared_, ranks_[static_cast<size_t>(i)], i, before_step);
  }
}

LocalExecutor::~LocalExecutor() {
  bool ended;
  {
    std::unique_lock lock(shared_->mutex);
    shared_->stop = true;
    shared_->changed.notify_all();
    for (const auto& rank : ranks_) {
      if (rank->communicator != nullptr) rank->communicator->Abort("the executor ends");
    }
    const auto all_ended = [&] { return shared_->running == 0; };
    if (ranks() == 1) shared_->changed.wait(lock, all_ended);  // a step, however long, ends
    ended = shared_->changed.wait_for(lock, kJoinPatience, all_ended);
  }
  if (!ended) log::Error("a rank hangs: its thread and its memory are left behind");
  for (std::thread& thread : threads_) ended ? thread.join() : thread.detach();
}

std::string LocalExecutor::DescribeDevice() const {
  const std::string device = Describe(ranks_[0]->worker->stream());
  return ranks() == 1 ? device : StrCat(ranks(), " ranks, each ", device);
}

uint64_t LocalExecutor::weight_bytes() const {
  uint64_t bytes = 0;
  for (const auto& rank : ranks_) bytes += rank->worker->llama().weight_bytes();
  return bytes;
}

uint64_t LocalExecutor::kv_bytes() const {
  const KvCache::Shape& shape = ranks_[0]->worker->cache().shape();
  return shape.page_bytes() * static_cast<uint64_t>(shape.pages) * static_cast<uint64_t>(ranks());
}

void LocalExecutor::Launch(std::shared_ptr<const StepPlan> plan) {
  {
    std::lock_guard lock(shared_->mutex);
    for (auto& plans : shared_->plans) plans.push_back(plan);
  }
  shared_->changed.notify_all();
}

StepResult LocalExecutor::Wait() {
  std::unique_lock lock(shared_->mutex);
  shared_->changed.wait(lock, [&] { return !shared_->results.empty() || !shared_->failure.ok(); });
  StepResult result;
  if (!shared_->results.empty()) {
    result = std::move(shared_->results.front());
    shared_->results.pop_front();
  }
  // Rank 0 may have ended the step before another rank failed in it: the next one cannot run then.
  if (!shared_->failure.ok()) result.status = shared_->failure;
  return result;
}

void LocalExecutor::Loop(std::shared_ptr<Shared> shared, std::shared_ptr<Rank> rank, int index,
                         std::function<void(int, uint64_t)> before_step) {
  auto execute = [&](const StepPlan& plan) {
    try {
      if (before_step) before_step(index, plan.step);
      return rank->worker->Execute(plan);
    } catch (const std::exception& error) {  // nothing of ours throws but an allocation
      StepResult result;
      result.step = plan.step;
      result.status = Status(Code::kInternal, StrCat("rank ", index, ": ", error.what()));
      return result;
    }
  };
  std::unique_lock lock(shared->mutex);
  auto& plans = shared->plans[static_cast<size_t>(index)];
  for (;;) {
    shared->changed.wait(lock, [&] { return shared->stop || !plans.empty(); });
    if (shared->stop) break;
    const std::shared_ptr<const StepPlan> plan = std::move(plans.front());
    plans.pop_front();
    lock.unlock();
    StepResult result = execute(*plan);
    lock.lock();
    if (!result.status.ok() && shared->failure.ok()) shared->failure = result.status;
    if (!result.status.ok() && rank->communicator != nullptr) rank->communicator->Abort(result.status.message());
    if (index == 0) shared->results.push_back(std::move(result));
    shared->changed.notify_all();
  }
  --shared->running;
  shared->changed.notify_all();
}

}  // namespace altiplano
