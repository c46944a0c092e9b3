// The engine without a front end: how fast prefill and decode are with 1, 8 and 32 streams.
#include <algorithm>
#include <condition_variable>
#include <cstdio>
#include <mutex>
#include <random>

#include "server/base/json.h"
#include "server/base/strings.h"
#include "server/cli/command.h"
#include "server/cli/config.h"
#include "server/cli/load_model.h"
#include "server/cli/local_server.h"
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

struct Result {
  int64_t streams = 0;
  double ttft_mean = 0, ttft_max = 0;  // seconds
  double prefill_rate = 0;             // prompt tokens a second until the last stream has its first token
  double decode_rate = 0;              // tokens a second of all streams while all decode
  double rate = 0;                     // tokens a second, prompts and answers, from the first to the last
};

StatusOr<Result> Measure(LoadedModel& model, int64_t streams, int64_t input_len, int64_t output_len, uint64_t seed) {
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
  std::vector<RequestHandle> handles;
  TimePoint begin = Clock::Real().Now();
  for (auto& request : requests) {
    request->arrival = Clock::Real().Now();
    sinks.push_back(std::make_shared<TimingSink>());
    ASSIGN_OR_RETURN(RequestHandle handle, model.engine->Submit(request, sinks.back()));
    handles.push_back(std::move(handle));
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
  return result;
}

StatusOr<std::vector<int64_t>> ParseStreams(std::string_view text) {
  std::vector<int64_t> streams;
  while (!text.empty()) {
    size_t comma = std::min(text.find(','), text.size());
    auto value = ParseCount(text.substr(0, comma), 1, 65536);
    if (!value.ok()) return Status(Code::kInvalidArgument, "--streams must be whole numbers such as 1,8,32");
    streams.push_back(*value);
    text.remove_prefix(std::min(comma + 1, text.size()));
  }
  return streams;
}

OrderedJson ToJson(const Result& result) {
  return {{"streams", result.streams},
          {"mean_ttft_ms", result.ttft_mean * 1e3},
          {"max_ttft_ms", result.ttft_max * 1e3},
          {"prefill_tokens_per_second", result.prefill_rate},
          {"decode_tokens_per_second", result.decode_rate},
          {"tokens_per_second", result.rate}};
}

int Run(const ParsedFlags& flags) {
  auto streams = ParseStreams(flags.text("streams"));
  if (!streams.ok()) return Fail("bench offline", streams.status().message(), kExitUsage);
  auto config = ResolveOffline(flags);
  if (!config.ok()) return Fail("bench offline", config.status().message(), kExitUsage);
  auto model = LoadModel(config->values, {.progress = LoadProgressPrinter(), .cancelled = {}, .on_step = {}});
  if (!model.ok()) return Fail("bench offline", model.status().message(), ExitCodeOfLoad(model.status()));

  OrderedJson json = {{"model", model->name},
                      {"device", model->device},
                      {"dtype", model->dtype},
                      {"weight_bytes", model->weight_bytes},
                      {"input_len", flags.count("input-len")},
                      {"output_len", flags.count("output-len")},
                      {"results", OrderedJson::array()}};
  bool as_json = flags.boolean("json");
  if (!as_json) {
    std::printf("%s, %s, %s of weights, on %s; %lld + %lld tokens a stream\n", model->name.c_str(),
                model->dtype.c_str(), HumanBytes(model->weight_bytes).c_str(), model->device.c_str(),
                static_cast<long long>(flags.count("input-len")), static_cast<long long>(flags.count("output-len")));
    std::printf("%8s %14s %14s %16s %16s %14s\n", "streams", "mean TTFT ms", "max TTFT ms", "prefill tok/s",
                "decode tok/s", "weights GB/s");
  }
  for (int64_t count : *streams) {
    auto result = Measure(*model, count, flags.count("input-len"), flags.count("output-len"),
                          static_cast<uint64_t>(flags.count("seed")));
    if (!result.ok()) return Fail("bench offline", result.status().ToString(), kExitFailure);
    json["results"].push_back(ToJson(*result));
    // While all streams decode, each step reads every weight once and yields one token for each stream.
    double steps = result->decode_rate / static_cast<double>(count);
    if (as_json) continue;
    std::printf("%8lld %14.1f %14.1f %16.1f %16.1f %14.2f\n", static_cast<long long>(count), result->ttft_mean * 1e3,
                result->ttft_max * 1e3, result->prefill_rate, result->decode_rate,
                steps * static_cast<double>(model->weight_bytes) / 1e9);
    std::fflush(stdout);
  }
  if (as_json) std::printf("%s\n", json.dump(2).c_str());
  return kExitOk;
}

}  // namespace

Subcommand BenchOfflineCommand() {
  Subcommand subcommand{
      .command =
          {.name = "bench offline",
           .summary = "measure the engine without a server: TTFT and decode rate at 1, 8 and 32 streams",
           .synopsis = "altiplano bench offline --model MODEL",
           .notes =
               "All streams start at once. Decode tok/s counts the tokens of all streams while every stream decodes.",
           .flags = {{.name = "streams",
                      .type = FlagType::kText,
                      .default_value = "1,8,32",
                      .meaning = "Numbers of streams to measure, separated by commas.",
                      .example = "1,64"},
                     {.name = "input-len",
                      .type = FlagType::kCount,
                      .default_value = "128",
                      .meaning = "Tokens of each prompt.",
                      .example = "1024",
                      .min = 1,
                      .max = 1 << 24},
                     {.name = "output-len",
                      .type = FlagType::kCount,
                      .default_value = "64",
                      .meaning = "Tokens of each answer.",
                      .example = "256",
                      .min = 2,
                      .max = 1 << 24},
                     {.name = "seed",
                      .type = FlagType::kCount,
                      .default_value = "0",
                      .meaning = "Of the random prompts.",
                      .example = "1"},
                     {.name = "json",
                      .type = FlagType::kBool,
                      .default_value = "false",
                      .meaning = "Print one JSON object instead of the table."}}},
      .run = Run};
  for (Flag& flag : OfflineFlags()) subcommand.command.flags.push_back(flag);
  return subcommand;
}

}  // namespace altiplano::cli
