#include "server/engine/local_executor.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <map>
#include <optional>
#include <set>
#include <tuple>
#include <utility>

#include "kernels/comm/nccl_link.h"
#include "kernels/cpu/thread_team.h"
#include "kernels/cuda/cublaslt.h"
#include "kernels/cuda/overlap.h"
#include "server/base/log.h"
#include "server/base/strings.h"

namespace altiplano {

namespace {

using SteadyTime = std::chrono::steady_clock::time_point;

constexpr auto kJoinPatience = std::chrono::seconds(5);
constexpr auto kLook = std::chrono::milliseconds(50);  // how often a waiting executor looks whether ranks get on

int LocalStages(const LocalExecutorOptions& options) {
  return options.local_stages > 0 ? options.local_stages : options.stages;
}

// Of all ranks, those of a stage together.
StatusOr<std::vector<Shard>> MakeShards(const ModelConfig& config, const LocalExecutorOptions& options) {
  std::vector<Shard> shards;
  for (int i = 0; i < LocalStages(options); ++i) {
    const int stage = options.first_stage + i;
    for (int rank = 0; rank < options.ranks; ++rank) {
      ASSIGN_OR_RETURN(const Shard shard, Shard::Make(config, rank, options.ranks, stage, options.stages));
      shards.push_back(shard);
    }
  }
  return shards;
}

constexpr auto kPoll = std::chrono::microseconds(20);  // for a GPU, or for a rank that failed meanwhile
// Of a GPU's memory, left free for what its driver may still take: 1.2 GiB of 80.
constexpr uint64_t kReservedPart = 64;

int GpuOf(const LocalExecutorOptions& options, size_t rank) {
  return options.gpus.empty() ? static_cast<int>(rank) : options.gpus.at(rank);
}

// Where a rank's memory is: on the CPU all ranks' is "GPU 0"'s.
int PlaceOf(const LocalExecutorOptions& options, size_t rank) {
  return options.device == Device::kCpu ? 0 : GpuOf(options, rank);
}

Llama::Limits ModelLimits(const LocalExecutorOptions& options) {
  Llama::Limits limits;
  limits.max_tokens = options.token_budget;
  limits.batch_invariant = options.batch_invariant;
  limits.max_logit_rows = std::min<int64_t>(limits.max_logit_rows, options.token_budget);
  if (options.device == Device::kCuda) limits.max_context = options.max_context;
  return limits;
}

// What is certainly needed, against what is free: known before hundreds of gigabytes are read.
Status CheckRoomForModel(const ModelConfig& config, const LocalExecutorOptions& options,
                         const std::vector<Shard>& shards) {
  struct Need {
    uint64_t weights = 0, activations = 0;
  };
  std::map<int, Need> needs;
  for (size_t rank = 0; rank < shards.size(); ++rank) {
    Need& need = needs[PlaceOf(options, rank)];
    need.weights += RankWeightBytes(config, shards[rank], options.dtype);
    need.activations += Llama::WorkspaceBytes(config, shards[rank], ModelLimits(options), options.dtype);
  }
  const bool on_gpus = options.device == Device::kCuda;
  for (const auto& [gpu, need] : needs) {
    const MemoryInfo memory = QueryMemory(options.device, gpu);
    const uint64_t bytes = need.weights + need.activations;
    if (memory.total_bytes == 0 || bytes <= memory.free_bytes) continue;  // 0: whoever allocates will learn why
    std::string advice = options.dtype == DType::kF32 ? "; --dtype bf16 takes half" : "";
    if (on_gpus && bytes <= memory.total_bytes) {
      advice += StrCat("; end what else uses GPU ", gpu, ", which nvidia-smi lists, or name another with --devices");
    } else if (on_gpus) {
      advice += "; split it with a larger --tensor-parallel or --pipeline-parallel: altiplano plan says what fits";
    }
    return Status(
        Code::kResourceExhausted,
        StrCat("the model does not fit: ", HumanBytes(need.weights), " of weights and ", HumanBytes(need.activations),
               " of activations (--max-num-batched-tokens ", options.token_budget, ") are for ",
               on_gpus ? StrCat("GPU ", gpu) : "this machine", ", which has ", HumanBytes(memory.free_bytes),
               " free of ", HumanBytes(memory.total_bytes), advice));
  }
  return OkStatus();
}

// As asked, or the model's own.
StatusOr<int32_t> ChooseContext(const ModelConfig& config, int32_t asked) {
  const auto most = static_cast<int32_t>(std::min<int64_t>(config.max_position, INT32_MAX / 2));
  if (asked <= most) return asked > 0 ? asked : most;
  return Status(Code::kOutOfRange, StrCat("max_context is ", asked, ", the model was made for ", most, " positions"));
}

// Of each rank's cache, but for its pages.
std::vector<KvCache::Shape> CacheShapes(const ModelConfig& config, const LocalExecutorOptions& options,
                                        const std::vector<Shard>& shards) {
  KvCache::Shape shape;
  shape.kv_heads = shards.front().kv_heads(config);
  shape.page_size = options.page_size;
  shape.head_dim = config.head_dim;
  shape.dtype = options.dtype;
  std::vector<KvCache::Shape> shapes(shards.size(), shape);
  for (size_t i = 0; i < shards.size(); ++i) shapes[i].layers = shards[i].layers(config);
  return shapes;
}

// How many pages there may be, of each rank's KV cache, and words for what decides it.
struct Room {
  uint64_t most = 0;        // that may be asked for
  uint64_t default_ = 0;    // that are taken unless something is asked for
  uint64_t page_bytes = 0;  // of all ranks that share the memory in question
  std::string words;
};

// shapes: of each rank's cache.
Room FindRoom(const LocalExecutorOptions& options, const std::vector<KvCache::Shape>& shapes) {
  std::map<int, uint64_t> page_bytes;
  for (size_t rank = 0; rank < shapes.size(); ++rank) page_bytes[PlaceOf(options, rank)] += shapes[rank].page_bytes();
  if (options.device == Device::kCpu) {
    const uint64_t free_bytes = QueryMemory(Device::kCpu).free_bytes, bytes = page_bytes[0];
    return {free_bytes / bytes, free_bytes / 2 / bytes, bytes,
            StrCat("this machine has ", HumanBytes(free_bytes), " of memory free")};
  }
  Room room;
  room.most = UINT64_MAX;
  for (const auto& [gpu, bytes] : page_bytes) {  // the GPU with the least room for its ranks decides
    const MemoryInfo memory = QueryMemory(Device::kCuda, gpu);
    const uint64_t reserve = memory.total_bytes / kReservedPart;
    const uint64_t can_have = memory.free_bytes - std::min<uint64_t>(memory.free_bytes, reserve);
    if (can_have / bytes >= room.most) continue;
    room.most = can_have / bytes;
    room.page_bytes = bytes;
    room.words = StrCat("GPU ", gpu, " has room for ", HumanBytes(can_have), " (", HumanBytes(memory.free_bytes),
                        " of its ", HumanBytes(memory.total_bytes), " are free beside the model, and ",
                        HumanBytes(reserve), " stay free for the driver)");
  }
  room.default_ = room.most;
  return room;
}

// Pages for the KV cache of each rank: as asked, or as many as could be used within the room that there is.
StatusOr<int32_t> ChoosePages(const LocalExecutorOptions& options, const std::vector<KvCache::Shape>& shapes) {
  constexpr uint64_t kLeast = 2;
  uint64_t page_bytes = 0;  // of all ranks
  for (const KvCache::Shape& shape : shapes) page_bytes += shape.page_bytes();
  const int64_t pages_for_one = (options.max_context + options.page_size - 1) / options.page_size;
  const Room room = FindRoom(options, shapes);
  uint64_t pages = options.kv_bytes / page_bytes;
  if (options.kv_bytes == 0) {
    const uint64_t useful = static_cast<uint64_t>(pages_for_one) * static_cast<uint64_t>(options.max_running);
    pages = std::min(room.default_ / static_cast<uint64_t>(options.executors), useful);
  } else if (pages > room.most) {
    return Status(Code::kResourceExhausted, StrCat("--kv-memory is too large: ", HumanBytes(pages * room.page_bytes),
                                                   " of it would be here, but ", room.words,
                                                   "; lower it, or leave it out to take what there is room for"));
  }
  if (pages < kLeast && options.kv_bytes > 0) {
    return Status(Code::kResourceExhausted,
                  StrCat("--kv-memory is too small: its ", HumanBytes(options.kv_bytes), " for a replica hold ", pages,
                         pages == 1 ? " block of " : " blocks of ", options.page_size, " tokens, of which at least ",
                         kLeast, " are needed, ", HumanBytes(kLeast * page_bytes), "; raise it"));
  }
  if (pages < kLeast) {
    return Status(Code::kResourceExhausted,
                  StrCat("no room for a KV cache: ", kLeast, " blocks of ", options.page_size, " tokens take ",
                         HumanBytes(kLeast * room.page_bytes), ", and ", room.words,
                         "; lower --max-num-batched-tokens, or split the model among more ",
                         options.device == Device::kCuda ? "GPUs (--tensor-parallel)" : "machines (--nodes)"));
  }
  return static_cast<int32_t>(std::min<uint64_t>(pages, INT32_MAX / static_cast<uint64_t>(options.page_size)));
}

// Seconds since it was made, or asked before.
class Lap {
 public:
  double Take() {
    const SteadyTime begin = std::exchange(begin_, std::chrono::steady_clock::now());
    return std::chrono::duration<double>(begin_ - begin).count();
  }

