#include "server/base/listen_error.h"

#include <netdb.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string_view>

#include "server/base/strings.h"

namespace altiplano {

namespace {

// 0, or the error.
int TryToBind(int family, const sockaddr* address, socklen_t size) {
  const int fd = socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0) return errno;
  const int yes = 1;  // as gRPC: connections that have just ended are in nobody's way
  setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
  const int error = bind(fd, address, size) == 0 ? 0 : errno;
  close(fd);
  return error;
}

std::string_view Advice(int error, bool is_unix) {
  switch (error) {
    case EADDRINUSE:
      return is_unix ? ": end what listens there or remove the file, or name another path"
                     : ": end what listens there, or name another port";
    case EADDRNOTAVAIL:
      return ": no interface of this machine has it; name one that it has, or 0.0.0.0 for all";
    case EACCES:
      return is_unix ? ": name a folder in which this user may make files"
                     : ": low ports, mostly those below 1024, take CAP_NET_BIND_SERVICE; name a higher one";
    case ENOENT:
      return ": make the folder first, or name another";
    default:
      return "";
  }
}

std::string Words(int error, bool is_unix) {
  if (error == 0) return "it was refused a moment ago, and would be free now: try again";
  return StrCat(std::strerror(error), Advice(error, is_unix));
}

std::string WhyNoSocketAt(std::string_view path) {
  sockaddr_un at{};
  at.sun_family = AF_UNIX;
  if (path.size() >= sizeof at.sun_path)
    return StrCat("a socket's path has at most ", sizeof at.sun_path - 1, " bytes");
  path.copy(at.sun_path, path.size());
  const int error = TryToBind(AF_UNIX, reinterpret_cast<const sockaddr*>(&at), sizeof at);
  if (error == 0) unlink(at.sun_path);
  return Words(error, true);
}

}  // namespace

std::string_view UnixSocketPath(std::string_view address) {
  std::string_view path = address.substr(kUnixAddress.size());
  if (path.starts_with("//")) path.remove_prefix(2);
  return path;
}

std::string WhyNotListening(const std::string& address) {
  if (address.starts_with(kUnixAddress)) return WhyNoSocketAt(UnixSocketPath(address));
  const size_t colon = address.rfind(':');
  if (colon == std::string::npos) return "it is not HOST:PORT";
  std::string host = address.substr(0, colon);
  const std::string port = address.substr(colon + 1);
  if (host.size() >= 2 && host.front() == '[' && host.back() == ']') host = host.substr(1, host.size() - 2);
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE;
  addrinfo* found = nullptr;
  if (const int error = getaddrinfo(host.c_str(), port.c_str(), &hints, &found); error != 0) {
    return StrCat(gai_strerror(error), ": name an address of this machine, or 0.0.0.0 for all");
  }
  const int error = TryToBind(found->ai_family, found->ai_addr, found->ai_addrlen);
  freeaddrinfo(found);
  return Words(error, false);
}

}  // namespace altiplano
