// Networks of their own for the processes of a test: a network namespace for each node, and one with the switch that
// joins them. They have no names and are held by this process's file descriptors alone: when it ends, however it does,
// the kernel takes them away with all that is in them. Nothing is changed in the machine's own network.
#pragma once

#include <memory>
#include <string>
#include <vector>

namespace altiplano::e2e {

class Network {
 public:
  // Null with *why when the kernel, our rights or a missing `ip` (iproute2) forbid it.
  static std::unique_ptr<Network> Create(int nodes, std::string* why);
  Network(const Network&) = delete;
  ~Network();

  int space(int node) const { return spaces_[static_cast<size_t>(node)]; }  // for Process
  std::string Address(int node, int port) const;

  // The node's cable is pulled: it sees that. Nothing is told to anybody, no connection is reset.
  void Unplug(int node);
  void Plug(int node);
  // The switch forgets the node's port: what the node sends and what is sent to it vanishes, and nobody sees anything.
  void Swallow(int node);
  void Forward(int node);

 private:
  Network() = default;
  void ChangePort(int node, const std::string& change);

  int switch_ = -1;
  std::vector<int> spaces_;
};

}  // namespace altiplano::e2e
