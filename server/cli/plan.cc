// altiplano plan: would a model fit on these GPUs, and what would they give?
#include <cstdio>
#include <filesystem>

#include "kernels/comm/all_reduce_plan.h"
#include "server/base/json.h"
#include "server/base/read_file.h"
#include "server/base/strings.h"
#include "server/bench/capacity.h"
#include "server/bench/machine.h"
#include "server/cli/command.h"
#include "server/cli/load_model.h"

namespace altiplano::cli {

namespace {

constexpr std::string_view kPlan = "plan";
constexpr size_t kMaxConfigBytes = 16 << 20;
static_assert(bench::kMostTensorParallelGpus == kMostPeers);

// A published model's name, a folder of which only config.json is read (the weights need not be there yet), or a GGUF.
StatusOr<ModelConfig> FindConfig(const std::string& model) {
  namespace fs = std::filesystem;
  if (auto config = PublishedModelConfig(model)) return *config;
  const fs::path json = fs::path(model) / "config.json";
  std::error_code ignored;
  if (fs::is_directory(model, ignored) && fs::is_regular_file(json, ignored)) {
    ASSIGN_OR_RETURN(const std::string text, ReadFile(json.string(), kMaxConfigBytes));
    auto config = ParseModelConfig(text);
    if (!config.ok()) return Status(config.status().code(), StrCat(json.string(), ": ", config.status().message()));
    config->name = fs::path(model).filename().string();
    return config;
  }
  if (!fs::exists(model, ignored)) {
    return Status(Code::kNotFound, StrCat("--model ", model,
                                          ": there is no such file or folder, and no published model but 1b, 3b, 8b, "
                                          "70b, 405b"));
  }
  ASSIGN_OR_RETURN(auto checkpoint, Checkpoint::Open(model));
  return checkpoint->config();
}

// "8xH100", "2 nodes of 8xH100"
std::string NameOf(const bench::GpuGroup& gpus, int nodes) {
  const std::string node = StrCat(gpus.count, "x", gpus.gpu.name);
  return nodes == 1 ? node : StrCat(nodes, " nodes of ", node);
}

std::string Requests(int64_t count) {
  return StrCat(count, count == 1 ? " request" : " requests");
}

// What to change, when it does not fit.
std::vector<std::string> Advice(const ModelConfig& config, const bench::GpuGroup& gpus, const bench::Demand& demand,
                                const bench::ServingLimits& limits, const bench::Capacity& plan) {
  std::vector<std::string> advice;
  if (const bench::Machines fewest = FewestMachines(config, gpus.gpu, demand, limits); fewest.gpus > 0) {
    advice.push_back(StrCat("it fits on ", NameOf({gpus.gpu, fewest.gpus}, fewest.nodes),
                            fewest.nodes == 1 ? "" : StrCat(" (--nodes ", fewest.nodes, ")")));
  }
  for (const bench::Gpu& other : bench::Gpus()) {
    if (other.name == gpus.gpu.name) continue;
    if (PlanCapacity(config, {other, gpus.count}, demand, limits).why_not.empty()) {
      advice.push_back(StrCat("it fits on ", NameOf({other, gpus.count}, limits.nodes)));
    }
  }
  if (plan.largest_batch > 0 && plan.largest_batch < demand.concurrency) {
    advice.push_back(StrCat("--concurrency ", plan.largest_batch, " fits here"));
  }
  if (plan.longest_context >= limits.block_size && plan.longest_context < demand.context) {
    advice.push_back(StrCat("--context ", plan.longest_context, " fits here"));
  }
  return advice;
}

void PrintText(const ModelConfig& config, const bench::GpuGroup& gpus, const bench::Demand& demand,
               const bench::ServingLimits& limits, const bench::Capacity& plan,
               const std::vector<std::string>& advice) {
  auto line = [](const char* name, const std::string& value) { std::printf("%-16s %s\n", name, value.c_str()); };
  const bool billions = config.parameters() >= 1'000'000'000;
  line("model",
       StrFormat("%s, %.1f %s parameters, bf16", config.name.c_str(),
                 static_cast<double>(config.parameters()) / (billions ? 1e9 : 1e6), billions ? "billion" : "million"));
  line("machine",
       StrCat(NameOf(gpus, limits.nodes), limits.stages == 1 ? ", tensor-parallel"
                                                             : StrCat(", ", limits.stages, " stages of ",
                                                                      plan.gpus / limits.stages, " tensor-parallel")));
  line("demand", StrCat(Requests(demand.concurrency), " at one time, each ", demand.context - demand.answer_tokens,
                        " prompt tokens and ", demand.answer_tokens, " of answer"));
  line("fits", plan.why_not.empty() ? "yes" : StrCat("no: ", plan.why_not));
  for (const std::string& what : advice) line("", what);
  if (plan.weight_bytes > 0) {
    line("a GPU's memory",
         StrCat(HumanBytes(plan.memory_bytes), ", of which ", HumanBytes(plan.usable_bytes), " used"));
    line("  weights", HumanBytes(plan.weight_bytes));
    line("  activations", HumanBytes(plan.workspace_bytes));
    line("  KV block", HumanBytes(plan.block_bytes));
  }
  if (plan.kv_tokens > 0) {
    line("KV tokens", StrCat(plan.kv_tokens));
    line("largest batch", StrCat(Requests(plan.largest_batch), " of ", demand.context, " tokens"));
    line("longest context", StrCat(plan.longest_context, " tokens with ", Requests(demand.concurrency)));
    if (plan.all_reduces.calls > 0) {
      line("all-reduces", StrFormat("%lld a step, of %s for each token; %.1f us each with one token",
                                    static_cast<long long>(plan.all_reduces.calls),
                                    HumanBytes(plan.all_reduces.token_bytes).c_str(), plan.one_token_us));
      line("  beside them", StrFormat("weights that take %.2f ms of a decode step", plan.hidden_weights_us * 1e-3));
    }
    line("predicted",
         StrFormat("TTFT %.1f ms when idle; ITL %.2f ms; %.1f tokens/s each, %.0f in all", Milliseconds(plan.ttft),
                   Milliseconds(plan.itl), 1e3 / Milliseconds(plan.itl), plan.tokens_per_second));
  }
  std::printf("Speeds follow from datasheet rates and what good engines reach of them; none is a measurement.\n");
}

void PrintJson(const ModelConfig& config, const bench::GpuGroup& gpus, const bench::Demand& demand,
               const bench::ServingLimits& limits, const bench::Capacity& plan,
               const std::vector<std::string>& advice) {
  OrderedJson json;
  json["model"] = config.name;
  json["parameters"] = config.parameters();
  json["gpu"] = std::string(gpus.gpu.name);
  json["nodes"] = limits.nodes;
  json["gpus"] = plan.gpus;
  json["tensor_parallel"] = plan.gpus / limits.stages;
  json["pipeline_parallel"] = limits.stages;
  json["context"] = demand.context;
  json["answer_tokens"] = demand.answer_tokens;
  json["concurrency"] = demand.concurrency;
  json["fits"] = plan.why_not.empty();
  json["why_not"] = plan.why_not;
  json["advice"] = advice;
  json["gpu_memory_bytes"] = plan.memory_bytes;
  json["gpu_usable_bytes"] = plan.usable_bytes;
  json["gpu_weight_bytes"] = plan.weight_bytes;
  json["gpu_workspace_bytes"] = plan.workspace_bytes;
  json["gpu_kv_block_bytes"] = plan.block_bytes;
  json["kv_tokens"] = plan.kv_tokens;
  json["largest_batch"] = plan.largest_batch;
  json["longest_context"] = plan.longest_context;
  json["predicted"] = {{"ttft_ms", Milliseconds(plan.ttft)},
                       {"itl_ms", Milliseconds(plan.itl)},
                       {"tokens_per_second", plan.tokens_per_second}};
  json["all_reduces"] = {{"a_step", plan.all_reduces.calls},
                         {"token_bytes", plan.all_reduces.token_bytes},
                         {"one_token_us", plan.one_token_us},
                         {"hidden_weights_us", plan.hidden_weights_us}};
  json["step_cost"] = bench::ToJson(plan.cost);
  std::printf("%s\n", json.dump(2, ' ', false, OrderedJson::error_handler_t::replace).c_str());
}

int RunPlan(const ParsedFlags& flags) {
  if (!flags.given("model")) return Fail(kPlan, "needs --model DIR_OR_GGUF, 8b, 70b or 405b", kExitUsage);
  auto gpus = bench::ParseGpus(flags.text("gpus"));
  if (!gpus.ok()) return Fail(kPlan, StrCat("--gpus: ", gpus.status().message()), kExitUsage);
  bench::Demand demand;
  demand.context = flags.count("context");
  demand.answer_tokens =
      flags.given("answer-tokens") ? flags.count("answer-tokens") : std::min<int64_t>(512, demand.context / 2);
  demand.concurrency = flags.count("concurrency");
  if (demand.answer_tokens >= demand.context) {
    return Fail(kPlan,
                StrCat("--answer-tokens ", demand.answer_tokens, " leave nothing of --context ", demand.context,
                       " for a prompt"),
                kExitUsage);
  }
  bench::ServingLimits limits;
  limits.max_running = flags.count("max-num-seqs");
  limits.token_budget = flags.count("max-num-batched-tokens");
  limits.nodes = static_cast<int>(flags.count("nodes"));
  limits.stages = flags.given("pipeline-parallel") ? static_cast<int>(flags.count("pipeline-parallel")) : limits.nodes;
  limits.memory_fraction = static_cast<double>(flags.count("memory-percent")) / 100;
  auto config = FindConfig(flags.text("model"));
  if (!config.ok()) return Fail(kPlan, config.status().message(), ExitCodeOfLoad(config.status()));

  const bench::Capacity plan = PlanCapacity(*config, *gpus, demand, limits);
  std::vector<std::string> advice;
  if (!plan.why_not.empty()) advice = Advice(*config, *gpus, demand, limits, plan);
  (flags.boolean("json") ? PrintJson : PrintText)(*config, *gpus, demand, limits, plan, advice);
  return plan.why_not.empty() ? kExitOk : kExitFailure;
}

Flag Count(std::string_view name, std::string_view value, std::string_view meaning, std::string_view example,
           int64_t most, int64_t least = 1) {
  return {.name = name,
          .type = FlagType::kCount,
          .default_value = value,
          .meaning = meaning,
          .example = example,
          .min = least,
          .max = most};
}

}  // namespace

Subcommand PlanCommand() {
  constexpr int64_t kMost = 1 << 24;
  return {
      .command =
          {.name = kPlan,
           .summary = "would a model fit on these GPUs, and what would they give?",
           .synopsis = "altiplano plan --model 70b --gpus 4xH200 --context 8192 --concurrency 32",
           .notes =
               "Sizes are those of the program's own allocator, for bf16. Speeds are\n"
               "predicted by the formula of docs/load_tests.md, from what good engines reach on H100 and H200; other\n"
               "GPUs are taken to reach the same shares of their datasheets. No kernel of this project has run on a\n"
               "GPU yet.\n"
               "Exit code 0: it fits; 1: it does not, and the answer says what would.",
           .flags = {{.name = "model",
                      .type = FlagType::kText,
                      .meaning =
                          "1b, 3b, 8b, 70b, 405b, a folder with a config.json (weights are not read), or a GGUF.",
                      .example = "70b"},
                     {.name = "gpus",
                      .type = FlagType::kText,
                      .default_value = "1xH200",
                      .meaning = "How many of which: H100 (80 GB), H200 (141 GB), A100-40GB, A100-80GB, L4 (24 GB) or "
                                 "L40S (48 GB). L4 and "
                                 "L40S sum over PCIe.",
                      .example = "8xH200"},
                     Count("context", "8192", "Tokens of one request, prompt and answer together.", "32768", kMost, 2),
                     Count("answer-tokens", "", "How many of them are the answer. Without it: 512, at most half.",
                           "1024", kMost),
                     Count("concurrency", "1", "Requests that run at one time.", "32", kMost),
                     Count("max-num-seqs", "256", "As serve's.", "512", kMost),
                     Count("max-num-batched-tokens", "2048", "As serve's: tokens of the largest step.", "4096", kMost),
                     Count("nodes", "1", "Machines, each with --gpus. Tensor parallelism stays inside of one.", "2",
                           64),
                     Count("pipeline-parallel", "",
                           "Stages that the layers are split into, on all nodes together. Without it: one on each.",
                           "2", 64),
                     Count("memory-percent", "90", "Of a GPU's memory that may be used.", "95", 100),
                     {.name = "json",
                      .type = FlagType::kBool,
                      .default_value = "false",
                      .meaning = "Print one JSON object; sizes are bytes."}},
           .max_positional = 0},
      .run = RunPlan};
}

}  // namespace altiplano::cli
