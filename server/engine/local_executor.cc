#include "server/engine/local_executor.h"

#include <algorithm>
#include <exception>
#include <tuple>
#include <utility>

#include "server/base/log.h"
#include "server/base/strings.h"

namespace altiplano {

namespace {

constexpr auto kJoinPatience = std::chrono::seconds(5);

// Of all ranks, those of a stage together.
StatusOr<std::vector<Shard>> MakeShards(const ModelConfig& config, const LocalExecutorOptions& options) {
  std::vector<Shard> shards;
  for (int stage = 0; stage < options.stages; ++stage) {
    for (int rank = 0; rank < options.ranks; ++rank) {
      ASSIGN_OR_RETURN(const Shard shard, Shard::Make(config, rank, options.ranks, stage, options.stages));
      shards.push_back(shard);
    }
  }
  return shards;
}

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
  ASSIGN_OR_RETURN(const std::vector<Shard> shards, MakeShards(checkpoint.config(), options));
  return LoadAllRanks(checkpoint, load, shards);
}

// Of what decides which tokens are computed and where they go.
uint64_t HashOf(const StepPlan& plan) {
  uint64_t hash = plan.step;
  const auto add = [&](int64_t number) { hash = (hash ^ static_cast<uint64_t>(number)) * 0x9E3779B97F4A7C15 + 1; };
  for (const PlannedSequence& sequence : plan.sequences) {
    add(sequence.slot);
    add(sequence.token_begin);
    add(sequence.num_tokens);
    add(sequence.sample);
  }
  for (TokenId token : plan.tokens) add(token);
  for (int32_t block : plan.block_ids) add(block);
  return hash;
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

  ASSIGN_OR_RETURN(const std::vector<Shard> shards, MakeShards(config, options));
  std::vector<LlamaWeights> weights;
  if (options.weights != nullptr) {
    for (const auto& rank : *options.weights) weights.push_back(Share(rank));
  } else {
    ASSIGN_OR_RETURN(weights, Load(checkpoint, options));
  }

  KvCache::Shape shape;
  shape.layers = config.layers;  // of all stages together
  shape.kv_heads = shards.front().kv_heads(config);
  shape.page_size = options.page_size;
  shape.head_dim = config.head_dim;
  shape.dtype = options.dtype;

  // Activations before KV: the pool takes a part of what is left.
  Llama::Limits limits;
  limits.max_tokens = options.token_budget;
  limits.max_logit_rows = std::min<int64_t>(limits.max_logit_rows, options.token_budget);
  Ranks ranks = Connect(options);
  std::vector<std::unique_ptr<Llama>> models;
  for (size_t i = 0; i < ranks.size(); ++i) {
    models.push_back(Llama::Create(config, shards[i], std::move(weights[i]), limits, ranks[i]->communicator.get()));
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
  for (size_t i = 0; i < ranks.size(); ++i) {
    Rank& rank = *ranks[i];
    KvCache::Shape of_stage = shape;
    of_stage.layers = shards[i].layers(config);
    std::optional<KvCache> cache = KvCache::Create(of_stage, Device::kCpu);
    if (cache) {
      rank.worker =
          RankWorker::Create(Stream::Cpu(std::max(1, threads / static_cast<int>(ranks.size()))), std::move(models[i]),
                             std::move(*cache), RankWorker::Limits{options.max_running, max_context}, scheduler.eos_ids,
                             {rank.communicator.get(), rank.previous.get(), rank.next.get()});
    }
    if (rank.worker == nullptr) {
      return Status(Code::kResourceExhausted, StrCat("no memory for the KV cache and the logits: ",
                                                     HumanBytes(shape.page_bytes() * static_cast<uint64_t>(pages) *
                                                                static_cast<uint64_t>(options.ranks))));
    }
  }
  RETURN_IF_ERROR(WarmUp(ranks));
  return std::unique_ptr<LocalExecutor>(
      new LocalExecutor(std::move(ranks), std::move(scheduler), std::move(options.before_step)));
}

LocalExecutor::Ranks LocalExecutor::Connect(const LocalExecutorOptions& options) {
  Ranks ranks;
  for (int stage = 0; stage < options.stages; ++stage) {
    std::vector<std::unique_ptr<Communicator>> group(static_cast<size_t>(options.ranks));
    if (options.ranks > 1) group = MakeInProcessGroup(options.ranks, options.patience);
    for (auto& communicator : group) {
      if (communicator != nullptr && options.check_ranks) communicator = MakeChecked(std::move(communicator));
      ranks.push_back(std::make_shared<Rank>());
      ranks.back()->communicator = std::move(communicator);
    }
  }
  if (options.stages == 1) return ranks;
  const auto stage_size = static_cast<size_t>(options.ranks);
  for (size_t i = 0; i < ranks.size(); ++i) {
    const size_t next = (i + stage_size) % ranks.size();
    std::tie(ranks[i]->next, ranks[next]->previous) =
        MakeInProcessLink(StrCat("rank ", i), StrCat("rank ", next), options.patience);
  }
  return ranks;
}

void LocalExecutor::Rank::Abort(std::string_view reason) const {
  if (communicator != nullptr) communicator->Abort(reason);
  if (previous != nullptr) previous->Abort(reason);
  if (next != nullptr) next->Abort(reason);
}

// On all ranks at once: they meet in it.
Status LocalExecutor::WarmUp(const Ranks& ranks) {
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

LocalExecutor::LocalExecutor(Ranks ranks, SchedulerOptions scheduler_options,
                             std::function<void(int, uint64_t)> before_step)
    : scheduler_options_(std::move(scheduler_options)), ranks_(std::move(ranks)), shared_(std::make_shared<Shared>()) {
  shared_->plans.resize(ranks_.size());
  shared_->running = this->ranks();
  for (int i = 0; i < this->ranks(); ++i) {
    threads_.emplace_back(Loop, shared_, ranks_, i, before_step);
  }
}

LocalExecutor::~LocalExecutor() {
  bool ended;
  {
    std::unique_lock lock(shared_->mutex);
    shared_->stop = true;
    shared_->changed.notify_all();
    for (const auto& rank : ranks_) rank->Abort("the executor ends");
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
  uint64_t bytes = 0;
  for (const auto& rank : ranks_) {
    const KvCache::Shape& shape = rank->worker->cache().shape();
    bytes += shape.page_bytes() * static_cast<uint64_t>(shape.pages);
  }
  return bytes;
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
  // The rank that samples may have ended the step before another one failed in it: the next one cannot run then.
  if (!shared_->failure.ok()) result.status = shared_->failure;
  return result;
}

void LocalExecutor::Loop(std::shared_ptr<Shared> shared, Ranks ranks, int index,
                         std::function<void(int, uint64_t)> before_step) {
  RankWorker& worker = *ranks[static_cast<size_t>(index)]->worker;
  auto execute = [&](const StepPlan& plan) {
    try {
      if (before_step) before_step(index, plan.step);
      // Ranks that differ end the group, and so the step.
      Communicator* group = ranks[static_cast<size_t>(index)]->communicator.get();
      if (group != nullptr) group->CheckSame(StrCat("the plan of step ", plan.step), HashOf(plan));
      return worker.Execute(plan);
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
    if (!result.status.ok()) {
      for (const auto& rank : ranks) rank->Abort(result.status.message());
    }
    if (worker.samples()) shared->results.push_back(std::move(result));
    shared->changed.notify_all();
  }
  --shared->running;
  shared->changed.notify_all();
}

}  // namespace altiplano
