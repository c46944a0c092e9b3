#include "server/cli/load_flags.h"

#include <algorithm>
#include <cstdio>

#include "server/base/json.h"
#include "server/base/strings.h"
#include "server/cli/command.h"
#include "server/cli/units.h"
#include "server/cli/write_file.h"

namespace altiplano::cli {

namespace {

constexpr std::string_view kGroupDataset = "Requests", kGroupArrivals = "When they are sent", kGroupReport = "Report";
constexpr int64_t kMaxLength = 1 << 24;

}  // namespace

std::vector<Flag> LoadFlags() {
  return {
      {.name = "dataset-name",
       .type = FlagType::kChoice,
       .default_value = "random",
       .meaning = "Made-up token ids, or a file: ShareGPT (conversations, or JSON lines of token ids), an Azure LLM "
                  "inference trace, a Mooncake trace (equal hash ids become equal tokens), or a CSV of lengths.",
       .example = "mooncake",
       .choices = bench::kDatasetNames,
       .group = kGroupDataset},
      {.name = "dataset-path",
       .type = FlagType::kPath,
       .meaning = "The dataset's file, plain or gzipped.",
       .example = "AzureLLMInferenceTrace_2023_conv.csv.gz",
       .group = kGroupDataset},
      {.name = "num-prompts",
       .type = FlagType::kCount,
       .default_value = "100",
       .meaning = "Requests in all; fewer when the file has no more.",
       .example = "1000",
       .min = 1,
       .max = 10000000,
       .group = kGroupDataset},
      {.name = "input-len",
       .type = FlagType::kCount,
       .default_value = "128",
       .meaning = "Tokens of each made-up prompt, its shared beginning not counted.",
       .example = "1024",
       .min = 1,
       .max = kMaxLength,
       .alias = "random-input-len",
       .group = kGroupDataset},
      {.name = "output-len",
       .type = FlagType::kCount,
       .meaning = "Tokens of each answer, instead of what the file says; of made-up requests 64.",
       .example = "128",
       .min = 1,
       .max = kMaxLength,
       .alias = "random-output-len",
       .group = kGroupDataset},
      {.name = "random-range-ratio",
       .type = FlagType::kReal,
       .default_value = "0",
       .meaning = "Made-up lengths are uniform within this share below and above.",
       .example = "0.5",
       .group = kGroupDataset},
      {.name = "random-prefix-len",
       .type = FlagType::kCount,
       .default_value = "0",
       .meaning = "Tokens that made-up prompts begin with in common, as a system prompt.",
       .example = "512",
       .max = kMaxLength,
       .group = kGroupDataset},
      {.name = "num-prefixes",
       .type = FlagType::kCount,
       .default_value = "1",
       .meaning = "Different such beginnings, used in turn.",
       .example = "10",
       .min = 1,
       .max = 1000000,
       .group = kGroupDataset},
      {.name = "length-scale",
       .type = FlagType::kReal,
       .default_value = "1",
       .meaning = "Multiplies the lengths of a file, so that a trace of a large model fits a small one.",
       .example = "0.1",
       .group = kGroupDataset},
      {.name = "ttft-target",
       .type = FlagType::kText,
       .meaning = "Time to first token that each request asks for; several, separated by commas, are given in turn. "
                  "0: none.",
       .example = "500ms,5s",
       .group = kGroupDataset},
      {.name = "priorities",
       .type = FlagType::kText,
       .meaning = "Priorities of the requests in turn, separated by commas.",
       .example = "0,0,1",
       .group = kGroupDataset},
      {.name = "request-tenants",
       .type = FlagType::kText,
       .meaning = "Names of the tenants that the requests are of in turn, separated by commas.",
       .example = "blue,green",
       .group = kGroupDataset},
      {.name = "seed",
       .type = FlagType::kCount,
       .default_value = "0",
       .meaning =
           "Of prompts and arrivals: equal seeds make equal prompts, which a server may find in its prefix cache.",
       .example = "1",
       .max = 1ll << 40,
       .group = kGroupDataset},
      {.name = "request-rate",
       .type = FlagType::kText,
       .default_value = "inf",
       .meaning = "Requests a second, inf (as soon as --max-concurrency lets them), or trace (the file's times).",
       .example = "8",
       .group = kGroupArrivals},
      {.name = "burstiness",
       .type = FlagType::kReal,
       .default_value = "1",
       .meaning =
           "Shape of the gamma distribution of the gaps at a rate: 1 is Poisson, less is burstier, more is evener.",
       .example = "0.5",
       .group = kGroupArrivals},
      {.name = "speed-up",
       .type = FlagType::kReal,
       .default_value = "1",
       .meaning = "How many times faster a trace is replayed.",
       .example = "10",
       .group = kGroupArrivals},
      {.name = "max-concurrency",
       .type = FlagType::kCount,
       .default_value = "0",
       .meaning = "Requests at one time; a closed loop with --request-rate inf. 0: no limit.",
       .example = "32",
       .max = 1000000,
       .group = kGroupArrivals},
      {.name = "goodput",
       .type = FlagType::kText,
       .meaning = "Count the requests that met all of these: METRIC:MILLISECONDS,... of ttft, tpot, itl (the largest "
                  "gap), e2el, queue.",
       .example = "ttft:500,tpot:50",
       .group = kGroupReport},
      {.name = "percentile-metrics",
       .type = FlagType::kText,
       .default_value = "ttft,tpot,itl,e2el,queue",
       .meaning = "Metrics that the table shows.",
       .example = "ttft,itl",
       .group = kGroupReport},
      {.name = "metric-percentiles",
       .type = FlagType::kText,
       .default_value = "50,90,99",
       .meaning = "Percentiles to report, separated by commas.",
       .example = "99",
       .group = kGroupReport},
      {.name = "json",
       .type = FlagType::kBool,
       .default_value = "false",
       .meaning = "Print one JSON object instead of the table.",
       .group = kGroupReport},
      {.name = "result-filename",
       .type = FlagType::kPath,
       .meaning = "Write that JSON object to this file too.",
       .example = "result.json",
       .alias = "save-result",
       .group = kGroupReport},
      {.name = "save-detailed",
       .type = FlagType::kBool,
       .default_value = "false",
       .meaning = "With the values of each request in the JSON object.",
       .group = kGroupReport},
  };
}

namespace {

Status PlanTurns(const ParsedFlags& flags, LoadPlan* plan) {
  ASSIGN_OR_RETURN(plan->ttft_targets, DurationsOf(flags, "ttft-target"));
  const auto priorities = ParseCounts(flags.text("priorities"), INT32_MIN, INT32_MAX);
  if (!priorities.ok()) return InvalidArgument(StrCat("--priorities: ", priorities.status().message()));
  for (const int64_t priority : *priorities) plan->priorities.push_back(static_cast<int32_t>(priority));
  auto tenants = ParseWords(flags.text("request-tenants"));
  if (!tenants.ok()) return InvalidArgument(StrCat("--request-tenants: ", tenants.status().message()));
  plan->tenants = *std::move(tenants);
  return OkStatus();
}

}  // namespace

StatusOr<std::vector<Duration>> DurationsOf(const ParsedFlags& flags, std::string_view name) {
  const auto words = ParseWords(flags.text(name));
  if (!words.ok()) return InvalidArgument(StrCat("--", name, ": ", words.status().message()));
  std::vector<Duration> durations;
  for (const std::string& text : *words) {
    auto duration = ParseDuration(text);
    if (!duration.ok()) return InvalidArgument(StrCat("--", name, ": \"", text, "\" ", duration.status().message()));
    durations.push_back(*duration);
  }
  return durations;
}

StatusOr<LoadPlan> PlanLoad(const ParsedFlags& flags) {
  LoadPlan plan;
  auto name_it = [](std::string_view flag, const Status& status) {
    return InvalidArgument(StrCat("--", flag, " ", status.message()));
  };
  auto positive = [&](std::string_view name) { return flags.real(name) > 0 && flags.real(name) <= 1e6; };
  bench::DatasetOptions& dataset = plan.dataset;
  dataset.name = flags.text("dataset-name");
  dataset.path = flags.text("dataset-path");
  if ((dataset.name == "random") != dataset.path.empty()) {
    return InvalidArgument(dataset.path.empty()
                               ? StrCat("--dataset-name ", dataset.name, " needs --dataset-path")
                               : "--dataset-path needs --dataset-name: random prompts come from no file");
  }
  dataset.num_prompts = flags.count("num-prompts");
  dataset.seed = static_cast<uint64_t>(flags.count("seed"));
  dataset.input_len = static_cast<int32_t>(flags.count("input-len"));
  if (flags.given("output-len")) dataset.output_len = static_cast<int32_t>(flags.count("output-len"));
  dataset.range_ratio = flags.real("random-range-ratio");
  if (!(dataset.range_ratio >= 0 && dataset.range_ratio < 1))
    return InvalidArgument("--random-range-ratio must be in [0, 1)");
  dataset.prefix_len = static_cast<int32_t>(flags.count("random-prefix-len"));
  dataset.num_prefixes = static_cast<int32_t>(flags.count("num-prefixes"));
  for (std::string_view name : {"length-scale", "burstiness", "speed-up"}) {
    if (!positive(name)) return InvalidArgument(StrCat("--", name, " must be above 0, at most 1000000"));
  }
  dataset.length_scale = flags.real("length-scale");
  RETURN_IF_ERROR(PlanTurns(flags, &plan));

  auto arrivals = bench::ParseRequestRate(flags.text("request-rate"));
  if (!arrivals.ok()) return name_it("request-rate", arrivals.status());
  plan.arrivals = *arrivals;
  plan.arrivals.burstiness = flags.real("burstiness");
  plan.arrivals.speed_up = flags.real("speed-up");
  plan.arrivals.seed = dataset.seed;

  bench::BenchReport& report = plan.report;
  report.request_rate = flags.text("request-rate");
  report.max_concurrency = flags.count("max-concurrency");
  auto objectives = bench::ParseGoodput(flags.text("goodput"));
  if (!objectives.ok()) return name_it("goodput", objectives.status());
  report.objectives = *objectives;
  auto metrics = bench::ParseMetrics(flags.text("percentile-metrics"));
  if (!metrics.ok()) return name_it("percentile-metrics", metrics.status());
  report.metrics = *metrics;
  auto percentiles = bench::ParsePercentiles(flags.text("metric-percentiles"));
  if (!percentiles.ok()) return name_it("metric-percentiles", percentiles.status());
  report.percentiles = *percentiles;
  if (flags.given("result-filename")) {
    const Status status = CheckFolderOf(flags.text("result-filename"));
    if (!status.ok()) return name_it("result-filename:", status);
  }
  return plan;
}

StatusOr<Load> ReadLoad(LoadPlan* plan, int32_t max_context, int32_t vocabulary_size,
                        const bench::TokenizeFn& tokenize) {
  plan->dataset.max_tokens = max_context;
  Load load;
  ASSIGN_OR_RETURN(load.dataset, bench::LoadDataset(plan->dataset, tokenize));
  ASSIGN_OR_RETURN(load.arrivals, bench::MakeArrivals(plan->arrivals, load.dataset));
  for (size_t i = 0; i < load.dataset.requests.size(); ++i) {
    auto in_turn = [i](const auto& values, auto* value) {
      if (!values.empty()) *value = values[i % values.size()];
    };
    bench::LoadRequest& request = load.dataset.requests[i];
    in_turn(plan->ttft_targets, &request.ttft_target);
    in_turn(plan->priorities, &request.priority);
    in_turn(plan->tenants, &request.tenant);
  }
  if (load.dataset.left_out > 0) {
    plan->report.notes.push_back(StrCat(load.dataset.left_out, " requests of the dataset were left out: longer than ",
                                        max_context, " tokens with their answers"));
  }
  if (int64_t foreign = bench::CountForeign(load.dataset, vocabulary_size); foreign > 0) {
    plan->report.notes.push_back(StrCat(foreign, " prompts have ids outside the vocabulary of ", vocabulary_size,
                                        " tokens, made by another tokenizer; other ids were sent instead"));
  }
  if (static_cast<int64_t>(load.dataset.requests.size()) < plan->dataset.num_prompts) {
    plan->report.notes.push_back(StrCat("the dataset had only ", load.dataset.requests.size(), " requests to send"));
  }
  return load;
}

int PrintReport(std::string_view command, const ParsedFlags& flags, const bench::BenchReport& report,
                OrderedJson facts) {
  facts["dataset_name"] = flags.text("dataset-name");
  facts["seed"] = flags.count("seed");
  facts["num_prompts"] = static_cast<int64_t>(report.requests.size()) + report.not_sent;
  facts.update(report.ToJson(flags.boolean("save-detailed")));
  if (flags.boolean("json")) {
    std::printf("%s\n", facts.dump(2).c_str());
  } else {
    std::fputs(report.ToText().c_str(), stdout);
  }
  if (flags.given("result-filename")) {
    const Status status = WriteFile(flags.text("result-filename"), facts.dump(2) + "\n");
    if (!status.ok()) return Fail(command, status.message(), kExitUnavailable);
  }
  if (report.interrupted) return Fail(command, "interrupted", kExitInterrupted);
  auto failed = std::find_if(report.requests.begin(), report.requests.end(), [](const auto& r) { return !r.ok; });
  if (failed == report.requests.end()) return kExitOk;
  return Fail(command, StrCat("a request failed: ", failed->error), kExitFailure);
}

}  // namespace altiplano::cli
