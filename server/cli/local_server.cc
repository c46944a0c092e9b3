#include "server/cli/local_server.h"

#include <stdlib.h>
#include <unistd.h>

#include "server/base/log.h"
#include "server/base/strings.h"
#include "server/cli/command.h"
#include "server/cli/load_model.h"
#include "server/cli/request_flags.h"
#include "server/cli/serving.h"
#include "server/cli/terminal.h"

namespace altiplano::cli {

namespace {

constexpr size_t kMostSocketFolder = 90;  // a socket's path has room for 107 bytes

// A folder that only this user can enter, removed with the socket in it.
class PrivateFolder {
 public:
  PrivateFolder() {
    const char* tmpdir = getenv("TMPDIR");
    for (std::string_view parent : {std::string_view(tmpdir != nullptr ? tmpdir : ""), std::string_view("/tmp")}) {
      std::string path = StrCat(parent, "/altiplano-XXXXXX");
      if (parent.empty() || path.size() > kMostSocketFolder || mkdtemp(path.data()) == nullptr) continue;
      path_ = path;
      return;
    }
  }
  ~PrivateFolder() { Remove(); }
  void Remove() {
    if (path_.empty()) return;
    unlink(socket().c_str());
    rmdir(path_.c_str());
    path_.clear();
  }
  bool ok() const { return !path_.empty(); }
  std::string socket() const { return path_ + "/socket"; }

 private:
  std::string path_;
};

}  // namespace

class LocalServer::Impl {
 public:
  PrivateFolder folder;
  std::unique_ptr<Serving> serving;
  std::unique_ptr<Client> client;
};

LocalServer::LocalServer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
LocalServer::~LocalServer() {
  impl_->client.reset();
  if (impl_->serving != nullptr) impl_->serving->Stop();
}

Client& LocalServer::client() {
  return *impl_->client;
}

StatusOr<std::unique_ptr<LocalServer>> LocalServer::Start(const config::v1::ServerConfig& config,
                                                          std::string_view command) {
  auto impl = std::make_unique<Impl>();
  if (!impl->folder.ok()) return Status(Code::kUnavailable, "cannot make a folder in TMPDIR or /tmp");
  config::v1::ServerConfig private_config = config;
  std::string address = StrCat("unix:", impl->folder.socket());
  private_config.set_listen(address);
  private_config.set_admin_listen("");
  ASSIGN_OR_RETURN(impl->serving, Serving::Listen(private_config));
  ASSIGN_OR_RETURN(impl->client, Client::Connect(address, std::chrono::seconds(10)));
  impl->folder.Remove();  // who is connected needs no name, and ctrl-C would leave it behind
  RETURN_IF_ERROR(impl->serving->Load(
      {.progress = LoadProgressPrinter(), .cancelled = {}, .on_step = {}, .on_start_hang = EndHungStart(command)}));
  return std::unique_ptr<LocalServer>(new LocalServer(std::move(impl)));
}

std::vector<Flag> OfflineFlags() {
  constexpr std::string_view kGroups[] = {kGroupModel, kGroupKv, kGroupScheduling, kGroupThreads, kGroupLogs};
  std::vector<Flag> flags = SettingsOf(kGroups);
  for (Flag& flag : flags) {
    if (flag.name == "log-level") flag.default_value = "warn";  // the answer is what one wants to see
  }
  flags.push_back({.name = "config",
                   .type = FlagType::kPath,
                   .meaning = "A textproto file with any of these settings, as for altiplano serve.",
                   .example = "config/smollm2-cpu.textproto",
                   .group = "Configuration"});
  return flags;
}

StatusOr<EffectiveConfig> ResolveOffline(const ParsedFlags& flags) {
  ASSIGN_OR_RETURN(EffectiveConfig config, ResolveConfig(flags));
  if (config.values.model().path().empty()) {
    return Status(Code::kInvalidArgument, "needs --model (or model.path in the config file)");
  }
  RETURN_IF_ERROR(CheckScheduling(config.values));
  config.values.mutable_nodes()->set_count(1);  // these commands run here alone
  RETURN_IF_ERROR(CheckDevices(config.values));
  if (config.origins["log.level"] == "default") config.values.mutable_log()->set_level(flags.text("log-level"));
  InitLog(config.values.log());
  return config;
}

int Connect(std::string_view command, const ParsedFlags& flags, Connection* connection) {
  bool here = flags.given("model") || flags.given("config");
  if (here == flags.given("url")) {
    return Fail(command, "needs one of --model (loads it here) and --url (asks a server)", kExitUsage);
  }
  if (!here) {
    if (Status status = CheckRemote(flags); !status.ok()) return Fail(command, status.message(), kExitUsage);
    auto client = ConnectTo(flags);
    if (!client.ok()) return Fail(command, client.status().message(), kExitUnavailable);
    connection->remote = std::move(*client);
    return kExitOk;
  }
  auto config = ResolveOffline(flags);
  if (!config.ok()) return Fail(command, config.status().message(), kExitUsage);
  auto local = LocalServer::Start(config->values, command);
  if (!local.ok()) return Fail(command, local.status().message(), ExitCodeOfLoad(local.status()));
  connection->local = std::move(*local);
  return kExitOk;
}

}  // namespace altiplano::cli
