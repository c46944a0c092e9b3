#include <cstdio>

#include "server/base/json.h"
#include "server/base/strings.h"
#include "server/cli/command.h"
#include "server/cli/local_server.h"
#include "server/cli/request_flags.h"
#include "server/cli/terminal.h"

namespace altiplano::cli {

namespace {

v1::GenerateRequest MakeRequest(const ParsedFlags& flags, const std::string& prompt) {
  v1::GenerateRequest request;
  FillSampling(flags, &request);
  if (!flags.boolean("chat")) {
    request.set_text(prompt);
    return request;
  }
  auto* chat = request.mutable_chat();
  if (flags.given("system")) {
    auto* message = chat->add_messages();
    message->set_role(v1::ROLE_SYSTEM);
    message->set_content(flags.text("system"));
  }
  auto* message = chat->add_messages();
  message->set_role(v1::ROLE_USER);
  message->set_content(prompt);
  return request;
}

void PrintJson(const std::string& text, const Answer& answer) {
  OrderedJson json = {
      {"text", text},
      {"finish_reason", answer.finishes.empty() ? "unspecified" : FinishName(answer.finishes[0].reason())},
      {"request_id", answer.prompt.request_id()},
      {"seed", answer.prompt.seed()},
      {"prompt_tokens", answer.usage.prompt_tokens()},
      {"cached_tokens", answer.usage.cached_tokens()},
      {"completion_tokens", answer.usage.completion_tokens()},
      {"ttft_ms", Milliseconds(answer.first_token)},
      {"total_ms", Milliseconds(answer.total)},
      {"tokens_per_second", answer.TokensPerSecond()}};
  std::printf("%s\n", json.dump(2, ' ', false, OrderedJson::error_handler_t::replace).c_str());
}

int RunGenerate(const ParsedFlags& flags) {
  if (flags.given("system") && !flags.boolean("chat")) {
    return Fail("generate", "--system needs --chat", kExitUsage);
  }
  Connection connection;
  if (int code = Connect("generate", flags, &connection); code != kExitOk) return code;
  auto prompt = TextOrStdin(flags, "prompt");
  if (!prompt.ok()) return Fail("generate", prompt.status().message(), kExitUsage);

  bool json = flags.boolean("json");
  bool terminal = IsTerminal(stdout);
  std::string text;
  Answer answer;
  Status status = connection.client().StreamGenerate(
      MakeRequest(flags, *prompt),
      [&](const v1::Delta& delta) {
        text += delta.text();
        if (json) return;
        std::string shown = terminal ? Printable(delta.text()) : delta.text();
        std::fwrite(shown.data(), 1, shown.size(), stdout);
        std::fflush(stdout);
      },
      &answer);
  if (!json && !text.empty()) std::fputs("\n", stdout);
  if (!status.ok()) return FailCall("generate", status);
  if (json) PrintJson(text, answer);
  if (!json && IsTerminal(stderr)) {
    std::fprintf(stderr, "%u + %u tokens, TTFT %s, %.1f tok/s\n", answer.usage.prompt_tokens(),
                 answer.usage.completion_tokens(), HumanTime(answer.first_token).c_str(), answer.TokensPerSecond());
  }
  return kExitOk;
}

}  // namespace

Subcommand GenerateCommand() {
  Subcommand subcommand{
      .command = {.name = "generate",
                  .summary = "continue a text, with a model loaded here (--model) or with a server's (--url)",
                  .synopsis = "altiplano generate --model MODEL --prompt TEXT [--max-tokens N]",
                  .notes = "  echo 'Once upon a time' | altiplano generate --url 127.0.0.1:50051 --max-tokens 100\n"
                           "  altiplano generate --model MODEL --chat --prompt 'What is the capital of France?' --json",
                  .flags = {{.name = "prompt",
                             .type = FlagType::kText,
                             .meaning = "The text to continue. Without it: all of stdin, less a last newline.",
                             .example = "'Once upon a time'"},
                            {.name = "chat",
                             .type = FlagType::kBool,
                             .default_value = "false",
                             .meaning = "The prompt is a user's message to answer, not a text to continue."},
                            {.name = "system",
                             .type = FlagType::kText,
                             .meaning = "With --chat: the system message.",
                             .example = "'Answer in French.'"},
                            {.name = "json",
                             .type = FlagType::kBool,
                             .default_value = "false",
                             .meaning = "Print one JSON object at the end instead of streaming: text, finish_reason, "
                                        "token counts, times in milliseconds."}}},
      .run = RunGenerate};
  auto& list = subcommand.command.flags;
  for (Flag& flag : SamplingFlags()) list.push_back(flag);
  list.push_back(UrlFlag());
  for (Flag& flag : OfflineFlags()) list.push_back(flag);
  return subcommand;
}

}  // namespace altiplano::cli