 private:
  SteadyTime begin_ = std::chrono::steady_clock::now();
};

// CANCELLED when whoever starts this wants it no more. Asked between the parts of a start.
Status CheckWanted(const LocalExecutorOptions& options) {
  if (!options.cancelled || !options.cancelled()) return OkStatus();
  return Status(Code::kCancelled, "the start was cancelled");
}

// What nothing but the time of prompts would show.
void WarnOfMissingLibraries(const LocalExecutorOptions& options) {
  if (options.device != Device::kCuda || options.dtype != DType::kBF16 || options.batch_invariant) return;
  const std::string why = cuda::WhyNoCublasLt();
  if (why.empty()) return;
  log::Warn("prompts are computed without cuBLASLt, and may take longer",
            {{"reason", why}, {"remedy", "install libcublas of the CUDA version that altiplano version names"}});
}

void LogMemory(const DeviceMemory& held) {
  std::string ranks;
  for (const int rank : held.ranks) ranks += StrCat(ranks.empty() ? "" : ",", rank);
  log::Info("ranks have their memory",
            {{"ranks", ranks},
             {"device", held.device},
             {"weights", HumanBytes(held.weight_bytes)},
             {"activations", HumanBytes(held.activation_bytes)},
             {"kv_cache", HumanBytes(held.kv_cache_bytes)},
             {"free", StrCat(HumanBytes(held.free_bytes), " of ", HumanBytes(held.total_bytes))}});
}

// Before there are streams to ask for more.
std::vector<std::string> RankNames(const LocalExecutorOptions& options) {
  std::vector<std::string> names;
  const auto ranks = static_cast<size_t>(LocalStages(options) * options.ranks);
  for (size_t i = 0; i < ranks; ++i) {
    const std::string where = options.device == Device::kCpu ? "" : StrCat(" (GPU ", GpuOf(options, i), ")");
    names.push_back(StrCat(static_cast<size_t>(options.first_stage * options.ranks) + i, where));
  }
  return names;
}

StatusOr<std::vector<LlamaWeights>> Load(const Checkpoint& checkpoint, const LocalExecutorOptions& options,
                                         StartWatch* watch) {
  LoadOptions load;
  load.dtype = options.dtype;
  load.device = options.device;
  load.readers = options.readers;
  load.progress = options.progress;
  load.cancelled = options.cancelled;
  ASSIGN_OR_RETURN(const std::vector<Shard> shards, MakeShards(checkpoint.config(), options));
  RETURN_IF_ERROR(CheckRoomForModel(checkpoint.config(), options, shards));
  std::vector<int> gpus;
  for (size_t rank = 0; rank < shards.size(); ++rank) gpus.push_back(GpuOf(options, rank));
  struct Bytes {
    std::atomic<uint64_t> done{0}, total{0};
  };
  std::vector<Bytes> bytes(shards.size());
  load.progress_of_shard = [&](size_t rank, const LoadProgress& progress) {
    bytes[rank].total = progress.bytes_total;
    bytes[rank].done = progress.bytes_done;
  };
  watch->Begin("loading the weights", RankNames(options), [&](size_t rank) -> std::optional<uint64_t> {
    const uint64_t done = bytes[rank].done;
    if (done > 0 && done == bytes[rank].total) return std::nullopt;
    return done;
  });
  auto weights = LoadAllRanks(checkpoint, load, shards, gpus);
  watch->End();
  return weights;
}

// Of each rank: those given, or its own from the checkpoint.
StatusOr<std::vector<LlamaWeights>> LoadOrShare(const Checkpoint& checkpoint, const LocalExecutorOptions& options,
                                                StartWatch* watch) {
  if (options.weights == nullptr) return Load(checkpoint, options, watch);
  std::vector<LlamaWeights> weights;
  for (const auto& rank : *options.weights) weights.push_back(Share(rank));
  return weights;
}

// Nothing of ours throws but an allocation, and drills.
template <typename Work>
Status OrWhatItThrows(int rank, Work&& work) {
  try {
    return work();
  } catch (const std::exception& error) {
    return Status(Code::kInternal, StrCat("rank ", rank, ": ", error.what()));
  }
}

// Of what decides which tokens are computed and where they go.
uint64_t HashOf(const StepPlan& plan) {
  uint64_t hash = plan.step;
  const auto add = [&](int64_t number) { hash = (hash ^ static_cast<uint64_t>(number)) * 0x9E3779B97F4A7C15 + 1; };
  for (const PlannedSequence& sequence : plan.sequences) {
    add(sequence.slot);
    add(sequence.token_begin);
    add(sequence.num_tokens);
    add(sequence.known_blocks);
    add(sequence.sample);
  }
  for (TokenId token : plan.tokens) add(token);
  for (int32_t block : plan.block_ids) add(block);
  return hash;
}

// Of the ranks of one stage, the stage-th of this process.
StatusOr<std::vector<std::unique_ptr<Communicator>>> MakeGroup(const LocalExecutorOptions& options, int stage) {
  if (options.device == Device::kCpu) return MakeInProcessGroup(options.ranks, options.patience);
  CudaGroupOptions group;
  for (int rank = 0; rank < options.ranks; ++rank) {
    group.ordinals.push_back(GpuOf(options, static_cast<size_t>(stage * options.ranks + rank)));
  }
  group.patience = options.patience;
  group.capture_nccl = options.nccl_in_graphs;
  std::string error;
  group.nccl = LoadNccl(&error);
  if (options.adjust_group) options.adjust_group(group);
  if (group.nccl == nullptr) log::Info("large messages go without NCCL", {{"reason", error}});
  std::vector<std::unique_ptr<Communicator>> members = MakeCudaGroup(group, &error);
  if (members.empty()) {
    return Status(Code::kUnavailable, StrCat("device cuda with ", options.ranks, " ranks: ", error));
  }
  return members;
}

// The largest tensor that a stage sends: the residual stream, or from the last stage the ids that it sampled.
size_t MostLinkBytes(const ModelConfig& config, const LocalExecutorOptions& options, bool from_last) {
  if (!from_last) return Llama::ResidualBytes(config, options.token_budget);
  return static_cast<size_t>(std::min(options.max_running, options.token_budget)) * sizeof(int32_t);
}

using LinkEnds = std::pair<std::unique_ptr<Link>, std::unique_ptr<Link>>;

// From rank `from` of this process to rank `to` of the stage after it; names count from first_rank.
StatusOr<LinkEnds> MakeLink(const ModelConfig& config, const LocalExecutorOptions& options, size_t first_rank,
                            size_t from, size_t to) {
  CudaLinkOptions link;
  link.sender = StrCat("rank ", first_rank + from);
  link.receiver = StrCat("rank ", first_rank + to);
  link.patience = options.patience;
  if (options.device == Device::kCpu) return MakeInProcessLink(link.sender, link.receiver, link.patience);
  link.from = GpuOf(options, from);
  link.to = GpuOf(options, to);
  link.most_bytes = MostLinkBytes(config, options, to < from);
  std::string error;
  LinkEnds ends = MakeCudaLink(link, &error);
  if (ends.first == nullptr) return Status(Code::kUnavailable, StrCat("device cuda with several stages: ", error));
  return ends;
}

struct OuterLinks {
  std::vector<std::shared_ptr<Link>> previous, next;  // [ranks]
};

// Between the GPUs of this node and those of the nodes around it, which the given links introduce.
StatusOr<OuterLinks> LinkNodes(const ModelConfig& config, const LocalExecutorOptions& options) {
  std::string error;
  const NcclApi* nccl = LoadNccl(&error);
  if (nccl == nullptr) return Status(Code::kUnavailable, StrCat("device cuda on several nodes needs NCCL: ", error));
  const int nodes = options.stages / options.local_stages, node = options.first_stage / options.local_stages;
  const auto ranks = static_cast<size_t>(options.ranks);
  std::vector<NcclLinkEnd> ends;
  for (size_t rank = 0; rank < ranks; ++rank) {
    ends.push_back({.wire = options.outer_previous[rank],
                    .sends = false,
                    .gpu = GpuOf(options, rank),
                    .most_bytes = 0,
                    .peer = StrCat("node ", (node + nodes - 1) % nodes)});
  }
  for (size_t rank = 0; rank < ranks; ++rank) {
    ends.push_back({.wire = options.outer_next[rank],
                    .sends = true,
                    .gpu = GpuOf(options, static_cast<size_t>(options.local_stages - 1) * ranks + rank),
                    .most_bytes = MostLinkBytes(config, options, node == nodes - 1),
                    .peer = StrCat("node ", (node + 1) % nodes)});
  }
  const auto links = MakeNcclLinks(*nccl, ends, options.patience, &error);
  if (links.empty()) return Status(Code::kUnavailable, StrCat("device cuda on several nodes: ", error));
  const auto half = links.begin() + options.ranks;
  return OuterLinks{{links.begin(), half}, {half, links.end()}};
}

}  // namespace

StatusOr<std::shared_ptr<const RankWeights>> LocalExecutor::LoadShared(const Checkpoint& checkpoint,
                                                                       const LocalExecutorOptions& options) {
  StartWatch watch(options.start_patience, options.on_start_hang, options.on_start_phase);
  ASSIGN_OR_RETURN(std::vector<LlamaWeights> loaded, Load(checkpoint, options, &watch));
  auto weights = std::make_shared<RankWeights>();
  for (LlamaWeights& rank : loaded) weights->push_back(std::make_shared<const LlamaWeights>(std::move(rank)));
  return std::shared_ptr<const RankWeights>(std::move(weights));
}

StatusOr<std::unique_ptr<LocalExecutor>> LocalExecutor::Create(const Checkpoint& checkpoint,
                                                               LocalExecutorOptions options) {
  const ModelConfig& config = checkpoint.config();
  ASSIGN_OR_RETURN(options.max_context, ChooseContext(config, options.max_context));
  cuda::OverlapKernels(options.overlap_kernels);
  ASSIGN_OR_RETURN(const std::vector<Shard> shards, MakeShards(config, options));
  WarnOfMissingLibraries(options);
  StartWatch watch(options.start_patience, options.on_start_hang, options.on_start_phase);
  Lap lap;
  watch.Begin("connecting the ranks");
  ASSIGN_OR_RETURN(Ranks ranks, Connect(config, options));  // before weights are read for GPUs that are not there
  const double connecting = lap.Take();
  RETURN_IF_ERROR(CheckWanted(options));
  ASSIGN_OR_RETURN(std::vector<LlamaWeights> weights, LoadOrShare(checkpoint, options, &watch));
  const double loading = lap.Take();
  watch.Begin("making the ranks");
  RETURN_IF_ERROR(MakeWorkers(ranks, checkpoint, options, shards, std::move(weights)));
  watch.End();  // other nodes watch themselves
  if (options.meet) RETURN_IF_ERROR(options.meet());
  std::vector<KvCache::Shape> shapes = CacheShapes(config, options, shards);
  RETURN_IF_ERROR(WarmUp(ranks, &watch, options, shapes));
  const double warming_up = lap.Take();
  watch.Begin("allocating the KV cache");
  ASSIGN_OR_RETURN(const int32_t pages, ChoosePages(options, shapes));
  for (KvCache::Shape& shape : shapes) shape.pages = pages;
  RETURN_IF_ERROR(AllocateCaches(ranks, shapes));
  RETURN_IF_ERROR(CheckWanted(options));
  if (options.device == Device::kCuda && options.cuda_graphs) RETURN_IF_ERROR(CaptureGraphs(ranks, &watch, options));
  std::vector<DeviceMemory> devices = FindDevices(ranks, options);
  for (const DeviceMemory& held : devices) LogMemory(held);
  log::Info("the ranks are ready", {{"ranks", ranks.size()},
                                    {"kv_blocks", pages},
                                    {"kv_block_tokens", options.page_size},
                                    {"connecting_seconds", connecting},
                                    {"loading_seconds", loading},
                                    {"warm_up_seconds", warming_up},
                                    {"kv_cache_and_graphs_seconds", lap.Take()}});

  SchedulerOptions scheduler;
  scheduler.num_blocks = pages;
  scheduler.block_size = options.page_size;
  scheduler.max_running = options.max_running;
  scheduler.token_budget = options.token_budget;
  scheduler.max_context = options.max_context;
  scheduler.eos_ids = checkpoint.generation_defaults().eos_ids;
  return std::unique_ptr<LocalExecutor>(
      new LocalExecutor(std::move(ranks), std::move(scheduler), std::move(devices), options));
}

Status LocalExecutor::MakeWorkers(const Ranks& ranks, const Checkpoint& checkpoint, const LocalExecutorOptions& options,
                                  const std::vector<Shard>& shards, std::vector<LlamaWeights> weights) {
  const Llama::Limits limits = ModelLimits(options);
  RankWorker::Limits worker_limits;
  worker_limits.slots = options.max_running;
  worker_limits.max_tokens = options.token_budget;
  worker_limits.max_context = options.max_context;
  worker_limits.page_size = options.page_size;
  const int threads = options.threads > 0 ? options.threads : UsableCores();
  const int threads_each = std::max(1, threads / static_cast<int>(ranks.size()));
  for (size_t i = 0; i < ranks.size(); ++i) {
    Rank& rank = *ranks[i];
    std::string error;
    auto stream = Stream::Open(options.device, GpuOf(options, i), threads_each, &error);
    if (stream == nullptr) return Status(Code::kUnavailable, error);
    rank.name = StrCat(rank.number);  // now: a driver that hangs answers nobody
    if (options.device == Device::kCuda)
      rank.name += StrCat(" (GPU ", GpuOf(options, i), ", ", AddressOf(*stream), ")");
    auto model =
        Llama::Create(*stream, checkpoint.config(), shards[i], std::move(weights[i]), limits, rank.communicator.get());
    if (model == nullptr) {
      return Status(Code::kResourceExhausted,
                    StrCat("no memory for the activations of ", options.token_budget, " tokens in one step"));
    }
    rank.worker =
        RankWorker::Create(std::move(stream), std::move(model), worker_limits, checkpoint.generation_defaults().eos_ids,
                           {rank.communicator.get(), rank.previous.get(), rank.next.get()});
    if (rank.worker == nullptr || (options.on_step_times && !rank.worker->TimeSteps())) {
      return Status(Code::kResourceExhausted,
                    StrCat("no memory for the logits and the sampling of ", options.max_running, " sequences"));
    }
  }
  return OkStatus();
}

// No rank takes or gives back memory of a GPU, or pinned memory, from the first collective of a step until all ranks
// have ended it. To do so a driver may wait for its GPU and for all that reach its memory, so for the kernel in which a
// peer waits for this rank, which waits for the driver. Hence all that a rank ever needs is taken before a step begins,
// in the warm-up by all ranks before any enqueues, and later by none.
Status LocalExecutor::WarmUp(const Ranks& ranks, StartWatch* watch, const LocalExecutorOptions& options,
                             const std::vector<KvCache::Shape>& shapes) {
  const auto step = [&](int32_t tokens) -> Status {
    watch->Begin("allocating for the warm-up");
    for (size_t i = 0; i < ranks.size(); ++i) RETURN_IF_ERROR(ranks[i]->worker->BeginWarmUp(tokens, shapes[i]));
    RETURN_IF_ERROR(OnAllRanks(ranks, watch, "the warm-up", [&](size_t i, RankWorker& worker) {
      if (options.before_step) options.before_step(ranks[i]->number, 0);
      return worker.WarmUp();
    }));
    for (const auto& rank : ranks) rank->worker->EndWarmUp();
    return OkStatus();
  };
  RETURN_IF_ERROR(step(1));
  RETURN_IF_ERROR(CheckWanted(options));
  if (options.device != Device::kCuda) return OkStatus();
  // Whatever a GPU still takes in its largest step is taken before the pool gets what is left.
  return step(static_cast<int32_t>(
      std::min<int64_t>(options.token_budget, int64_t{options.max_context} * options.max_running)));
}

Status LocalExecutor::AllocateCaches(const Ranks& ranks, const std::vector<KvCache::Shape>& shapes) {
  for (size_t i = 0; i < ranks.size(); ++i) {
    std::optional<KvCache> cache = KvCache::Create(shapes[i], ranks[i]->worker->stream());
    if (!cache) {
      return Status(Code::kResourceExhausted,
                    StrCat("no memory for the KV cache of rank ", i, ": ",
                           HumanBytes(shapes[i].page_bytes() * static_cast<uint64_t>(shapes[i].pages)),
                           "; a smaller --kv-memory may be had"));
    }
    ranks[i]->worker->SetCache(std::move(*cache));
  }
  return OkStatus();
}

StatusOr<LocalExecutor::Ranks> LocalExecutor::Connect(const ModelConfig& config, const LocalExecutorOptions& options) {
  Ranks ranks;
  for (int stage = 0; stage < LocalStages(options); ++stage) {
    std::vector<std::unique_ptr<Communicator>> group(static_cast<size_t>(options.ranks));
    if (options.ranks > 1) {
      ASSIGN_OR_RETURN(group, MakeGroup(options, stage));
    }
    for (auto& communicator : group) {
      const int rank = options.first_stage * options.ranks + static_cast<int>(ranks.size());
      ranks.push_back(std::make_shared<Rank>());
      ranks.back()->number = rank;
      ranks.back()->checked = communicator != nullptr && options.check_ranks;
      if (ranks.back()->checked) communicator = MakeChecked(std::move(communicator));
      if (communicator != nullptr && options.wrap_communicator) {
        communicator = options.wrap_communicator(rank, std::move(communicator));
      }
      ranks.back()->communicator = std::move(communicator);
    }
  }
  if (options.stages == 1) return ranks;
  const auto stage_size = static_cast<size_t>(options.ranks);
  const bool all_here = LocalStages(options) == options.stages;
  OuterLinks outer{options.outer_previous, options.outer_next};
  if (options.device == Device::kCuda && !all_here) {
    ASSIGN_OR_RETURN(outer, LinkNodes(config, options));
  }
  const size_t first_rank = static_cast<size_t>(options.first_stage) * stage_size;
  for (size_t i = 0; i < ranks.size(); ++i) {
    const size_t next = (i + stage_size) % ranks.size();
    if (!all_here && next < stage_size) {
      ranks[i]->next = outer.next[next];
      ranks[next]->previous = outer.previous[next];
      continue;
    }
    ASSIGN_OR_RETURN(auto ends, MakeLink(config, options, first_rank, i, next));
    std::tie(ranks[i]->next, ranks[next]->previous) = std::move(ends);
  }
  for (size_t i = 0; options.wrap_link && i < ranks.size(); ++i) {
    for (auto* link : {&ranks[i]->previous, &ranks[i]->next}) {
      *link = options.wrap_link(ranks[i]->number, std::move(*link));
    }
  }
  return ranks;
}

void LocalExecutor::Rank::Abort(std::string_view reason) const {
  if (communicator != nullptr) communicator->Abort(reason);
  if (previous != nullptr) previous->Abort(reason);
  if (next != nullptr) next->Abort(reason);
}

std::string LocalExecutor::Rank::Error() const {
  std::string error = communicator == nullptr ? "" : communicator->error();
  if (worker->stream().device() == Device::kCpu) return error;
  if (error.empty() && previous != nullptr) error = previous->error();
  if (error.empty() && next != nullptr) error = next->error();
  return error;
}

Status LocalExecutor::OnAllRanks(const Ranks& ranks, StartWatch* watch, std::string what,
                                 const std::function<Status(size_t, RankWorker&)>& work) {
  std::vector<Status> statuses(ranks.size());
  std::vector<std::atomic<bool>> done(ranks.size());
  std::vector<std::string> names;
  for (const auto& rank : ranks) names.push_back(rank->name);
  watch->Begin(std::move(what), std::move(names), [&](size_t i) -> std::optional<uint64_t> {
    if (done[i]) return std::nullopt;
    return ranks[i]->worker->progress();
  });
  std::vector<std::thread> threads;
  for (size_t i = 0; i < ranks.size(); ++i) {
    threads.emplace_back([&, i] {
      RankWorker& worker = *ranks[i]->worker;
      worker.stream().UseFromThisThread();
      statuses[i] = OrWhatItThrows(ranks[i]->number, [&] { return work(i, worker); });
      if (!statuses[i].ok()) {
        ranks[i]->Abort(statuses[i].message());  // nobody waits for it
        watch->GiveUp(statuses[i]);
      }
      done[i] = true;
    });
  }
  for (std::thread& thread : threads) thread.join();
  watch->End();
  // That a group has ended is the consequence of another rank's error.
  std::stable_partition(statuses.begin(), statuses.end(),
                        [](const Status& status) { return status.code() != Code::kUnavailable; });
  for (const Status& status : statuses) RETURN_IF_ERROR(status);
  return OkStatus();
}

Status LocalExecutor::CaptureGraphs(const Ranks& ranks, StartWatch* watch, const LocalExecutorOptions& options) {
  const auto begin = std::chrono::steady_clock::now();
  const uint64_t free_before = QueryMemory(options.device, GpuOf(options, 0)).free_bytes;
  RETURN_IF_ERROR(OnAllRanks(ranks, watch, "capturing the graphs of decode steps",
                             [](size_t, RankWorker& worker) { return worker.CaptureDecodeGraphs(); }));
  size_t graphs = SIZE_MAX;
  for (const auto& rank : ranks) graphs = std::min(graphs, rank->worker->decode_graphs());
  for (const auto& rank : ranks) rank->worker->KeepDecodeGraphs(graphs);
  if (const size_t wanted = ranks[0]->worker->decode_graph_shapes(); graphs < wanted) {
    log::Warn("no memory for the graphs of all decode steps: those of larger batches are issued op by op",
              {{"graphs", graphs}, {"of", wanted}, {"remedy", "a smaller --kv-memory"}});
  }
  const uint64_t free_after = QueryMemory(options.device, GpuOf(options, 0)).free_bytes;
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
  log::Info("captured the graphs of decode steps",
            {{"graphs", graphs},
             {"seconds", took.count()},
             {"driver_memory", HumanBytes(free_before - std::min(free_before, free_after))}});
  return OkStatus();
}

std::vector<DeviceMemory> LocalExecutor::FindDevices(const Ranks& ranks, const LocalExecutorOptions& options) {
  std::map<int, DeviceMemory> places;
  for (size_t i = 0; i < ranks.size(); ++i) {
    DeviceMemory& held = places[PlaceOf(options, i)];
    RankWorker& worker = *ranks[i]->worker;
    const Llama& llama = worker.llama();
    const KvCache::Shape& shape = worker.cache().shape();
    if (held.device.empty()) {
      held.device = Describe(worker.stream());
      if (options.device == Device::kCuda) {
        held.device = StrCat("GPU ", GpuOf(options, i), ": ", held.device, ", ", AddressOf(worker.stream()));
      }
    }
    held.ranks.push_back(ranks[i]->number);
    held.weight_bytes += llama.weight_bytes();
    held.activation_bytes += Llama::WorkspaceBytes(llama.config(), llama.shard(), llama.limits(), options.dtype);
    held.kv_cache_bytes += shape.page_bytes() * static_cast<uint64_t>(shape.pages);
  }
  std::vector<DeviceMemory> devices;
  for (auto& [gpu, held] : places) {
    const MemoryInfo memory = QueryMemory(options.device, gpu);
    held.free_bytes = memory.free_bytes;
    held.total_bytes = memory.total_bytes;
    devices.push_back(std::move(held));
  }
  return devices;
}

LocalExecutor::LocalExecutor(Ranks ranks, SchedulerOptions scheduler_options, std::vector<DeviceMemory> devices,
                             const LocalExecutorOptions& options)
    : device_(options.device),
      patience_(options.patience),
      on_step_times_(options.on_step_times),
      scheduler_options_(std::move(scheduler_options)),
      devices_(std::move(devices)),
      ranks_(std::move(ranks)),
      shared_(std::make_shared<Shared>()) {
  shared_->plans.resize(ranks_.size());
  shared_->enqueued.resize(ranks_.size());
  shared_->running = this->ranks();
  for (size_t i = 0; i < ranks_.size(); ++i) {
    threads_.emplace_back(Loop, shared_, ranks_, i, options.before_step);
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
    // Nobody can tell the only rank to leave its step: it is waited for as long as it gets on.
    const bool alone = ranks() == 1 && ranks_[0]->next == nullptr;
    const auto patience = stalled_ ? 2 * kLook : std::max<std::chrono::milliseconds>(kJoinPatience, patience_);
    uint64_t progress;
    do {
      progress = Progress();
      ended = shared_->changed.wait_for(lock, alone ? patience : kJoinPatience, all_ended);
    } while (!ended && alone && Progress() != progress);
  }
  if (!ended || !replaceable()) log::Error("a rank hangs: its thread and its memory are left behind");
  if (!replaceable()) {  // to give memory of a GPU back is to wait for the GPU
    static auto& left_behind = *new std::vector<Ranks>;
    static std::mutex mutex;
    std::lock_guard lock(mutex);
    left_behind.push_back(ranks_);
  }
  for (std::thread& thread : threads_) ended ? thread.join() : thread.detach();
}

std::string LocalExecutor::DescribeDevice() const {
  std::string kinds;  // GPUs may be of several
  std::set<std::string> seen;
  for (const auto& rank : ranks_) {
    const std::string kind = Describe(rank->worker->stream());
    if (seen.insert(kind).second) kinds += StrCat(kinds.empty() ? "" : " or ", kind);
  }
  return ranks() == 1 ? kinds : StrCat(ranks(), " ranks, each ", kinds);
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
    ++shared_->launched;
  }
  shared_->changed.notify_all();
}

