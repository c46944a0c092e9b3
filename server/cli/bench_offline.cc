// The engine without a front end: how fast prefill and decode are with 1, 8 and 32 streams, or what a load does to it.
#include <algorithm>
#include <condition_variable>
#include <cstdio>
#include <mutex>
#include <optional>
#include <random>
#include <utility>
#include <vector>

#include "server/base/json.h"
#include "server/base/strings.h"
#include "server/bench/capacity.h"
#include "server/bench/machine.h"
#include "server/bench/report.h"
#include "server/cli/command.h"
#include "server/cli/config.h"
#include "server/cli/load_flags.h"
#include "server/cli/load_model.h"
#include "server/cli/load_run.h"
#include "server/cli/local_server.h"
#include "server/cli/step_cost_file.h"
#include "server/cli/terminal.h"
#include "server/cli/units.h"

namespace altiplano::cli {

namespace {

// When each token of one stream came.
class TimingSink : public RequestSink {
 public:
  void OnEvent(Event event) override {
    std::lock_guard lock(mutex_);
    if (event.kind == Event::Kind::kToken) times_.push_back(Clock::Real().Now());
    if (event.kind != Event::Kind::kEnded) return;
    status_ = event.status;
    ended_ = true;
    changed_.notify_all();
  }
  Status WaitForEnd() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return ended_; });
    return status_;
  }
  const std::vector<TimePoint>& times() const { return times_; }  // after WaitForEnd

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<TimePoint> times_;
  Status status_;
  bool ended_ = false;
};

// What the engines' threads say of their steps.
class StepTimesLog {
 public:
  void Add(const StepTimes& times) {
    std::lock_guard lock(mutex_);
    times_.push_back(times);
  }
  std::vector<StepTimes> Take() {
    std::lock_guard lock(mutex_);
    return std::exchange(times_, {});
  }

 private:
  std::mutex mutex_;
  std::vector<StepTimes> times_;
};

// Of the steps that decode the most sequences, the streams all together, in microseconds.
struct DecodeSteps {
  int64_t count = 0, from_graphs = 0;
  bench::Distribution idle, issue, device;
};

DecodeSteps DescribeDecodeSteps(const std::vector<StepTimes>& steps) {
  int32_t most = 0;
  for (const StepTimes& step : steps) most = std::max(most, step.decodes ? step.sequences : 0);
  std::vector<double> idle, issue, device;
  DecodeSteps found;
  for (const StepTimes& step : steps) {
    if (!step.decodes || step.sequences < most) continue;
    ++found.count;
    found.from_graphs += step.from_graph;
    idle.push_back(1e6 * Seconds(step.idle));
    issue.push_back(1e6 * Seconds(step.issue));
    device.push_back(1e6 * Seconds(step.device));
  }
  const std::vector<double> percentiles = {90};
  found.idle = bench::Describe(std::move(idle), percentiles);
  found.issue = bench::Describe(std::move(issue), percentiles);
  found.device = bench::Describe(std::move(device), percentiles);
  return found;
}

OrderedJson ToJson(const bench::Distribution& microseconds) {
  OrderedJson json = {{"median", microseconds.median}, {"mean", microseconds.mean}, {"max", microseconds.max}};
  for (const auto& [percent, value] : microseconds.percentiles) json[StrCat("p", percent)] = value;
  return json;
}

// Requests of the engine that one may want to end together. Any thread.
class LiveRequests {
 public:
  void Add(RequestHandle handle) {
    std::lock_guard lock(mutex_);
    handles_.push_back(std::move(handle));
    if (cancelled_) Cancel(&handles_.back());
  }
  void CancelAll() {
    std::lock_guard lock(mutex_);
    cancelled_ = true;
    for (RequestHandle& handle : handles_) Cancel(&handle);
  }

 private:
  static void Cancel(RequestHandle* handle) { handle->Cancel(Status(Code::kCancelled, "interrupted")); }

  std::mutex mutex_;
  std::vector<RequestHandle> handles_;
  bool cancelled_ = false;
};

