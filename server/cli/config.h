// The server's configuration: one table of settings drives the flags of `altiplano serve`, the fields of ServerConfig
// and their documentation. A flag wins over the file, the file over the default.
#pragma once

#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "altiplano/config/v1/server_config.pb.h"
#include "server/base/status.h"
#include "server/cli/flags.h"

namespace altiplano::cli {

// Every setting; each names its field. A test holds table and proto together, both ways.
std::span<const Flag> Settings();
// Those of some groups, for commands that load a model without serving it.
std::vector<Flag> SettingsOf(std::span<const std::string_view> groups);

inline constexpr std::string_view kGroupListening = "Listening";
inline constexpr std::string_view kGroupModel = "Model";
inline constexpr std::string_view kGroupNodes = "Several nodes";
inline constexpr std::string_view kGroupKv = "KV cache";
inline constexpr std::string_view kGroupScheduling = "Scheduling";
inline constexpr std::string_view kGroupLimits = "Limits for callers";
inline constexpr std::string_view kGroupThreads = "Threads";
inline constexpr std::string_view kGroupLogs = "Logs";
inline constexpr std::string_view kGroupStopping = "Stopping";

struct EffectiveConfig {
  config::v1::ServerConfig values;             // every field set, every value checked
  std::map<std::string, std::string> origins;  // field -> "default", "tiny.textproto:3:9", "--listen"
};

// Where the fields of a file stand, for messages and for --print-config.
struct ConfigFile {
  config::v1::ServerConfig values;
  std::map<std::string, std::string> places;  // field -> "FILE:LINE:COLUMN", of the fields that are set
};

// INVALID_ARGUMENT "FILE:LINE:COLUMN: ..." for bad syntax, an unknown field (with the nearest name) or a bad value.
StatusOr<ConfigFile> ParseConfig(std::string_view text, const std::string& file_name);

// `file` may be null. Settings that the command does not have as flags come from file or default.
StatusOr<EffectiveConfig> ResolveConfig(const ParsedFlags& flags, const ConfigFile* file);
// Reads --config (when the command has it and it is given) and resolves. ReadFile's errors when it cannot be read.
StatusOr<EffectiveConfig> ResolveConfig(const ParsedFlags& flags);

// A textproto that ParseConfig reads back, each value followed by its origin as a comment.
std::string PrintConfig(const EffectiveConfig& config);

}  // namespace altiplano::cli