uint64_t LocalExecutor::Progress() const {
  uint64_t progress = 0;
  for (const auto& rank : ranks_) progress += rank->worker->progress();
  return progress;
}

// Of all ranks in a step. A slow step is none, however slow; where ranks wait for one that hangs, they end the group
// first and can say why.
class LocalExecutor::Standstill {
 public:
  explicit Standstill(const LocalExecutor& executor)
      : executor_(executor),
        limit_(executor.patience_ +
               std::max<std::chrono::milliseconds>(executor.patience_ / 4, std::chrono::seconds(1))) {
    Reset();
  }
  void Reset() { since_ = std::chrono::steady_clock::now(); }
  bool TooLong() {
    const uint64_t progress = executor_.Progress();
    if (progress != std::exchange(progress_, progress)) {
      Reset();
      if (ExecutorObserver* observer = executor_.observer_) observer->OnProgress();
    }
    return std::chrono::steady_clock::now() - since_ > limit_;
  }
  Status Of(std::string_view ranks) const {
    return Status(Code::kUnavailable, StrCat(ranks, " hangs: it has done nothing for ", limit_.count(), " ms"));
  }

 private:
  const LocalExecutor& executor_;
  const std::chrono::milliseconds limit_;
  SteadyTime since_;
  uint64_t progress_ = 0;
};

