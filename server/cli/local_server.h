// A model loaded into this process and served to it alone, over a socket in a private folder: offline commands take the
// very road that a server's clients take.
#pragma once

#include <memory>
#include <string_view>

#include "server/base/status.h"
#include "server/cli/client.h"
#include "server/cli/config.h"

namespace altiplano::cli {

class LocalServer {
 public:
  // Prints progress on stderr. Errors as LoadModel's. A start that hangs ends the process in the command's name.
  static StatusOr<std::unique_ptr<LocalServer>> Start(const config::v1::ServerConfig& config, std::string_view command);
  ~LocalServer();
  Client& client();

 private:
  class Impl;
  explicit LocalServer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// Settings that a command which loads a model itself has as flags: model, KV cache, scheduling, threads, logs,
// --config.
std::vector<Flag> OfflineFlags();

// The config of a command with OfflineFlags, its log set up. INVALID_ARGUMENT (usage) without a model.
StatusOr<EffectiveConfig> ResolveOffline(const ParsedFlags& flags);

// A Client of --url, or of a LocalServer for --model; which of the two was given decides.
struct Connection {
  std::unique_ptr<Client> remote;
  std::unique_ptr<LocalServer> local;
  Client& client() { return local != nullptr ? local->client() : *remote; }
};
// Prints the error; returns the exit code.
int Connect(std::string_view command, const ParsedFlags& flags, Connection* connection);

}  // namespace altiplano::cli
