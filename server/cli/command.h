// The subcommands. Each file NAME.cc has one factory; cli.cc lists them.
#pragma once

#include <span>
#include <string_view>

#include "server/cli/exit_code.h"
#include "server/cli/flags.h"

namespace altiplano::cli {

struct Subcommand {
  Command command;
  int (*run)(const ParsedFlags& flags) = nullptr;  // returns the exit code
};

Subcommand ServeCommand();
Subcommand GenerateCommand();
Subcommand ChatCommand();
Subcommand TokenizeCommand();
Subcommand InspectCommand();
Subcommand MakeRandomCommand();
Subcommand BenchServeCommand();
Subcommand BenchOfflineCommand();
Subcommand SimulateCommand();
Subcommand PlanCommand();
Subcommand DemoCommand();
Subcommand HealthCommand();
Subcommand DumpFlightRecordCommand();
Subcommand ReplayCommand();
Subcommand VersionCommand();

std::vector<Subcommand> Subcommands();

// The whole program. arguments: without argv[0].
int Main(std::span<const std::string_view> arguments);

// "altiplano NAME: MESSAGE" on stderr, one line. Returns `code`.
int Fail(std::string_view name, std::string_view message, ExitCode code);
// As Fail, of a command whose log is set up: an error in the log, with the exit code. Where the log is off, Fail's
// line.
int FailInLog(std::string_view name, std::string_view message, ExitCode code);

}  // namespace altiplano::cli
