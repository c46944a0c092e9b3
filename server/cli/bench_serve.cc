// Loads a server over gRPC, as many clients would.
#include <sys/resource.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <thread>

#include "server/base/json.h"
#include "server/base/strings.h"
#include "server/cli/command.h"
#include "server/cli/load_flags.h"
#include "server/cli/load_run.h"
#include "server/cli/request_flags.h"

namespace altiplano::cli {

namespace {

constexpr int64_t kStreamsPerConnection = 50;  // half of what servers allow by default
constexpr int64_t kMaxConnections = 64;

bench::RequestRecord RecordOf(const Status& status, Answer answer, uint64_t input_tokens) {
  bench::RequestRecord record;
  record.ok = status.ok();
  if (!record.ok) {
    record.error_code = StrCat(CodeName(status.code()), status.reason().empty() ? "" : " ", status.reason());
    record.error = DescribeError(status);
  }
  record.input_tokens = input_tokens;
  record.output_tokens = answer.tokens;
  record.cached_tokens = answer.usage.cached_tokens();
  record.preemptions = answer.timing.preemptions();
  record.queued =
      std::chrono::seconds(answer.timing.queued().seconds()) + std::chrono::nanoseconds(answer.timing.queued().nanos());
  record.ttft = answer.first_token;
  record.latency = answer.total;
  record.itl = std::move(answer.intervals);
  return record;
}

class GrpcTarget : public LoadTarget {
 public:
  GrpcTarget(std::vector<std::unique_ptr<Client>> clients, bench::Vocabulary vocabulary, bool ignore_eos)
      : clients_(std::move(clients)), vocabulary_(std::move(vocabulary)), ignore_eos_(ignore_eos) {}

  std::function<void(Done)> Prepare(const bench::LoadRequest& request) override {
    auto message = std::make_shared<v1::GenerateRequest>();
    std::vector<TokenId> prompt = bench::PromptOf(request, vocabulary_);
    message->mutable_token_ids()->mutable_ids()->Add(prompt.begin(), prompt.end());
    message->mutable_sampling()->set_temperature(0);
    message->mutable_stopping()->set_max_new_tokens(static_cast<uint32_t>(request.output_tokens));
    message->mutable_stopping()->set_ignore_eos(ignore_eos_);
    v1::Scheduling& scheduling = *message->mutable_scheduling();
    scheduling.set_priority(request.priority);
    scheduling.set_tenant(request.tenant);
    if (request.ttft_target > Duration(0)) {
      const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(request.ttft_target);
      scheduling.mutable_ttft_target()->set_seconds(seconds.count());
      scheduling.mutable_ttft_target()->set_nanos(static_cast<int32_t>((request.ttft_target - seconds).count()));
    }
    Client& client = *clients_[next_client_++ % clients_.size()];
    return [this, &client, message](const Done& done) {
      const auto input_tokens = static_cast<uint64_t>(message->token_ids().ids_size());
      client.StartGenerate(
          *message, [this](const v1::Delta& delta) { CountTokens(delta.num_tokens()); },
          [done, input_tokens](const Status& status, Answer answer) {
            done(RecordOf(status, std::move(answer), input_tokens));
          },
          &cancellation_);
    };
  }
  void Cancel() override { cancellation_.Cancel(); }

