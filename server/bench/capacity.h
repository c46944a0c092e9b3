// What a model needs on GPUs and what they would give: the arithmetic of "altiplano plan". Predictions, not
// measurements.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "server/base/status.h"
#include "server/model/config.h"
#include "server/scheduler/step_cost.h"

namespace altiplano::bench {

// Datasheet figures.
struct Gpu {
  std::string_view name;
  double memory_bytes = 0;
  double bytes_per_second = 0;       // of its memory
  double flops = 0;                  // bf16, dense
  double link_bytes_per_second = 0;  // to its peers, both directions together: NVLink, or PCIe where it has none
};
std::span<const Gpu> Gpus();

struct GpuGroup {
  Gpu gpu;
  int count = 1;
};
// "8xH200", "L4". INVALID_ARGUMENT names what there is.
StatusOr<GpuGroup> ParseGpus(std::string_view text);

// What tensor-parallel ranks sum in a step, all stages together.
struct AllReduces {
  int64_t calls = 0;         // of one step
  uint64_t token_bytes = 0;  // of the message of one call, for each token
};
AllReduces AllReducesOf(const ModelConfig& config, int ranks);

// A call in a step of one token; 0 where there are none.
double OneTokenUs(const AllReduces& sums, const Gpu& gpu);

// What of the reading of weights a decode step does beside its all-reduces: the product that follows one has its first
// weights on their way before it waits (Llama::EarlyWeightBytes), for as long as the all-reduce takes at most.
double HiddenWeightsUs(const ModelConfig& config, const Gpu& gpu, int ranks);

// bf16 weights and KV cache on `ranks` tensor-parallel GPUs (of each of several stages: a step that runs alone goes
// through all of them, and what they hand on is not counted), derived as the presets of FindMachine are (machine.cc).
// The ranks must be a size that the model can be cut into.
StepCost DeriveStepCost(const ModelConfig& config, const Gpu& gpu, int ranks);

struct Demand {
  int64_t context = 8192;       // tokens of a request, prompt and answer
  int64_t answer_tokens = 512;  // of them
  int64_t concurrency = 1;      // requests that run at one time
};

struct ServingLimits {
  int64_t block_size = 64;
  int64_t max_running = 256;
  int64_t token_budget = 2048;
  int nodes = 1;                 // each with the GPUs that are named; they share out the stages
  int stages = 1;                // of the pipeline, on all nodes; all GPUs are shared out among them
  double memory_fraction = 0.9;  // of a GPU's memory that may be used
};

// Sizes are of one GPU: of the stage that has most of each.
struct Capacity {
  int gpus = 1;         // of all nodes
  std::string why_not;  // empty: the demand fits
  uint64_t memory_bytes = 0;
  uint64_t usable_bytes = 0;
  uint64_t weight_bytes = 0;
  uint64_t workspace_bytes = 0;  // activations of the largest step
  uint64_t block_bytes = 0;
  int64_t kv_tokens = 0;        // whole blocks; 0: not even the weights fit
  int64_t largest_batch = 0;    // requests of the demanded context
  int64_t longest_context = 0;  // of one request, when the demanded number of them run
  AllReduces all_reduces;
  double one_token_us = 0;       // of an all-reduce
  double hidden_weights_us = 0;  // of a decode step; cost.weights_us is without them
  StepCost cost;
  // Of the demanded load, if it ran: an idle server's time to first token; the time of a decode step of all requests in
  // the middle of their answers.
  Duration ttft{}, itl{};
  double tokens_per_second = 0;  // of all requests, while all decode
};
Capacity PlanCapacity(const ModelConfig& config, const GpuGroup& gpus, const Demand& demand,
                      const ServingLimits& limits);

// The most GPUs that a tensor-parallel group may have.
inline constexpr int kMostTensorParallelGpus = 8;

// The fewest of 1, 2, 4, 8 GPUs of this kind, or of 2, 4, 8 nodes with 8 of them, that the demand fits on, each node
// with as many stages as limits say. gpus: of a node; 0: none of them.
struct Machines {
  int nodes = 1, gpus = 0;
};
Machines FewestMachines(const ModelConfig& config, const Gpu& gpu, const Demand& demand, const ServingLimits& limits);

}  // namespace altiplano::bench
