// Groups of nodes, as threads of this process over real connections.
#include "server/cluster/group.h"

#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <atomic>
#include <functional>
#include <future>
#include <map>
#include <set>
#include <stdexcept>
#include <thread>

#include "altiplano/cluster/v1/cluster.grpc.pb.h"
#include "server/base/log.h"
#include "server/base/strings.h"
#include "server/cluster/data_links.h"
#include "server/cluster/secret.h"
#include "tests/server/cluster/free_address.h"
#include "tests/server/engine/engine_testlib.h"
#include "tests/server/engine/parallel_testlib.h"

namespace altiplano::cluster {
namespace {

using std::chrono::milliseconds;
using ::testing::HasSubstr;

std::unique_ptr<Checkpoint> OpenTiny() {
  return std::move(*Checkpoint::Open(StrCat(ALTIPLANO_SOURCE_DIR, "/tests/data/tiny")));
}

class GroupTest : public ::testing::Test {
 protected:
  GroupOptions Options(int rank, int nodes) const {
    GroupOptions options;
    options.place = {rank, nodes, address_};
    options.terms = {{"dtype", "f32"}, {"model", "tiny"}};
    options.join_patience = std::chrono::seconds(60);
    options.cancelled = [end = std::chrono::steady_clock::now() + std::chrono::minutes(1)] {
      return std::chrono::steady_clock::now() > end;  // a node that waits for ever is a failure, not a test without end
    };
    return options;
  }
  LocalExecutorOptions Stages(int stages, int ranks) const {
    LocalExecutorOptions options = TinyOptions(ranks);
    options.stages = stages;
    return options;
  }
  std::future<Status> StartFollower(GroupOptions options, LocalExecutorOptions executor_options) {
    return std::async(std::launch::async, [this, options, executor_options] {
      return Follow(options, *checkpoint_, executor_options, [this] { ++ready_; });
    });
  }
  std::unique_ptr<Engine> StartEngine(Leader& leader, const LocalExecutorOptions& options,
                                      decltype(EngineOptions::restart) restart = {}) {
    auto formed = leader.Form(*checkpoint_, options);
    EXPECT_TRUE(formed.ok()) << formed.status().ToString();
    if (!formed.ok()) return nullptr;
    EngineOptions engine_options;
    engine_options.scheduler = formed->scheduler;
    engine_options.restart = std::move(restart);
    return std::move(*Engine::Start(engine_options, std::move(formed->executor)));
  }