 private:
  const std::vector<std::unique_ptr<Client>> clients_;
  const bench::Vocabulary vocabulary_;
  const bool ignore_eos_;
  Cancellation cancellation_;
  size_t next_client_ = 0;  // the sending thread's
};

double CpuSeconds() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  auto seconds = [](const timeval& t) { return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_usec) / 1e6; };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

// Requests of their own prompts, one after the other: connections, and pages that nobody has touched yet.
Status WarmUp(int64_t count, const LoadPlan& plan, int32_t max_context, GrpcTarget& target, LoadInterrupt& interrupt) {
  if (count == 0) return OkStatus();
  bench::DatasetOptions options;
  options.num_prompts = count;
  options.seed = ~plan.dataset.seed;
  options.input_len = std::min(options.input_len, std::max(1, max_context / 2));
  options.output_len = std::min(8, std::max(1, max_context / 2));
  Load load;
  ASSIGN_OR_RETURN(load.dataset, bench::LoadDataset(options, nullptr));
  load.arrivals.resize(load.dataset.requests.size());
  bench::BenchReport report;
  report.max_concurrency = 1;
  RunLoad(load, target, interrupt, nullptr, &report);
  for (const bench::RequestRecord& request : report.requests) {
    if (!request.ok && !request.cancelled) return Status(Code::kUnknown, StrCat("the warm-up failed: ", request.error));
  }
  return OkStatus();
}

StatusOr<std::vector<std::unique_ptr<Client>>> ConnectAll(const ParsedFlags& flags, int64_t streams) {
  int64_t connections = flags.count("connections");
  if (connections == 0) {
    connections =
        std::clamp<int64_t>((streams + kStreamsPerConnection - 1) / kStreamsPerConnection, 1, kMaxConnections);
  }
  std::vector<std::unique_ptr<Client>> clients;
  for (int64_t i = 0; i < connections; ++i) {
    ASSIGN_OR_RETURN(clients.emplace_back(), ConnectTo(flags));
  }
  return clients;
}

int RunBenchServe(const ParsedFlags& flags) {
  constexpr std::string_view kName = "bench serve";
  LoadInterrupt interrupt;
  InterruptOnSignal on_signal(kName, &interrupt);
  auto plan = PlanLoad(flags);
  if (!plan.ok()) return Fail(kName, plan.status().message(), kExitUsage);
  bench::BenchReport& report = plan->report;
  auto control = ConnectTo(flags);
  if (!control.ok()) return Fail(kName, control.status().message(), kExitUnavailable);
  auto models = (*control)->ListModels();
  if (!models.ok()) return FailCall(kName, models.status());
  if (models->models().empty() || models->models(0).vocab_size() < 2) {
    return Fail(kName, "the server has no model", kExitFailure);
  }
  const v1::Model& model = models->models(0);
  auto server_load = (*control)->GetLoad();
  if (!server_load.ok()) return FailCall(kName, server_load.status());
  const uint64_t kv_tokens = server_load->kv_blocks_total() * server_load->kv_block_tokens();
  const auto max_context = static_cast<int32_t>(std::min<uint64_t>(model.max_context(), kv_tokens));
  auto tokenize = [&control](const std::string& text) -> StatusOr<std::vector<TokenId>> {
    v1::TokenizeRequest request;
    request.set_text(text);
    request.set_omit_bos(true);
    ASSIGN_OR_RETURN(v1::TokenizeResponse response, (*control)->Tokenize(request));
    return std::vector<TokenId>(response.token_ids().begin(), response.token_ids().end());
  };
  auto load = ReadLoad(&*plan, max_context, static_cast<int32_t>(model.vocab_size()), tokenize);
  if (!load.ok()) return Fail(kName, load.status().message(), kExitData);

  const auto requests = static_cast<int64_t>(load->arrivals.size());
  auto clients = ConnectAll(flags, report.max_concurrency > 0 ? std::min(report.max_concurrency, requests) : requests);
  if (!clients.ok()) return Fail(kName, clients.status().message(), kExitUnavailable);
  const size_t connections = clients->size();
  bench::Vocabulary vocabulary{.size = static_cast<int32_t>(model.vocab_size()), .excluded = {}};
  vocabulary.excluded.assign(model.eos_token_ids().begin(), model.eos_token_ids().end());
  GrpcTarget target(std::move(*clients), std::move(vocabulary), flags.boolean("ignore-eos"));
  on_signal.Arm();
  Status warm = WarmUp(flags.count("num-warmups"), *plan, max_context, target, interrupt);
  if (!warm.ok()) return Fail(kName, warm.message(), kExitFailure);

  const double cpu_before = CpuSeconds();
  {
    LoadStatePrinter printer(stderr);
    RunLoad(*load, target, interrupt, &printer, &report);
  }
  bench::ClientUse use{.cpu_seconds = CpuSeconds() - cpu_before,
                       .cores = static_cast<int32_t>(std::max(1u, std::thread::hardware_concurrency()))};
  std::vector<std::string> notes = bench::ClientNotes(use, report);
  report.notes.insert(report.notes.end(), notes.begin(), notes.end());
  return PrintReport(kName, flags, report,
                     {{"model_id", model.name()},
                      {"endpoint", flags.text("url")},
                      {"connections", connections},
                      {"client_cpu_seconds", use.cpu_seconds},
                      {"client_cores", use.cores}});
}

}  // namespace

Subcommand BenchServeCommand() {
  Subcommand subcommand{
      .command =
          {.name = "bench serve",
           .summary = "load a server over gRPC: TTFT, TPOT, ITL, queue time, goodput and throughput",
           .synopsis = "altiplano bench serve --url HOST:PORT --num-prompts 1000 --request-rate 8 --goodput "
                       "ttft:500,tpot:50",
           .notes =
               "Answers are greedy and go on past EOS to the length asked for, so that every run does the same "
               "work.\n"
               "TTFT and E2EL count from when a request was sent. ITL is the gap between two messages of a stream;\n"
               "Queue is the server's own measurement. Notes below the table say when this client was the limit.\n"
               "SIGINT or SIGTERM: nothing more is sent, live requests are cancelled, and the report is of those that\n"
               "have finished, exit code 130. A second one ends the program at once.\n"
               "Names are those of vLLM's bench serve.",
           .flags = {UrlFlag()}},
      .run = RunBenchServe};
  for (Flag& flag : LoadFlags()) subcommand.command.flags.push_back(flag);
  subcommand.command.flags.push_back({.name = "num-warmups",
                                      .type = FlagType::kCount,
                                      .default_value = "1",
                                      .meaning = "Short requests before the clock starts, one after the other.",
                                      .example = "10",
                                      .max = 100000,
                                      .group = "Client"});
  subcommand.command.flags.push_back({.name = "connections",
                                      .type = FlagType::kCount,
                                      .default_value = "0",
                                      .meaning =
                                          "HTTP/2 connections to spread the streams over. 0: one for 50 requests "
                                          "that may run at once, at most 64.",
                                      .example = "8",
                                      .max = 1024,
                                      .group = "Client"});
  subcommand.command.flags.push_back({.name = "ignore-eos",
                                      .type = FlagType::kBool,
                                      .default_value = "true",
                                      .meaning = "Go on past EOS, so that answers have the length asked for.",
                                      .group = "Client"});
  return subcommand;
}

}  // namespace altiplano::cli
