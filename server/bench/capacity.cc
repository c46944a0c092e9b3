#include "server/bench/capacity.h"

#include <algorithm>
#include <array>
#include <charconv>

#include "server/base/strings.h"
#include "server/model/llama.h"
#include "server/model/weights.h"

namespace altiplano::bench {

namespace {

// NVIDIA's datasheets: of the SXM boards of H100, H200 and A100, and of L4 and L40S, which have no NVLink but PCIe 4.0
// x16. Where a sheet names a rate with sparsity only (L4: 242 TFLOP/s), half of it.
constexpr double kHopperFlops = 989.4e12, kHopperLink = 900e9;
constexpr std::array kGpus = {
    Gpu{"H100", 80e9, 3.35e12, kHopperFlops, kHopperLink},
    Gpu{"H200", 141e9, 4.8e12, kHopperFlops, kHopperLink},
    Gpu{"A100-40GB", 40e9, 1.555e12, 312e12, 600e9},
    Gpu{"A100-80GB", 80e9, 2.039e12, 312e12, 600e9},
    Gpu{"L4", 24e9, 300e9, 121e12, 64e9},
    Gpu{"L40S", 48e9, 864e9, 362.05e12, 64e9},
};

// What good engines reach of a datasheet's figures on Hopper (machine.cc says the same of the presets). Other GPUs are
// taken to reach the same shares of theirs.
constexpr double kWeightEfficiency = 0.75;
constexpr double kKvEfficiency = 0.83;
constexpr double kGemmEfficiency = 790e12 / kHopperFlops;
constexpr double kAttentionEfficiency = 550e12 / kHopperFlops;
constexpr double kAllReduceEfficiency = 67108864 / 316e-6 / kHopperLink;  // 64 MiB in 316 us, 8 GPUs
constexpr double kStepUs = 150;
constexpr double kSequenceUs = 1;

double WeightReadUs(double bytes, const Gpu& gpu) {
  return bytes / (kWeightEfficiency * gpu.bytes_per_second) * 1e6;
}

// Read once for every step: all but the embedding, of which a step reads a row for each token.
double MatrixParameters(const ModelConfig& c) {
  const double layer =
      static_cast<double>(c.hidden) * static_cast<double>(2 * c.q_size() + 2 * c.kv_size() + 3 * c.ffn);
  return static_cast<double>(c.layers) * layer + static_cast<double>(c.vocab) * static_cast<double>(c.hidden);
}

// Of one shot on 8 H100: a line through the published 7.8 us of 32 KiB and 16.7 us of 256 KiB. What grows with the
// message does so as the links are slower.
double OneShotUs(uint64_t bytes, const Gpu& gpu) {
  constexpr double kFrom = 32 << 10, kTo = 256 << 10, kByteUs = (16.7 - 7.8) / (kTo - kFrom);
  const double fixed = 7.8 - kFrom * kByteUs;
  return fixed + static_cast<double>(bytes) * kByteUs * (kHopperLink / gpu.link_bytes_per_second);
}

// hidden_weights_us: of the weights, read while ranks sum.
StepCost CostOf(const ModelConfig& c, const Gpu& gpu, int ranks, double hidden_weights_us) {
  const Shard shard = Shard::Make(c, 0, ranks).value();
  const double parameters = MatrixParameters(c) / ranks;
  const AllReduces sums = AllReducesOf(c, ranks);
  const auto calls = static_cast<double>(sums.calls);
  StepCost cost;
  cost.step_us = kStepUs + calls * OneTokenUs(sums, gpu);
  cost.weights_us = WeightReadUs(parameters * SizeOf(DType::kBF16), gpu) - hidden_weights_us;
  cost.token_us = 2 * parameters / (kGemmEfficiency * gpu.flops) * 1e6;
  if (sums.calls > 0) {
    cost.token_us +=
        calls * static_cast<double>(sums.token_bytes) / (kAllReduceEfficiency * gpu.link_bytes_per_second) * 1e6;
  }
  cost.sequence_us = kSequenceUs;
  cost.kv_token_us =
      static_cast<double>(shard.kv_bytes_per_token(c, DType::kBF16)) / (kKvEfficiency * gpu.bytes_per_second) * 1e6;
  cost.attention_us =
      4.0 * static_cast<double>(c.layers * c.q_size()) / ranks / (kAttentionEfficiency * gpu.flops) * 1e6;
  return cost;
}

}  // namespace

std::span<const Gpu> Gpus() {
  return kGpus;
}

StatusOr<GpuGroup> ParseGpus(std::string_view text) {
  GpuGroup group;
  std::string_view name = text;
  if (const size_t x = text.find_first_of("xX*"); x != std::string_view::npos) {
    const auto [end, error] = std::from_chars(text.data(), text.data() + x, group.count);
    if (error == std::errc() && end == text.data() + x) name = text.substr(x + 1);
  }
  std::string names;
  for (const Gpu& gpu : kGpus) {
    const bool same = std::equal(gpu.name.begin(), gpu.name.end(), name.begin(), name.end(),
                                 [](char a, char b) { return a == (b >= 'a' && b <= 'z' ? b - 'a' + 'A' : b); });
    if (same && group.count >= 1 && group.count <= 1024) {
      group.gpu = gpu;
      return group;
    }
    names += StrCat(names.empty() ? "" : ", ", gpu.name);
  }
  return Status(Code::kInvalidArgument,
                StrCat("\"", text, "\" is not a number of GPUs and their kind, such as 8xH200; known are ", names));
}

AllReduces AllReducesOf(const ModelConfig& c, int ranks) {
  AllReduces sums;
  // Stages share out the layers, and the first one embeds: together they sum as often as one.
  sums.calls = Llama::AllReduces(c, Shard::Make(c, 0, ranks).value());
  if (sums.calls == 0) return sums;
  sums.token_bytes = Llama::ResidualBytes(c, 1);
  return sums;
}

double OneTokenUs(const AllReduces& sums, const Gpu& gpu) {
  return sums.calls == 0 ? 0 : OneShotUs(sums.token_bytes, gpu);
}

double HiddenWeightsUs(const ModelConfig& c, const Gpu& gpu, int ranks) {
  const AllReduces sums = AllReducesOf(c, ranks);
  if (sums.calls == 0) return 0;
  const Llama::EarlyWeights early = Llama::EarlyWeightBytes(c, Shard::Make(c, 0, ranks).value());
  const auto beside_a_call = [&](int64_t bytes) {
    return std::min(OneTokenUs(sums, gpu), WeightReadUs(static_cast<double>(bytes), gpu));
  };
  const auto layers = static_cast<double>(c.layers);
  return layers * beside_a_call(early.qkv) + layers * beside_a_call(early.gate_up) + beside_a_call(early.head);
}

StepCost DeriveStepCost(const ModelConfig& c, const Gpu& gpu, int ranks) {
  return CostOf(c, gpu, ranks, HiddenWeightsUs(c, gpu, ranks));
}

Capacity PlanCapacity(const ModelConfig& c, const GpuGroup& gpus, const Demand& demand, const ServingLimits& limits) {
  Capacity plan;
  plan.gpus = gpus.count * limits.nodes;
  plan.memory_bytes = static_cast<uint64_t>(gpus.gpu.memory_bytes);
  plan.usable_bytes = static_cast<uint64_t>(gpus.gpu.memory_bytes * limits.memory_fraction);
  if (limits.stages % limits.nodes != 0) {
    plan.why_not = StrCat(limits.stages, " stages cannot be shared out among ", limits.nodes, " nodes");
    return plan;
  }
  if (plan.gpus % limits.stages != 0) {
    plan.why_not = StrCat(plan.gpus, " GPUs cannot be shared out among ", limits.stages, " stages");
    return plan;
  }
  const int ranks = plan.gpus / limits.stages;
  if (ranks > kMostTensorParallelGpus) {
    plan.why_not = StrCat(ranks, " GPUs of a stage are more than the ", kMostTensorParallelGpus, " that may be");
    return plan;
  }
  Llama::Limits step;
  step.max_tokens = limits.token_budget;
  step.max_logit_rows = std::min(step.max_logit_rows, limits.token_budget);
  int64_t blocks = INT64_MAX;  // of the stage that has the least room
  for (int stage = 0; stage < limits.stages; ++stage) {
    const auto shard = Shard::Make(c, 0, ranks, stage, limits.stages);
    if (!shard.ok()) {
      plan.why_not = shard.status().message();
      return plan;
    }
    const uint64_t weights = RankWeightBytes(c, *shard, DType::kBF16);
    const uint64_t link = limits.stages > 1 ? Llama::LinkBytes(c, step) : 0;
    const uint64_t workspace = Llama::WorkspaceBytes(c, *shard, step, DType::kBF16) + link;
    const uint64_t block = shard->kv_bytes_per_token(c, DType::kBF16) * static_cast<uint64_t>(limits.block_size);
    plan.weight_bytes = std::max(plan.weight_bytes, weights);
    plan.workspace_bytes = std::max(plan.workspace_bytes, workspace);
    plan.block_bytes = std::max(plan.block_bytes, block);
    const uint64_t room = plan.usable_bytes - std::min(plan.usable_bytes, weights + workspace);
    blocks = std::min(blocks, static_cast<int64_t>(room / block));
  }
  plan.all_reduces = AllReducesOf(c, ranks);
  plan.one_token_us = OneTokenUs(plan.all_reduces, gpus.gpu);
  plan.hidden_weights_us = HiddenWeightsUs(c, gpus.gpu, ranks);
  plan.cost = CostOf(c, gpus.gpu, ranks, plan.hidden_weights_us);

  const int64_t prompt = demand.context - demand.answer_tokens;
  for (int64_t at = 0; at < prompt; at += limits.token_budget) {
    const int64_t tokens = std::min(limits.token_budget, prompt - at);
    plan.ttft += StepTime(
        plan.cost, {.sequences = 1, .tokens = tokens, .prefill_context = at * tokens + tokens * (tokens + 1) / 2});
  }
  plan.itl = StepTime(plan.cost, {.sequences = demand.concurrency,
                                  .tokens = demand.concurrency,
                                  .decode_context = demand.concurrency * (prompt + demand.answer_tokens / 2)});
  plan.tokens_per_second = static_cast<double>(demand.concurrency) / Seconds(plan.itl);

  if (blocks == 0) {
    plan.why_not =
        StrCat("each GPU would hold ", HumanBytes(plan.weight_bytes), " of weights and ",
               HumanBytes(plan.workspace_bytes), " of activations, and may use ", HumanBytes(plan.usable_bytes));
    return plan;
  }
  plan.kv_tokens = blocks * limits.block_size;
  const int64_t blocks_each = (demand.context + limits.block_size - 1) / limits.block_size;
  plan.largest_batch = std::min(blocks / blocks_each, limits.max_running);
  plan.longest_context = std::min(blocks / demand.concurrency * limits.block_size, c.max_position);
  if (demand.context > c.max_position) {
    plan.why_not = StrCat("the model was made for ", c.max_position, " positions");
  } else if (demand.concurrency > limits.max_running) {
    plan.why_not =
        StrCat(demand.concurrency, " requests at one time are more than --max-num-seqs ", limits.max_running);
  } else if (plan.largest_batch < demand.concurrency) {
    const bool one = demand.concurrency == 1;
    plan.why_not = StrCat("the KV cache holds ", plan.kv_tokens, " tokens, ", demand.concurrency,
                          one ? " request of " : " requests of ", demand.context, one ? " needs " : " need ",
                          demand.concurrency * blocks_each * limits.block_size);
  }
  return plan;
}

Machines FewestMachines(const ModelConfig& config, const Gpu& gpu, const Demand& demand, const ServingLimits& limits) {
  const int stages = std::max(1, limits.stages / limits.nodes);
  for (const auto& [nodes, gpus] : {Machines{1, 1}, {1, 2}, {1, 4}, {1, 8}, {2, 8}, {4, 8}, {8, 8}}) {
    ServingLimits there = limits;
    there.nodes = nodes;
    there.stages = nodes * stages;
    if (PlanCapacity(config, {gpu, gpus}, demand, there).why_not.empty()) return {nodes, gpus};
  }
  return {};
}

}  // namespace altiplano::bench
