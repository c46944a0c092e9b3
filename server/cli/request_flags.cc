#include "server/cli/request_flags.h"

#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <iostream>
#include <iterator>

#include "server/base/strings.h"
#include "server/cli/command.h"
#include "server/cli/config.h"

namespace altiplano::cli {

namespace {

constexpr std::string_view kGroup = "Answer";

}  // namespace

Flag UrlFlag() {
  return {.name = "url",
          .type = FlagType::kUrl,
          .default_value = "127.0.0.1:50051",
          .meaning = "The server: HOST:PORT or unix:/path, with or without grpc:// before it.",
          .example = "127.0.0.1:50051"};
}

std::vector<Flag> SamplingFlags() {
  return {
      {.name = "max-tokens",
       .type = FlagType::kCount,
       .meaning = "Most tokens of the answer. Without it: until the context is full.",
       .example = "200",
       .min = 1,
       .max = 1 << 24,
       .group = kGroup},
      {.name = "temperature",
       .type = FlagType::kReal,
       .meaning = "0 takes the most probable token each time. Without it: the model's own default.",
       .example = "0",
       .group = kGroup},
      {.name = "top-p",
       .type = FlagType::kReal,
       .meaning = "Sample from the most probable tokens that have this share together.",
       .example = "0.9",
       .group = kGroup},
      {.name = "top-k",
       .type = FlagType::kCount,
       .meaning = "Sample from this many most probable tokens; 0: all.",
       .example = "40",
       .max = 1 << 30,
       .group = kGroup},
      {.name = "min-p",
       .type = FlagType::kReal,
       .meaning = "Leave out tokens less probable than this share of the most probable one.",
       .example = "0.05",
       .group = kGroup},
      {.name = "repetition-penalty",
       .type = FlagType::kReal,
       .meaning = "Divides the logits of tokens that are there already, multiplies negative ones; 1: none.",
       .example = "1.1",
       .group = kGroup},
      {.name = "presence-penalty",
       .type = FlagType::kReal,
       .meaning = "Taken from the logit of each token that the answer has.",
       .example = "0.5",
       .group = kGroup},
      {.name = "frequency-penalty",
       .type = FlagType::kReal,
       .meaning = "The same, times how often the answer has it.",
       .example = "0.2",
       .group = kGroup},
      {.name = "seed",
       .type = FlagType::kSeed,
       .meaning = "The same seed gives the same answer. Without it: random.",
       .example = "1",
       .group = kGroup},
      {.name = "min-tokens",
       .type = FlagType::kCount,
       .meaning = "No end-of-text token before that many; a --stop text ends the answer all the same.",
       .example = "20",
       .max = 1 << 24,
       .group = kGroup},
      {.name = "ignore-eos",
       .type = FlagType::kBool,
       .default_value = "false",
       .meaning = "Go on after an end-of-text token, up to --max-tokens.",
       .group = kGroup},
      {.name = "stop",
       .type = FlagType::kText,
       .meaning = "Text that ends the answer and is left out of it.",
       .example = "END",
       .repeated = true,
       .group = kGroup},
  };
}

void FillSampling(const ParsedFlags& flags, v1::GenerateRequest* request) {
  auto* sampling = request->mutable_sampling();
  auto* stopping = request->mutable_stopping();
  if (flags.given("max-tokens")) stopping->set_max_new_tokens(static_cast<uint32_t>(flags.count("max-tokens")));
  if (flags.given("temperature")) sampling->set_temperature(static_cast<float>(flags.real("temperature")));
  if (flags.given("top-p")) sampling->set_top_p(static_cast<float>(flags.real("top-p")));
  if (flags.given("top-k")) sampling->set_top_k(static_cast<uint32_t>(flags.count("top-k")));
  if (flags.given("min-p")) sampling->set_min_p(static_cast<float>(flags.real("min-p")));
  if (flags.given("repetition-penalty")) {
    sampling->set_repetition_penalty(static_cast<float>(flags.real("repetition-penalty")));
  }
  if (flags.given("presence-penalty")) {
    sampling->set_presence_penalty(static_cast<float>(flags.real("presence-penalty")));
  }
  if (flags.given("frequency-penalty")) {
    sampling->set_frequency_penalty(static_cast<float>(flags.real("frequency-penalty")));
  }
  if (flags.given("min-tokens")) stopping->set_min_new_tokens(static_cast<uint32_t>(flags.count("min-tokens")));
  if (flags.given("ignore-eos")) stopping->set_ignore_eos(flags.boolean("ignore-eos"));
  if (flags.given("seed")) sampling->set_seed(flags.seed("seed"));
  for (const std::string& stop : flags.all("stop")) stopping->add_sequences(stop);
}

Status CheckRemote(const ParsedFlags& flags) {
  for (const Flag& flag : Settings()) {
    if (!flags.has(flag.name) || !flags.given(flag.name)) continue;
    return Status(Code::kInvalidArgument,
                  StrCat("--", flag.name, " is of a model loaded here; a server (--url) has its own"));
  }
  return OkStatus();
}

StatusOr<std::unique_ptr<Client>> ConnectTo(const ParsedFlags& flags) {
  std::string url = flags.text("url");
  auto client = Client::Connect(url, std::chrono::seconds(3));
  if (client.ok()) return client;
  return Status(client.status().code(),
                StrCat(client.status().message(), "; start one with: altiplano serve --model MODEL --listen ", url));
}

StatusOr<std::string> TextOrStdin(const ParsedFlags& flags, std::string_view name) {
  if (flags.given(name)) return flags.text(name);
  if (isatty(STDIN_FILENO) != 0) std::fprintf(stderr, "Type the text; ctrl-D on a line of its own ends it.\n");
  std::string text((std::istreambuf_iterator<char>(std::cin)), std::istreambuf_iterator<char>());
  if (std::ferror(stdin) != 0) return InvalidArgument(StrCat("cannot read stdin: ", std::strerror(errno)));
  if (text.ends_with('\n')) text.pop_back();
  if (!IsValidUtf8(text)) return Status(Code::kInvalidArgument, "the text on stdin is not valid UTF-8");
  return text;
}

std::string_view FinishName(v1::FinishReason reason) {
  switch (reason) {
    case v1::FINISH_REASON_EOS:
      return "eos";
    case v1::FINISH_REASON_STOP:
      return "stop";
    case v1::FINISH_REASON_LENGTH:
      return "length";
    case v1::FINISH_REASON_TIME_LIMIT:
      return "time_limit";
    case v1::FINISH_REASON_TOOL_CALL:
      return "tool_call";
    case v1::FINISH_REASON_CANCELLED:
      return "cancelled";
    default:
      return "unspecified";
  }
}

int FailCall(std::string_view command, const Status& status) {
  return Fail(command, DescribeError(status), status.code() == Code::kUnavailable ? kExitUnavailable : kExitFailure);
}

}  // namespace altiplano::cli
