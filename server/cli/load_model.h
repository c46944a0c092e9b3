// From a path to something that answers: checkpoint, tokenizer, chat format, engine.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "altiplano/config/v1/server_config.pb.h"
#include "kernels/tensor.h"
#include "server/base/status.h"
#include "server/cli/command.h"
#include "server/cluster/group.h"
#include "server/engine/local_executor.h"
#include "server/engine/replica_set.h"
#include "server/model/checkpoint.h"
#include "server/model/weights.h"
#include "server/scheduler/tenants.h"
#include "server/text/chat_format.h"
#include "server/text/tokenizer.h"

namespace altiplano::cli {

struct TextModel {
  std::shared_ptr<const Tokenizer> tokenizer;
  std::shared_ptr<const ChatFormat> chat_format;  // null: plain text only
};

// From tokenizer.json, else tokenizer.model, else GGUF. FAILED_PRECONDITION when there is none, or when it has more
// tokens than the model; what is wrong with a file names it.
StatusOr<std::shared_ptr<const Tokenizer>> LoadTokenizer(const Checkpoint& checkpoint);

// The tokenizer, and chat_format: "auto", "none" or a format's name. "auto" with a template that is not known is
// NOT_FOUND naming --chat-format; "auto" without any template is plain text only, with a warning in the log. A format
// with a special token that the tokenizer lacks is FAILED_PRECONDITION, or OUT_OF_RANGE where it was named.
StatusOr<TextModel> LoadText(const Checkpoint& checkpoint, std::string_view chat_format);

// --block-size, whose default depends on the device.
constexpr int64_t BlockSize(int64_t given, Device device) {
  if (given > 0) return given;
  return device == Device::kCuda ? 64 : 16;
}

// --tenants, complete. INVALID_ARGUMENT, with the flag's name, for a list that cannot be meant so beside the other
// flags.
StatusOr<std::vector<TenantOptions>> CheckedTenants(std::string_view text, int64_t max_num_seqs,
                                                    int64_t max_queued_requests, int64_t max_queued_tokens);

// OUT_OF_RANGE for a step that has no room for a block: the one that the first prompt gets whatever the ceiling.
Status CheckBudget(int64_t max_num_batched_tokens, int64_t block_size);

// What of the scheduler's configuration can be told to be wrong without a model: an error with what to change.
// A block's size that follows from the device is taken to be that of a CPU with --device auto.
Status CheckScheduling(const config::v1::ServerConfig& config);

// What of --devices, --isa and --check-ranks can be told to be wrong without a look at the machine: those that would
// have no effect beside --device and --tensor-parallel, too.
Status CheckDevices(const config::v1::ServerConfig& config);

struct LoadHooks {
  std::function<void(const LoadProgress&)> progress;            // calling thread
  std::function<bool()> cancelled;                              // polled while weights are read; true: CANCELLED
  std::function<void()> on_step;                                // see Engine::Start
  std::function<void()> on_failed_for_good = {};                // see EngineOptions
  std::function<void(const Status&)> on_start_hang = {};        // see LocalExecutorOptions; within --start-timeout
  std::function<void(const std::string&)> on_start_phase = {};  // see StartWatch
  std::function<void(const StepTimes&)> on_step_times = {};     // see LocalExecutorOptions; any engine's thread
  bool without_all_reduces = false;                             // ranks are those of MakeUnsummed: for measuring
};

struct LoadedModel {
  std::unique_ptr<Checkpoint> checkpoint;
  TextModel text;
  std::string name;                   // what clients call it
  std::string device;                 // "AMD EPYC 9B14, 2 threads, avx512_bf16"
  std::vector<DeviceMemory> devices;  // of this node
  std::string dtype;                  // "bf16"
  int32_t tensor_parallel = 1;
  int32_t pipeline_parallel = 1;
  int32_t max_context = 0;
  int64_t kv_tokens = 0;  // that the pools of all replicas hold
  uint64_t kv_bytes = 0;
  uint64_t weight_bytes = 0;                // of all replicas
  std::unique_ptr<cluster::Leader> leader;  // null for one node; outlives the engine
  std::unique_ptr<ReplicaSet> engine;
};

// LoadHooks::on_start_hang of a command: says what hangs, by Fail or FailInLog, and ends the process with kExitRestart.
std::function<void(const Status&)> EndHungStart(std::string_view command, decltype(&Fail) fail = &Fail);

// What an executor of this config is to be given, ALTIPLANO_FAULT included. UNAVAILABLE without a usable device.
// replica_gpus: null, or where the GPUs of each replica's ranks on this node are put; with no GPU there are none.
StatusOr<LocalExecutorOptions> ExecutorOptionsOf(const config::v1::ServerConfig& config, const LoadHooks& hooks,
                                                 std::vector<std::vector<int>>* replica_gpus = nullptr);

// UNAVAILABLE without a usable device, RESOURCE_EXHAUSTED when memory does not suffice, else what is wrong with the
// files.
StatusOr<LoadedModel> LoadModel(const config::v1::ServerConfig& config, const LoadHooks& hooks);

}  // namespace altiplano::cli
