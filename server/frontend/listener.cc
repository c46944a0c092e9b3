#include "server/frontend/listener.h"

#include <fcntl.h>
#include <google/protobuf/stubs/logging.h>
#include <grpc/support/log.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <climits>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <optional>
#include <thread>

#include "server/base/listen_error.h"
#include "server/base/log.h"
#include "server/base/strings.h"

namespace altiplano {

namespace {

constexpr int kMaxHeaderBytes = 16 << 10;

int Millis(Duration duration) {
  return static_cast<int>(std::min<int64_t>(duration / std::chrono::milliseconds(1), INT_MAX));
}

void SetArguments(const FrontendLimits& limits, grpc::ServerBuilder* builder) {
  builder->SetMaxReceiveMessageSize(limits.max_message_bytes);
  builder->SetMaxSendMessageSize(-1);  // unary answers may be large; clients have their own bound
  // A second server on the same port is an error, not a silent half of the connections.
  builder->AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  builder->AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, limits.max_streams_per_connection);
  builder->AddChannelArgument(GRPC_ARG_MAX_METADATA_SIZE, kMaxHeaderBytes);
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, Millis(limits.keepalive_time));
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, Millis(limits.keepalive_timeout));
  // gRPC's own interval is 300 s, which would cut off clients that keep their connections alive as they are told to:
  // those ping every 10 s at most. Of pings that come too soon, with nothing sent in between, it bears two; any number
  // where it is told 0.
  const bool bounded = limits.min_client_ping_interval > Duration(0);
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  builder->AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS,
                              Millis(limits.min_client_ping_interval));
  builder->AddChannelArgument(GRPC_ARG_HTTP2_MAX_PING_STRIKES, bounded ? 2 : 0);
}

// gRPC would take port 443 where none is given.
bool HasPort(const std::string& address) {
  size_t colon = address.rfind(':');
  if (colon == std::string::npos || colon == 0) return false;
  std::string_view port = std::string_view(address).substr(colon + 1);
  uint16_t number = 0;  // 99999 would be taken modulo 65536
  auto [end, error] = std::from_chars(port.data(), port.data() + port.size(), number);
  return error == std::errc() && end == port.data() + port.size();
}

// Whoever makes a unix socket in this folder does so alone: between the look whether a server listens on one and gRPC's
// taking its name another server would take it. A folder that cannot be locked, or that somebody keeps locked, is no
// reason not to listen.
class FolderLock {
 public:
  explicit FolderLock(std::string_view path) {
    const size_t slash = path.rfind('/');
    const std::string folder(slash == path.npos ? "." : slash == 0 ? "/" : path.substr(0, slash));
    fd_ = open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    const auto end = std::chrono::steady_clock::now() + kPatience;
    while (fd_ >= 0 && flock(fd_, LOCK_EX | LOCK_NB) != 0 && std::chrono::steady_clock::now() < end) {
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
  }
  FolderLock(const FolderLock&) = delete;
  ~FolderLock() {
    if (fd_ >= 0) close(fd_);  // and with it the lock
  }

 private:
  static constexpr auto kPatience = std::chrono::seconds(2);
  int fd_ = -1;
};

// A server listens on this unix socket. gRPC would remove it, and that server would serve nobody without noticing; one
// that nobody listens on is left over from a server that was killed.
bool IsTaken(const std::string& address) {
  const std::string_view path = UnixSocketPath(address);
  sockaddr_un to{};
  to.sun_family = AF_UNIX;
  if (path.size() >= sizeof to.sun_path) return false;
  path.copy(to.sun_path, path.size());
  const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (fd < 0) return false;
  const bool taken = connect(fd, reinterpret_cast<const sockaddr*>(&to), sizeof to) == 0 || errno == EAGAIN;
  close(fd);
  return taken;
}

thread_local bool reports_itself = false;  // whoever calls gRPC on this thread

void WriteGrpcLog(gpr_log_func_args* args) {
  // Its errors are about peers and sockets; ours to act on are reported where they matter.
  const bool told = reports_itself || args->severity != GPR_LOG_SEVERITY_ERROR;
  const log::Level level = told ? log::Level::kDebug : log::Level::kWarn;
  log::Write(level, "grpc", {{"message", args->message}});
}

// About messages that clients send, which get their status for them. A fatal one ends the process after this.
void WriteProtobufLog(google::protobuf::LogLevel severity, const char*, int, const std::string& message) {
  const bool fatal = severity == google::protobuf::LOGLEVEL_FATAL;
  log::Write(fatal ? log::Level::kError : log::Level::kDebug, "protobuf", {{"message", message}});
}

}  // namespace

void RouteLibraryLogs() {
  static std::once_flag once;
  std::call_once(once, [] {
    gpr_set_log_function(WriteGrpcLog);
    google::protobuf::SetLogHandler(WriteProtobufLog);
  });
}

StatusOr<Listening> Listen(std::string_view flag, const std::string& address, const FrontendLimits& limits,
                           const std::vector<grpc::Service*>& services) {
  const bool is_unix = address.starts_with(kUnixAddress);
  const auto refused = [&](std::string_view why) {
    return Status(Code::kUnavailable, StrCat(flag, ": cannot listen on ", address, ": ", why));
  };
  if (!is_unix && !HasPort(address)) return refused("it is not HOST:PORT");
  std::optional<FolderLock> alone;
  if (is_unix) alone.emplace(UnixSocketPath(address));
  if (is_unix && IsTaken(address)) return refused(WhyNotListening(address));
  grpc::ServerBuilder builder;
  SetArguments(limits, &builder);
  int port = 0;
  builder.AddListeningPort(address, grpc::InsecureServerCredentials(), &port);
  for (grpc::Service* service : services) builder.RegisterService(service);
  Listening out;
  reports_itself = true;
  out.server = builder.BuildAndStart();
  reports_itself = false;
  if (out.server == nullptr || port <= 0) return refused(WhyNotListening(address));  // gRPC does not say
  out.address = address;
  if (!is_unix) {
    out.port = port;
    out.address = StrCat(address.substr(0, address.rfind(':') + 1), port);
  }
  return out;
}

}  // namespace altiplano
