// Nodes in networks of their own: cables pulled, packets swallowed without a word, processes killed and paused.
//
// Skips where network namespaces cannot be made. NetworkFaults takes its time and runs with
// ALTIPLANO_E2E_NETWORK_FAULTS=1 only (ctest: e2e_network_faults).
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "server/base/strings.h"
#include "server/cli/client.h"
#include "tests/e2e/live_stream_testlib.h"
#include "tests/e2e/network_testlib.h"
#include "tests/e2e/process_testlib.h"

namespace altiplano::e2e {
namespace {

using cli::Answer;
using cli::Client;
using std::chrono::seconds;
using ::testing::StartsWith;

// Each node has a network namespace; the test talks to the leader through a Unix socket, which no network is between.
class Networks : public ::testing::Test {
 protected:
  static constexpr int kExitRestart = 75;

  void Start(int nodes, const std::string& on_failure, const std::string& step_deadline = "2s") {
    std::string why;
    network_ = Network::Create(nodes, &why);
    if (network_ == nullptr) GTEST_SKIP() << why;
    socket_ = StrCat(::testing::TempDir(), "altiplano-", getpid(), ".sock");
    flags_ = {"serve",
              "--model",
              ALTIPLANO_SOURCE_DIR "/tests/data/tiny",
              "--dtype",
              "f32",
              "--kv-memory",
              "64MiB",
              "--threads",
              "2",
              "--tp",
              "2",
              "--log-format",
              "text",
              "--listen",
              StrCat("unix:", socket_),
              "--nodes",
              StrCat(nodes),
              "--leader",
              network_->Address(0, 50060),
              "--step-deadline",
              step_deadline,
              "--on-engine-failure",
              on_failure};
    nodes_.resize(static_cast<size_t>(nodes));
    for (int node = 0; node < nodes; ++node) StartNode(node);
    ASSERT_THAT(nodes_[0]->ReadLine(), StartsWith("READY address=")) << Errors();
    for (int node = 1; node < nodes; ++node) AwaitFollower(node);
    auto client = Client::Connect(StrCat("unix:", socket_), seconds(kPatience));
    ASSERT_TRUE(client.ok()) << client.status().ToString();
    client_ = std::move(*client);
  }
  void TearDown() override { std::filesystem::remove(socket_); }

  void StartNode(int node) {
    std::vector<std::string> flags = flags_;
    flags.insert(flags.end(), {"--node-rank", StrCat(node)});
    nodes_[static_cast<size_t>(node)] = std::make_unique<Process>(flags, network_->space(node));
  }
  Process& node(int node) { return *nodes_[static_cast<size_t>(node)]; }
  void AwaitFollower(int follower) {
    EXPECT_THAT(node(follower).ReadLine(), StartsWith(StrCat("READY node=", follower))) << Errors();
  }
  std::string Errors() {
    std::string all;
    for (size_t node = 0; node < nodes_.size(); ++node) all += StrCat("\nnode ", node, ":\n", nodes_[node]->Errors());
    return all;
  }
  void StartStream(uint32_t tokens = 1'000'000) {
    stream_ = std::make_unique<LiveStream>(client_.get(), tokens);
    ASSERT_TRUE(stream_->WaitForFirstToken()) << Errors();
  }
  // What runs when the group is lost ends so, and says when to come again.
  void ExpectStreamLost() {
    const Status& status = stream_->End();
    EXPECT_EQ(status.code(), Code::kUnavailable) << status.ToString();
    EXPECT_EQ(status.reason(), "ENGINE_DOWN") << status.ToString();
    EXPECT_TRUE(status.detail() != nullptr && status.detail()->retry_after.has_value()) << status.ToString();
  }
  std::string Health() {
    auto health = client_->Health("", seconds(kPatience));
    return health.ok() ? *health : health.status().ToString();
  }
  void ExpectServesAgain() {
    EXPECT_TRUE(Eventually([&] { return Health() == "SERVING"; })) << Errors();
    LiveStream again(client_.get(), 20);
    EXPECT_TRUE(again.End().ok()) << again.End().ToString() << Errors();
    EXPECT_EQ(again.tokens(), 20u);
  }
  void ExpectAllEnd(int code) {
    for (const auto& node : nodes_) EXPECT_EQ(node->Wait(), code) << Errors();
  }
  void StopAll() {
    for (const auto& node : nodes_) node->Signal(SIGTERM);
    ExpectAllEnd(0);
  }