StepResult LocalExecutor::Wait() {
  StepResult result;
  Standstill standstill(*this);
  {
    std::unique_lock lock(shared_->mutex);
    const auto& enqueued = shared_->enqueued;
    const auto over = [&] {
      return !shared_->failure.ok() ||
             std::all_of(enqueued.begin(), enqueued.end(), [](int steps) { return steps > 0; });
    };
    while (!shared_->changed.wait_for(lock, kLook, over)) {
      if (shared_->launched == 0) standstill.Reset();
      if (!standstill.TooLong()) continue;
      const auto late = static_cast<size_t>(std::find(enqueued.begin(), enqueued.end(), 0) - enqueued.begin());
      lock.unlock();
      stalled_ = true;
      Fail(standstill.Of(StrCat("rank ", ranks_[late]->name)));
      lock.lock();
    }
  }
  for (size_t i = 0; i < ranks_.size(); ++i) {
    const auto& rank = ranks_[i];
    // A GPU may find out in the middle of the step that another one does not come.
    const auto look = [&] {
      const std::string error = rank->Error();
      if (!error.empty()) Fail(Status(Code::kUnavailable, StrCat("the group of ranks ended: ", error)));
    };
    for (standstill.Reset(); failure().ok() && !rank->worker->Done(); std::this_thread::sleep_for(kPoll)) {
      look();
      if (!standstill.TooLong()) continue;
      stalled_ = true;
      Fail(standstill.Of(StrCat("the GPU of rank ", rank->name)));
    }
    look();
    // A rank may have ended the step before another one failed in it: the next one cannot run then.
    if (result.status = failure(); !result.status.ok()) return result;
    StepTimes times;
    StepResult of_rank = rank->worker->Collect(&times);
    if (!of_rank.status.ok()) Fail(of_rank.status);
    if (!rank->worker->samples()) continue;
    if (on_step_times_ && of_rank.status.ok()) on_step_times_(times);
    result = std::move(of_rank);
  }
  std::lock_guard lock(shared_->mutex);
  for (int& steps : shared_->enqueued) --steps;
  --shared_->launched;
  shared_->changed.notify_all();
  result.status = shared_->failure;
  return result;
}

