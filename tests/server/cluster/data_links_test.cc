#include "server/cluster/data_links.h"

#include <arpa/inet.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <future>

namespace altiplano::cluster {
namespace {

using std::chrono::milliseconds;
using ::testing::HasSubstr;

TEST(DataLinks, LocalAddressIsWhereThePeerIsReachedFrom) {
  EXPECT_EQ(LocalAddressTowards("127.0.0.1:50060").value(), "127.0.0.1");
  EXPECT_THAT(LocalAddressTowards("no.such.host.invalid:1").status().message(), HasSubstr("no.such.host.invalid"));
}

TEST(DataLinks, ARingOfThreeNodesAndTwoRanks) {
  constexpr int kNodes = 3, kRanks = 2;
  std::vector<std::unique_ptr<DataListener>> listeners;
  for (int i = 0; i < kNodes; ++i) listeners.push_back(std::move(*DataListener::Start("127.0.0.1")));
  // Strangers come first: one that says something else, one that says nothing, and one of another group that says where
  // it belongs there.
  sockaddr_in to{};
  to.sin_family = AF_INET;
  to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  to.sin_port = htons(static_cast<uint16_t>(std::stoi(listeners[1]->address().substr(10))));
  int strangers[3];
  for (int& stranger : strangers) {
    stranger = socket(AF_INET, SOCK_STREAM, 0);
    ASSERT_EQ(connect(stranger, reinterpret_cast<sockaddr*>(&to), sizeof to), 0);
  }
  ASSERT_EQ(write(strangers[0], "token/9/9\n", 10), 10);
  close(strangers[1]);
  ASSERT_EQ(write(strangers[2], "stale/0/0\n", 10), 10);
  std::vector<std::future<StatusOr<DataLinks>>> nodes;
  for (int node = 0; node < kNodes; ++node) {
    nodes.push_back(std::async(std::launch::async, [&, node] {
      return ConnectDataLinks(*listeners[static_cast<size_t>(node)],
                              {.token = "token",
                               .node = node,
                               .nodes = kNodes,
                               .ranks = kRanks,
                               .next_address = listeners[static_cast<size_t>((node + 1) % kNodes)]->address()},
                              std::chrono::seconds(60), {});
    }));
  }
  std::vector<DataLinks> links;
  for (auto& node : nodes) {
    auto connected = node.get();
    ASSERT_TRUE(connected.ok()) << connected.status().ToString();
    links.push_back(std::move(*connected));
  }
  const auto stream = Stream::Cpu(1);
  for (int node = 0; node < kNodes; ++node) {
    for (int rank = 0; rank < kRanks; ++rank) {
      int32_t out = 10 * node + rank, in = -1;
      const auto next = static_cast<size_t>((node + 1) % kNodes);
      ASSERT_TRUE(links[static_cast<size_t>(node)].next[static_cast<size_t>(rank)]->Send(
          *stream, TensorView::Make(&out, DType::kI32, {1})));
      ASSERT_TRUE(
          links[next].previous[static_cast<size_t>(rank)]->Receive(*stream, TensorView::Make(&in, DType::kI32, {1})));
      EXPECT_EQ(in, out);
    }
  }
  close(strangers[0]);
  close(strangers[2]);
}

TEST(DataLinks, ANodeThatDoesNotComeIsNamed) {
  auto mine = std::move(*DataListener::Start("127.0.0.1")), other = std::move(*DataListener::Start("127.0.0.1"));
  const DataPeers peers{.token = "t", .node = 0, .nodes = 3, .ranks = 1, .next_address = other->address()};
  EXPECT_THAT(ConnectDataLinks(*mine, peers, milliseconds(100), {}).status().message(),
              HasSubstr("node 2 did not connect within 100 ms"));
  const std::string gone = other->address();
  other.reset();
  EXPECT_THAT(ConnectDataLinks(*mine, peers, milliseconds(100), {}).status().message(),
              HasSubstr("cannot connect to node 1 at " + gone));
  EXPECT_EQ(ConnectDataLinks(*mine, {.token = "t", .nodes = 2, .next_address = mine->address()},
                             std::chrono::seconds(60), [] { return true; })
                .status()
                .code(),
            Code::kCancelled);
}

}  // namespace
}  // namespace altiplano::cluster
