// A closed loop against a server: each of --max-concurrency callers sends its next request when the last has ended.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <fstream>
#include <random>
#include <thread>

#include "server/base/strings.h"
#include "server/cli/bench_report.h"
#include "server/cli/command.h"
#include "server/cli/request_flags.h"
#include "server/cli/units.h"

namespace altiplano::cli {

namespace {

// Random token ids, none that ends an answer. Each request has its own generator: the order of callers does not matter.
v1::GenerateRequest MakeRequest(const v1::Model& model, int64_t index, const ParsedFlags& flags) {
  std::mt19937_64 random(static_cast<uint64_t>(flags.count("seed")) * 1000003 + static_cast<uint64_t>(index));
  v1::GenerateRequest request;
  auto* ids = request.mutable_token_ids()->mutable_ids();
  const auto& eos = model.eos_token_ids();
  while (ids->size() < flags.count("input-len")) {
    auto id = static_cast<uint32_t>(random() % model.vocab_size());
    if (std::find(eos.begin(), eos.end(), id) == eos.end()) ids->Add(id);
  }
  request.mutable_sampling()->set_temperature(0);
  request.mutable_stopping()->set_max_new_tokens(static_cast<uint32_t>(flags.count("output-len")));
  request.mutable_stopping()->set_ignore_eos(true);
  return request;
}

RequestRecord Measure(Client& client, const v1::GenerateRequest& request) {
  Answer answer;
  Status status = client.StreamGenerate(
      request, [](const v1::Delta&) {}, &answer);
  return {.ok = status.ok(),
          .error = status.ok() ? "" : DescribeError(status),
          .input_tokens = static_cast<uint64_t>(request.token_ids().ids_size()),
          .output_tokens = answer.tokens,
          .ttft = answer.first_token,
          .latency = answer.total,
          .itl = std::move(answer.intervals)};
}

StatusOr<std::vector<double>> ParsePercentiles(std::string_view text) {
  std::vector<double> percentiles;
  while (!text.empty()) {
    size_t comma = std::min(text.find(','), text.size());
    auto value = ParseReal(text.substr(0, comma));
    if (!value.ok() || *value < 0 || *value > 100) {
      return Status(Code::kInvalidArgument, "--metric-percentiles must be numbers from 0 to 100, such as 50,90,99");
    }
    percentiles.push_back(*value);
    text.remove_prefix(std::min(comma + 1, text.size()));
  }
  return percentiles;
}

BenchReport RunClosedLoop(Client& client, const v1::Model& model, const ParsedFlags& flags) {
  BenchReport report;
  report.max_concurrency = std::min(flags.count("max-concurrency"), flags.count("num-prompts"));
  report.requests.resize(static_cast<size_t>(flags.count("num-prompts")));
  std::atomic<size_t> next = 0;
  TimePoint begin = Clock::Real().Now();
  std::vector<std::thread> callers;
  for (int64_t i = 0; i < report.max_concurrency; ++i) {
    callers.emplace_back([&] {
      for (size_t index = next++; index < report.requests.size(); index = next++) {
        report.requests[index] = Measure(client, MakeRequest(model, static_cast<int64_t>(index), flags));
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  report.duration = Clock::Real().Now() - begin;
  return report;
}

int Run(const ParsedFlags& flags) {
  auto percentiles = ParsePercentiles(flags.text("metric-percentiles"));
  if (!percentiles.ok()) return Fail("bench serve", percentiles.status().message(), kExitUsage);
  auto client = ConnectTo(flags);
  if (!client.ok()) return Fail("bench serve", client.status().message(), kExitUnavailable);
  auto models = (*client)->ListModels();
  if (!models.ok()) return FailCall("bench serve", models.status());
  if (models->models().empty() || models->models(0).vocab_size() < 2) {
    return Fail("bench serve", "the server has no model", kExitFailure);
  }
  const v1::Model& model = models->models(0);
  // One request before the clock starts: connection, and pages that nobody has touched yet.
  RequestRecord warm_up = Measure(**client, MakeRequest(model, -1, flags));
  if (!warm_up.ok) return Fail("bench serve", warm_up.error, kExitFailure);

  BenchReport report = RunClosedLoop(**client, model, flags);
  report.percentiles = *percentiles;
  OrderedJson json = report.ToJson();
  json["model_id"] = model.name();
  json["num_prompts"] = flags.count("num-prompts");
  json["input_len"] = flags.count("input-len");
  json["output_len"] = flags.count("output-len");
  json["seed"] = flags.count("seed");
  if (flags.boolean("json")) {
    std::printf("%s\n", json.dump(2).c_str());
  } else {
    std::fputs(report.ToText().c_str(), stdout);
  }
  if (flags.given("save-result") && !(std::ofstream(flags.text("save-result")) << json.dump(2) << "\n")) {
    return Fail("bench serve", StrCat("cannot write ", flags.text("save-result")), kExitFailure);
  }
  for (const RequestRecord& request : report.requests) {
    if (!request.ok) return Fail("bench serve", StrCat("a request failed: ", request.error), kExitFailure);
  }
  return kExitOk;
}

}  // namespace

Subcommand BenchServeCommand() {
  return {
      .command =
          {.name = "bench serve",
           .summary = "load a server in a closed loop: TTFT, TPOT, ITL and throughput",
           .synopsis = "altiplano bench serve --url HOST:PORT --num-prompts 100 --max-concurrency 8",
           .notes = "Prompts are random token ids, answers are greedy and go on past EOS to --output-len, so that "
                    "every run\n"
                    "does the same work. ITL is the gap between two messages of a stream; a message may carry several\n"
                    "tokens when the client is slow. Names are those of vLLM's bench serve.",
           .flags =
               {UrlFlag(),
                {.name = "num-prompts",
                 .type = FlagType::kCount,
                 .default_value = "100",
                 .meaning = "Requests in all.",
                 .example = "1000",
                 .min = 1,
                 .max = 10000000},
                {.name = "max-concurrency",
                 .type = FlagType::kCount,
                 .default_value = "8",
                 .meaning = "Requests at one time.",
                 .example = "32",
                 .min = 1,
                 .max = 4096},
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
                 .example = "128",
                 .min = 1,
                 .max = 1 << 24},
                {.name = "seed",
                 .type = FlagType::kCount,
                 .default_value = "0",
                 .meaning =
                     "Of the prompts: equal seeds make equal prompts, which a server may find in its prefix cache.",
                 .example = "1",
                 .max = 1ll << 40},
                {.name = "metric-percentiles",
                 .type = FlagType::kText,
                 .default_value = "99",
                 .meaning = "Percentiles to report, separated by commas.",
                 .example = "50,90,99"},
                {.name = "json",
                 .type = FlagType::kBool,
                 .default_value = "false",
                 .meaning = "Print one JSON object instead of the table."},
                {.name = "save-result",
                 .type = FlagType::kPath,
                 .meaning = "Write that JSON object to this file too.",
                 .example = "result.json"}}},
      .run = Run};
}

}  // namespace altiplano::cli