  const std::string address_ = FreeAddress();
  const std::unique_ptr<Checkpoint> checkpoint_ = OpenTiny();
  std::atomic<int> ready_{0};
};

TEST_F(GroupTest, NodesAnswerAsOneProcessDoes) {
  const Answers alone = Ask(*StartTiny(Stages(1, 2)));
  for (const auto& [nodes, stages] : {std::pair{2, 2}, {2, 4}, {4, 4}}) {
    SCOPED_TRACE(StrCat(nodes, " nodes, ", stages, " stages"));
    auto leader = std::move(*Leader::Start(Options(0, nodes)));
    std::vector<std::future<Status>> followers;
    for (int node = nodes - 1; node > 0; --node)
      followers.push_back(StartFollower(Options(node, nodes), Stages(stages, 2)));
    {
      auto engine = StartEngine(*leader, Stages(stages, 2));
      ASSERT_NE(engine, nullptr);
      const Answers together = Ask(*engine);
      for (size_t i = 0; i < alone.tokens.size(); ++i) {
        ExpectSame(alone.tokens[i], together.tokens[i], 0);
        ExpectSame(alone.prompt_scores[i], together.prompt_scores[i], 0);
      }
    }
    for (auto& follower : followers) EXPECT_TRUE(follower.get().ok()) << "the leader has stopped in order";
  }
  EXPECT_EQ(ready_, 1 + 1 + 3);
}

TEST_F(GroupTest, TheSmallestPoolBoundsTheGroup) {
  auto leader = std::move(*Leader::Start(Options(0, 2)));
  LocalExecutorOptions small = Stages(2, 1);
  small.kv_bytes /= 2;
  auto follower = StartFollower(Options(1, 2), small);
  auto formed = leader->Form(*checkpoint_, Stages(2, 1));
  ASSERT_TRUE(formed.ok()) << formed.status().ToString();
  auto alone = LocalExecutor::Create(*checkpoint_, small);
  // A stage has half of the layers: as many bytes hold twice the blocks.
  EXPECT_EQ(formed->scheduler.num_blocks, 2 * (*alone)->scheduler_options().num_blocks);
  formed->executor.reset();
  EXPECT_TRUE(follower.get().ok());
}

TEST_F(GroupTest, ANodeWithOtherTermsIsRefusedByNameAndTheRightOneMayCome) {
  auto leader = std::move(*Leader::Start(Options(0, 2)));
  GroupOptions wrong = Options(1, 2);
  wrong.terms["dtype"] = "bf16";
  const Status refused = Follow(wrong, *checkpoint_, Stages(2, 1), [] {});
  ASSERT_EQ(refused.code(), Code::kFailedPrecondition) << refused.ToString();
  EXPECT_THAT(refused.message(), HasSubstr("node 1 has dtype bf16, the leader has f32"));
  GroupOptions stranger = Options(2, 2);
  EXPECT_THAT(Follow(stranger, *checkpoint_, Stages(2, 1), [] {}).message(), HasSubstr("there is no node 2"));
  auto follower = StartFollower(Options(1, 2), Stages(2, 1));
  auto engine = StartEngine(*leader, Stages(2, 1));
  ASSERT_NE(engine, nullptr);
  engine.reset();
  EXPECT_TRUE(follower.get().ok());
}

TEST_F(GroupTest, OnlyWhoKnowsTheSecretJoins) {
  GroupOptions options = Options(0, 2);
  options.secret = "the secret of this group";
  auto leader = std::move(*Leader::Start(options));
  GroupOptions stranger = Options(1, 2);
  EXPECT_EQ(Follow(stranger, *checkpoint_, Stages(2, 1), [] {}).message(),
            "node 1 has no --node-secret-file, the leader has one");
  stranger.secret = "a guess at the secret";
  const Status refused = Follow(stranger, *checkpoint_, Stages(2, 1), [] {});
  EXPECT_EQ(refused.code(), Code::kFailedPrecondition);
  EXPECT_THAT(refused.message(), HasSubstr(StrCat("the leader at ", address_, " does not know the secret")));
  options.place.rank = 1;
  auto follower = StartFollower(options, Stages(2, 1));
  auto engine = StartEngine(*leader, Stages(2, 1));
  ASSERT_NE(engine, nullptr);
  engine.reset();
  EXPECT_TRUE(follower.get().ok());
}

// A leader cannot be had by whoever takes its address, nor does it believe one who has only listened.
TEST_F(GroupTest, ALeaderProvesThatItKnowsTheSecretAndAnAnswerIsGoodForOneChallenge) {
  auto without = std::move(*Leader::Start(Options(0, 2)));
  GroupOptions follower = Options(1, 2);
  follower.secret = "the secret of this group";
  EXPECT_EQ(Follow(follower, *checkpoint_, Stages(2, 1), [] {}).message(),
            "node 1 has a --node-secret-file, the leader has none");
  without.reset();

  GroupOptions options = Options(0, 2);
  options.secret = follower.secret;
  auto leader = std::move(*Leader::Start(options));
  Exchange exchange{.follower_nonce = "overheard", .leader_nonce = "", .node = 1, .data_address = "127.0.0.1:1"};
  std::set<std::string> nonces;
  std::string old_proof;
  for (int attempt = 0; attempt < 2; ++attempt) {
    auto stub = v1::LeaderService::NewStub(grpc::CreateChannel(address_, grpc::InsecureChannelCredentials()));
    grpc::ClientContext context;
    auto stream = stub->Join(&context);
    v1::FollowerMessage message;
    message.mutable_hello()->set_node_rank(1);
    message.mutable_hello()->set_nonce(exchange.follower_nonce);
    message.mutable_hello()->set_data_address(exchange.data_address);
    ASSERT_TRUE(stream->Write(message));
    v1::LeaderMessage challenge;
    ASSERT_TRUE(stream->Read(&challenge));
    exchange.leader_nonce = challenge.challenge().nonce();
    EXPECT_EQ(challenge.challenge().proof(), LeaderProof(options.secret, exchange));
    nonces.insert(exchange.leader_nonce);
    message.set_proof(attempt == 0 ? challenge.challenge().proof() : old_proof);  // its own back, or an old answer
    old_proof = FollowerProof(options.secret, exchange);
    ASSERT_TRUE(stream->Write(message));
    EXPECT_FALSE(stream->Read(&challenge));
    EXPECT_THAT(stream->Finish().error_message(), HasSubstr("node 1 does not know the secret"));
  }
  EXPECT_EQ(nonces.size(), 2u);
}

TEST_F(GroupTest, NodesThatDoNotComeAreNamed) {
  GroupOptions options = Options(0, 4);
  options.join_patience = milliseconds(100);
  auto leader = std::move(*Leader::Start(options));
  auto formed = leader->Form(*checkpoint_, Stages(4, 1));
  EXPECT_EQ(formed.status().code(), Code::kUnavailable);
  EXPECT_THAT(formed.status().message(), HasSubstr("of 4 nodes these have not joined: 1, 2, 3"));
}

TEST_F(GroupTest, AFollowerWithoutALeaderGivesUp) {
  GroupOptions options = Options(1, 2);
  options.join_patience = milliseconds(200);
  ::testing::internal::CaptureStderr();
  const Status alone = Follow(options, *checkpoint_, Stages(2, 1), [] {});
  log::Flush();
  EXPECT_THAT(::testing::internal::GetCapturedStderr(), HasSubstr("the leader has not taken this node in yet"));
  EXPECT_EQ(alone.code(), Code::kUnavailable);
  EXPECT_THAT(alone.message(), HasSubstr(StrCat("the leader at ", options.place.leader,
                                                " did not take this node in within --join-timeout (200 ms): ")));
  EXPECT_THAT(alone.message(), HasSubstr("is node 0 running"));
  options.join_patience = std::chrono::seconds(60);
  options.cancelled = [] { return true; };
  EXPECT_EQ(Follow(options, *checkpoint_, Stages(2, 1), [] {}).code(), Code::kCancelled);
}

TEST_F(GroupTest, ALeaderWhoseAddressIsTakenSaysSo) {
  auto leader = std::move(*Leader::Start(Options(0, 2)));
  auto second = Leader::Start(Options(0, 2));
  EXPECT_EQ(second.status().code(), Code::kUnavailable);
  EXPECT_THAT(second.status().message(), HasSubstr(address_));
}

// A rank of any node fails: everybody learns why, and the nodes form a group again.
TEST_F(GroupTest, AFailureEndsTheGroupEverywhereAndItIsFormedAgain) {
  for (int victim : {0, 1}) {
    for (bool hangs : {false, true}) {
      SCOPED_TRACE(StrCat("node ", victim, hangs ? " hangs" : " throws"));
      std::promise<void> release;
      std::shared_future<void> released = release.get_future().share();
      auto done = std::make_shared<std::atomic<bool>>(false);
      LocalExecutorOptions options = Stages(2, 1);
      options.patience = milliseconds(2000);  // also the time that loaded machines have to warm up
      options.before_step = [=](int rank, uint64_t step) {
        if (rank != victim || step < 8 || done->exchange(true)) return;
        if (!hangs) throw std::runtime_error("injected");
        released.wait();
      };
      auto leader = std::move(*Leader::Start(Options(0, 2)));
      std::promise<Status> first_end;
      std::thread follower([&] {
        first_end.set_value(Follow(Options(1, 2), *checkpoint_, options, [] {}));
        EXPECT_TRUE(Follow(Options(1, 2), *checkpoint_, options, [] {}).ok());
      });
      auto engine = StartEngine(*leader, options, [&](const auto&) -> StatusOr<std::unique_ptr<Executor>> {
        auto formed = leader->Form(*checkpoint_, options);
        if (!formed.ok()) return formed.status();
        return std::move(formed->executor);
      });
      ASSERT_NE(engine, nullptr);
      auto sink = std::make_shared<CollectingSink>();
      auto handle = engine->Submit(MakeRequest(0, 10, 100), sink);
      ASSERT_TRUE(handle.ok());
      const Status ended = sink->WaitForEnd().back().status;
      EXPECT_EQ(ended.reason(), "ENGINE_DOWN") << ended.ToString();
      EXPECT_THAT(ended.message(), HasSubstr(hangs ? "no word for 2000 ms" : StrCat("rank ", victim, ": injected")));
      release.set_value();
      EXPECT_EQ(first_end.get_future().get().code(), Code::kUnavailable);
      while (!engine->healthy()) std::this_thread::sleep_for(milliseconds(5));
      auto again = std::make_shared<CollectingSink>();
      auto second = engine->Submit(MakeRequest(0, 10, 20), again);
      ASSERT_TRUE(second.ok()) << second.status().ToString();
      EXPECT_TRUE(again->WaitForEnd().back().status.ok());
      *handle = RequestHandle();  // which must not outlive the engine
      *second = RequestHandle();
      engine.reset();
      follower.join();
    }
  }
}

// Whoever hangs before the group serves is not waited for: its process is to be ended, and the leader knows why.
TEST_F(GroupTest, AFollowerThatHangsInItsWarmUpIsNamed) {
  std::promise<void> release;
  LocalExecutorOptions options = Stages(2, 2);
  options.patience = milliseconds(1000);  // then the rank beside it gives up
  options.start_patience = milliseconds(2000);
  options.before_step = [released = release.get_future().share()](int rank, uint64_t step) {
    if (rank == 3 && step == 0) released.wait();
  };
  options.on_start_hang = [&](const Status& status) {
    EXPECT_THAT(status.message(), HasSubstr("rank 3 hangs in the warm-up"));
    release.set_value();
  };
  auto leader = std::move(*Leader::Start(Options(0, 2)));
  auto follower = StartFollower(Options(1, 2), options);
  const Status formed = leader->Form(*checkpoint_, Stages(2, 2)).status();
  EXPECT_EQ(formed.code(), Code::kDeadlineExceeded);
  EXPECT_THAT(formed.message(), HasSubstr("node 1: rank 3 hangs in the warm-up"));
  EXPECT_FALSE(follower.get().ok());
}

// The nodes beside it give up first, and have only lost a neighbour: that is not what all end with.
TEST_F(GroupTest, AStartThatHangsEndsAllNodesWithThatCauseWhoeverSpeaksFirst) {
  for (int victim : {0, 1}) {
    SCOPED_TRACE(StrCat("node ", victim, " of 3 hangs"));
    std::promise<void> release;
    std::vector<std::future<Status>> followers;
    std::vector<LocalExecutorOptions> options(3, Stages(3, 1));
    for (LocalExecutorOptions& each : options) {
      each.patience = milliseconds(200);
      each.start_patience = std::chrono::minutes(10);
      each.on_start_hang = [](const Status& status) { ADD_FAILURE() << status.ToString(); };
    }
    LocalExecutorOptions& hangs = options[static_cast<size_t>(victim)];
    hangs.start_patience = milliseconds(1500);
    hangs.before_step = [released = release.get_future().share()](int, uint64_t step) {
      if (step == 0) released.wait();
    };
    hangs.on_start_hang = [&](const Status& status) {
      EXPECT_THAT(status.message(), HasSubstr(StrCat("rank ", victim, " hangs in the warm-up")));
      // Here its process would end, from which the others would learn that it is lost and no more.
      for (size_t i = 0; victim == 0 && i < followers.size(); ++i) followers[i].wait();
      release.set_value();
    };
    auto leader = std::move(*Leader::Start(Options(0, 3)));
    for (int node : {1, 2}) followers.push_back(StartFollower(Options(node, 3), options[static_cast<size_t>(node)]));
    const Status formed = leader->Form(*checkpoint_, options[0]).status();
    EXPECT_EQ(formed.code(), Code::kDeadlineExceeded);
    EXPECT_THAT(formed.message(), HasSubstr(StrCat("node ", victim, ": rank ", victim, " hangs in the warm-up")));
    for (auto& follower : followers) {
      const Status status = follower.get();
      EXPECT_EQ(status.code(), Code::kDeadlineExceeded) << status.ToString();
      EXPECT_THAT(status.message(), HasSubstr(StrCat("rank ", victim, " hangs in the warm-up")));
    }
  }
}

// One that speaks the protocol and computes nothing.
class FakeFollower {
 public:
  // answer: to a plan. load_error: UNAVAILABLE, if not empty, instead of having loaded.
  FakeFollower(const GroupOptions& options, std::function<v1::StepDone(const v1::Plan&)> answer,
               std::string load_error = "")
      : terms_(options.terms),
        load_error_(std::move(load_error)),
        stub_(
            v1::LeaderService::NewStub(grpc::CreateChannel(options.place.leader, grpc::InsecureChannelCredentials()))),
        listener_(std::move(*DataListener::Start("127.0.0.1"))),
        thread_([this, answer] { Run(answer); }) {}
  ~FakeFollower() {
    context_.TryCancel();
    thread_.join();
  }

