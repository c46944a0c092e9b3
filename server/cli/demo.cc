// Questions asked at once, the answers streamed side by side: what ./run demo shows.
#include <atomic>
#include <cstdio>
#include <thread>

#include "server/base/strings.h"
#include "server/cli/command.h"
#include "server/cli/request_flags.h"
#include "server/cli/terminal.h"

namespace altiplano::cli {

namespace {

struct Stream {
  std::string question;
  Answer answer;
  Status status;
};

// The most KV blocks in use while it lives, by asking every few milliseconds.
class LoadWatcher {
 public:
  explicit LoadWatcher(Client& client) : client_(client), thread_([this] { Loop(); }) {}
  v1::Load Stop() {
    stop_ = true;
    thread_.join();
    return peak_;
  }

 private:
  void Loop() {
    while (!stop_) {
      auto load = client_.GetLoad();
      if (load.ok() && load->kv_blocks_used() >= peak_.kv_blocks_used()) peak_ = *load;
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
    }
  }

  Client& client_;
  std::atomic<bool> stop_ = false;
  v1::Load peak_;  // the thread's until it is joined
  std::thread thread_;
};

v1::GenerateRequest MakeRequest(const ParsedFlags& flags, const std::string& question, bool chat) {
  v1::GenerateRequest request;
  FillSampling(flags, &request);
  if (!flags.given("max-tokens")) request.mutable_stopping()->set_max_new_tokens(120);
  if (!flags.given("temperature")) request.mutable_sampling()->set_temperature(0);
  if (chat) {
    auto* message = request.mutable_chat()->add_messages();
    message->set_role(v1::ROLE_USER);
    message->set_content(question);
  } else {
    request.set_text(question);
  }
  return request;
}

void PrintSummary(const std::vector<Stream>& streams, Duration total, const v1::Load& peak) {
  uint64_t tokens = 0;
  for (size_t i = 0; i < streams.size(); ++i) {
    const Answer& answer = streams[i].answer;
    tokens += answer.tokens;
    std::printf("%zu  %u prompt tokens, %llu answered, TTFT %s, then %.1f tok/s, finish %s\n", i + 1,
                answer.usage.prompt_tokens(), static_cast<unsigned long long>(answer.tokens),
                HumanTime(answer.first_token).c_str(), answer.TokensPerSecond(),
                answer.finishes.empty() ? "unspecified" : std::string(FinishName(answer.finishes[0].reason())).c_str());
  }
  std::printf("together %llu tokens in %s, %.1f tok/s\n", static_cast<unsigned long long>(tokens),
              HumanTime(total).c_str(), static_cast<double>(tokens) / Seconds(total));
  double share = peak.kv_blocks_total() > 0
                     ? 100.0 * static_cast<double>(peak.kv_blocks_used()) / static_cast<double>(peak.kv_blocks_total())
                     : 0;
  std::printf("KV cache: at most %llu of %llu blocks in use (%.2f %%), %u tokens each\n",
              static_cast<unsigned long long>(peak.kv_blocks_used()),
              static_cast<unsigned long long>(peak.kv_blocks_total()), share, peak.kv_block_tokens());
}

int RunDemo(const ParsedFlags& flags) {
  auto client = ConnectTo(flags);
  if (!client.ok()) return Fail("demo", client.status().message(), kExitUnavailable);
  auto models = (*client)->ListModels();
  if (!models.ok()) return FailCall("demo", models.status());
  if (models->models().empty()) return Fail("demo", "the server has no model", kExitFailure);
  const v1::Model& model = models->models(0);
  bool chat = !model.chat_format().empty() && model.chat_format() != "none";

  std::vector<Stream> streams;
  for (const std::string& question : flags.all("prompt"))
    streams.push_back({.question = question, .answer = {}, .status = {}});
  if (streams.empty()) {
    streams.push_back({.question = "What is the capital of France?", .answer = {}, .status = {}});
    streams.push_back({.question = "Tell me a short story about a fox.", .answer = {}, .status = {}});
  }
  std::printf("%s at %s, %zu question%s at once:\n", Printable(model.name()).c_str(), flags.text("url").c_str(),
              streams.size(), streams.size() == 1 ? "" : "s");
  std::vector<std::string> labels;
  for (size_t i = 0; i < streams.size(); ++i) {
    std::printf("%zu? %s\n", i + 1, streams[i].question.c_str());
    labels.push_back(StrCat(i + 1, "| "));
  }
  std::printf("\n");

  InterleavedPrinter printer(stdout, labels, 96, TakesEscapes(stdout));
  LoadWatcher watcher(**client);
  TimePoint begin = Clock::Real().Now();
  std::vector<std::thread> threads;
  for (size_t i = 0; i < streams.size(); ++i) {
    threads.emplace_back([&, i] {
      Stream& stream = streams[i];
      stream.status = (*client)->StreamGenerate(
          MakeRequest(flags, stream.question, chat), [&](const v1::Delta& delta) { printer.Print(i, delta.text()); },
          &stream.answer);
      printer.Finish(i);
    });
  }
  for (std::thread& thread : threads) thread.join();
  Duration total = Clock::Real().Now() - begin;
  v1::Load peak = watcher.Stop();
  for (const Stream& stream : streams) {
    if (!stream.status.ok()) return FailCall("demo", stream.status);
  }
  std::printf("\n");
  PrintSummary(streams, total, peak);
  return kExitOk;
}

}  // namespace

Subcommand DemoCommand() {
  Subcommand subcommand{
      .command =
          {.name = "demo",
           .summary = "ask a server several questions at once and show the answers side by side",
           .synopsis = "altiplano demo [--url HOST:PORT] [--prompt TEXT]...",
           .notes = "Unlike the other commands it answers greedily and with at most 120 tokens unless told otherwise.",
           .flags = {UrlFlag(),
                     {.name = "prompt",
                      .type = FlagType::kText,
                      .meaning = "A question. Without any: two that come with the program.",
                      .example = "'Why is the sky blue?'",
                      .repeated = true}}},
      .run = RunDemo};
  for (Flag& flag : SamplingFlags()) subcommand.command.flags.push_back(flag);
  return subcommand;
}

}  // namespace altiplano::cli
