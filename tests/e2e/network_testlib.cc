#include "tests/e2e/network_testlib.h"

#include <fcntl.h>
#include <sched.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <thread>

#include "server/base/check.h"
#include "server/base/strings.h"

namespace altiplano::e2e {

namespace {

// An empty network namespace; -1 with *why.
int NewSpace(std::string* why) {
  int space = -1;
  // unshare is of the calling thread only.
  std::thread([&] {
    if (unshare(CLONE_NEWNET) == 0) space = open("/proc/thread-self/ns/net", O_RDONLY | O_CLOEXEC);
    if (space < 0) *why = StrCat("no network namespace: ", std::strerror(errno));
  }).join();
  return space;
}

// Lines of commands for iproute2's ip within a namespace. False with *why.
bool Ip(int space, const std::string& commands, std::string* why) {
  int input[2], errors[2];
  CHECK(pipe2(input, O_CLOEXEC) == 0 && pipe2(errors, O_CLOEXEC) == 0);
  const pid_t child = fork();
  CHECK(child >= 0);
  if (child == 0) {
    dup2(input[0], STDIN_FILENO);
    dup2(errors[1], STDERR_FILENO);
    if (setns(space, CLONE_NEWNET) == 0) {
      execlp("ip", "ip", "-batch", "-", nullptr);
      execl("/usr/sbin/ip", "ip", "-batch", "-", nullptr);  // not in everybody's PATH
    }
    dprintf(STDERR_FILENO, "ip (of iproute2): %s", std::strerror(errno));
    _exit(127);
  }
  close(input[0]);
  close(errors[1]);
  const bool given = write(input[1], commands.data(), commands.size()) == static_cast<ssize_t>(commands.size());
  close(input[1]);
  std::string said;
  char buffer[512];
  for (ssize_t n; (n = read(errors[0], buffer, sizeof buffer)) > 0;) said.append(buffer, static_cast<size_t>(n));
  close(errors[0]);
  int status = 0;
  waitpid(child, &status, 0);
  if (given && WIFEXITED(status) && WEXITSTATUS(status) == 0) return true;
  *why = said.empty() ? "ip failed" : said;
  return false;
}

}  // namespace

std::unique_ptr<Network> Network::Create(int nodes, std::string* why) {
  std::unique_ptr<Network> network(new Network);
  network->switch_ = NewSpace(why);
  if (network->switch_ < 0) return nullptr;
  std::string ports = "link add bridge type bridge\nlink set bridge up\n";
  for (int node = 0; node < nodes; ++node) {
    const int space = NewSpace(why);
    if (space < 0) return nullptr;
    network->spaces_.push_back(space);
    const std::string port = StrCat("port", node);
    ports += StrCat("link add ", port, " type veth peer name eth0 netns /proc/", getpid(), "/fd/", space, "\n");
    ports += StrCat("link set ", port, " master bridge\nlink set ", port, " up\n");
  }
  if (!Ip(network->switch_, ports, why)) return nullptr;
  for (int node = 0; node < nodes; ++node) {
    const std::string address = StrCat("address add 10.77.0.", node + 1, "/24 dev eth0\n");
    if (!Ip(network->space(node), "link set lo up\nlink set eth0 up\n" + address, why)) return nullptr;
  }
  return network;
}

Network::~Network() {
  for (const int space : spaces_) close(space);
  close(switch_);
}

std::string Network::Address(int node, int port) const {
  return StrCat("10.77.0.", node + 1, ":", port);
}

void Network::ChangePort(int node, const std::string& change) {
  std::string why;
  const bool changed = Ip(switch_, StrCat("link set port", node, " ", change, "\n"), &why);
  if (!changed) fprintf(stderr, "%s\n", why.c_str());
  CHECK(changed);
}

void Network::Unplug(int node) {
  ChangePort(node, "down");
}
void Network::Plug(int node) {
  ChangePort(node, "up");
}
void Network::Swallow(int node) {
  ChangePort(node, "nomaster");
}
void Network::Forward(int node) {
  ChangePort(node, "master bridge");
}

}  // namespace altiplano::e2e
