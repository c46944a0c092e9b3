// Link: one end of a connection between two ranks, over which stages of a pipeline hand tensors on. Each end is used by
// its rank's thread; Abort may come from any thread.
//
// What one end sends the other receives, in order, each tensor as one of the same size. When either end aborts, is
// destroyed, or has waited for `patience`, both ends are of no more use: every call returns false. Nobody waits for
// ever.
#pragma once

#include <chrono>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

#include "kernels/device.h"
#include "kernels/tensor.h"

namespace altiplano {

class Link {
 public:
  virtual ~Link() = default;
  Link() = default;
  Link(const Link&) = delete;
  Link& operator=(const Link&) = delete;

  // x: dense. May be changed when this returns; the other end need not have come. False: the link has ended.
  virtual bool Send(Stream& stream, const TensorView& x) = 0;
  // Fills x, dense, with what the other end sends. False: the link has ended, the contents of x are undefined.
  virtual bool Receive(Stream& stream, const TensorView& x) = 0;

  // Idempotent, never waits. The first reason stays.
  virtual void Abort(std::string_view reason = "aborted") = 0;
  // Why the link ended; empty while it lives. Any thread.
  virtual std::string error() const = 0;

 protected:
  // Of a tensor on `device`. Dies when it is on another one or not dense: a bug of the caller's.
  static size_t BytesOfDense(const TensorView& x, Device device = Device::kCpu);
};

// Between two ranks of this process, with CPU memory. The names are for errors: what the other end is called.
std::pair<std::unique_ptr<Link>, std::unique_ptr<Link>> MakeInProcessLink(
    std::string first, std::string second, std::chrono::milliseconds patience = std::chrono::seconds(30));

// Of the largest tensor, that a link between GPUs keeps: as many as there are steps on their way.
inline constexpr size_t kCudaLinkSlots = 2;

struct CudaLinkOptions {
  int from = 0, to = 0;          // ordinals of the GPUs; may be the same
  size_t most_bytes = 0;         // of a tensor
  std::string sender, receiver;  // for errors: what the ends are called
  std::chrono::milliseconds patience = std::chrono::seconds(30);
};
// Between two ranks of this process with a GPU each: the first end sends, the second one receives. Tensors are on the
// GPUs and stay there. Calls return when they are issued, at the latest when the other end has issued its own; true
// then means that nothing was wrong yet: ask error(), while the stream is on its way to the call and when it has come.
// Null with *error: no such GPU, no memory.
std::pair<std::unique_ptr<Link>, std::unique_ptr<Link>> MakeCudaLink(const CudaLinkOptions& options,
                                                                     std::string* error);

// Over a connected stream socket, which it takes, with CPU memory: between machines that have no better way. patience
// counts from the last byte. Both ends must be little-endian, and are trusted.
std::unique_ptr<Link> MakeSocketLink(int socket, std::string peer,
                                     std::chrono::milliseconds patience = std::chrono::seconds(30));

}  // namespace altiplano
