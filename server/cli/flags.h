// Flags: one table row each, from which come parsing, checking, --help and (for the server's) the config file's fields.
#pragma once

#include <cstdint>
#include <limits>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "server/base/clock.h"
#include "server/base/status.h"

namespace altiplano::cli {

enum class FlagType { kText, kPath, kAddress, kUrl, kBool, kCount, kSeed, kReal, kBytes, kDuration, kChoice };

struct Flag {
  std::string_view name;  // "max-num-seqs"
  FlagType type = FlagType::kText;
  std::string_view default_value = {};  // as one would write it
  std::string_view meaning = {};        // one sentence, with the unit of plain numbers
  std::string_view example = {};        // a value; empty for switches
  std::string_view field = {};          // in ServerConfig, "scheduler.max_num_seqs"; empty: of the command line only
  std::string_view choices = {};        // kChoice: "f32|bf16"
  int64_t min = 0;                      // kCount
  int64_t max = std::numeric_limits<int64_t>::max();
  std::string_view least = "0";  // kBytes, kDuration: as one would write it
  bool repeated = false;
  std::string_view alias = {};  // a second spelling
  std::string_view group = {};  // heading in --help
};

// A value judged by its flag's type. The message reads on after the flag's or field's name and value.
Status CheckValue(const Flag& flag, std::string_view value);

struct Command {
  std::string_view name;           // "bench serve"
  std::string_view summary = {};   // one line
  std::string_view synopsis = {};  // "altiplano inspect DIR_OR_GGUF [--json]"
  std::string_view notes = {};     // after the flags; may be empty
  std::vector<Flag> flags = {};
  size_t max_positional = 0;
};

// What was given, all of it checked. Reading a name that the command does not have is a bug (CHECK).
class ParsedFlags {
 public:
  // INVALID_ARGUMENT, one line: unknown flag with a suggestion, missing or bad value, a flag given twice.
  // A bool is --name, --no-name or --name=false; other values follow as --name=VALUE or the next argument.
  // After "--" everything is positional.
  static StatusOr<ParsedFlags> Parse(const Command& command, std::span<const std::string_view> arguments);

  bool help() const { return help_; }
  bool has(std::string_view name) const;  // the command has this flag
  bool given(std::string_view name) const { return values_.count(Find(name).name) != 0; }
  std::string text(std::string_view name) const;  // the last one given, or the default
  std::vector<std::string> all(std::string_view name) const;
  int64_t count(std::string_view name) const;
  uint64_t seed(std::string_view name) const;
  double real(std::string_view name) const;
  bool boolean(std::string_view name) const;
  uint64_t bytes(std::string_view name) const;
  Duration duration(std::string_view name) const;
  const std::vector<std::string>& positional() const { return positional_; }

 private:
  const Flag& Find(std::string_view name) const;

  std::vector<Flag> flags_;
  std::map<std::string_view, std::vector<std::string>> values_;
  std::vector<std::string> positional_;
  bool help_ = false;
};

// The page that `altiplano COMMAND --help` prints.
std::string HelpText(const Command& command);

}  // namespace altiplano::cli
