#include "server/cluster/data_links.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "server/base/strings.h"

namespace altiplano::cluster {

namespace {

using SteadyTime = std::chrono::steady_clock::time_point;

constexpr auto kGreetingPatience = std::chrono::seconds(5);
constexpr auto kPoll = std::chrono::milliseconds(50);

class Socket {
 public:
  explicit Socket(int fd = -1) : fd_(fd) {}
  Socket(Socket&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Socket& operator=(Socket&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~Socket() {
    if (fd_ >= 0) close(fd_);
  }
  int get() const { return fd_; }
  int release() { return std::exchange(fd_, -1); }
  explicit operator bool() const { return fd_ >= 0; }

 private:
  int fd_;
};

struct Resolved {
  sockaddr_storage address{};
  socklen_t size = 0;
};

StatusOr<Resolved> Resolve(const std::string& address) {
  const size_t colon = address.rfind(':');
  std::string host = address.substr(0, colon), port = colon == address.npos ? "" : address.substr(colon + 1);
  if (host.size() > 1 && host.front() == '[' && host.back() == ']') host = host.substr(1, host.size() - 2);
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  if (const int error = getaddrinfo(host.c_str(), port.c_str(), &hints, &found); error != 0) {
    return Status(Code::kUnavailable, StrCat("cannot resolve ", address, ": ", gai_strerror(error)));
  }
  Resolved resolved;
  resolved.size = found->ai_addrlen;
  std::memcpy(&resolved.address, found->ai_addr, found->ai_addrlen);
  freeaddrinfo(found);
  return resolved;
}

std::string HostText(const sockaddr_storage& address) {
  char text[INET6_ADDRSTRLEN] = "";
  if (address.ss_family == AF_INET6) {
    inet_ntop(AF_INET6, &reinterpret_cast<const sockaddr_in6&>(address).sin6_addr, text, sizeof text);
    return StrCat("[", text, "]");
  }
  inet_ntop(AF_INET, &reinterpret_cast<const sockaddr_in&>(address).sin_addr, text, sizeof text);
  return text;
}

// What begins a connection: the group's token, which node it comes from and for which rank of a stage.
std::string Greeting(const std::string& token, int node, int rank) {
  return StrCat(token, "/", node, "/", rank, "\n");
}

bool SendAll(int socket, std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t sent = send(socket, bytes.data(), bytes.size(), MSG_NOSIGNAL);
    if (sent <= 0) return false;
    bytes.remove_prefix(static_cast<size_t>(sent));
  }
  return true;
}

// A connection to `to`; empty, with *why, when there is none after `end` or cancelled() says so.
Socket ConnectTo(const Resolved& to, SteadyTime end, const std::function<bool()>& cancelled, std::string* why) {
  Socket out(socket(to.address.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  int error = out && connect(out.get(), reinterpret_cast<const sockaddr*>(&to.address), to.size) == 0 ? 0 : errno;
  while (error == EINPROGRESS) {
    // Packets to a node that is gone vanish without a word; the system alone would try for minutes.
    if (std::chrono::steady_clock::now() > end || (cancelled && cancelled())) error = ETIMEDOUT;
    pollfd ready{out.get(), POLLOUT, 0};
    if (poll(&ready, 1, static_cast<int>(kPoll.count())) <= 0) continue;
    socklen_t size = sizeof error;
    getsockopt(out.get(), SOL_SOCKET, SO_ERROR, &error, &size);
  }
  if (error == 0) return out;
  *why = std::strerror(error);
  return Socket();
}

// The line that a connection begins with; "" when none comes in time or it is too long.
std::string ReadGreeting(int socket) {
  const SteadyTime end = std::chrono::steady_clock::now() + kGreetingPatience;
  std::string line;
  while (line.size() < 256 && std::chrono::steady_clock::now() < end) {
    pollfd ready{socket, POLLIN, 0};
    if (poll(&ready, 1, static_cast<int>(kPoll.count())) <= 0) continue;
    char c;  // by byte: what follows belongs to the link
    if (recv(socket, &c, 1, 0) != 1) return "";
    line += c;
    if (c == '\n') return line;
  }
  return "";
}

}  // namespace

StatusOr<std::string> LocalAddressTowards(const std::string& peer) {
  ASSIGN_OR_RETURN(const Resolved to, Resolve(peer));
  const Socket probe(socket(to.address.ss_family, SOCK_DGRAM | SOCK_CLOEXEC, 0));  // connecting it sends nothing
  sockaddr_storage from{};
  socklen_t size = sizeof from;
  if (!probe || connect(probe.get(), reinterpret_cast<const sockaddr*>(&to.address), to.size) != 0 ||
      getsockname(probe.get(), reinterpret_cast<sockaddr*>(&from), &size) != 0) {
    return Status(Code::kUnavailable, StrCat("there is no way to ", peer, ": ", std::strerror(errno)));
  }
  return HostText(from);
}

StatusOr<std::unique_ptr<DataListener>> DataListener::Start(const std::string& local_address) {
  ASSIGN_OR_RETURN(Resolved at, Resolve(StrCat(local_address, ":0")));
  Socket listener(::socket(at.address.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  sockaddr_storage bound{};
  socklen_t size = sizeof bound;
  if (!listener || bind(listener.get(), reinterpret_cast<const sockaddr*>(&at.address), at.size) != 0 ||
      listen(listener.get(), 128) != 0 ||
      getsockname(listener.get(), reinterpret_cast<sockaddr*>(&bound), &size) != 0) {
    return Status(Code::kUnavailable, StrCat("cannot listen on ", local_address, ": ", std::strerror(errno)));
  }
  const int port = ntohs(bound.ss_family == AF_INET6 ? reinterpret_cast<sockaddr_in6&>(bound).sin6_port
                                                     : reinterpret_cast<sockaddr_in&>(bound).sin_port);
  return std::unique_ptr<DataListener>(new DataListener(listener.release(), StrCat(HostText(bound), ":", port)));
}

DataListener::~DataListener() {
  close(socket_);
}

StatusOr<DataLinks> ConnectDataLinks(const DataListener& listener, const DataPeers& peers,
                                     std::chrono::milliseconds patience, const std::function<bool()>& cancelled) {
  const int before = (peers.node + peers.nodes - 1) % peers.nodes, after = (peers.node + 1) % peers.nodes;
  DataLinks links;
  links.previous.resize(static_cast<size_t>(peers.ranks));
  ASSIGN_OR_RETURN(const Resolved to, Resolve(peers.next_address));
  const SteadyTime end = std::chrono::steady_clock::now() + patience;
  for (int rank = 0; rank < peers.ranks; ++rank) {
    std::string why = "it hung up";
    Socket out = ConnectTo(to, end, cancelled, &why);
    if (!out || !SendAll(out.get(), Greeting(peers.token, peers.node, rank))) {
      if (cancelled && cancelled()) return Status(Code::kCancelled, "cancelled");
      return Status(Code::kUnavailable,
                    StrCat("cannot connect to node ", after, " at ", peers.next_address, ": ", why));
    }
    links.next.push_back(MakeSocketLink(out.release(), StrCat("node ", after), peers.link_patience));
  }
  for (int missing = peers.ranks; missing > 0;) {
    if (cancelled && cancelled()) return Status(Code::kCancelled, "cancelled");
    if (std::chrono::steady_clock::now() > end) {
      return Status(Code::kUnavailable, StrCat("node ", before, " did not connect within ", patience.count(), " ms"));
    }
    pollfd ready{listener.socket(), POLLIN, 0};
    if (poll(&ready, 1, static_cast<int>(kPoll.count())) <= 0) continue;
    Socket in(accept4(listener.socket(), nullptr, nullptr, SOCK_CLOEXEC));
    if (!in) continue;
    const std::string greeting = ReadGreeting(in.get());
    for (int rank = 0; rank < peers.ranks; ++rank) {
      auto& link = links.previous[static_cast<size_t>(rank)];
      if (link != nullptr || greeting != Greeting(peers.token, before, rank)) continue;
      link = MakeSocketLink(in.release(), StrCat("node ", before), peers.link_patience);
      --missing;
      break;
    }
  }
  return links;
}

}  // namespace altiplano::cluster