 private:
  void Run(const std::function<v1::StepDone(const v1::Plan&)>& answer) {
    const auto stream = stub_->Join(&context_);
    v1::FollowerMessage hello;
    hello.mutable_hello()->set_node_rank(1);
    hello.mutable_hello()->mutable_terms()->insert(terms_.begin(), terms_.end());
    hello.mutable_hello()->set_data_address(listener_->address());
    stream->Write(hello);
    DataLinks links;
    for (v1::LeaderMessage message; stream->Read(&message);) {
      v1::FollowerMessage reply;
      if (message.has_formed()) {
        DataPeers peers;
        peers.token = message.formed().token();
        peers.node = 1;
        peers.nodes = 2;
        peers.next_address = message.formed().data_addresses(0);
        auto connected = ConnectDataLinks(*listener_, peers, std::chrono::minutes(1), {});
        ASSERT_TRUE(connected.ok()) << connected.status().ToString();
        links = std::move(*connected);
        if (load_error_.empty()) {
          reply.mutable_loaded();
        } else {
          reply.mutable_step_done()->set_error(load_error_);
          reply.mutable_step_done()->set_code(static_cast<int>(Code::kUnavailable));
        }
      } else if (message.has_warm_up()) {
        reply.mutable_warmed_up()->set_num_blocks(1000);
      } else if (message.has_plan()) {
        *reply.mutable_step_done() = answer(message.plan());
      } else {
        reply.mutable_heartbeat();
      }
      stream->Write(reply);
    }
    (void)stream->Finish();
  }