struct Result {
  int64_t streams = 0;
  double ttft_mean = 0, ttft_max = 0;  // seconds
  double prefill_rate = 0;             // prompt tokens a second until the last stream has its first token
  // Tokens a second of all streams while all decode; none: they never do.
  std::optional<double> decode_rate = {};
  double rate = 0;  // tokens a second, prompts and answers, from the first to the last
  DecodeSteps decode_steps = {};
};

// CANCELLED when it is interrupted.
StatusOr<Result> Measure(LoadedModel& model, StepTimesLog* log, int64_t streams, int64_t input_len, int64_t output_len,
                         uint64_t seed, LoadInterrupt& interrupt) {
  std::mt19937_64 random(seed);
  std::vector<std::shared_ptr<Request>> requests;
  for (int64_t i = 0; i < streams; ++i) {
    auto request = std::make_shared<Request>();
    request->id = StrCat("bench-", i);
    while (static_cast<int64_t>(request->prompt.size()) < input_len) {
      auto id = static_cast<TokenId>(random() % static_cast<uint64_t>(model.text.tokenizer->vocab_size()));
      if (!model.text.tokenizer->IsSpecial(id)) request->prompt.push_back(id);
    }
    request->sampling.temperature = 0;
    request->stop.max_new_tokens = static_cast<int32_t>(output_len);
    request->stop.ignore_eos = true;
    request->bypass_prefix_cache = true;
    requests.push_back(std::move(request));
  }
  std::vector<std::shared_ptr<TimingSink>> sinks;
  log->Take();  // of what was measured before
  LiveRequests live;
  LoadInterrupt::Watch watch(interrupt, [&live] { live.CancelAll(); });
  TimePoint begin = Clock::Real().Now();
  for (auto& request : requests) {
    request->arrival = Clock::Real().Now();
    sinks.push_back(std::make_shared<TimingSink>());
    ASSIGN_OR_RETURN(RequestHandle handle, model.engine->Submit(request, sinks.back()));
    live.Add(std::move(handle));
  }
  Result result{.streams = streams};
  TimePoint all_first = begin, first_end = kNever, last_end = begin;
  for (auto& sink : sinks) {
    RETURN_IF_ERROR(sink->WaitForEnd());
    double ttft = Seconds(sink->times().front() - begin);
    result.ttft_mean += ttft / static_cast<double>(streams);
    result.ttft_max = std::max(result.ttft_max, ttft);
    all_first = std::max(all_first, sink->times().front());
    first_end = std::min(first_end, sink->times().back());
    last_end = std::max(last_end, sink->times().back());
  }
  int64_t decoded = 0;
  for (auto& sink : sinks) {
    for (TimePoint time : sink->times()) decoded += time > all_first && time <= first_end;
  }
  result.prefill_rate = static_cast<double>(streams * input_len) / Seconds(all_first - begin);
  result.rate = static_cast<double>(streams * (input_len + output_len)) / Seconds(last_end - begin);
  if (first_end > all_first) result.decode_rate = static_cast<double>(decoded) / Seconds(first_end - all_first);
  result.decode_steps = DescribeDecodeSteps(log->Take());
  return result;
}

// --- A load ----------------------------------------------------------------------------------------------------------

// Sees one request's events as a client would see its stream.
class RecordingSink : public RequestSink {
 public:
  RecordingSink(uint64_t input_tokens, LoadTarget::Done done, std::function<void()> on_token)
      : sent_(Clock::Real().Now()), done_(std::move(done)), on_token_(std::move(on_token)) {
    record_.input_tokens = input_tokens;
  }
  void OnEvent(Event event) override {
    const TimePoint now = Clock::Real().Now();
    if (event.kind == Event::Kind::kAdmitted) record_.cached_tokens = event.cached_tokens;
    if (event.kind == Event::Kind::kToken) {
      if (record_.output_tokens++ == 0) {
        record_.ttft = now - sent_;
      } else {
        record_.itl.push_back(now - last_);
      }
      last_ = now;
      on_token_();
    }
    if (event.kind != Event::Kind::kEnded) return;
    record_.queued = event.timing.queued;
    record_.preemptions = event.timing.preemptions;
    End(event.status);
  }
  void End(const Status& status) {
    record_.ok = status.ok();
    if (!record_.ok) {
      record_.error_code = StrCat(CodeName(status.code()), status.reason().empty() ? "" : " ", status.reason());
      record_.error = status.ToString();
    }
    record_.latency = Clock::Real().Now() - sent_;
    done_(std::move(record_));
  }