  std::unique_ptr<Network> network_;
  std::string socket_;
  std::vector<std::string> flags_;
  std::vector<std::unique_ptr<Process>> nodes_;
  std::unique_ptr<Client> client_;
  std::unique_ptr<LiveStream> stream_;
};

TEST_F(Networks, SwallowedPacketsEndTheGroupWhichFormsAgainWhenTheyGetThrough) {
  Start(2, "restart");
  if (client_ == nullptr) return;
  StartStream();
  network_->Swallow(1);
  ExpectStreamLost();
  EXPECT_EQ(Health(), "NOT_SERVING");
  network_->Forward(1);
  ExpectServesAgain();
  AwaitFollower(1);
  StopAll();
}

TEST_F(Networks, AKilledFollowerEndsTheLeaderWithExit75) {
  Start(2, "exit");
  if (client_ == nullptr) return;
  StartStream();
  node(1).Signal(SIGKILL);
  ExpectStreamLost();
  EXPECT_EQ(node(0).Wait(), kExitRestart) << Errors();
}

class NetworkFaults : public Networks {
 protected:
  void SetUp() override {
    if (std::getenv("ALTIPLANO_E2E_NETWORK_FAULTS") == nullptr) GTEST_SKIP() << "slow: ALTIPLANO_E2E_NETWORK_FAULTS=1";
  }
  // Of a fault that just began.
  void ExpectNotServingSoon() {
    const auto begin = std::chrono::steady_clock::now();
    EXPECT_TRUE(Eventually([&] { return Health() == "NOT_SERVING"; })) << Errors();
    EXPECT_LT(std::chrono::steady_clock::now() - begin, seconds(5)) << Errors();
  }
};

TEST_F(NetworkFaults, APulledCableIsNoticedWhileNothingRunsAndWhenItIsPluggedInAllServe) {
  Start(2, "restart");
  if (client_ == nullptr) return;
  for (int round = 0; round < 2; ++round) {
    network_->Unplug(round);  // a follower's, then the leader's
    ExpectNotServingSoon();
    network_->Plug(round);
    ExpectServesAgain();
    AwaitFollower(1);
  }
  StopAll();
}

TEST_F(NetworkFaults, APulledCableEndsAllNodesWithExit75) {
  Start(2, "exit");
  if (client_ == nullptr) return;
  StartStream();
  network_->Unplug(1);
  ExpectStreamLost();
  ExpectAllEnd(kExitRestart);
}

TEST_F(NetworkFaults, AnOutageShorterThanTheDeadlineTurnsHealthAndDelays) {
  Start(2, "exit", "30s");
  if (client_ == nullptr) return;
  LiveStream stream(client_.get(), 4000);
  ASSERT_TRUE(stream.WaitForFirstToken());
  network_->Swallow(1);
  ExpectNotServingSoon();
  network_->Forward(1);
  EXPECT_TRUE(Eventually([&] { return Health() == "SERVING"; })) << Errors();
  EXPECT_TRUE(stream.End().ok()) << stream.End().ToString() << Errors();
  EXPECT_EQ(stream.tokens(), 4000u);
  StopAll();
}

TEST_F(NetworkFaults, APausedFollowerIsLeftAndJoinsAgainWhenItGoesOn) {
  Start(2, "restart");
  if (client_ == nullptr) return;
  StartStream();
  node(1).Signal(SIGSTOP);
  ExpectNotServingSoon();
  ExpectStreamLost();
  node(1).Signal(SIGCONT);
  ExpectServesAgain();
  AwaitFollower(1);
  StopAll();
}

TEST_F(NetworkFaults, OfThreeNodesTheOneInTheMiddleIsLostToItsNeighboursAndToTheLeader) {
  Start(3, "restart");
  if (client_ == nullptr) return;
  StartStream();
  network_->Swallow(1);
  ExpectNotServingSoon();
  ExpectStreamLost();
  network_->Forward(1);
  ExpectServesAgain();
  StartStream();
  node(2).Signal(SIGKILL);
  ExpectNotServingSoon();
  ExpectStreamLost();
  StartNode(2);
  AwaitFollower(2);
  ExpectServesAgain();
  StopAll();
}

// A node that is cut off at some moment between its start and the group's. The leader forms the group with it when it
// can be reached again, or ends when it had joined and was lost.
TEST_F(NetworkFaults, ANodeLostWhileTheGroupFormsIsNotWaitedForForEver) {
  for (int round = 0; round < 6; ++round) {
    SCOPED_TRACE(round);
    Start(2, "restart");
    if (client_ == nullptr) return;
    StartStream();
    node(1).Signal(SIGKILL);
    ExpectStreamLost();
    StartNode(1);
    std::this_thread::sleep_for(std::chrono::milliseconds(30 * round));
    network_->Swallow(1);
    std::this_thread::sleep_for(seconds(4));
    network_->Forward(1);
    if (!node(1).running()) StartNode(1);  // it had never served: that ends it
    EXPECT_TRUE(Eventually([&] { return Health() == "SERVING" || !node(0).running(); })) << Errors();
    if (node(0).running()) {
      ExpectServesAgain();
      StopAll();
    } else {
      EXPECT_EQ(node(0).Wait(), kExitRestart) << Errors();
    }
  }
}

}  // namespace
}  // namespace altiplano::e2e
