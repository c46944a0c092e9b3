// Listener: one address with the services behind it, gRPC's arguments set as docs say.
#pragma once

#include <grpcpp/grpcpp.h>

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "server/base/status.h"
#include "server/frontend/limits.h"

namespace altiplano {

struct Listening {
  std::unique_ptr<grpc::Server> server;
  int port = 0;         // 0: a unix socket
  std::string address;  // as given, with the port that was taken
};

// UNAVAILABLE naming the flag that asks for it, the address, the reason and what to do.
StatusOr<Listening> Listen(std::string_view flag, const std::string& address, const FrontendLimits& limits,
                           const std::vector<grpc::Service*>& services);

// gRPC's and protobuf's own messages go through our log from now on. Idempotent.
void RouteLibraryLogs();

}  // namespace altiplano