 private:
  const TimePoint sent_;
  const LoadTarget::Done done_;
  const std::function<void()> on_token_;
  bench::RequestRecord record_;
  TimePoint last_{};
};

class EngineTarget : public LoadTarget {
 public:
  EngineTarget(InferenceEngine& engine, bench::Vocabulary vocabulary)
      : engine_(engine), vocabulary_(std::move(vocabulary)) {}

  std::function<void(Done)> Prepare(const bench::LoadRequest& load) override {
    auto request = std::make_shared<Request>();
    request->id = StrCat("bench-", prepared_++);
    request->prompt = bench::PromptOf(load, vocabulary_);
    request->sampling.temperature = 0;
    request->stop.max_new_tokens = load.output_tokens;
    request->ttft_target = load.ttft_target;
    request->priority = load.priority;
    request->tenant = load.tenant;
    request->stop.ignore_eos = true;
    return [this, request](const Done& done) {
      request->arrival = Clock::Real().Now();
      auto sink = std::make_shared<RecordingSink>(request->prompt.size(), done, [this] { CountTokens(1); });
      auto handle = engine_.Submit(request, sink);
      if (handle.ok()) {
        live_.Add(std::move(*handle));
      } else {
        sink->End(handle.status());
      }
    };
  }
  void Cancel() override { live_.CancelAll(); }

 private:
  InferenceEngine& engine_;
  const bench::Vocabulary vocabulary_;
  size_t prepared_ = 0;  // the sending thread's
  LiveRequests live_;
};

// --write-step-cost: from the flight record of what was measured.
int WriteStepCost(const ParsedFlags& flags, const LoadedModel& model) {
  constexpr std::string_view kName = "bench offline";
  if (!flags.given("write-step-cost")) return kExitOk;
  auto file = model.engine->FlightRecord(0);
  if (!file.ok()) return Fail(kName, StrCat("--write-step-cost: ", file.status().message()), kExitUsage);
  const std::string& path = flags.text("write-step-cost");
  const std::string what = StrCat("fitted to ", model.name, ", ", model.dtype, ", on ", model.device);
  auto said = FitAndWriteStepCost(*ParseFlightRecord(*file), what, model.kv_tokens, path);
  if (!said.ok()) return Fail(kName, StrCat("--write-step-cost: ", said.status().message()), kExitFailure);
  std::fprintf(stderr, "%s\n", said->c_str());
  return kExitOk;
}

int RunDataset(const ParsedFlags& flags, LoadPlan plan, LoadedModel& model, LoadInterrupt& interrupt) {
  constexpr std::string_view kName = "bench offline";
  const Tokenizer& tokenizer = *model.text.tokenizer;
  auto tokenize = [&tokenizer](const std::string& text) -> StatusOr<std::vector<TokenId>> {
    std::vector<TokenId> ids;
    tokenizer.Encode(text, &ids);
    return ids;
  };
  auto load = ReadLoad(&plan, model.engine->max_servable_tokens(), tokenizer.vocab_size(), tokenize);
  if (!load.ok()) return Fail(kName, load.status().message(), kExitData);
  bench::Vocabulary vocabulary{.size = tokenizer.vocab_size(), .excluded = {}};
  for (TokenId id = 0; id < vocabulary.size; ++id) {
    if (tokenizer.IsSpecial(id)) vocabulary.excluded.push_back(id);
  }
  EngineTarget target(*model.engine, std::move(vocabulary));
  {
    LoadStatePrinter printer(stderr);
    RunLoad(*load, target, interrupt, &printer, &plan.report);
  }
  plan.report.title = "Engine Benchmark Result";
  const SchedulerLoad learned = Total(model.engine->loads()).scheduler;
  const bench::Machine machine{
      .name = {},
      .description = StrCat("learned from ", learned.measured_steps, " steps of ", model.name, " on ", model.device),
      .kv_tokens = model.kv_tokens,
      .cost = learned.step_cost};
  plan.report.rows.emplace_back("Step time predicted off by (%):", 100 * learned.step_cost_error);
  const int code = PrintReport(kName, flags, plan.report,
                               {{"model_id", model.name},
                                {"device", model.device},
                                {"dtype", model.dtype},
                                {"step_cost", bench::ToJson(machine)},
                                {"measured_steps", learned.measured_steps},
                                {"step_cost_error_percent", 100 * learned.step_cost_error}});
  return plan.report.interrupted ? code : std::max(code, WriteStepCost(flags, model));
}

