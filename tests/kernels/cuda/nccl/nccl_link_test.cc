// Links between nodes by NCCL: two threads, each with an end and a simulated GPU, sockets for wires, and a stand-in for
// the library (fake_nccl.cc). What is issued runs at once there: a kernel that waits for another GPU's is not seen.
#include "kernels/comm/nccl_link.h"

#include <gtest/gtest.h>
#include <sys/socket.h>

#include <future>
#include <string>
#include <utility>
#include <vector>

#include "kernels/cuda/backend.h"
#include "kernels/cuda/sim/sim.h"
#include "tests/kernels/cuda/cuda_testlib.h"

namespace altiplano {
namespace {

using std::chrono::milliseconds;
using Links = std::vector<std::shared_ptr<Link>>;

const NcclApi& Nccl() {
  std::string error;
  const NcclApi* nccl = LoadNccl(&error);
  EXPECT_NE(nccl, nullptr) << error;
  return *nccl;
}

// Two nodes with links both ways: {previous, next} of each.
std::pair<Links, Links> Connect(milliseconds patience, const NcclApi& nccl = Nccl()) {
  int there[2], back[2];
  EXPECT_EQ(socketpair(AF_UNIX, SOCK_STREAM, 0, there) + socketpair(AF_UNIX, SOCK_STREAM, 0, back), 0);
  const auto node = [=, &nccl](int gpu, int previous, int next) {
    std::string failed;
    const std::string peer = "node " + std::to_string(1 - gpu);
    Links links =
        MakeNcclLinks(nccl,
                      {{.wire = MakeSocketLink(previous, peer), .sends = false, .gpu = gpu, .peer = peer},
                       {.wire = MakeSocketLink(next, peer), .sends = true, .gpu = gpu, .most_bytes = 64, .peer = peer}},
                      patience, &failed);
    EXPECT_EQ(failed, "");
    return links;
  };
  auto second = std::async(std::launch::async, node, 1, there[1], back[1]);
  Links first = node(0, back[0], there[0]);
  return {std::move(first), second.get()};
}

class NcclLinkTest : public testing::Test {
 protected:
  void SetUp() override {
    sim::SetGpus(2);
    std::string error;
    for (int gpu : {0, 1}) streams_[gpu] = Stream::Cuda(gpu, &error);
  }
  void TearDown() override {
    EXPECT_EQ(sim::TakeError(), "");
    sim::SetGpus(1);
  }
  std::unique_ptr<Stream> streams_[2];
};

TEST_F(NcclLinkTest, TensorsComeInOrderBothWays) {
  const auto [first, second] = Connect(std::chrono::minutes(10));
  auto other = std::async(std::launch::async, [&, &links = second] {
    for (int32_t i = 0; i < 40; ++i) {
      OnDevice x(*streams_[1], std::vector<int32_t>(2));
      EXPECT_TRUE(links[0]->Receive(*streams_[1], x.view()));
      EXPECT_EQ(x.Values(), (std::vector<int32_t>{i, -i}));
      EXPECT_TRUE(links[1]->Send(*streams_[1], TensorView::Make(x.view().data, DType::kI32, {1}, Device::kCuda)));
    }
  });
  const OnDevice back(*streams_[0], std::vector<int32_t>(1));
  for (int32_t i = 0; i < 40; ++i) {
    const OnDevice x(*streams_[0], std::vector<int32_t>{i, -i});
    EXPECT_TRUE(first[1]->Send(*streams_[0], x.view()));
    if (i == 0) continue;  // two are on their way
    EXPECT_TRUE(first[0]->Receive(*streams_[0], back.view()));
    EXPECT_EQ(back.Values(), std::vector<int32_t>{i - 1});
  }
  other.get();
  for (const auto& link : {first[0], first[1], second[0], second[1]}) EXPECT_EQ(link->error(), "");
}

// No host waits for a stream. What is sent is taken by a copy that the simulator knows of: it finds those that race.
TEST_F(NcclLinkTest, EventsAloneOrderASlotsCopies) {
  static Buffer taken;
  taken = Buffer::Allocate(*streams_[0], 64);
  NcclApi api = Nccl();
  api.send = [](const void* from, size_t count, NcclType type, int peer, NcclComm* comm, void* stream) {
    cuda::Copy(stream, taken.data(), Device::kCuda, from, Device::kCuda, count);
    return Nccl().send(from, count, type, peer, comm, stream);
  };
  const auto [first, second] = Connect(std::chrono::minutes(10), api);
  const OnDevice x(*streams_[0], std::vector<int32_t>{1, 2}), y(*streams_[1], std::vector<int32_t>(2));
  for (int i = 0; i < 8; ++i) {
    EXPECT_TRUE(first[1]->Send(*streams_[0], x.view()));
    EXPECT_TRUE(second[0]->Receive(*streams_[1], y.view()));
  }
  EXPECT_EQ(streams_[1]->Synchronize(), "");
  EXPECT_EQ(y.Values(), (std::vector<int32_t>{1, 2}));
  taken = Buffer();
}

TEST_F(NcclLinkTest, ANodeThatSendsNothingIsNamed) {
  const auto [first, second] = Connect(milliseconds(100));
  const OnDevice x(*streams_[1], std::vector<int32_t>(2));
  EXPECT_FALSE(second[0]->Receive(*streams_[1], x.view()));
  EXPECT_EQ(second[0]->error(), "node 0: NCCL: no end to a call for 100 ms");
  EXPECT_NE(first[1]->error(), "") << "the wire tells the other end";
  EXPECT_FALSE(second[0]->Receive(*streams_[1], x.view()));
}

TEST_F(NcclLinkTest, ANodeThatGoesOrAbortsEndsBothEnds) {
  auto [first, second] = Connect(std::chrono::minutes(10));
  first.clear();
  EXPECT_EQ(second[0]->error(), "node 0 has left");
  EXPECT_EQ(second[1]->error(), "node 0 has left");

  auto [third, fourth] = Connect(std::chrono::minutes(10));
  third[1]->Abort("the group has ended");
  EXPECT_EQ(third[1]->error(), "the group has ended");
  EXPECT_EQ(fourth[0]->error(), "node 0 has left");
  EXPECT_EQ(fourth[1]->error(), "") << "a link of its own";
}

TEST_F(NcclLinkTest, AnAsynchronousErrorEndsIt) {
  const auto [first, second] = Connect(std::chrono::minutes(10));
  const OnDevice x(*streams_[0], std::vector<int32_t>{1}), y(*streams_[1], std::vector<int32_t>{1, 2});
  EXPECT_TRUE(first[1]->Send(*streams_[0], x.view()));
  EXPECT_FALSE(second[0]->Receive(*streams_[1], y.view()));
  EXPECT_EQ(second[0]->error(), "node 0: NCCL: invalid usage: ");
}

}  // namespace
}  // namespace altiplano
