#include "server/frontend/listener.h"

#include <google/protobuf/stubs/logging.h>
#include <grpc/support/log.h>
#include <netdb.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <climits>
#include <cstdint>
#include <cstring>
#include <mutex>

#include "server/base/log.h"
#include "server/base/strings.h"

namespace altiplano {

namespace {

constexpr std::string_view kUnix = "unix:";
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

// gRPC does not say why it could not listen: try what it tried.
std::string WhyNotListening(const std::string& address) {
  size_t colon = address.rfind(':');
  std::string host = address.substr(0, colon), port = address.substr(colon + 1);
  if (host.size() >= 2 && host.front() == '[' && host.back() == ']') host = host.substr(1, host.size() - 2);
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE;
  addrinfo* found = nullptr;
  if (int error = getaddrinfo(host.c_str(), port.c_str(), &hints, &found); error != 0) return gai_strerror(error);
  std::string why = "gRPC gives no reason";
  int fd = socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0 || bind(fd, found->ai_addr, found->ai_addrlen) != 0) why = std::strerror(errno);
  if (fd >= 0) close(fd);
  freeaddrinfo(found);
  return why;
}

// A server listens on this unix socket. gRPC would remove it, and that server would serve nobody without noticing; one
// that nobody listens on is left over from a server that was killed.
bool IsTaken(const std::string& address) {
  std::string_view path = std::string_view(address).substr(kUnix.size());
  if (path.starts_with("//")) path.remove_prefix(2);
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

void WriteGrpcLog(gpr_log_func_args* args) {
  // Its errors are about peers and sockets; ours to act on are reported where they matter.
  log::Level level = args->severity == GPR_LOG_SEVERITY_ERROR ? log::Level::kWarn : log::Level::kDebug;
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

StatusOr<Listening> Listen(const std::string& address, const FrontendLimits& limits,
                           const std::vector<grpc::Service*>& services) {
  bool is_unix = address.starts_with(kUnix);
  if (!is_unix && !HasPort(address)) {
    return Status(Code::kUnavailable, StrCat("cannot listen on ", address, ": it is not HOST:PORT"));
  }
  if (is_unix && IsTaken(address)) {
    return Status(Code::kUnavailable, StrCat("cannot listen on ", address, ": ", std::strerror(EADDRINUSE)));
  }
  grpc::ServerBuilder builder;
  SetArguments(limits, &builder);
  int port = 0;
  builder.AddListeningPort(address, grpc::InsecureServerCredentials(), &port);
  for (grpc::Service* service : services) builder.RegisterService(service);
  Listening out;
  out.server = builder.BuildAndStart();
  if (out.server == nullptr || port <= 0) {
    std::string why = is_unix ? std::string("the socket cannot be made there") : WhyNotListening(address);
    return Status(Code::kUnavailable, StrCat("cannot listen on ", address, ": ", why));
  }
  out.address = address;
  if (!is_unix) {
    out.port = port;
    out.address = StrCat(address.substr(0, address.rfind(':') + 1), port);
  }
  return out;
}

}  // namespace altiplano