  const std::map<std::string, std::string> terms_;
  const std::string load_error_;
  grpc::ClientContext context_;
  const std::unique_ptr<v1::LeaderService::Stub> stub_;
  const std::unique_ptr<DataListener> listener_;
  std::thread thread_;
};

// Of a device that is not there no other node is the cause, who could still say so.
TEST_F(GroupTest, ANodeThatCannotLoadEndsTheStartSoon) {
  auto leader = std::move(*Leader::Start(Options(0, 2)));
  const FakeFollower follower(Options(1, 2), {}, "no GPU 0");
  LocalExecutorOptions options = Stages(2, 1);
  options.start_patience = std::chrono::minutes(10);
  options.on_start_hang = [](const Status& status) { ADD_FAILURE() << status.ToString(); };
  const Status formed = leader->Form(*checkpoint_, options).status();
  EXPECT_EQ(formed.code(), Code::kUnavailable);
  EXPECT_EQ(formed.message(), "node 1: no GPU 0");
}

// The scheduler would take them for broken invariants.
TEST_F(GroupTest, ResultsThatAreNotOfTheStepEndTheGroup) {
  struct Case {
    std::function<void(v1::StepDone&)> breaks;
    std::string message;
  };
  for (const Case& c :
       {Case{[](v1::StepDone&) {}, ""},
        {[](v1::StepDone& done) { done.set_step(done.step() + 1); }, "node 1 sent the result of step 2 as that of 1"},
        {[](v1::StepDone& done) { done.add_sampled()->set_finite(true); },
         "node 1 sent 2 tokens of the 1 that step 1 samples"},
        {[](v1::StepDone& done) { done.clear_sampled(); }, "node 1 sent 0 tokens of the 1 that step 1 samples"},
        {[](v1::StepDone& done) { done.mutable_prompt_scores(0)->add_scores(); },
         "node 1 sent other prompt scores than step 1 has"},
        {[](v1::StepDone& done) { done.mutable_sampled(0)->set_token(2048); },
         "node 1 sent tokens in step 1 that the vocabulary has not"},
        {[](v1::StepDone& done) { done.mutable_prompt_scores(0)->mutable_scores(3)->set_token(-1); },
         "node 1 sent tokens in step 1 that the vocabulary has not"},
        {[](v1::StepDone& done) {
           done.mutable_sampled(0)->add_top_tokens(-5);
           done.mutable_sampled(0)->add_top_logprobs(0);
         },
         "node 1 sent tokens in step 1 that the vocabulary has not"},
        {[](v1::StepDone& done) { done.mutable_sampled(0)->add_top_tokens(5); },
         "node 1: alternatives without log-probabilities"}}) {
    SCOPED_TRACE(c.message);
    auto leader = std::move(*Leader::Start(Options(0, 2)));
    const FakeFollower follower(Options(1, 2), [&](const v1::Plan& plan) {
      v1::StepDone done;
      done.set_step(plan.step());
      for (const auto& sequence : plan.sequences()) {
        if (sequence.sample()) done.add_sampled()->set_finite(true);
        if (sequence.num_prompt_scores() == 0) continue;
        v1::PromptScores* scores = done.add_prompt_scores();
        for (int i = 0; i < sequence.num_prompt_scores(); ++i) scores->add_scores()->set_finite(true);
      }
      c.breaks(done);
      return done;
    });
    auto engine = StartEngine(*leader, Stages(2, 1));
    ASSERT_NE(engine, nullptr);
    auto request = MakeRequest(0, 10, 1);
    request->sampling.prompt_top_logprobs = 0;
    auto sink = std::make_shared<CollectingSink>();
    auto handle = engine->Submit(request, sink);
    ASSERT_TRUE(handle.ok());
    const Status ended = sink->WaitForEnd().back().status;
    EXPECT_EQ(ended.ok(), c.message.empty()) << ended.ToString();
    EXPECT_THAT(ended.message(), HasSubstr(c.message));
  }
}

// A leader that speaks the protocol, and computes as much as a follower needs to warm up.
class FakeLeader : public v1::LeaderService::Service {
 public:
  // plans: to be sent when it says that the group serves.
  FakeLeader(const std::string& address, const ModelConfig& config, std::vector<v1::Plan> plans)
      : config_(config), plans_(std::move(plans)), listener_(std::move(*DataListener::Start("127.0.0.1"))) {
    grpc::ServerBuilder builder;
    builder.AddListeningPort(address, grpc::InsecureServerCredentials());
    builder.RegisterService(this);
    server_ = builder.BuildAndStart();
  }
  ~FakeLeader() override { server_->Shutdown(); }