OrderedJson ToJson(const Result& result) {
  return {{"streams", result.streams},
          {"mean_ttft_ms", result.ttft_mean * 1e3},
          {"max_ttft_ms", result.ttft_max * 1e3},
          {"prefill_tokens_per_second", result.prefill_rate},
          {"decode_tokens_per_second", result.decode_rate ? OrderedJson(*result.decode_rate) : OrderedJson()},
          {"tokens_per_second", result.rate},
          {"decode_steps", result.decode_steps.count},
          {"decode_steps_from_graphs", result.decode_steps.from_graphs},
          {"host_gap_us", ToJson(result.decode_steps.idle)},
          {"issue_us", ToJson(result.decode_steps.issue)},
          {"device_step_us", ToJson(result.decode_steps.device)}};
}

// Of one step; "summed" is false where they were left out.
OrderedJson AllReducesOf(const ParsedFlags& flags, const LoadedModel& model) {
  const bench::AllReduces sums = bench::AllReducesOf(model.checkpoint->config(), model.tensor_parallel);
  return {{"a_step", sums.calls}, {"token_bytes", sums.token_bytes}, {"summed", !flags.boolean("without-all-reduces")}};
}

int RunStreams(const ParsedFlags& flags, const std::vector<int64_t>& streams, LoadedModel& model, StepTimesLog* log,
               LoadInterrupt& interrupt) {
  const int64_t input_len = flags.count("input-len");
  const int64_t output_len = flags.given("output-len") ? flags.count("output-len") : 64;
  if (output_len < 2) return Fail("bench offline", "--output-len must be at least 2 to have a decode rate", kExitUsage);
  OrderedJson json = {{"model", model.name},
                      {"device", model.device},
                      {"dtype", model.dtype},
                      {"weight_bytes", model.weight_bytes},
                      {"tensor_parallel", model.tensor_parallel},
                      {"all_reduces", AllReducesOf(flags, model)},
                      {"input_len", input_len},
                      {"output_len", output_len},
                      {"results", OrderedJson::array()}};
  bool as_json = flags.boolean("json");
  if (!as_json) {
    std::printf("%s, %s, %s of weights, on %s; %lld + %lld tokens a stream\n", model.name.c_str(), model.dtype.c_str(),
                HumanBytes(model.weight_bytes).c_str(), model.device.c_str(), static_cast<long long>(input_len),
                static_cast<long long>(output_len));
    std::printf("%8s %14s %14s %16s %16s %14s %12s %10s\n", "streams", "mean TTFT ms", "max TTFT ms", "prefill tok/s",
                "decode tok/s", "weights GB/s", "host gap us", "issue us");
  }
  bool all_decoded = true;
  Status failure;
  for (int64_t count : streams) {
    const auto seed = static_cast<uint64_t>(flags.count("seed"));
    auto result = Measure(model, log, count, input_len, output_len, seed, interrupt);
    if (!result.ok()) {  // what was measured before is worth telling
      if (!interrupt.interrupted()) failure = result.status();
      break;
    }
    json["results"].push_back(ToJson(*result));
    // While all streams decode, each step reads every weight once and yields one token for each stream.
    std::string decode = "-", weights = "-";
    if (result->decode_rate) {
      decode = StrFormat("%.1f", *result->decode_rate);
      const double steps = *result->decode_rate / static_cast<double>(count);
      weights = StrFormat("%.2f", steps * static_cast<double>(model.weight_bytes) / 1e9);
    }
    all_decoded = all_decoded && result->decode_rate;
    if (as_json) continue;
    std::printf("%8lld %14.1f %14.1f %16.1f %16s %14s %12.1f %10.1f\n", static_cast<long long>(count),
                result->ttft_mean * 1e3, result->ttft_max * 1e3, result->prefill_rate, decode.c_str(), weights.c_str(),
                result->decode_steps.idle.median, result->decode_steps.issue.median);
    std::fflush(stdout);
  }
  if (!as_json && !all_decoded) {
    std::printf(
        "-: at no time all streams decoded, since some had ended before others began; raise --output-len,\n"
        "--max-num-seqs or --kv-memory\n");
  }
  const bool interrupted = failure.ok() && json["results"].size() < streams.size();
  json["interrupted"] = interrupted;
  if (as_json) std::printf("%s\n", json.dump(2).c_str());
  if (!failure.ok()) return Fail("bench offline", failure.ToString(), kExitFailure);
  if (interrupted) return Fail("bench offline", "interrupted", kExitInterrupted);
  return WriteStepCost(flags, model);
}

