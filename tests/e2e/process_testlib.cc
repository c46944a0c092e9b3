#include "tests/e2e/process_testlib.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <thread>

#include "server/base/check.h"

namespace altiplano::e2e {

namespace {

using SteadyClock = std::chrono::steady_clock;

SteadyClock::time_point Limit() {
  return SteadyClock::now() + std::chrono::seconds(kPatience);
}

void Pause() {
  std::this_thread::sleep_for(std::chrono::milliseconds(2));
}

std::string ReadAll(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

}  // namespace

Process::Process(std::vector<std::string> arguments, std::optional<int> network) {
  signal(SIGPIPE, SIG_IGN);
  const std::string folder = ::testing::TempDir();
  std::string errors = folder + "/errors-XXXXXX";
  int error_file = mkostemp(errors.data(), O_CLOEXEC);
  CHECK(error_file >= 0);
  errors_path_ = errors;
  int input[2], output[2];
  CHECK(pipe2(input, O_CLOEXEC) == 0 && pipe2(output, O_CLOEXEC) == 0);
  if (arguments[0] == "serve" && std::ranges::find(arguments, "--flight-record-dir") == arguments.end()) {
    arguments.insert(arguments.end(), {"--flight-record-dir", folder});
  }
  arguments.insert(arguments.begin(), ALTIPLANO_BINARY_DIR "/altiplano");
  std::vector<char*> argv;
  for (std::string& argument : arguments) argv.push_back(argument.data());
  argv.push_back(nullptr);
  pid_ = fork();
  CHECK(pid_ >= 0);
  if (pid_ == 0) {
    dup2(input[0], STDIN_FILENO);
    dup2(output[1], STDOUT_FILENO);
    dup2(error_file, STDERR_FILENO);
    signal(SIGPIPE, SIG_DFL);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (network && setns(*network, CLONE_NEWNET) != 0) _exit(126);
    execv(argv[0], argv.data());
    _exit(127);
  }
  close(input[0]);
  close(output[1]);
  close(error_file);
  in_ = input[1];
  out_ = output[0];
}

Process::~Process() {
  if (!ended_) {
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
  }
  CloseInput();
  close(out_);
  unlink(errors_path_.c_str());
}

bool Process::ReadMore(int timeout_ms) {
  pollfd poller{.fd = out_, .events = POLLIN, .revents = 0};
  if (poll(&poller, 1, timeout_ms) <= 0) return false;
  char buffer[4096];
  ssize_t count = read(out_, buffer, sizeof buffer);
  if (count <= 0) return false;
  output_.append(buffer, static_cast<size_t>(count));
  return true;
}

std::string Process::ReadLine() {
  auto limit = Limit();
  for (;;) {
    size_t newline = output_.find('\n', lines_end_);
    if (newline != std::string::npos) {
      std::string line = output_.substr(lines_end_, newline - lines_end_);
      lines_end_ = newline + 1;
      return line;
    }
    if (SteadyClock::now() > limit || !ReadMore(kPatience * 1000)) return "";
  }
}

bool Process::ReadUntil(const std::string& text, int patience_ms) {
  auto limit = SteadyClock::now() + std::chrono::milliseconds(patience_ms);
  while (output_.find(text, lines_end_) == std::string::npos) {
    if (SteadyClock::now() > limit || !ReadMore(patience_ms)) return false;
  }
  return true;
}

void Process::Write(const std::string& text) {
  CHECK(write(in_, text.data(), text.size()) == static_cast<ssize_t>(text.size()));
}

void Process::CloseInput() {
  if (in_ >= 0) close(in_);
  in_ = -1;
}

void Process::Signal(int signal) {
  kill(pid_, signal);
}

bool Process::WaitUntilTermIsHandled() {
  auto limit = Limit();
  while (SteadyClock::now() < limit) {
    std::ifstream status("/proc/" + std::to_string(pid_) + "/status");
    for (std::string line; std::getline(status, line);) {
      if (line.rfind("SigBlk:", 0) != 0 && line.rfind("SigCgt:", 0) != 0) continue;
      const auto has = [set = std::stoull(line.substr(7), nullptr, 16)](int signal) {
        return (set >> (signal - 1) & 1) != 0;
      };
      // Whoever has blocked them all, as a runtime does for a moment when it starts a thread, will let them through.
      if (has(SIGTERM) && !has(SIGUSR2)) return true;
    }
    if (!running()) return false;
    Pause();
  }
  return false;
}

bool Process::running() {
  if (ended_) return false;
  int status = 0;
  pid_t pid = waitpid(pid_, &status, WNOHANG);
  if (pid != pid_) return true;
  ended_ = true;
  exit_code_ = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  return false;
}

int Process::Wait() {
  auto limit = Limit();
  while (running()) {
    if (SteadyClock::now() > limit) {
      kill(pid_, SIGKILL);
      waitpid(pid_, nullptr, 0);
      ended_ = true;
      exit_code_ = -1;
      break;
    }
    if (!ReadMore(2)) Pause();
  }
  while (ReadMore(100)) {
  }
  return exit_code_;
}

std::string Process::Errors() {
  return ReadAll(errors_path_);
}

Server::Server(std::vector<std::string> more_flags, const std::string& model)
    : process_([&] {
        std::vector<std::string> arguments = {
            "serve", "--model", model, "--listen",    "127.0.0.1:0", "--served-model-name", "tiny", "--threads",
            "1",     "--dtype", "f32", "--kv-memory", "64MiB"};
        arguments.insert(arguments.end(), more_flags.begin(), more_flags.end());
        return arguments;
      }()) {}

const std::string& Server::ready_line() {
  if (ready_line_.empty()) ready_line_ = process_.ReadLine();
  return ready_line_;
}

const std::string& Server::address() {
  const std::string& line = ready_line();
  size_t begin = line.find("address=");
  if (line.rfind("READY ", 0) == 0 && begin != std::string::npos) {
    begin += 8;
    address_ = line.substr(begin, line.find(' ', begin) - begin);
  }
  return address_;
}

Finished RunToEnd(std::vector<std::string> arguments, const std::string& input) {
  Process process(std::move(arguments));
  process.Write(input);
  process.CloseInput();
  int code = process.Wait();
  return {.code = code, .out = process.output(), .err = process.Errors()};
}

}  // namespace altiplano::e2e