  void LetServe() { serve_.set_value(); }
  std::future<void> warmed_up() { return warmed_up_.get_future(); }
  std::future<std::string> error() { return error_.get_future(); }  // that the follower tells of

  grpc::Status Join(grpc::ServerContext*,
                    grpc::ServerReaderWriter<v1::LeaderMessage, v1::FollowerMessage>* stream) override {
    DataLinks links;
    for (v1::FollowerMessage message; stream->Read(&message);) {
      v1::LeaderMessage reply;
      if (message.has_hello()) {
        reply.mutable_formed()->set_token("token");
        reply.mutable_formed()->add_data_addresses(listener_->address());
        reply.mutable_formed()->add_data_addresses(message.hello().data_address());
        stream->Write(reply);
        DataPeers peers;
        peers.token = "token";
        peers.nodes = 2;
        peers.next_address = message.hello().data_address();
        auto connected = ConnectDataLinks(*listener_, peers, std::chrono::minutes(1), {});
        EXPECT_TRUE(connected.ok()) << connected.status().ToString();
        if (!connected.ok()) return grpc::Status::CANCELLED;
        links = std::move(*connected);
      } else if (message.has_loaded()) {
        reply.mutable_warm_up();
        stream->Write(reply);
        const auto cpu = Stream::Cpu(1);
        std::vector<float> residual(static_cast<size_t>(config_.hidden), 0.5f);
        EXPECT_TRUE(links.next[0]->Send(*cpu, TensorView::Make(residual.data(), DType::kF32, {1, config_.hidden})));
        int32_t id = -1;
        EXPECT_TRUE(links.previous[0]->Receive(*cpu, TensorView::Make(&id, DType::kI32, {1})));
        EXPECT_GE(id, 0);
      } else if (message.has_warmed_up()) {
        warmed_up_.set_value();
        serve_.get_future().wait();
        reply.mutable_serving();
        stream->Write(reply);
        for (const v1::Plan& plan : plans_) {
          *reply.mutable_plan() = plan;
          stream->Write(reply);
        }
      } else if (message.has_step_done() && message.step_done().code() == static_cast<int>(Code::kInternal)) {
        error_.set_value(message.step_done().error());
        reply.mutable_ended()->set_reason(message.step_done().error());
        stream->Write(reply);
        return grpc::Status::OK;
      }
    }
    return grpc::Status::OK;
  }

