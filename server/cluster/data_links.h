// The ring of TCP connections over which nodes hand activations on: each node listens for the one before it, and
// connects to the one after it, once for each rank of a stage.
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "kernels/comm/link.h"
#include "server/base/status.h"

namespace altiplano::cluster {

// The address of this machine from which `peer` ("host:port") is reached. UNAVAILABLE when there is no way to it.
StatusOr<std::string> LocalAddressTowards(const std::string& peer);

class DataListener {
 public:
  // On a free port of a local address.
  static StatusOr<std::unique_ptr<DataListener>> Start(const std::string& local_address);
  ~DataListener();
  const std::string& address() const { return address_; }  // "1.2.3.4:5678", "[::1]:5678"
  int socket() const { return socket_; }

 private:
  DataListener(int socket, std::string address) : socket_(socket), address_(std::move(address)) {}
  const int socket_;
  const std::string address_;
};

struct DataLinks {
  std::vector<std::shared_ptr<Link>> previous, next;  // [ranks]
};
struct DataPeers {
  std::string token;  // of the group: a connection without it is closed
  int node = 0;       // this one
  int nodes = 1;
  int ranks = 1;                                                       // of a stage
  std::string next_address;                                            // where the node after it listens
  std::chrono::milliseconds link_patience = std::chrono::seconds(30);  // of the links, once connected
};
// All nodes at once. UNAVAILABLE when the others have not come after `patience`; CANCELLED when cancelled() says so.
StatusOr<DataLinks> ConnectDataLinks(const DataListener& listener, const DataPeers& peers,
                                     std::chrono::milliseconds patience, const std::function<bool()>& cancelled);

}  // namespace altiplano::cluster