Status LocalExecutor::failure() const {
  std::lock_guard lock(shared_->mutex);
  return shared_->failure;
}

// What a rank says of another one names no GPU: the log says once where each is, before anybody acts on the failure.
void LocalExecutor::Fail(Shared& shared, const Ranks& ranks, const Status& status) {
  {
    std::lock_guard lock(shared.mutex);
    if (shared.failure.ok() && !shared.stop && ranks.front()->worker->stream().device() == Device::kCuda) {
      std::string names;
      for (const auto& rank : ranks) names += StrCat(names.empty() ? "" : ", ", rank->name);
      log::Error("ranks on GPUs have failed", {{"error", status.message()}, {"ranks", names}});
    }
    if (shared.failure.ok()) shared.failure = status;
    shared.changed.notify_all();
  }
  for (const auto& rank : ranks) rank->Abort(status.message());
}

void LocalExecutor::Loop(std::shared_ptr<Shared> shared, Ranks ranks, size_t index,
                         std::function<void(int, uint64_t)> before_step) {
  const Rank& rank = *ranks[index];
  RankWorker& worker = *rank.worker;
  worker.stream().UseFromThisThread();
  auto enqueue = [&](const StepPlan& plan) {
    if (before_step) before_step(rank.number, plan.step);
    // Ranks that differ end the group, and so the step.
    if (rank.checked) rank.communicator->CheckSame(StrCat("the plan of step ", plan.step), HashOf(plan));
    return worker.Enqueue(plan);
  };
  std::unique_lock lock(shared->mutex);
  auto& plans = shared->plans[index];
  for (;;) {
    // A rank has room for two steps: a process without the last stage may be asked for a third before Wait has the
    // first.
    const int& enqueued = shared->enqueued[index];
    shared->changed.wait(lock, [&] { return shared->stop || (!plans.empty() && enqueued < 2); });
    if (shared->stop) break;
    const std::shared_ptr<const StepPlan> plan = std::move(plans.front());
    plans.pop_front();
    if (!shared->failure.ok()) continue;  // its inputs are gone
    lock.unlock();
    const Status status = OrWhatItThrows(rank.number, [&] { return enqueue(*plan); });
    if (!status.ok()) Fail(*shared, ranks, status);
    lock.lock();
    if (status.ok()) ++shared->enqueued[index];
    shared->changed.notify_all();
  }
  --shared->running;
  shared->changed.notify_all();
}

}  // namespace altiplano
