// Several nodes as processes of this machine: killed, paused, stopped, started again.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <unistd.h>

#include <memory>
#include <stdexcept>

#include "server/base/strings.h"
#include "server/cli/client.h"
#include "tests/e2e/live_stream_testlib.h"
#include "tests/e2e/process_testlib.h"
#include "tests/server/cluster/free_address.h"

namespace altiplano::e2e {
namespace {

namespace v1 = inference::v1;
using cli::Answer;
using cli::Client;
using cluster::FreeAddress;
using ::testing::HasSubstr;
using ::testing::StartsWith;

const std::string kTiny = ALTIPLANO_SOURCE_DIR "/tests/data/tiny";

// A leader and one follower, two ranks each; the deadline is short unless the test says otherwise.
class Nodes : public ::testing::Test {
 protected:
  void Start(std::vector<std::string> more = {}, const std::string& step_deadline = "2s") {
    group_ = {"--nodes", "2", "--leader", FreeAddress(), "--tp", "2", "--step-deadline", step_deadline};
    group_.insert(group_.end(), more.begin(), more.end());
    leader_ = std::make_unique<Server>(group_);
    StartFollower();
    // Thrown: a test has nothing to go on with.
    if (leader_->address().empty()) throw std::runtime_error(leader_->process().Errors() + follower_->Errors());
    EXPECT_THAT(follower_->ReadLine(), StartsWith("READY node=1 of=2"));
    auto client = Client::Connect(leader_->address(), std::chrono::seconds(kPatience));
    if (!client.ok()) throw std::runtime_error(client.status().ToString());
    client_ = std::move(*client);
  }
  void StartFollower() {
    std::vector<std::string> flags = {"serve",       "--model",      kTiny,       "--dtype", "f32",
                                      "--kv-memory", "64MiB",        "--threads", "2",       "--node-rank",
                                      "1",           "--log-format", "text"};
    flags.insert(flags.end(), group_.begin(), group_.end());
    follower_ = std::make_unique<Process>(flags);
  }
  void StartStream(uint32_t tokens = 1'000'000) {
    stream_ = std::make_unique<LiveStream>(client_.get(), tokens);
    ASSERT_TRUE(stream_->WaitForFirstToken());
  }
  Status EndOfStream() { return stream_->End(); }
  std::string Health() { return client_->Health("", std::chrono::seconds(kPatience)).value(); }

