#include <cerrno>
#include <cstdio>
#include <cstring>
#include <string>

#include "server/base/log.h"
#include "server/base/strings.h"
#include "server/cli/command.h"

namespace altiplano::cli {

namespace {

constexpr std::string_view kExitCodes =
    "Exit codes: 0 done (a server: drained), 1 a request failed or the server is not serving, 64 wrong usage or "
    "configuration,\n"
    "65 something wrong with the model's files, 69 no device, memory, address or server, 70 a bug, 75 a device or a "
    "rank\n"
    "failed while serving, or the start hung: start it again, 130 a load test was interrupted.\n";

std::string Line(const Command& command) {
  return StrFormat("  %-24s  %s\n", std::string(command.name).c_str(), std::string(command.summary).c_str());
}

std::string Overview() {
  std::string out =
      "altiplano: an inference server for Llama models. The usual way:\n\n"
      "  altiplano inspect MODEL             what a checkpoint is and needs\n"
      "  altiplano serve --model MODEL       serve it over gRPC at 127.0.0.1:50051\n"
      "  altiplano chat                      talk to it\n\n"
      "Commands (altiplano COMMAND --help explains each flag):\n";
  for (const Subcommand& subcommand : Subcommands()) {
    out += Line(subcommand.command);
  }
  return out + "\n" + std::string(kExitCodes);
}

// Of the commands that begin with this word, "bench" or "admin"; empty when there is none.
std::string Family(std::string_view word) {
  std::string lines;
  for (const Subcommand& subcommand : Subcommands()) {
    if (subcommand.command.name.starts_with(StrCat(word, " "))) lines += Line(subcommand.command);
  }
  if (lines.empty()) return "";
  return StrCat("altiplano ", word, ": one of (--help explains each flag)\n\n", lines);
}

void Print(const std::string& text) {
  std::fwrite(text.data(), 1, text.size(), stdout);
}

}  // namespace

std::vector<Subcommand> Subcommands() {
  return {ServeCommand(),
          GenerateCommand(),
          ChatCommand(),
          TokenizeCommand(),
          InspectCommand(),
          BenchServeCommand(),
          BenchOfflineCommand(),
          SimulateCommand(),
          PlanCommand(),
          MakeRandomCommand(),
          DemoCommand(),
          HealthCommand(),
          DumpFlightRecordCommand(),
          ReplayCommand(),
          VersionCommand()};
}

int Fail(std::string_view name, std::string_view message, ExitCode code) {
  std::string line = StrCat("altiplano ", name, name.empty() ? "" : ": ", message, "\n");
  std::fwrite(line.data(), 1, line.size(), stderr);
  return code;
}

int FailInLog(std::string_view name, std::string_view message, ExitCode code) {
  if (!log::Enabled(log::Level::kError)) return Fail(name, message, code);
  log::Error(StrCat(name, " failed"), {{"error", message}, {"exit_code", static_cast<int>(code)}});
  return code;
}

namespace {

int RunCommand(std::span<const std::string_view> arguments) {
  std::string_view first = arguments.empty() ? "" : arguments[0];
  if (first.empty()) {
    std::fputs(Overview().c_str(), stderr);
    return kExitUsage;
  }
  if (first == "--help" || first == "-h" || (first == "help" && arguments.size() == 1)) {
    Print(Overview());
    return kExitOk;
  }
  if (first == "--version") first = "version";
  bool help = first == "help";  // altiplano help bench serve
  auto words = arguments.subspan(help ? 1 : 0);
  if (help) first = words[0];

  std::vector<std::string_view> names;
  std::vector<Subcommand> subcommands = Subcommands();
  for (const Subcommand& subcommand : subcommands) {
    std::string_view name = subcommand.command.name;
    names.push_back(name);
    size_t blank = name.find(' ');
    bool matches = blank == std::string_view::npos
                       ? name == first
                       : name.substr(0, blank) == first && words.size() > 1 && name.substr(blank + 1) == words[1];
    if (!matches) continue;
    auto flags = ParsedFlags::Parse(subcommand.command, words.subspan(blank == std::string_view::npos ? 1 : 2));
    if (help || (flags.ok() && flags->help())) {
      Print(HelpText(subcommand.command));
      return kExitOk;
    }
    if (!flags.ok()) return Fail(name, flags.status().message(), kExitUsage);
    return subcommand.run(*flags);
  }
  const std::string family = Family(first);
  if (!family.empty()) {
    const bool asked = words.size() == (help ? 1 : 2) && (help || words[1] == "--help" || words[1] == "-h");
    if (asked) {
      Print(family);
      return kExitOk;
    }
    if (words.size() == 1) {
      std::fputs(family.c_str(), stderr);
      return kExitUsage;
    }
  }
  std::string given = family.empty() ? std::string(first) : StrCat(first, " ", words[1]);
  std::string_view nearest = Nearest(given, names);
  return Fail("",
              StrCat(given, ": unknown command; ",
                     nearest.empty() ? "see altiplano help" : StrCat("did you mean ", nearest, "?")),
              kExitUsage);
}

}  // namespace

int Main(std::span<const std::string_view> arguments) {
  const int code = RunCommand(arguments);
  // A full disk is noticed when what was printed leaves the buffer, or was when an earlier part did.
  errno = 0;
  const bool written = std::fflush(stdout) == 0 && std::ferror(stdout) == 0;
  if (written || code != kExitOk) return code;
  return Fail(arguments[0], StrCat("cannot write to stdout", errno != 0 ? StrCat(": ", std::strerror(errno)) : ""),
              kExitFailure);
}

}  // namespace altiplano::cli