int RunBenchOffline(const ParsedFlags& flags) {
  constexpr std::string_view kName = "bench offline";
  LoadInterrupt interrupt;
  InterruptOnSignal on_signal(kName, &interrupt);
  auto streams = ParseCounts(flags.text("streams"), 1, 65536);
  if (!streams.ok()) return Fail(kName, StrCat("--streams: ", streams.status().message()), kExitUsage);
  auto plan = PlanLoad(flags);
  if (!plan.ok()) return Fail(kName, plan.status().message(), kExitUsage);
  const bool with_dataset = flags.given("dataset-name");
  if (with_dataset && flags.given("streams")) {
    return Fail(kName, "--streams and --dataset-name exclude each other", kExitUsage);
  }
  auto config = ResolveOffline(flags);
  if (!config.ok()) return Fail(kName, config.status().message(), kExitUsage);
  const bool without_all_reduces = flags.boolean("without-all-reduces");
  if (without_all_reduces && config->values.model().tensor_parallel() == 1) {
    return Fail(kName, "--without-all-reduces needs --tensor-parallel: one rank sums nothing", kExitUsage);
  }
  StepTimesLog log;
  LoadHooks hooks{
      .progress = LoadProgressPrinter(), .cancelled = {}, .on_step = {}, .on_start_hang = EndHungStart(kName)};
  if (!with_dataset) hooks.on_step_times = [&log](const StepTimes& times) { log.Add(times); };
  hooks.without_all_reduces = without_all_reduces;
  auto model = LoadModel(config->values, hooks);
  if (!model.ok()) return Fail(kName, model.status().message(), ExitCodeOfLoad(model.status()));
  on_signal.Arm();
  return with_dataset ? RunDataset(flags, std::move(*plan), *model, interrupt)
                      : RunStreams(flags, *streams, *model, &log, interrupt);
}

}  // namespace

Subcommand BenchOfflineCommand() {
  Subcommand subcommand{
      .command =
          {.name = "bench offline",
           .summary = "measure the engine without a server: at 1, 8 and 32 streams, or under a load",
           .synopsis = "altiplano bench offline --model MODEL",
           .notes =
               "Without --dataset-name all streams start at once; decode tok/s counts the tokens of all streams "
               "while\n"
               "every stream decodes; the host gap is how long the device waits between two such steps, and issue\n"
               "how long the host takes to enqueue one, medians of both. With it, the engine is loaded as bench serve "
               "loads a server.\n"
               "SIGINT or SIGTERM: what has been measured is reported, exit code 130. A second one ends the\n"
               "program at once.",
           .flags = {{.name = "streams",
                      .type = FlagType::kText,
                      .default_value = "1,8,32",
                      .meaning = "Numbers of streams to measure, separated by commas.",
                      .example = "1,64"},
                     {.name = "without-all-reduces",
                      .type = FlagType::kBool,
                      .default_value = "false",
                      .meaning = "Tensor-parallel ranks leave out their sums: what they answer is wrong, and how much "
                                 "sooner says what the sums cost."},
                     {.name = "write-step-cost",
                      .type = FlagType::kPath,
                      .meaning = "Fit what a step costs to the steps measured here and write it to this file, "
                                 "for --step-cost of serve and simulate.",
                      .example = "step_cost.json"}}},
      .run = RunBenchOffline};
  for (Flag& flag : LoadFlags()) subcommand.command.flags.push_back(flag);
  for (Flag& flag : OfflineFlags()) subcommand.command.flags.push_back(flag);
  return subcommand;
}

}  // namespace altiplano::cli