  std::vector<std::string> group_;
  std::unique_ptr<Server> leader_;
  std::unique_ptr<Process> follower_;
  std::unique_ptr<Client> client_;
  std::unique_ptr<LiveStream> stream_;
};

TEST_F(Nodes, AnswersAreThoseOfOneProcess) {
  Start();
  Server alone({"--tp", "2"});
  auto other = Client::Connect(alone.address(), std::chrono::seconds(kPatience));
  ASSERT_TRUE(other.ok());
  std::string texts[2];
  Client* clients[2] = {client_.get(), other->get()};
  for (int i = 0; i < 2; ++i) {
    Answer answer;
    EXPECT_TRUE(clients[i]
                    ->StreamGenerate(
                        Story(200), [&](const v1::Delta& delta) { texts[i] += delta.text(); }, &answer)
                    .ok());
  }
  EXPECT_NE(texts[0], "");
  EXPECT_EQ(texts[0], texts[1]);
}

// Both get the signal at once, as from a launcher: the follower stays until the leader has drained.
TEST_F(Nodes, TermForAllDrainsThemAll) {
  Start({"--drain-timeout", "10m"});
  StartStream(300);
  follower_->Signal(SIGTERM);
  leader_->process().Signal(SIGTERM);
  EXPECT_TRUE(EndOfStream().ok()) << EndOfStream().ToString();
  EXPECT_EQ(stream_->tokens(), 300u);
  EXPECT_EQ(leader_->process().Wait(), 0) << leader_->process().Errors();
  EXPECT_EQ(follower_->Wait(), 0) << follower_->Errors();
}

TEST_F(Nodes, AKilledFollowerEndsTheLeaderWithExit75) {
  Start();
  StartStream();
  follower_->Signal(SIGKILL);
  EXPECT_EQ(EndOfStream().reason(), "ENGINE_DOWN") << EndOfStream().ToString();
  EXPECT_EQ(leader_->process().Wait(), 75) << leader_->process().Errors();
}

TEST_F(Nodes, APausedFollowerEndsTheLeaderWithExit75) {
  Start();
  StartStream();
  follower_->Signal(SIGSTOP);
  EXPECT_EQ(EndOfStream().reason(), "ENGINE_DOWN") << EndOfStream().ToString();
  EXPECT_THAT(EndOfStream().message(), HasSubstr("no word for 2000 ms from"));
  EXPECT_EQ(leader_->process().Wait(), 75) << leader_->process().Errors();
  follower_->Signal(SIGCONT);
  EXPECT_EQ(follower_->Wait(), 75) << "when it goes on it finds the leader gone: " << follower_->Errors();
}

TEST_F(Nodes, APausedFollowerIsNoticedWhileNothingRuns) {
  Start({"--on-engine-failure", "stay"});
  EXPECT_EQ(Health(), "SERVING");
  follower_->Signal(SIGSTOP);
  EXPECT_TRUE(Eventually([&] { return Health() == "NOT_SERVING"; })) << leader_->process().Errors();
  leader_->process().Signal(SIGTERM);
  EXPECT_EQ(leader_->process().Wait(), 0) << leader_->process().Errors();
  follower_->Signal(SIGCONT);
  EXPECT_EQ(follower_->Wait(), 75) << follower_->Errors();
}

// Health follows what is heard of the follower, while something runs and while nothing does; nothing is given up.
TEST_F(Nodes, AFollowerPausedForLessThanTheStepDeadlineOnlyTurnsHealth) {
  Start({"--health-deadline", "500ms"}, "10m");
  StartStream(400);
  for (bool idle : {false, true}) {
    SCOPED_TRACE(idle ? "idle" : "busy");
    follower_->Signal(SIGSTOP);
    EXPECT_TRUE(Eventually([&] { return Health() == "NOT_SERVING"; })) << leader_->process().Errors();
    follower_->Signal(SIGCONT);
    EXPECT_TRUE(Eventually([&] { return Health() == "SERVING"; })) << leader_->process().Errors();
    EXPECT_TRUE(EndOfStream().ok()) << EndOfStream().ToString();
    EXPECT_EQ(stream_->tokens(), 400u);
  }
}

TEST_F(Nodes, AFollowerEndsWhenTheLeaderIsKilledOrPaused) {
  Start();
  leader_->process().Signal(SIGKILL);
  EXPECT_EQ(follower_->Wait(), 75) << follower_->Errors();
  Start();
  leader_->process().Signal(SIGSTOP);
  EXPECT_EQ(follower_->Wait(), 75) << follower_->Errors();
  leader_->process().Signal(SIGCONT);
  EXPECT_EQ(leader_->process().Wait(), 75) << leader_->process().Errors();
}

TEST_F(Nodes, WithRestartTheGroupIsFormedAgainWhenTheFollowerIs) {
  Start({"--on-engine-failure", "restart"});
  StartStream();
  follower_->Signal(SIGKILL);
  EXPECT_EQ(EndOfStream().reason(), "ENGINE_DOWN") << EndOfStream().ToString();
  EXPECT_EQ(Health(), "NOT_SERVING");
  StartFollower();
  EXPECT_THAT(follower_->ReadLine(), StartsWith("READY node=1 of=2"));
  EXPECT_TRUE(Eventually([&] { return Health() == "SERVING"; })) << leader_->process().Errors();
  Answer answer;
  EXPECT_TRUE(client_
                  ->StreamGenerate(
                      Story(20), [](const v1::Delta&) {}, &answer)
                  .ok());
  leader_->process().Signal(SIGTERM);
  EXPECT_EQ(leader_->process().Wait(), 0) << leader_->process().Errors();
  EXPECT_EQ(follower_->Wait(), 0) << follower_->Errors();
}

// The leader that comes back fails in its warm-up: the group that served cannot be formed again.
TEST_F(Nodes, WithRestartAFollowerOfAGroupThatIsNotFormedAgainEndsWithExit75) {
  Start({"--on-engine-failure", "restart"});
  leader_->process().Signal(SIGKILL);
  leader_->process().Wait();
  setenv("ALTIPLANO_FAULT", "0:0:throw", 1);
  leader_ = std::make_unique<Server>(group_);
  unsetenv("ALTIPLANO_FAULT");
  EXPECT_NE(leader_->process().Wait(), 0);
  EXPECT_EQ(follower_->Wait(), 75) << follower_->Errors();
  EXPECT_THAT(follower_->Errors(), HasSubstr(R"(serve failed  error="rank 0: failed on purpose)"));
}

// The follower's rank 3 hangs before anything serves.
TEST_F(Nodes, AFollowerThatHangsInItsWarmUpEndsAllWithExit75) {
  group_ = {"--nodes", "2", "--leader", FreeAddress(), "--tp", "2", "--step-deadline", "1s", "--start-timeout", "2s"};
  leader_ = std::make_unique<Server>(group_);
  setenv("ALTIPLANO_FAULT", "3:0:hang", 1);
  StartFollower();
  unsetenv("ALTIPLANO_FAULT");
  EXPECT_EQ(leader_->process().Wait(), 75) << leader_->process().Errors();
  EXPECT_EQ(follower_->Wait(), 75) << follower_->Errors();
  EXPECT_EQ(leader_->process().output(), "") << "not READY";
  EXPECT_THAT(leader_->process().Errors(), HasSubstr(R"("serve failed","error":"node 1: rank 3 hangs in the warm-up)"));
  EXPECT_THAT(follower_->Errors(), HasSubstr(R"(serve failed  error="rank 3 hangs in the warm-up)"));
}

TEST_F(Nodes, WhereClientsAreServedIsNoLeader) {
  Start();
  const Finished follower =
      RunToEnd({"serve", "--model", kTiny, "--nodes", "2", "--node-rank", "1", "--leader", leader_->address()});
  EXPECT_EQ(follower.code, 64) << follower.err;
  EXPECT_THAT(follower.err, HasSubstr("what answers at " + leader_->address() + " leads no nodes: --leader is the"));
  EXPECT_EQ(Health(), "SERVING") << "and the group goes on";
}

TEST_F(Nodes, OneWithAnotherModelOrFlagIsRefused) {
  Start();
  std::vector<std::string> flags = {"serve",       "--model", kTiny,         "--dtype", "f32",
                                    "--node-rank", "1",       "--log-level", "off"};
  flags.insert(flags.end(), group_.begin(), group_.end());
  std::vector<std::string> seqs = flags;
  seqs.insert(seqs.end(), {"--max-num-seqs", "3"});
  const Finished other_flag = RunToEnd(seqs);
  EXPECT_EQ(other_flag.code, 64) << other_flag.err;
  EXPECT_THAT(other_flag.err, HasSubstr("node 1 has max-num-seqs 3, the leader has 256"));
  flags[2] = ALTIPLANO_SOURCE_DIR "/tests/data/tiny-draft";
  const Finished other_model = RunToEnd(flags);
  EXPECT_EQ(other_model.code, 64) << other_model.err;
  EXPECT_THAT(other_model.err, HasSubstr("node 1 has model "));
  EXPECT_EQ(Health(), "SERVING") << "and the group goes on";
}

}  // namespace
}  // namespace altiplano::e2e
