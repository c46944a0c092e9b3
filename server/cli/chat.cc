// A conversation on the terminal. SIGINT cancels the answer in progress and leaves the program running.
#include <pthread.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstdio>
#include <iostream>
#include <string>
#include <thread>

#include "server/base/strings.h"
#include "server/cli/command.h"
#include "server/cli/request_flags.h"
#include "server/cli/terminal.h"

namespace altiplano::cli {

namespace {

constexpr const char* kHelp =
    "  /reset          forget the conversation (the system message stays)\n"
    "  /system TEXT    set the system message and forget the conversation; without TEXT: none\n"
    "  /help           this\n"
    "  /quit           leave (ctrl-D too); ctrl-C stops an answer\n";

// Takes SIGINT on a thread of its own: an answer in progress is cancelled, at the prompt a hint is shown, before that
// the program ends. Made before anything that starts threads: they must have the signal blocked too.
class InterruptWatcher {
 public:
  InterruptWatcher() {
    sigemptyset(&set_);
    sigaddset(&set_, SIGINT);
    pthread_sigmask(SIG_BLOCK, &set_, &before_);
    thread_ = std::thread([this] { Loop(); });
  }
  ~InterruptWatcher() {
    stop_ = true;
    pthread_kill(thread_.native_handle(), SIGINT);
    thread_.join();
    pthread_sigmask(SIG_SETMASK, &before_, nullptr);
  }
  void AtPrompt() { state_ = State::kPrompt; }
  Cancellation* BeginAnswer() {
    cancellation_.Reset();
    state_ = State::kAnswer;
    return &cancellation_;
  }

 private:
  enum class State { kConnecting, kPrompt, kAnswer };

  void Loop() {
    for (;;) {
      int signal = 0;
      sigwait(&set_, &signal);
      if (stop_) return;
      if (state_ == State::kConnecting) _exit(130);
      if (state_ == State::kAnswer) {
        cancellation_.Cancel();
      } else {
        std::printf("\n(/quit or ctrl-D leaves)\n> ");
        std::fflush(stdout);
      }
    }
  }

  sigset_t set_, before_;
  Cancellation cancellation_;
  std::atomic<State> state_ = State::kConnecting;
  std::atomic<bool> stop_ = false;
  std::thread thread_;
};

class Repl {
 public:
  Repl(Client& client, const ParsedFlags& flags, InterruptWatcher& interrupts)
      : client_(client), interrupts_(interrupts), live_(IsTerminal(stdout)) {
    FillSampling(flags, &request_);
    system_ = flags.text("system");
    Reset();
  }

  // False: an unknown command or a failed answer; the conversation goes on either way.
  bool Line(const std::string& line) {
    if (line.empty()) return true;
    if (line[0] == '/') return Command(line);
    if (!IsValidUtf8(line)) {
      std::printf("This line is not valid UTF-8.\n");
      return false;
    }
    auto* message = request_.mutable_chat()->add_messages();
    message->set_role(v1::ROLE_USER);
    message->set_content(line);
    return Ask();
  }
  bool quit() const { return quit_; }

 private:
  bool Command(const std::string& line) {
    std::string word = line.substr(0, line.find(' '));
    std::string rest = line.size() > word.size() ? line.substr(word.size() + 1) : "";
    if (word == "/reset") {
      Reset();
      std::printf("The conversation is forgotten.\n");
    } else if (word == "/system") {
      system_ = rest;
      Reset();
    } else if (word == "/help") {
      std::fputs(kHelp, stdout);
    } else if (word == "/quit" || word == "/exit") {
      quit_ = true;
    } else {
      auto nearest = Nearest(word, std::initializer_list<std::string_view>{"/reset", "/system", "/help", "/quit"});
      std::printf("unknown command %s; %s\n", Printable(word).c_str(),
                  nearest.empty() ? "see /help" : StrCat("did you mean ", nearest, "?").c_str());
      return false;
    }
    return true;
  }

  void Reset() {
    request_.mutable_chat()->clear_messages();
    if (system_.empty()) return;
    auto* message = request_.mutable_chat()->add_messages();
    message->set_role(v1::ROLE_SYSTEM);
    message->set_content(system_);
  }

  bool Ask() {
    std::string text;
    Answer answer;
    Cancellation* cancellation = interrupts_.BeginAnswer();
    Status status = client_.StreamGenerate(
        request_,
        [&](const v1::Delta& delta) {
          text += delta.text();
          std::string shown = live_ ? Printable(delta.text()) : delta.text();
          std::fwrite(shown.data(), 1, shown.size(), stdout);
          std::fflush(stdout);
        },
        &answer, cancellation);
    interrupts_.AtPrompt();
    bool cancelled = status.code() == Code::kCancelled && cancellation->cancelled();
    if (!status.ok() && !cancelled) {  // the question is taken back: it can be asked again
      request_.mutable_chat()->mutable_messages()->RemoveLast();
      std::printf("%s%s\n", text.empty() ? "" : "\n", Printable(DescribeError(status)).c_str());
      if (status.reason() == "CONTEXT_LENGTH_EXCEEDED")
        std::printf("The conversation is too long: /reset begins anew.\n");
      return false;
    }
    auto* message = request_.mutable_chat()->add_messages();
    message->set_role(v1::ROLE_ASSISTANT);
    message->set_content(text);
    std::printf("\n%s[%s%llu tokens, TTFT %s, %.1f tok/s]%s\n", TakesStyle(stdout) ? "\033[2m" : "",
                cancelled ? "stopped, " : "", static_cast<unsigned long long>(answer.tokens),
                HumanTime(answer.first_token).c_str(), answer.TokensPerSecond(), TakesStyle(stdout) ? "\033[0m" : "");
    return true;
  }

  Client& client_;
  InterruptWatcher& interrupts_;
  const bool live_;
  v1::GenerateRequest request_;
  std::string system_;
  bool quit_ = false;
};

int RunChat(const ParsedFlags& flags) {
  InterruptWatcher interrupts;
  auto client = ConnectTo(flags);
  if (!client.ok()) return Fail("chat", client.status().message(), kExitUnavailable);
  auto models = (*client)->ListModels();
  if (!models.ok()) return FailCall("chat", models.status());
  for (const v1::Model& model : models->models()) {
    std::printf("%s, context %u tokens, at %s. /help lists commands.\n", Printable(model.name()).c_str(),
                model.max_context(), flags.text("url").c_str());
  }
  Repl repl(**client, flags, interrupts);
  interrupts.AtPrompt();
  std::string line;
  bool good = true;
  for (;;) {
    std::printf("> ");
    std::fflush(stdout);
    if (!std::getline(std::cin, line)) break;
    good = repl.Line(line);
    if (repl.quit()) return kExitOk;
  }
  std::printf("\n");
  return good ? kExitOk : kExitFailure;
}

}  // namespace

Subcommand ChatCommand() {
  Subcommand subcommand{.command = {.name = "chat",
                                    .summary = "talk to a server; ctrl-C stops an answer, not the program",
                                    .synopsis = "altiplano chat [--url HOST:PORT] [--system TEXT]",
                                    .notes = kHelp,
                                    .flags = {UrlFlag(),
                                              {.name = "system",
                                               .type = FlagType::kText,
                                               .meaning = "The system message.",
                                               .example = "'Answer in one sentence.'"}}},
                        .run = RunChat};
  for (Flag& flag : SamplingFlags()) subcommand.command.flags.push_back(flag);
  return subcommand;
}

}  // namespace altiplano::cli
