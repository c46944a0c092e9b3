#include "server/engine/local_executor.h"

#include <algorithm>
#include <utility>

#include "server/base/strings.h"

namespace altiplano {

namespace {

constexpr int64_t kMaxLogitRows = 256;

// Pages for the KV cache: as asked, or as much as could be used within half of the free memory.
StatusOr<int32_t> ChoosePages(const LocalExecutorOptions& options, const KvCache::Shape& shape, int32_t max_context) {
  const uint64_t page_bytes = shape.page_bytes();
  const int64_t pages_for_one = (max_context + options.page_size - 1) / options.page_size;
  const uint64_t free_bytes = QueryMemory(Device::kCpu).free_bytes;
  uint64_t bytes = options.kv_bytes;
  if (bytes == 0) {
    uint64_t useful = page_bytes * static_cast<uint64_t>(pages_for_one) * static_cast<uint64_t>(options.max_running);
    bytes = std::min(free_bytes / 2, useful);
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

}  // namespace

StatusOr<std::unique_ptr<LocalExecutor>> LocalExecutor::Create(const Checkpoint& checkpoint,
                                                               LocalExecutorOptions options) {
  const ModelConfig& config = checkpoint.config();
  int32_t max_context = static_cast<int32_t>(std::min<int64_t>(config.max_position, INT32_MAX / 2));
  if (options.max_context > max_context) {
    return Status(Code::kInvalidArgument, StrCat("max_context is ", options.max_context, ", the model was made for ",
                                                 max_context, " positions"));
  }
  if (options.max_context > 0) max_context = options.max_context;

  LoadOptions load;
  ASSIGN_OR_RETURN(load.shard, Shard::Make(config, 0, 1));
  load.dtype = options.dtype;
  load.readers = options.readers;
  load.progress = options.progress;
  load.cancelled = options.cancelled;
  ASSIGN_OR_RETURN(LlamaWeights weights, LoadWeights(checkpoint, load));

  Llama::Limits limits;
  limits.max_tokens = options.token_budget;
  limits.max_logit_rows = std::min<int64_t>(kMaxLogitRows, options.token_budget);
  std::unique_ptr<Llama> llama = Llama::Create(config, load.shard, std::move(weights), limits, nullptr);
  if (llama == nullptr) {
    return Status(Code::kResourceExhausted,
                  StrCat("no memory for the activations of ", options.token_budget, " tokens in one step"));
  }

  KvCache::Shape shape;
  shape.layers = config.layers;
  shape.kv_heads = load.shard.kv_heads(config);
  shape.page_size = options.page_size;
  shape.head_dim = config.head_dim;
  shape.dtype = options.dtype;
  ASSIGN_OR_RETURN(int32_t pages, ChoosePages(options, shape, max_context));
  shape.pages = pages;
  std::optional<KvCache> cache = KvCache::Create(shape, Device::kCpu);
  if (!cache) {
    return Status(Code::kResourceExhausted, StrCat("no memory for the KV cache: ",
                                                   HumanBytes(shape.page_bytes() * static_cast<uint64_t>(pages))));
  }

  SchedulerOptions scheduler;
  scheduler.num_blocks = pages;
  scheduler.block_size = options.page_size;
  scheduler.max_running = options.max_running;
  scheduler.token_budget = options.token_budget;
  scheduler.max_context = max_context;
  scheduler.eos_ids = checkpoint.generation_defaults().eos_ids;

  auto worker = std::make_unique<RankWorker>(Stream::Cpu(options.threads), std::move(llama), std::move(*cache),
                                             RankWorker::Limits{options.max_running, max_context}, scheduler.eos_ids);
  RETURN_IF_ERROR(worker->WarmUp());
  return std::unique_ptr<LocalExecutor>(new LocalExecutor(std::move(worker), std::move(scheduler)));
}

LocalExecutor::LocalExecutor(std::unique_ptr<RankWorker> worker, SchedulerOptions scheduler_options)
    : scheduler_options_(std::move(scheduler_options)), worker_(std::move(worker)), thread_([this] { Loop(); }) {}

LocalExecutor::~LocalExecutor() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

void LocalExecutor::Launch(std::shared_ptr<const StepPlan> plan) {
  {
    std::lock_guard lock(mutex_);
    plans_.push_back(std::move(plan));
  }
  changed_.notify_all();
}

StepResult LocalExecutor::Wait() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return !results_.empty(); });
  StepResult result = std::move(results_.front());
  results_.pop_front();
  return result;
}

void LocalExecutor::Loop() {
  for (;;) {
    std::shared_ptr<const StepPlan> plan;
    {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [&] { return stop_ || !plans_.empty(); });
      if (stop_) return;
      plan = std::move(plans_.front());
      plans_.pop_front();
    }
    StepResult result = worker_->Execute(*plan);
    {
      std::lock_guard lock(mutex_);
      results_.push_back(std::move(result));
    }
    changed_.notify_all();
  }
}

}  // namespace altiplano