 private:
  const ModelConfig config_;
  const std::vector<v1::Plan> plans_;
  const std::unique_ptr<DataListener> listener_;
  std::promise<void> warmed_up_, serve_;
  std::promise<std::string> error_;
  std::unique_ptr<grpc::Server> server_;
};

// Other nodes may still load when this one has warmed up.
TEST_F(GroupTest, AFollowerIsReadyWhenTheGroupServesAndNotBefore) {
  FakeLeader leader(address_, checkpoint_->config(), {});
  auto warmed_up = leader.warmed_up();
  std::atomic<bool> cancelled{false};
  GroupOptions options = Options(1, 2);
  options.cancelled = [&] { return cancelled.load(); };
  auto follower = StartFollower(options, Stages(2, 1));
  warmed_up.wait();
  std::this_thread::sleep_for(milliseconds(100));
  EXPECT_EQ(ready_, 0);
  leader.LetServe();
  for (int i = 0; i < 2000 && ready_ == 0; ++i) std::this_thread::sleep_for(milliseconds(5));
  EXPECT_EQ(ready_, 1);
  cancelled = true;
  EXPECT_EQ(follower.get().code(), Code::kCancelled);
}

// Executors would take them for broken invariants, or not at all.
TEST_F(GroupTest, APlanThatCannotBeEndsTheGroup) {
  v1::Plan plan;
  plan.set_step(1);
  plan.add_tokens(5);
  plan.add_block_ids(1 << 30);
  plan.add_slot_inits()->mutable_sampling()->set_repetition_penalty(1);
  plan.add_sequences()->set_num_tokens(1);
  plan.mutable_sequences(0)->set_num_blocks(1);
  v1::Plan uneven = plan;
  uneven.mutable_slot_inits(0)->mutable_sampling()->add_bias_ids(1);
  for (const auto& [bad, error] :
       {std::pair{plan, "step 1: block 1073741824 of "}, {uneven, "biases without tokens"}}) {
    SCOPED_TRACE(error);
    FakeLeader leader(address_, checkpoint_->config(), {bad});
    auto told = leader.error();
    leader.LetServe();
    const Status status = StartFollower(Options(1, 2), Stages(2, 1)).get();
    EXPECT_THAT(status.message(), HasSubstr(StrCat("the leader sent a plan that cannot be: ", error)));
    ASSERT_EQ(told.wait_for(std::chrono::seconds(1)), std::future_status::ready);
    EXPECT_THAT(told.get(), HasSubstr(error));
  }
}

// While nothing runs: the follower's node stops without a word. Its executor goes, its call is cancelled.
TEST_F(GroupTest, AFollowerThatLeavesWhileIdleEndsTheGroup) {
  auto leader = std::move(*Leader::Start(Options(0, 2)));
  std::atomic<bool> leave{false};
  GroupOptions options = Options(1, 2);
  options.cancelled = [&] { return leave.load(); };
  auto follower = StartFollower(options, Stages(2, 1));
  auto engine = StartEngine(*leader, Stages(2, 1));
  ASSERT_NE(engine, nullptr);
  leave = true;
  EXPECT_EQ(follower.get().code(), Code::kCancelled);
  while (engine->healthy()) std::this_thread::sleep_for(milliseconds(5));  // no step runs that could tell
}

}  // namespace
}  // namespace altiplano::cluster
