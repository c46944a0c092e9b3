// altiplano serve: listen, load, say READY, serve, drain.
#include <sys/resource.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <ctime>
#include <fstream>
#include <string>
#include <thread>

#include "server/base/log.h"
#include "server/base/strings.h"
#include "server/cli/command.h"
#include "server/cli/config.h"
#include "server/cli/load_model.h"
#include "server/cli/nodes.h"
#include "server/cli/serving.h"
#include "server/cli/start_notice.h"
#include "server/cli/stop_signal.h"
#include "server/cli/terminal.h"
#include "server/cli/units.h"
#include "server/cli/version.h"

namespace altiplano::cli {

namespace {

// How long the second signal lets things end in order before the process ends without.
constexpr auto kAtOnce = std::chrono::seconds(5);

// The process, whatever hangs in it: the timer runs where nothing else does.
void EndWithin(std::chrono::seconds time, ExitCode code) {
  std::thread([=] {
    std::this_thread::sleep_for(time);
    _exit(code);
  }).detach();
}

// A connection is a file; the usual soft limit of 1,024 is less than the front end's.
void RaiseFileLimit() {
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur == limit.rlim_max) return;
  limit.rlim_cur = limit.rlim_max;
  if (setrlimit(RLIMIT_NOFILE, &limit) != 0) log::Warn("cannot raise the limit of open files");
}

// Since the kernel started this process, before any of our code: field 22 of /proc/self/stat, in clock ticks since
// boot.
double SecondsSinceStart() {
  std::ifstream in("/proc/self/stat");
  std::string text((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  size_t at = text.rfind(')');  // the command's name before it may hold anything
  for (int field = 2; field < 22 && at != std::string::npos; ++field) at = text.find(' ', at + 1);
  if (at == std::string::npos) return 0;
  timespec now{};
  clock_gettime(CLOCK_BOOTTIME, &now);
  double started = std::strtod(text.c_str() + at + 1, nullptr) / static_cast<double>(sysconf(_SC_CLK_TCK));
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9 - started;
}

void PrintReady(const Serving& serving, const LoadedModel& model) {
  std::string admin = serving.admin_address().empty() ? "" : StrCat(" admin=", serving.admin_address());
  // One line that programs split at blanks: a model's name keeps none.
  std::string name = model.name;
  for (char& c : name) {
    if (static_cast<unsigned char>(c) <= ' ') c = '_';
  }
  PrintReadyLine(StrFormat("READY address=%s%s model=%s kv_tokens=%lld seconds=%.2f", serving.address().c_str(),
                           admin.c_str(), name.c_str(), static_cast<long long>(model.kv_tokens), SecondsSinceStart()));
}

// Until none is live, the deadline, or the signals-th signal.
void WaitForLiveRequests(Serving& serving, TimePoint deadline, StopSignal& stop, int signals) {
  while (serving.live_requests() > 0 && Clock::Real().Now() < deadline) {
    if (stop.WaitForCount(signals, Clock::Real().Now() + std::chrono::milliseconds(10))) break;
  }
}

// False: the engine failed for good, and on_failure does not say to stay.
bool ServeUntilStopped(const Serving& serving, const std::string& on_failure, StopSignal& stop) {
  return stop.WaitForCount(1, [&] { return serving.failed_for_good() && on_failure != "stay"; });
}

// docs: reliability, life cycle. Ends when no request is live, at the timeout, or at the second signal.
void Drain(Serving& serving, const config::v1::Drain& config, StopSignal& stop) {
  log::Info("draining", {{"signal", stop.first()},
                         {"delay", config.delay()},
                         {"timeout", config.timeout()},
                         {"a_second_signal", "ends live requests at once"}});
  serving.AnnounceEnd();
  TimePoint now = Clock::Real().Now();
  if (stop.WaitForCount(2, now + CheckedDuration(config.delay()))) return;
  serving.RefuseNew();
  WaitForLiveRequests(serving, Clock::Real().Now() + CheckedDuration(config.timeout()), stop, 2);
  if (serving.live_requests() > 0) {
    log::Warn(stop.count() > 1 ? "second signal: live requests are ended" : "drain timeout: live requests are ended",
              {{"requests", serving.live_requests()}});
  }
}

int Serve(const EffectiveConfig& config, StopSignal& stop, StartNotice& notice) {
  auto serving = Serving::Listen(config.values);
  if (!serving.ok()) return FailInLog("serve", serving.status().message(), kExitUnavailable);
  log::Info("listening, loading", {{"address", (*serving)->address()},
                                   {"model", config.values.model().path()},
                                   {"version", kVersion},
                                   {"commit", kCommit}});
  Status loaded = (*serving)->Load({.progress = LoadProgressPrinter(),
                                    .cancelled = [&stop] { return stop.count() > 0; },
                                    .on_step = {},
                                    .on_failed_for_good = [&stop] { stop.Wake(); },
                                    .on_start_hang = EndHungStart("serve", FailInLog),
                                    .on_start_phase = [&notice](const std::string& what) { notice.Begin(what); }});
  notice.End();
  if (stop.count() > 0) {
    log::Info("stopped while loading");
    return kExitOk;
  }
  if (!loaded.ok()) return FailInLog("serve", loaded.message(), ExitCodeOfLoad(loaded));
  PrintReady(**serving, (*serving)->model());
  if (!ServeUntilStopped(**serving, config.values.scheduler().on_engine_failure(), stop)) {
    log::Error("the engine failed: ending, to be started again", {{"exit_code", static_cast<int>(kExitRestart)}});
    EndWithin(3 * kAtOnce, kExitRestart);  // a GPU that hangs may hang whoever lets go of it
    (*serving)->AnnounceEnd();
    (*serving)->RefuseNew();
    WaitForLiveRequests(**serving, Clock::Real().Now() + kAtOnce, stop, 1);
    (*serving)->Stop();
    return kExitRestart;
  }
  Drain(**serving, config.values.drain(), stop);
  EndWithin(3 * kAtOnce, kExitOk);  // a replica that hangs while it is made again may be left
  (*serving)->Stop();
  log::Info("stopped");
  return kExitOk;
}

int RunServe(const ParsedFlags& flags) {
  // The second signal ends the process whatever hangs, and the first where nothing has begun.
  StartNotice notice;
  StopSignal stop([&notice](int count, const std::string& name) {
    if (notice.OnSignal(count, name)) EndWithin(kAtOnce, kExitOk);
  });
  auto config = ResolveConfig(flags);
  if (!config.ok()) return Fail("serve", config.status().message(), kExitUsage);
  if (flags.boolean("print-config")) {
    std::fputs(PrintConfig(*config).c_str(), stdout);
    return kExitOk;
  }
  if (config->values.model().path().empty()) {
    return Fail("serve", "needs --model (or model.path in the config file)", kExitUsage);
  }
  if (Status status = ResolveNodes(&config->values); !status.ok()) return Fail("serve", status.message(), kExitUsage);
  if (Status status = CheckScheduling(config->values); !status.ok()) return Fail("serve", status.message(), kExitUsage);
  if (Status status = CheckDevices(config->values); !status.ok()) return Fail("serve", status.message(), kExitUsage);
  if (flags.boolean("check")) {
    std::printf("configuration ok\n");
    return kExitOk;
  }
  InitLog(config->values.log());
  RaiseFileLimit();
  std::signal(SIGPIPE, SIG_IGN);  // whoever read stdout or stderr may go, and live answers must not go with it
  return config->values.nodes().rank() == 0 ? Serve(*config, stop, notice)
                                            : ServeAsFollower(config->values, stop, notice);
}

}  // namespace

Subcommand ServeCommand() {
  Subcommand subcommand{
      .command =
          {.name = "serve",
           .summary = "load a model and serve it over gRPC",
           .synopsis = "altiplano serve --model DIR_OR_GGUF [--listen 127.0.0.1:50051] [--config FILE.textproto]",
           .notes = "Prints one line on stdout when it serves:\n"
                    "  READY address=HOST:PORT [admin=HOST:PORT] model=NAME kv_tokens=N seconds=SINCE_START\n"
                    "SIGTERM, SIGINT or SIGHUP: health NOT_SERVING, --drain-delay, new requests refused, live ones\n"
                    "finish within --drain-timeout, exit code 0. A second one ends live requests at once, exit code 0\n"
                    "too.\n"
                    "With --nodes, the others than the leader print READY node=R of=N leader=HOST:PORT instead.\n"
                    "A start that fails ends with an error in the log, which says why and has the exit code; with "
                    "--log-level off\n"
                    "that is one plain line on stderr.\n"
                    "Exit code 75: a device or a rank failed while serving (--on-engine-failure), or the start hung\n"
                    "(--start-timeout); start it again.",
           .flags = {{.name = "config",
                      .type = FlagType::kPath,
                      .meaning =
                          "A textproto file with any of the settings below, by their config names. Flags win over it.",
                      .example = "config/smollm2-cpu.textproto",
                      .group = "Configuration"},
                     {.name = "print-config",
                      .type = FlagType::kBool,
                      .default_value = "false",
                      .meaning = "Print the effective settings, each with where it came from, and end.",
                      .group = "Configuration"},
                     {.name = "check",
                      .type = FlagType::kBool,
                      .default_value = "false",
                      .meaning = "Check flags and config file, load nothing, and end.",
                      .group = "Configuration"}},
           .max_positional = 0},
      .run = RunServe};
  for (const Flag& flag : Settings()) subcommand.command.flags.push_back(flag);
  return subcommand;
}

}  // namespace altiplano::cli
