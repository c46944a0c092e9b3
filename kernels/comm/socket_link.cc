// A tensor travels as 16 bytes of header (a mark and the number of bytes) and its memory as it lies.
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <mutex>
#include <string>
#include <utility>

#include "kernels/comm/link.h"

namespace altiplano {

namespace {

constexpr uint64_t kMark = 0x6b6e694c6f746c41;  // "AltoLink"

struct Header {
  uint64_t mark = kMark;
  uint64_t bytes = 0;
};

class SocketLink : public Link {
 public:
  SocketLink(int socket, std::string peer, std::chrono::milliseconds patience)
      : socket_(socket), peer_(std::move(peer)), patience_(patience) {
    const int on = 1;
    setsockopt(socket_, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);  // a Unix socket refuses, and needs none
    fcntl(socket_, F_SETFL, fcntl(socket_, F_GETFL) | O_NONBLOCK);
  }
  ~SocketLink() override {
    Abort("a rank has left");
    close(socket_);
  }

  bool Send(Stream& stream, const TensorView& x) override {
    const Header header{.bytes = BytesOfDense(x)};
    if (!stream.Synchronize().empty()) return false;
    return Write(&header, sizeof header) && Write(x.data, header.bytes);
  }

  bool Receive(Stream& stream, const TensorView& x) override {
    const uint64_t bytes = BytesOfDense(x);
    if (!stream.Synchronize().empty()) return false;
    Header header;
    if (!Read(&header, sizeof header)) return false;
    if (header.mark != kMark) return Fail(peer_ + " sent what is no tensor");
    if (header.bytes != bytes) {
      return Fail(peer_ + " sent a tensor of " + std::to_string(header.bytes) + " bytes where one of " +
                  std::to_string(bytes) + " was expected");
    }
    return Read(x.data, header.bytes);
  }

  void Abort(std::string_view reason) override { Fail(std::string(reason)); }
  // Also that the other end has gone, before a call finds out.
  std::string error() const override {
    if (std::string why = ended(); !why.empty()) return why;
    pollfd gone{socket_, POLLRDHUP, 0};
    return poll(&gone, 1, 0) > 0 ? peer_ + " has left" : "";
  }

 private:
  std::string ended() const {
    std::lock_guard lock(mutex_);
    return error_;
  }
  bool Fail(const std::string& reason) {
    std::lock_guard lock(mutex_);
    if (error_.empty()) error_ = reason;
    shutdown(socket_, SHUT_RDWR);  // wakes both ends
    return false;
  }

  // Until the socket is ready, at most patience.
  bool WaitFor(short events) {
    if (!ended().empty()) return false;
    pollfd ready{socket_, events, 0};
    const int found = poll(&ready, 1, static_cast<int>(std::min<int64_t>(patience_.count(), INT32_MAX)));
    if (found > 0 || (found < 0 && errno == EINTR)) return true;
    return Fail("no word for " + std::to_string(patience_.count()) + " ms from " + peer_);
  }

  // What send or recv returned, as whether to go on.
  bool Advance(ssize_t moved, short events, char** at, uint64_t* left) {
    if (moved > 0) {
      *at += moved;
      *left -= static_cast<uint64_t>(moved);
      return true;
    }
    if (moved < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return WaitFor(events);
    if (moved < 0 && errno == EINTR) return true;
    return Fail(peer_ + " has left");
  }

  bool Write(const void* data, uint64_t bytes) {
    char* at = static_cast<char*>(const_cast<void*>(data));
    while (bytes > 0) {
      if (!Advance(send(socket_, at, bytes, MSG_NOSIGNAL), POLLOUT, &at, &bytes)) return false;
    }
    return ended().empty();
  }

  bool Read(void* data, uint64_t bytes) {
    char* at = static_cast<char*>(data);
    while (bytes > 0) {
      if (!Advance(recv(socket_, at, bytes, 0), POLLIN, &at, &bytes)) return false;
    }
    return ended().empty();
  }

  const int socket_;
  const std::string peer_;
  const std::chrono::milliseconds patience_;
  mutable std::mutex mutex_;
  std::string error_;  // guarded by mutex_; not empty: ended
};

}  // namespace

std::unique_ptr<Link> MakeSocketLink(int socket, std::string peer, std::chrono::milliseconds patience) {
  return std::make_unique<SocketLink>(socket, std::move(peer), patience);
}

}  // namespace altiplano
