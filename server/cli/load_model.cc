#include "server/cli/load_model.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstring>
#include <ctime>

#include "kernels/comm/unsummed.h"
#include "kernels/cpu/cpu_features.h"
#include "kernels/device.h"
#include "server/base/log.h"
#include "server/base/strings.h"
#include "server/bench/machine.h"
#include "server/cli/gpus.h"
#include "server/cli/nodes.h"
#include "server/cli/units.h"
#include "server/cli/write_file.h"
#include "server/engine/fault_drill.h"
#include "server/engine/local_executor.h"
#include "server/engine/start_watch.h"
#include "server/scheduler/flight_recorder.h"

namespace altiplano::cli {

namespace {

StatusOr<std::shared_ptr<const Tokenizer>> MakeTokenizer(const TextAssets& assets) {
  if (!assets.tokenizer_json.empty()) return Tokenizer::FromHuggingFace(assets.tokenizer_json);
  if (!assets.tiktoken_model.empty()) return Tokenizer::FromTiktoken(assets.tiktoken_model);
  return Tokenizer::FromGguf({.model = assets.gguf->model,
                              .pre = assets.gguf->pre,
                              .tokens = assets.gguf->tokens,
                              .merges = assets.gguf->merges,
                              .types = assets.gguf->types,
                              .bos = assets.gguf->bos,
                              .add_bos = assets.gguf->add_bos});
}

StatusOr<std::shared_ptr<const ChatFormat>> FindChatFormat(const Checkpoint& checkpoint, std::string_view name) {
  if (name == "none") return std::shared_ptr<const ChatFormat>();
  if (name != "auto") return ChatFormat::FromName(name);
  const std::string& jinja = checkpoint.text_assets().chat_template;
  if (!jinja.empty()) return ChatFormat::FromTemplate(jinja);
  log::Warn("the checkpoint has no chat template: plain text only, unless --chat-format names one",
            {{"model", checkpoint.path()}});
  return std::shared_ptr<const ChatFormat>();
}

// Its special tokens are in the tokenizer: found out here, not by each chat.
StatusOr<std::shared_ptr<const ChatFormat>> LoadChatFormat(const Checkpoint& checkpoint, std::string_view name,
                                                           const Tokenizer& tokenizer) {
  ASSIGN_OR_RETURN(std::shared_ptr<const ChatFormat> format, FindChatFormat(checkpoint, name));
  if (format == nullptr) return format;
  Conversation shortest;
  shortest.messages.push_back({.role = Role::kUser, .content = "x", .tool_calls = {}, .tool_call_id = {}});
  const Status status = format->Render(shortest, tokenizer).status();
  if (status.ok()) return format;
  if (name != "auto") return Status(Code::kOutOfRange, StrCat("--chat-format ", name, ": ", status.message()));
  return Status(Code::kFailedPrecondition,
                StrCat(checkpoint.path(), ": its chat template is that of --chat-format ", format->name(), ", but ",
                       status.message(), "; --chat-format none serves plain text"));
}

Status ChooseIsa(const std::string& name) {
  if (!CpuIsSupported()) return Status(Code::kUnavailable, "this CPU has no AVX2 with FMA, which the kernels need");
  if (name == "auto") return OkStatus();
  std::optional<Isa> isa = ParseIsa(name);
  if (isa && SetIsa(*isa)) return OkStatus();
  return Status(Code::kUnavailable, StrCat("--isa ", name, ": this machine has ", Name(DetectedIsa())));
}

// gpu: one that is to be used.
StatusOr<Device> ChooseDevice(const config::v1::Model& config, int gpu) {
  std::string error;
  if (config.device() != "cpu") {
    if (Stream::Cuda(gpu, &error) != nullptr) return Device::kCuda;
    if (config.device() == "cuda") {
      return Status(Code::kUnavailable, StrCat("--device cuda: ", error, "; use --device cpu"));
    }
    log::Info("no GPU to use: the CPU computes", {{"reason", error}});
  }
  RETURN_IF_ERROR(ChooseIsa(config.isa()));
  return Device::kCpu;
}

// Of each replica's ranks on this node, of `present` GPUs.
StatusOr<std::vector<std::vector<int>>> GpusOf(const config::v1::ServerConfig& config, int present) {
  const uint32_t ranks = config.model().tensor_parallel() * PipelineStages(config) / config.nodes().count();
  return AssignGpus(config.model().devices(), static_cast<int>(config.model().replicas()), static_cast<int>(ranks),
                    present);
}

// The ranks of one engine, on this machine alone or on all nodes.
using Ranks = cluster::Leader::Formed;

StatusOr<Ranks> MakeRanks(const Checkpoint& checkpoint, cluster::Leader* leader, const LocalExecutorOptions& options) {
  if (leader != nullptr) return leader->Form(checkpoint, options);
  ASSIGN_OR_RETURN(auto executor, LocalExecutor::Create(checkpoint, options));
  Ranks ranks{.executor = nullptr,
              .scheduler = executor->scheduler_options(),
              .device = executor->DescribeDevice(),
              .weight_bytes = executor->weight_bytes(),
              .kv_bytes = executor->kv_bytes(),
              .devices = executor->devices()};
  ranks.executor = std::move(executor);
  return ranks;
}

// A file of its own, named by time, process and replica.
std::string FlightRecordPath(const std::string& folder, int replica, std::string_view suffix) {
  const std::time_t now = std::time(nullptr);
  std::tm utc{};
  gmtime_r(&now, &utc);
  char time[32];
  std::strftime(time, sizeof time, "%Y%m%dT%H%M%SZ", &utc);
  return StrCat(folder, "/altiplano-", time, "-", getpid(), "-", replica, suffix);
}

// The log says where.
void KeepFlightRecord(const std::string& folder, int replica, const std::string& record) {
  if (record.empty()) return;
  const std::string path = FlightRecordPath(folder, replica, ".flight");
  if (Status status = WriteFile(path, record); !status.ok()) {
    log::Error("cannot write the flight record", {{"error", status.message()}});
    return;
  }
  log::Info("the flight record of the failure is kept", {{"file", path}, {"bytes", record.size()}});
}

// After a failure: as many KV blocks as the scheduler counts on.
StatusOr<std::unique_ptr<Executor>> MakeRanksAgain(const Checkpoint& checkpoint, cluster::Leader* leader,
                                                   const LocalExecutorOptions& options, int32_t num_blocks) {
  ASSIGN_OR_RETURN(Ranks ranks, MakeRanks(checkpoint, leader, options));
  if (ranks.scheduler.num_blocks < num_blocks) {
    return Status(Code::kResourceExhausted, StrCat("made again, the KV cache has ", ranks.scheduler.num_blocks,
                                                   " blocks; before it had ", num_blocks));
  }
  return std::move(ranks.executor);
}

EngineOptions EngineOptionsOf(const config::v1::ServerConfig& config, const LoadHooks& hooks, const StepCost& cost) {
  EngineOptions options;
  options.scheduler.prefix_cache = config.kv().prefix_cache();
  options.scheduler.max_itl = CheckedDuration(config.scheduler().max_itl());
  options.scheduler.step_cost = cost;
  options.scheduler.learn_step_cost = config.scheduler().learn_step_cost();
  options.scheduler.default_ttft_target = CheckedDuration(config.scheduler().default_ttft_target());
  options.scheduler.priority_ageing = CheckedDuration(config.scheduler().priority_ageing());
  options.max_queued_requests = static_cast<int32_t>(config.scheduler().max_queued_requests());
  options.max_queued_tokens = static_cast<int64_t>(config.scheduler().max_queued_tokens());
  options.health_deadline = CheckedDuration(config.scheduler().health_deadline());
  options.flight_record_bytes = CheckedBytes(config.log().flight_record_memory());
  options.on_failed_for_good = hooks.on_failed_for_good;
  return options;
}

// How many replicas from this one on use GPUs that this one does.
int ReplicasToCome(const std::vector<std::vector<int>>& gpus, int replica) {
  const auto first = gpus.begin() + replica;
  return static_cast<int>(std::count_if(first, gpus.end(), [&](const std::vector<int>& other) {
    return std::find_first_of(other.begin(), other.end(), first->begin(), first->end()) != other.end();
  }));
}

StatusOr<StepCost> StepCostOf(const config::v1::ServerConfig& config) {
  if (config.scheduler().step_cost().empty()) return StepCost{};
  auto machine = bench::FindMachine(config.scheduler().step_cost());
  if (machine.ok()) return machine->cost;
  return Status(machine.status().code(), StrCat("--step-cost: ", machine.status().message()));
}

// A record that holds hardly a step would be found out only when it is needed.
Status CheckRecordMemory(uint64_t bytes) {
  constexpr uint64_t kLeast = 64 << 10;
  if (bytes == 0 || bytes >= kLeast) return OkStatus();
  return Status(Code::kInvalidArgument,
                StrCat("--flight-record-memory is ", bytes,
                       " bytes, too little for a record; raise it to 64KiB at least, or 0 for none"));
}

// Recorders take their memory at once: the ring, and a quarter of it for a checkpoint.
Status CheckRecordFits(uint64_t bytes, int replicas) {
  const uint64_t needed = bytes + bytes / 4, free = QueryMemory(Device::kCpu).free_bytes;
  if (needed <= free / static_cast<uint64_t>(replicas)) return OkStatus();
  return Status(Code::kResourceExhausted,
                StrCat("--flight-record-memory is ", HumanBytes(bytes), ", and a quarter more is set aside, ",
                       replicas > 1 ? StrCat("for each of ", replicas, " replicas, ") : "", "but only ",
                       HumanBytes(free), " are free; lower it"));
}

// Blocks are known only when all is loaded: too late to refuse for a record that can still be read.
void WarnOfRecordMemory(uint64_t bytes, int32_t num_blocks) {
  const size_t least = FlightRecorder::LeastBytes(num_blocks);
  if (bytes == 0 || bytes >= least) return;
  log::Warn("flight records of a full KV cache cannot be replayed: raise --flight-record-memory",
            {{"is", HumanBytes(bytes)}, {"at_least", HumanBytes(least)}, {"kv_blocks", num_blocks}});
}

// What the executor says of itself.
void SetSize(const SchedulerOptions& executor, SchedulerOptions* scheduler) {
  scheduler->num_blocks = executor.num_blocks;
  scheduler->block_size = executor.block_size;
  scheduler->max_running = executor.max_running;
  scheduler->token_budget = executor.token_budget;
  scheduler->max_context = executor.max_context;
  scheduler->eos_ids = executor.eos_ids;
}

}  // namespace

StatusOr<std::vector<TenantOptions>> CheckedTenants(std::string_view text, int64_t max_num_seqs,
                                                    int64_t max_queued_requests, int64_t max_queued_tokens) {
  auto tenants = ParseTenants(text);
  if (tenants.ok()) tenants = CompleteTenants(std::move(*tenants), static_cast<int32_t>(max_num_seqs));
  if (!tenants.ok()) return Status(tenants.status().code(), StrCat("--tenants: ", tenants.status().message()));
  for (const TenantOptions& tenant : *tenants) {
    if (tenant.max_queued_requests <= max_queued_requests && tenant.max_queued_tokens <= max_queued_tokens) continue;
    return Status(Code::kInvalidArgument,
                  StrCat("--tenants: tenant ", tenant.name,
                         " may have more waiting than all together; lower its "
                         "max-queued or max-queued-tokens, or raise --max-queued-requests or --max-queued-tokens"));
  }
  return tenants;
}

Status CheckBudget(int64_t max_num_batched_tokens, int64_t block_size) {
  if (max_num_batched_tokens >= block_size) return OkStatus();
  return Status(Code::kOutOfRange,
                StrCat("--max-num-batched-tokens is ", max_num_batched_tokens, ", less than a block of ", block_size,
                       " tokens; raise it or lower --block-size"));
}

Status CheckScheduling(const config::v1::ServerConfig& config) {
  ASSIGN_OR_RETURN(const StepCost cost, StepCostOf(config));
  SchedulerOptions options = EngineOptionsOf(config, {}, cost).scheduler;
  options.num_blocks = 2;  // the fewest that a KV cache has
  options.block_size = static_cast<int32_t>(
      BlockSize(config.kv().block_size(), config.model().device() == "cuda" ? Device::kCuda : Device::kCpu));
  options.max_running = static_cast<int32_t>(config.scheduler().max_num_seqs());
  options.token_budget = static_cast<int32_t>(config.scheduler().max_num_batched_tokens());
  options.max_context = 2;
  if (config.model().max_context() == 1) {
    return Status(Code::kInvalidArgument,
                  "--max-model-len is 1, must hold a prompt token and an answer token at least, or be 0");
  }
  RETURN_IF_ERROR(CheckBudget(options.token_budget, options.block_size));
  RETURN_IF_ERROR(CheckRecordMemory(CheckedBytes(config.log().flight_record_memory())));
  ASSIGN_OR_RETURN(options.tenants,
                   CheckedTenants(config.scheduler().tenants(), options.max_running,
                                  config.scheduler().max_queued_requests(), config.scheduler().max_queued_tokens()));
  return Scheduler::Create(std::move(options)).status();
}

Status CheckDevices(const config::v1::ServerConfig& config) {
  if (config.model().check_ranks() && config.model().tensor_parallel() == 1) {
    return Status(
        Code::kInvalidArgument,
        "--check-ranks compares the ranks of a tensor-parallel group, and --tensor-parallel is 1; raise it, or "
        "leave --check-ranks out");
  }
  if (config.model().isa() != "auto" && config.model().device() == "cuda") {
    return Status(Code::kInvalidArgument,
                  "--isa names instructions of a CPU, and --device is cuda; leave --isa out, or add --device cpu");
  }
  if (config.model().devices().empty()) return OkStatus();
  if (config.model().device() == "cpu") {
    return Status(Code::kInvalidArgument,
                  "--devices names GPUs, and --device is cpu; add --device cuda, or leave --devices out");
  }
  return GpusOf(config, INT_MAX).status();
}

StatusOr<std::shared_ptr<const Tokenizer>> LoadTokenizer(const Checkpoint& checkpoint) {
  const TextAssets& assets = checkpoint.text_assets();
  if (assets.tokenizer_json.empty() && assets.tiktoken_model.empty() && !assets.gguf) {
    return Status(Code::kFailedPrecondition,
                  StrCat(checkpoint.path(), checkpoint.format() == "gguf"
                                                ? ": metadata tokenizer.ggml.model: is missing: there is no tokenizer"
                                                : ": there is neither tokenizer.json nor tokenizer.model"));
  }
  auto tokenizer = MakeTokenizer(assets);
  if (!tokenizer.ok()) {  // the text layer knows no files
    const std::string_view file = assets.gguf                     ? ""
                                  : assets.tokenizer_json.empty() ? "/tokenizer.model"
                                                                  : "/tokenizer.json";
    return Status(tokenizer.status().code(), StrCat(checkpoint.path(), file, ": ", tokenizer.status().message()));
  }
  if ((*tokenizer)->vocab_size() > checkpoint.config().vocab) {
    return Status(Code::kFailedPrecondition,
                  StrCat(checkpoint.path(), ": the tokenizer has ", (*tokenizer)->vocab_size(),
                         " tokens, more than the model's ", checkpoint.config().vocab));
  }
  return tokenizer;
}

StatusOr<TextModel> LoadText(const Checkpoint& checkpoint, std::string_view chat_format) {
  TextModel text;
  ASSIGN_OR_RETURN(text.tokenizer, LoadTokenizer(checkpoint));
  ASSIGN_OR_RETURN(text.chat_format, LoadChatFormat(checkpoint, chat_format, *text.tokenizer));
  return text;
}

std::function<void(const Status&)> EndHungStart(std::string_view command, decltype(&Fail) fail) {
  return [command = std::string(command), fail](const Status& status) {
    fail(command, status.message(), kExitRestart);
    log::Flush();
    _exit(kExitRestart);  // nothing that hangs could be destroyed
  };
}

StatusOr<LocalExecutorOptions> ExecutorOptionsOf(const config::v1::ServerConfig& config, const LoadHooks& hooks,
                                                 std::vector<std::vector<int>>* replica_gpus) {
  LocalExecutorOptions options;
  options.start_patience = CheckedMilliseconds(config.scheduler().start_timeout());
  options.on_start_hang = hooks.on_start_hang;
  options.on_start_phase = hooks.on_start_phase;
  StartWatch watch(options.start_patience, options.on_start_hang, options.on_start_phase);
  watch.Begin("looking for devices");  // which is to ask a driver
  if (config.model().device() != "cpu" && CountGpus() > 0) {
    ASSIGN_OR_RETURN(auto gpus, GpusOf(config, CountGpus()));
    options.gpus = gpus.front();
    if (replica_gpus != nullptr) *replica_gpus = std::move(gpus);
  }
  ASSIGN_OR_RETURN(const Device device, ChooseDevice(config.model(), options.gpus.empty() ? 0 : options.gpus.front()));
  options.device = device;
  options.dtype = config.model().dtype() == "f32" ? DType::kF32 : DType::kBF16;
  options.ranks = static_cast<int>(config.model().tensor_parallel());
  options.stages = static_cast<int>(PipelineStages(config));
  options.check_ranks = config.model().check_ranks();
  const auto replicas = static_cast<int>(config.model().replicas());
  const auto threads = static_cast<int>(config.threads().compute());
  options.threads = std::max(1, (threads > 0 ? threads : UsableCores()) / replicas);
  options.executors = replicas;
  options.readers = static_cast<int>(config.threads().load());
  options.page_size = static_cast<int32_t>(BlockSize(config.kv().block_size(), device));
  options.max_running = static_cast<int32_t>(config.scheduler().max_num_seqs());
  options.token_budget = static_cast<int32_t>(config.scheduler().max_num_batched_tokens());
  RETURN_IF_ERROR(CheckBudget(options.token_budget, options.page_size));
  options.max_context = static_cast<int32_t>(config.model().max_context());
  options.batch_invariant = config.model().batch_invariant();
  options.cuda_graphs = config.model().cuda_graphs() != "off";
  options.nccl_in_graphs = config.model().cuda_graphs() == "nccl";
  options.overlap_kernels = config.model().overlap_kernels();
  options.kv_bytes = CheckedBytes(config.kv().memory()) / static_cast<uint64_t>(replicas);
  options.patience = CheckedMilliseconds(config.scheduler().step_deadline());
  options.progress = hooks.progress;
  options.cancelled = hooks.cancelled;
  options.on_step_times = hooks.on_step_times;
  ASSIGN_OR_RETURN(options.before_step, FaultDrillFromEnvironment());
  if (hooks.without_all_reduces) {
    options.wrap_communicator = [](int, std::unique_ptr<Communicator> rank) { return MakeUnsummed(std::move(rank)); };
  }
  return options;
}

StatusOr<LoadedModel> LoadModel(const config::v1::ServerConfig& config, const LoadHooks& hooks) {
  std::vector<std::vector<int>> gpus;
  ASSIGN_OR_RETURN(LocalExecutorOptions executor_options, ExecutorOptionsOf(config, hooks, &gpus));
  ASSIGN_OR_RETURN(const StepCost cost, StepCostOf(config));
  ASSIGN_OR_RETURN(std::vector<TenantOptions> tenants,
                   CheckedTenants(config.scheduler().tenants(), config.scheduler().max_num_seqs(),
                                  config.scheduler().max_queued_requests(), config.scheduler().max_queued_tokens()));
  const uint64_t record_bytes = CheckedBytes(config.log().flight_record_memory());
  RETURN_IF_ERROR(CheckRecordFits(record_bytes, executor_options.executors));  // now, not when all is loaded
  LoadedModel model;
  {
    StartWatch watch(executor_options.start_patience, executor_options.on_start_hang, executor_options.on_start_phase);
    watch.Begin("opening the model's files");
    ASSIGN_OR_RETURN(model.checkpoint, Checkpoint::Open(config.model().path()));
    ASSIGN_OR_RETURN(model.text, LoadText(*model.checkpoint, config.model().chat_format()));
  }
  if (const int64_t most = model.checkpoint->config().max_position; config.model().max_context() > most) {
    return Status(Code::kOutOfRange, StrCat("--max-model-len is ", config.model().max_context(),
                                            ", the model was made for ", most, " positions"));
  }
  model.name = config.model().name().empty() ? model.checkpoint->config().name : config.model().name();
  model.dtype = config.model().dtype();

  if (config.nodes().count() > 1) {
    ASSIGN_OR_RETURN(auto group, GroupOptionsOf(config, *model.checkpoint, executor_options.device, hooks));
    ASSIGN_OR_RETURN(model.leader, cluster::Leader::Start(std::move(group)));
  }
  const auto drill = executor_options.before_step;
  const int replicas = executor_options.executors;
  const bool on_gpus = executor_options.device == Device::kCuda;
  if (!on_gpus && replicas > 1) {
    ASSIGN_OR_RETURN(executor_options.weights, LocalExecutor::LoadShared(*model.checkpoint, executor_options));
  }
  const uint64_t kv_bytes = executor_options.kv_bytes;
  EngineOptions options = EngineOptionsOf(config, hooks, cost);
  options.scheduler.tenants = std::move(tenants);
  if (const std::string& folder = config.log().flight_record_dir();
      !folder.empty() && access(folder.c_str(), W_OK | X_OK) != 0) {
    log::Warn("flight records cannot be kept: no files can be made in --flight-record-dir",
              {{"folder", folder}, {"error", std::strerror(errno)}});
  }
  std::vector<std::unique_ptr<Engine>> engines;
  for (int replica = 0; replica < replicas; ++replica) {
    if (drill) {
      executor_options.before_step = [=, first = replica * executor_options.ranks * executor_options.stages](
                                         int rank, uint64_t step) { drill(first + rank, step); };
    }
    if (on_gpus) {
      // Each has weights of its own, and the pool that its GPUs have room for.
      executor_options.gpus = gpus[static_cast<size_t>(replica)];
      executor_options.kv_bytes = kv_bytes;
      executor_options.executors = ReplicasToCome(gpus, replica);
    }
    ASSIGN_OR_RETURN(Ranks ranks, MakeRanks(*model.checkpoint, model.leader.get(), executor_options));
    SetSize(ranks.scheduler, &options.scheduler);
    if (replica == 0) WarnOfRecordMemory(options.flight_record_bytes, options.scheduler.num_blocks);
    if (replicas > 1) options.replica = replica;
    executor_options.kv_bytes = ranks.kv_bytes;  // of the next replica on the CPU, and of one made again
    if (!on_gpus) executor_options.progress = {};
    if (config.scheduler().on_engine_failure() == "restart") {
      options.restart = [checkpoint = model.checkpoint.get(), leader = model.leader.get(), executor_options,
                         num_blocks = options.scheduler.num_blocks](const EngineOptions::Hung& hung) mutable {
        if (executor_options.on_start_hang) executor_options.on_start_hang = hung;
        executor_options.on_start_phase = {};
        return MakeRanksAgain(*checkpoint, leader, executor_options, num_blocks);
      };
    }
    if (const std::string& folder = config.log().flight_record_dir(); !folder.empty()) {
      options.on_failure = [=](const std::string& record) { KeepFlightRecord(folder, replica, record); };
      options.crash_record_path = FlightRecordPath(folder, replica, "-crash.flight");
    }
    model.device = ranks.device;
    for (DeviceMemory& device : ranks.devices) {
      device.replica = replica;
      model.devices.push_back(std::move(device));
    }
    model.weight_bytes = ranks.weight_bytes + (on_gpus ? model.weight_bytes : 0);  // on the CPU replicas share them
    model.kv_bytes += ranks.kv_bytes;
    model.kv_tokens += static_cast<int64_t>(options.scheduler.num_blocks) * options.scheduler.block_size;
    RETURN_IF_ERROR(CheckRecordFits(record_bytes, 1));
    ASSIGN_OR_RETURN(auto engine, Engine::Start(options, std::move(ranks.executor), hooks.on_step));
    engines.push_back(std::move(engine));
  }
  model.tensor_parallel = executor_options.ranks;
  model.pipeline_parallel = executor_options.stages;
  model.max_context = options.scheduler.max_context;
  if (replicas > 1) model.device = StrCat(replicas, " replicas, each ", model.device);
  model.engine = std::make_unique<ReplicaSet>(std::move(engines), config.kv().prefix_cache());
  return model;
}

}  // namespace altiplano::cli
