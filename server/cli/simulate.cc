// A load on the scheduler alone: what would these settings do on that machine?
#include <algorithm>
#include <chrono>
#include <optional>

#include "server/base/json.h"
#include "server/base/strings.h"
#include "server/bench/machine.h"
#include "server/bench/simulation.h"
#include "server/cli/command.h"
#include "server/cli/config.h"
#include "server/cli/load_flags.h"
#include "server/cli/load_model.h"
#include "server/cli/load_run.h"
#include "server/cli/write_file.h"
#include "server/scheduler/flight_recorder.h"

namespace altiplano::cli {

namespace {

constexpr size_t kRecordBytes = 256 << 20;

constexpr std::string_view kSchedulerFlags[] = {"block-size",
                                                "enable-prefix-caching",
                                                "max-num-seqs",
                                                "max-num-batched-tokens",
                                                "max-queued-requests",
                                                "max-queued-tokens",
                                                "max-itl",
                                                "default-ttft-target",
                                                "priority-ageing",
                                                "tenants",
                                                "learn-step-cost"};

StatusOr<bench::SimulationOptions> OptionsOf(const ParsedFlags& flags, const bench::Machine& machine) {
  bench::SimulationOptions options;
  options.cost = machine.cost;
  const int64_t kv_tokens = flags.given("kv-tokens") ? flags.count("kv-tokens") : machine.kv_tokens;
  SchedulerOptions& scheduler = options.scheduler;
  scheduler.block_size = static_cast<int32_t>(BlockSize(flags.count("block-size"), Device::kCpu));
  scheduler.num_blocks = static_cast<int32_t>(kv_tokens / scheduler.block_size);
  scheduler.max_running = static_cast<int32_t>(flags.count("max-num-seqs"));
  scheduler.token_budget = static_cast<int32_t>(flags.count("max-num-batched-tokens"));
  scheduler.max_context = static_cast<int32_t>(flags.count("max-model-len"));
  scheduler.prefix_cache = flags.boolean("enable-prefix-caching");
  options.max_queued_requests = static_cast<int32_t>(flags.count("max-queued-requests"));
  options.max_queued_tokens = flags.count("max-queued-tokens");
  scheduler.max_itl = flags.duration("max-itl");
  scheduler.step_cost = machine.cost;
  scheduler.learn_step_cost = flags.boolean("learn-step-cost");
  scheduler.default_ttft_target = flags.duration("default-ttft-target");
  scheduler.priority_ageing = flags.duration("priority-ageing");
  ASSIGN_OR_RETURN(scheduler.tenants, CheckedTenants(flags.text("tenants"), scheduler.max_running,
                                                     options.max_queued_requests, options.max_queued_tokens));
  RETURN_IF_ERROR(CheckBudget(scheduler.token_budget, scheduler.block_size));
  RETURN_IF_ERROR(Scheduler::Create(scheduler).status());
  return options;
}

int RunSimulate(const ParsedFlags& flags) {
  constexpr std::string_view kName = "simulate";
  LoadInterrupt interrupt;
  InterruptOnSignal on_signal(kName, &interrupt);
  auto plan = PlanLoad(flags);
  if (!plan.ok()) return Fail(kName, plan.status().message(), kExitUsage);
  auto machine = bench::FindMachine(flags.text("step-cost"));
  if (!machine.ok()) return Fail(kName, StrCat("--step-cost: ", machine.status().message()), kExitUsage);
  auto options = OptionsOf(flags, *machine);
  if (!options.ok()) return Fail(kName, options.status().message(), kExitUsage);
  const SchedulerOptions& scheduler = options->scheduler;
  auto deadlines = DurationsOf(flags, "deadlines");
  if (!deadlines.ok()) return Fail(kName, deadlines.status().message(), kExitUsage);
  auto load = ReadLoad(&*plan, std::min(scheduler.max_context, scheduler.num_blocks * scheduler.block_size), INT32_MAX,
                       nullptr);
  if (!load.ok()) return Fail(kName, load.status().message(), kExitData);

  for (size_t i = 0; i < load->dataset.requests.size() && !deadlines->empty(); ++i) {
    load->dataset.requests[i].deadline = (*deadlines)[i % deadlines->size()];
  }

  bench::BenchReport& report = plan->report;
  report.title = "Simulated Benchmark Result";
  std::optional<FlightRecorder> recorder;
  if (flags.given("flight-record")) {
    recorder.emplace(scheduler, kRecordBytes);
    options->scheduler.recorder = &*recorder;
  }
  options->interrupted = [&interrupt] { return interrupt.interrupted(); };
  on_signal.Arm();
  auto totals = bench::Simulate(load->dataset, load->arrivals, *options, &report);
  if (!totals.ok()) return Fail(kName, totals.status().message(), kExitUsage);
  if (recorder) {
    const auto unix_time = std::chrono::system_clock::now().time_since_epoch();
    Status status =
        WriteFile(flags.text("flight-record"),
                  recorder->Write(TimePoint(std::chrono::hours(1)) + report.duration, unix_time / Duration(1)));
    if (!status.ok()) return Fail(kName, status.message(), kExitUnavailable);
  }
  const double steps = static_cast<double>(std::max<uint64_t>(1, totals->steps));
  const double seconds = std::max(Seconds(report.duration), 1e-9);
  report.rows = {{"Steps:", static_cast<double>(totals->steps)},
                 {"Mean step (ms):", Milliseconds(totals->busy) / steps},
                 {"Longest step (ms):", Milliseconds(totals->longest_step)},
                 {"Sequences in a step:", static_cast<double>(totals->sequences) / steps},
                 {"Tokens in a step:", static_cast<double>(totals->tokens) / steps},
                 {"Time in steps (%):", 100 * Seconds(totals->busy) / seconds},
                 {"KV blocks held at most (%):", 100.0 * totals->peak_blocks / scheduler.num_blocks}};
  if (scheduler.max_itl > Duration(0)) {
    report.rows.insert(report.rows.end(),
                       {{"Tokens later than max-itl:", static_cast<double>(totals->load.late_tokens)},
                        {"Latest by (ms):", Milliseconds(totals->load.late_most)}});
  }
  if (!plan->ttft_targets.empty()) {
    report.rows.insert(report.rows.end(), {{"TTFT targets met:", static_cast<double>(totals->load.targets_met)},
                                           {"TTFT targets missed:", static_cast<double>(totals->load.targets_missed)}});
  }
  OrderedJson served = OrderedJson::object();  // tokens, by tenant
  for (size_t i = 0; i < scheduler.tenants.size(); ++i) {
    const TenantLoad& tenant = totals->load.tenants[i];
    served[scheduler.tenants[i].name] = {{"prompt_tokens", tenant.prompt_tokens},
                                         {"generated_tokens", tenant.generated_tokens}};
  }
  report.notes.push_back(StrCat("simulated with step cost ", machine->name, " (", machine->description,
                                "); no network, no text, no gRPC"));
  return PrintReport(kName, flags, report,
                     {{"simulated", true},
                      {"step_cost", machine->name},
                      {"kv_tokens", int64_t{scheduler.num_blocks} * scheduler.block_size},
                      {"steps", totals->steps},
                      {"mean_step_ms", Milliseconds(totals->busy) / steps},
                      {"longest_step_ms", Milliseconds(totals->longest_step)},
                      {"mean_step_sequences", static_cast<double>(totals->sequences) / steps},
                      {"mean_step_tokens", static_cast<double>(totals->tokens) / steps},
                      {"busy_percent", 100 * Seconds(totals->busy) / seconds},
                      {"late_tokens", totals->load.late_tokens},
                      {"late_total_ms", Milliseconds(totals->load.late_total)},
                      {"late_most_ms", Milliseconds(totals->load.late_most)},
                      {"targets_met", totals->load.targets_met},
                      {"targets_missed", totals->load.targets_missed},
                      {"hopeless", totals->load.hopeless},
                      {"tenants", std::move(served)},
                      {"peak_kv_percent", 100.0 * totals->peak_blocks / scheduler.num_blocks}});
}

}  // namespace

Subcommand SimulateCommand() {
  Subcommand subcommand{
      .command =
          {.name = "simulate",
           .summary = "run a load on the real scheduler with a formula for the device, in no time",
           .synopsis = "altiplano simulate --step-cost 70b-8xh200 --dataset-name azure --dataset-path FILE "
                       "--request-rate trace",
           .notes =
               "The scheduler is the server's own, the clock is turned from step to step, and a step takes what the\n"
               "formula of docs/load_tests.md says. The same arguments give the same table.\n"
               "SIGINT or SIGTERM: what has been simulated is reported, exit code 130. A second one ends the\n"
               "program at once.",
           .flags = {{.name = "step-cost",
                      .type = FlagType::kText,
                      .default_value = "8b-h200",
                      .meaning =
                          "What a step costs: 8b-h100, 8b-h200, 70b-8xh100, 70b-8xh200, 405b-8xh100, 405b-8xh200, "
                          "or a file such as config/step_cost.json.",
                      .example = "config/step_cost.json",
                      .group = "Machine"},
                     {.name = "kv-tokens",
                      .type = FlagType::kCount,
                      .meaning = "Tokens that the KV cache holds, instead of what the step cost says.",
                      .example = "100000",
                      .min = 1,
                      .max = INT32_MAX,
                      .group = "Machine"},
                     {.name = "max-model-len",
                      .type = FlagType::kCount,
                      .default_value = "131072",
                      .meaning = "Most tokens of a prompt and its answer together.",
                      .example = "8192",
                      .min = 2,
                      .max = 1 << 24,
                      .group = "Machine"},
                     {.name = "deadlines",
                      .type = FlagType::kText,
                      .meaning = "Deadlines of the requests in turn, from their sending, separated by commas. 0: none.",
                      .example = "2s,0",
                      .group = "Requests"},
                     {.name = "flight-record",
                      .type = FlagType::kPath,
                      .meaning = "Write the last 256 MiB of what the scheduler decided to this file, for altiplano "
                                 "replay. Times in it count from an hour before the load begins.",
                      .example = "simulated.flight",
                      .group = "Report"}}},
      .run = RunSimulate};
  std::vector<Flag>& flags = subcommand.command.flags;
  for (Flag& flag : LoadFlags()) flags.push_back(flag);
  for (const Flag& setting : Settings()) {
    if (std::find(std::begin(kSchedulerFlags), std::end(kSchedulerFlags), setting.name) == std::end(kSchedulerFlags)) {
      continue;
    }
    Flag& flag = flags.emplace_back(setting);
    flag.field = {};                                                   // there is no config file here
    if (flag.name == "learn-step-cost") flag.default_value = "false";  // the formula is the truth here
    flag.group = kGroupScheduling;
  }
  return subcommand;
}

}  // namespace altiplano::cli
