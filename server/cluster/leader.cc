#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <list>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "altiplano/cluster/v1/cluster.grpc.pb.h"
#include "server/base/hmac.h"
#include "server/base/listen_error.h"
#include "server/base/log.h"
#include "server/base/strings.h"
#include "server/cluster/data_links.h"
#include "server/cluster/group.h"
#include "server/cluster/heartbeat.h"
#include "server/cluster/plan_proto.h"
#include "server/cluster/secret.h"

namespace altiplano::cluster {

namespace {

using Message = std::shared_ptr<const v1::LeaderMessage>;

constexpr auto kFarewell = std::chrono::seconds(1);       // for a follower to hang up by itself
constexpr auto kIntroduction = std::chrono::seconds(10);  // from a caller's first byte until it has joined
// A failure shows on other nodes as a link that closes, which may be heard of first: so long the cause is waited for.
constexpr auto kCausePatience = std::chrono::milliseconds(500);
// Beyond the time after which a node says by itself that its start hangs.
constexpr auto kStartMargin = std::chrono::seconds(5);

Status Lost(std::string why) {
  return Status(Code::kUnavailable, std::move(why));
}
const Status kInOrder = Lost("");

class Group;

// A caller, a follower from its Hello on, until its call ends. Everything is guarded by the state's mutex.
struct Member {
  int node = 0;
  std::string data_address;
  grpc::ServerContext* context = nullptr;  // null: the call has ended
  std::shared_ptr<Group> group;            // null: it has not joined
  std::deque<Message> outbox;
  bool heartbeat_queued = false;
  SteadyTime last_heard;
  SteadyTime hang_up_at = SteadyTime::max();
  bool loaded = false;
  uint32_t num_blocks = 0;  // 0: has not warmed up
  bool failed = false;      // has said so
};

struct State {
  std::mutex mutex;
  std::condition_variable changed;
  std::list<std::shared_ptr<Member>> callers;  // guarded by mutex
  std::shared_ptr<Group> forming;              // guarded by mutex: whom the next to join belongs to
  bool stop = false;                           // guarded by mutex
};

// One generation of nodes, from the first that joins to the end. Everything under the state's mutex.
class Group {
 public:
  Group(int nodes, State* state) : members(static_cast<size_t>(nodes)), state_(*state) {}

  bool complete() const {
    for (size_t node = 1; node < members.size(); ++node) {
      if (members[node] == nullptr) return false;
    }
    return true;
  }
  void PostToAll(const Message& message) {
    for (const auto& member : members) {
      if (member != nullptr) member->outbox.push_back(message);
    }
    state_.changed.notify_all();
  }
  // The first reason stays. Without a message: in order.
  void End(const Status& why) {
    if (ended) return;
    ended = true;
    failure = why;
    if (observer != nullptr) observer->OnFailure(why);
    auto message = std::make_shared<v1::LeaderMessage>();
    message->mutable_ended()->set_reason(why.message());
    message->mutable_ended()->set_start_hung(why.code() == Code::kDeadlineExceeded);
    PostToAll(message);
    for (const auto& member : members) {
      if (member != nullptr) member->hang_up_at = Now() + kFarewell;
    }
  }

  // Tells of nodes that have not been heard of for `patience`, and when all have been again.
  void LookForSilence(std::chrono::milliseconds patience) {
    const bool found = std::any_of(members.begin(), members.end(), [&](const auto& member) {
      return member != nullptr && Now() - member->last_heard > patience;
    });
    if (std::exchange(silent, found) != found && observer != nullptr) observer->OnSilence(found);
  }

  // A node says that a rank of it has failed. UNAVAILABLE is what ranks say whose group has ended, or who wait in their
  // warm-up for one that hangs: the cause may be told of later.
  void Failed(int node, const Status& status) {
    if (const auto& member = members[static_cast<size_t>(node)]; member != nullptr) member->failed = true;
    const bool hangs = status.code() == Code::kDeadlineExceeded;
    const Status why(hangs ? Code::kDeadlineExceeded : Code::kUnavailable,
                     StrCat("node ", node, ": ", status.message()));
    if (status.code() != Code::kUnavailable) return End(why);
    if (!consequence_.ok()) return;
    consequence_ = why;
    consequence_since_ = Now();
    waited_for_ranks_ = node == 0 ? loaded : members[static_cast<size_t>(node)]->loaded;
  }
  // Ends what has failed, when no cause comes.
  void LookForCause() {
    if (ended || consequence_.ok()) return;
    const bool starts = starting || std::any_of(members.begin(), members.end(), [](const auto& member) {
                          return member != nullptr && member->num_blocks == 0 && !member->failed;
                        });
    const auto patience = starts && waited_for_ranks_ ? start_patience : kCausePatience;
    if (Now() - consequence_since_ >= patience) End(consequence_);
  }

  std::vector<std::shared_ptr<Member>> members;  // [nodes]; null: the leader itself, and who has not joined
  bool formed = false;                           // nobody joins any more; who leaves ends it
  bool loaded = false;                           // the leader has
  bool starting = true;                          // the leader's own ranks are not made
  std::chrono::milliseconds start_patience = kCausePatience;  // within this a node whose start hangs says so
  bool ended = false;
  Status failure;                        // once ended
  bool silent = false;                   // as LookForSilence last found
  ExecutorObserver* observer = nullptr;  // of the executor made of it, while that lives
  std::deque<StepResult> results;

 private:
  State& state_;
  Status consequence_;  // the first that Failed was told and that may have a cause
  SteadyTime consequence_since_;
  bool waited_for_ranks_ = false;  // whoever said so may have
};

class Service final : public v1::LeaderService::Service {
 public:
  using Stream = grpc::ServerReaderWriter<v1::LeaderMessage, v1::FollowerMessage>;
  Service(State* state, const GroupOptions* options) : state_(*state), options_(*options) {}

  grpc::Status Join(grpc::ServerContext* context, Stream* stream) override {
    auto member = std::make_shared<Member>();
    {
      std::lock_guard lock(state_.mutex);
      if (state_.stop) return {grpc::StatusCode::UNAVAILABLE, "the leader stops"};
      member->context = context;
      member->last_heard = Now();
      member->hang_up_at = Now() + kIntroduction;
      state_.callers.push_back(member);
    }
    const grpc::Status refused = Introduce(*stream, context, member);
    if (!refused.ok()) {
      Leave(*member);
      return refused;
    }
    v1::FollowerMessage message;
    std::thread writer([&] { Write(*member, *stream); });
    while (stream->Read(&message)) Read(*member, message);
    Leave(*member);
    writer.join();
    return grpc::Status::OK;
  }

 private:
  grpc::Status Introduce(Stream& stream, grpc::ServerContext* context, const std::shared_ptr<Member>& member) {
    v1::FollowerMessage message;
    if (!stream.Read(&message) || !message.has_hello()) {
      return {grpc::StatusCode::INVALID_ARGUMENT, "the first message must be hello"};
    }
    const v1::Hello hello = message.hello();
    if (grpc::Status refused = Authenticate(hello, stream); !refused.ok()) {
      log::Warn("a node was refused", {{"why", refused.error_message()}, {"address", context->peer()}});
      return refused;
    }
    return Enter(hello, context, member);
  }

  // Before anything is said of this node.
  grpc::Status Authenticate(const v1::Hello& hello, Stream& stream) {
    const bool wanted = !options_.secret.empty(), offered = !hello.nonce().empty();
    if (wanted != offered) {
      return {grpc::StatusCode::FAILED_PRECONDITION,
              StrCat("node ", hello.node_rank(), " has ", offered ? "a" : "no", " --node-secret-file, the leader has ",
                     wanted ? "one" : "none")};
    }
    if (!wanted) return grpc::Status::OK;
    const Exchange exchange{.follower_nonce = hello.nonce(),
                            .leader_nonce = RandomToken(),
                            .node = static_cast<int>(hello.node_rank()),
                            .data_address = hello.data_address()};
    v1::LeaderMessage challenge;
    challenge.mutable_challenge()->set_nonce(exchange.leader_nonce);
    challenge.mutable_challenge()->set_proof(LeaderProof(options_.secret, exchange));
    v1::FollowerMessage answer;
    if (stream.Write(challenge) && stream.Read(&answer) &&
        EqualInConstantTime(answer.proof(), FollowerProof(options_.secret, exchange))) {
      return grpc::Status::OK;
    }
    return {grpc::StatusCode::FAILED_PRECONDITION,
            StrCat("node ", hello.node_rank(), " does not know the secret of --node-secret-file")};
  }

  grpc::Status Enter(const v1::Hello& hello, grpc::ServerContext* context, const std::shared_ptr<Member>& member) {
    const auto node = static_cast<int>(hello.node_rank());
    if (node < 1 || node >= options_.place.nodes) {
      return {grpc::StatusCode::FAILED_PRECONDITION,
              StrCat("there is no node ", node, " to follow: the leader has --nodes ", options_.place.nodes)};
    }
    for (const auto& [name, mine] : options_.terms) {
      auto theirs = hello.terms().find(name);
      const std::string value = theirs == hello.terms().end() ? "none" : theirs->second;
      if (value == mine) continue;
      const std::string what = StrCat("node ", node, " has ", name, " ", value, ", the leader has ", mine);
      log::Warn("a node was refused", {{"why", what}});
      return {grpc::StatusCode::FAILED_PRECONDITION, what};
    }
    std::lock_guard lock(state_.mutex);
    if (state_.stop) return {grpc::StatusCode::UNAVAILABLE, "the leader stops"};
    auto& place = state_.forming->members[static_cast<size_t>(node)];
    if (place != nullptr) return {grpc::StatusCode::ALREADY_EXISTS, StrCat("node ", node, " has joined already")};
    member->node = node;
    member->data_address = hello.data_address();
    member->group = state_.forming;
    member->last_heard = Now();
    member->hang_up_at = SteadyTime::max();
    place = member;
    state_.changed.notify_all();
    log::Info("a node has joined", {{"node", node}, {"address", context->peer()}});
    return grpc::Status::OK;
  }

  void Read(Member& member, const v1::FollowerMessage& message) {
    std::lock_guard lock(state_.mutex);
    member.last_heard = Now();
    if (message.has_loaded()) member.loaded = true;
    if (message.has_warmed_up()) {
      member.num_blocks = std::min<uint32_t>(message.warmed_up().num_blocks(), INT32_MAX);
    }
    if (message.has_step_done()) {
      StepResult result = ResultFromProto(message.step_done());
      if (result.status.ok()) {
        member.group->results.push_back(std::move(result));
      } else {
        member.group->Failed(member.node, result.status);
      }
    }
    if (!message.has_heartbeat()) return state_.changed.notify_all();
    if (message.heartbeat().progress() && member.group->observer != nullptr) member.group->observer->OnProgress();
  }

  void Write(Member& member, Stream& stream) {
    std::unique_lock lock(state_.mutex);
    for (;;) {
      state_.changed.wait(lock, [&] { return member.context == nullptr || !member.outbox.empty(); });
      if (member.context == nullptr) return;
      const Message message = std::move(member.outbox.front());
      member.outbox.pop_front();
      if (message->has_heartbeat()) member.heartbeat_queued = false;
      lock.unlock();
      const bool written = stream.Write(*message);
      lock.lock();
      if (!written) return;  // Read hears of it too
    }
  }

  void Leave(Member& member) {
    std::lock_guard lock(state_.mutex);
    member.context = nullptr;
    if (member.group != nullptr && member.group->formed) {
      member.group->End(Lost(StrCat("the connection to node ", member.node, " was lost")));
    } else if (member.group != nullptr) {
      member.group->members[static_cast<size_t>(member.node)].reset();
    }
    member.group = nullptr;  // which holds its members
    state_.callers.remove_if([&](const auto& caller) { return caller.get() == &member; });
    state_.changed.notify_all();
  }

  State& state_;
  const GroupOptions& options_;
};

// Of one that could be computed.
bool IsScore(const TokenScore& score, TokenId vocab) {
  const auto is_token = [vocab](TokenId id) { return id >= 0 && id < vocab; };
  return !score.finite || (is_token(score.token) && std::all_of(score.top.begin(), score.top.end(),
                                                                [&](const auto& top) { return is_token(top.token); }));
}

// What is not as the plan wants it; empty: nothing. The scheduler takes for granted what ranks of its own process say.
std::string WhatIsWrong(const StepPlan& plan, const StepResult& result, TokenId vocab) {
  if (result.step != plan.step) return StrCat("sent the result of step ", result.step, " as that of ", plan.step);
  size_t sampled = 0, scored = 0;
  for (const PlannedSequence& sequence : plan.sequences) {
    sampled += sequence.sample;
    if (sequence.num_prompt_scores == 0) continue;
    const size_t at = scored++;
    if (at >= result.prompt_scores.size() ||
        result.prompt_scores[at].size() != static_cast<size_t>(sequence.num_prompt_scores)) {
      return StrCat("sent other prompt scores than step ", plan.step, " has");
    }
  }
  if (result.sampled.size() == sampled && result.prompt_scores.size() == scored) {
    const auto is_score = [vocab](const TokenScore& score) { return IsScore(score, vocab); };
    bool good = std::all_of(result.sampled.begin(), result.sampled.end(), is_score);
    for (const auto& scores : result.prompt_scores) good = good && std::all_of(scores.begin(), scores.end(), is_score);
    return good ? "" : StrCat("sent tokens in step ", plan.step, " that the vocabulary has not");
  }
  return StrCat("sent ", result.sampled.size(), " tokens of the ", sampled, " that step ", plan.step, " samples");
}

// The leader's own stages, and the other nodes.
class GroupExecutor : public Executor {
 public:
  GroupExecutor(State* state, std::shared_ptr<Group> group, std::unique_ptr<LocalExecutor> local, TokenId vocab)
      : state_(*state), group_(std::move(group)), local_(std::move(local)), vocab_(vocab), watch_([this] {
          WatchLocal();
        }) {}
  ~GroupExecutor() override {
    {
      std::lock_guard lock(state_.mutex);
      group_->observer = nullptr;
      group_->End(kInOrder);
    }
    local_->Abort("the executor ends");
    watch_.join();
  }

  void Launch(std::shared_ptr<const StepPlan> plan) override {
    auto message = std::make_shared<v1::LeaderMessage>();
    PlanToProto(*plan, message->mutable_plan());
    in_flight_.push_back(plan);
    local_->Launch(std::move(plan));
    std::lock_guard lock(state_.mutex);
    group_->PostToAll(message);
  }

  void Watch(ExecutorObserver* observer) override {
    local_->Watch(observer);
    std::lock_guard lock(state_.mutex);
    group_->observer = observer;
    if (group_->ended) observer->OnFailure(group_->failure);
    observer->OnSilence(group_->silent);
  }

  bool replaceable() const override { return local_->replaceable(); }

  StepResult Wait() override {
    std::unique_lock lock(state_.mutex);
    state_.changed.wait(lock, [&] { return group_->ended || !group_->results.empty(); });
    StepResult result;
    if (!group_->ended) {
      result = std::move(group_->results.front());
      group_->results.pop_front();
      const std::string wrong = WhatIsWrong(*in_flight_.front(), result, vocab_);
      in_flight_.pop_front();
      if (wrong.empty()) return result;
      group_->End(Lost(StrCat("node ", group_->members.size() - 1, " ", wrong)));
    }
    result.status = group_->failure;
    lock.unlock();
    local_->Abort(result.status.message());
    return result;
  }

 private:
  // The last stage is elsewhere: what matters here is a failure.
  void WatchLocal() {
    StepResult result = local_->Wait();
    while (result.status.ok()) result = local_->Wait();
    std::lock_guard lock(state_.mutex);
    group_->Failed(0, result.status);
  }

  State& state_;
  const std::shared_ptr<Group> group_;
  const std::unique_ptr<LocalExecutor> local_;
  const TokenId vocab_;
  std::deque<std::shared_ptr<const StepPlan>> in_flight_;  // of the thread that calls Launch and Wait
  std::thread watch_;
};

}  // namespace

class Leader::Impl {
 public:
  explicit Impl(GroupOptions options) : options_(std::move(options)) {
    state_.forming = std::make_shared<Group>(options_.place.nodes, &state_);
  }

  ~Impl() {
    {
      std::lock_guard lock(state_.mutex);
      state_.stop = true;
      state_.forming->End(kInOrder);
      for (const auto& caller : state_.callers) {
        if (caller->group == nullptr) caller->hang_up_at = Now();
      }
    }
    state_.changed.notify_all();
    {
      std::unique_lock lock(state_.mutex);
      state_.changed.wait_for(lock, 2 * kFarewell, [this] { return state_.callers.empty(); });
    }
    // No longer than it takes to tell them how their calls ended: it would wait for connections whose other end is
    // gone.
    if (server_ != nullptr) server_->Shutdown(std::chrono::system_clock::now() + kPollInterval);
    if (ticker_.joinable()) ticker_.join();
  }

  Status Start() {
    grpc::ServerBuilder builder;
    int port = 0;
    builder.AddListeningPort(options_.place.leader, grpc::InsecureServerCredentials(), &port);
    builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
    builder.SetMaxReceiveMessageSize(-1);
    builder.RegisterService(&service_);
    server_ = builder.BuildAndStart();
    if (server_ == nullptr || port == 0) {
      return Status(Code::kUnavailable, StrCat("--leader: cannot listen for the other nodes on ", options_.place.leader,
                                               ": ", WhyNotListening(options_.place.leader)));
    }
    ASSIGN_OR_RETURN(const std::string host, LocalAddressTowards(options_.place.leader));
    ASSIGN_OR_RETURN(listener_, DataListener::Start(host));
    ticker_ = std::thread([this] { Tick(); });
    return OkStatus();
  }

  StatusOr<Formed> Form(const Checkpoint& checkpoint, LocalExecutorOptions options) {
    ASSIGN_OR_RETURN(const std::shared_ptr<Group> group, WaitForAll());
    if (options.on_start_hang) {
      std::lock_guard lock(state_.mutex);
      group->start_patience = options.start_patience + kStartMargin;
    }
    auto formed = Build(group, checkpoint, std::move(options));
    std::unique_lock lock(state_.mutex);
    group->starting = false;
    if (formed.ok()) return formed;
    if (formed.status().code() != Code::kUnavailable) {
      group->End(formed.status());
      return formed;
    }
    group->Failed(0, formed.status());
    while (!group->ended) {
      if (options_.cancelled && options_.cancelled()) group->End(Status(Code::kCancelled, "cancelled"));
      state_.changed.wait_for(lock, kPollInterval);
    }
    return group->failure;
  }

 private:
  StatusOr<std::shared_ptr<Group>> WaitForAll() {
    const SteadyTime end = Now() + options_.join_patience;
    std::unique_lock lock(state_.mutex);
    while (!state_.forming->complete()) {
      if (options_.cancelled && options_.cancelled()) return Status(Code::kCancelled, "cancelled");
      if (Now() > end) {
        std::string missing;
        for (size_t node = 1; node < state_.forming->members.size(); ++node) {
          if (state_.forming->members[node] == nullptr) missing += StrCat(missing.empty() ? "" : ", ", node);
        }
        return Status(Code::kUnavailable,
                      StrCat("of ", options_.place.nodes, " nodes these have not joined: ", missing));
      }
      state_.changed.wait_for(lock, kPollInterval);
    }
    std::shared_ptr<Group> group =
        std::exchange(state_.forming, std::make_shared<Group>(options_.place.nodes, &state_));
    group->formed = true;
    return group;
  }

  // Until `done` says so of every follower.
  template <typename Done>
  Status WaitFor(const Group& group, Done done) {
    std::unique_lock lock(state_.mutex);
    for (;;) {
      if (group.ended) return group.failure;
      if (options_.cancelled && options_.cancelled()) return Status(Code::kCancelled, "cancelled");
      bool all = true;
      for (size_t node = 1; node < group.members.size(); ++node) all = all && done(*group.members[node]);
      if (all) return OkStatus();
      state_.changed.wait_for(lock, kPollInterval);
    }
  }

  StatusOr<Formed> Build(const std::shared_ptr<Group>& group, const Checkpoint& checkpoint,
                         LocalExecutorOptions options) {
    const int nodes = options_.place.nodes;
    auto message = std::make_shared<v1::LeaderMessage>();
    message->mutable_formed()->set_token(RandomToken());
    message->mutable_formed()->add_data_addresses(listener_->address());
    for (size_t node = 1; node < group->members.size(); ++node) {
      message->mutable_formed()->add_data_addresses(group->members[node]->data_address);
    }
    {
      std::lock_guard lock(state_.mutex);
      group->PostToAll(message);
    }
    ASSIGN_OR_RETURN(DataLinks links, ConnectDataLinks(*listener_,
                                                       {.token = message->formed().token(),
                                                        .node = 0,
                                                        .nodes = nodes,
                                                        .ranks = options.ranks,
                                                        .next_address = message->formed().data_addresses(1),
                                                        .link_patience = options.patience},
                                                       options_.silence, options_.cancelled));
    options.local_stages = options.stages / nodes;
    options.outer_previous = std::move(links.previous);
    options.outer_next = std::move(links.next);
    if (auto tell = options.on_start_hang) {
      options.on_start_hang = [this, group, tell](const Status& status) {
        EndByHang(*group, status);
        tell(status);
      };
    }
    options.meet = [this, group]() -> Status {
      RETURN_IF_ERROR(WaitFor(*group, [](const Member& member) { return member.loaded; }));
      auto warm_up = std::make_shared<v1::LeaderMessage>();
      warm_up->mutable_warm_up();
      std::lock_guard lock(state_.mutex);
      group->loaded = true;
      group->PostToAll(warm_up);
      return OkStatus();
    };
    ASSIGN_OR_RETURN(std::unique_ptr<LocalExecutor> local, LocalExecutor::Create(checkpoint, std::move(options)));
    RETURN_IF_ERROR(WaitFor(*group, [](const Member& member) { return member.num_blocks > 0; }));
    Formed formed;
    formed.scheduler = local->scheduler_options();
    for (size_t node = 1; node < group->members.size(); ++node) {
      formed.scheduler.num_blocks =
          std::min(formed.scheduler.num_blocks, static_cast<int32_t>(group->members[node]->num_blocks));
    }
    formed.device = StrCat(nodes, " nodes, this one ", local->DescribeDevice());
    formed.weight_bytes = local->weight_bytes();
    formed.kv_bytes = local->kv_bytes();
    formed.devices = local->devices();
    formed.executor = std::make_unique<GroupExecutor>(&state_, group, std::move(local),
                                                      static_cast<TokenId>(checkpoint.config().vocab));
    auto serving = std::make_shared<v1::LeaderMessage>();
    serving->mutable_serving();
    std::lock_guard lock(state_.mutex);
    group->PostToAll(serving);
    return formed;
  }

  // This node's start hangs, and its process may be ended: followers are told before that.
  void EndByHang(Group& group, const Status& status) {
    std::unique_lock lock(state_.mutex);
    group.Failed(0, status);
    state_.changed.wait_for(lock, 2 * kFarewell, [&] {
      return std::all_of(group.members.begin(), group.members.end(),
                         [](const auto& member) { return member == nullptr || member->context == nullptr; });
    });
  }

  // Sends heartbeats, and ends what is silent.
  void Tick() {
    auto heartbeat = std::make_shared<v1::LeaderMessage>();
    heartbeat->mutable_heartbeat();
    const std::chrono::milliseconds interval = HeartbeatInterval(options_);
    SteadyTime next_heartbeat;
    std::unique_lock lock(state_.mutex);
    while (!state_.stop || !state_.callers.empty()) {
      const bool beat = Now() >= next_heartbeat;
      if (beat) next_heartbeat = Now() + interval;
      for (const auto& member : state_.callers) {
        if (Now() >= member->hang_up_at) member->context->TryCancel();
        if (member->group == nullptr) continue;
        if (beat && !std::exchange(member->heartbeat_queued, true)) member->outbox.push_back(heartbeat);
        member->group->LookForSilence(options_.health_deadline);
        member->group->LookForCause();
        if (Now() - member->last_heard > options_.silence) {
          const std::string why = StrCat("no word for ", options_.silence.count(), " ms from node ", member->node);
          if (member->group->formed) member->group->End(Lost(why));
          member->hang_up_at = std::min(member->hang_up_at, Now());
        }
      }
      if (beat) state_.changed.notify_all();
      state_.changed.wait_for(lock, std::min(interval, std::chrono::milliseconds(kPollInterval)),
                              [&] { return state_.stop && state_.callers.empty(); });
    }
  }

  const GroupOptions options_;
  State state_;
  Service service_{&state_, &options_};
  std::unique_ptr<DataListener> listener_;
  std::unique_ptr<grpc::Server> server_;
  std::thread ticker_;
};

Leader::Leader(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Leader::~Leader() = default;

StatusOr<std::unique_ptr<Leader>> Leader::Start(GroupOptions options) {
  auto impl = std::make_unique<Impl>(std::move(options));
  RETURN_IF_ERROR(impl->Start());
  return std::unique_ptr<Leader>(new Leader(std::move(impl)));
}

StatusOr<Leader::Formed> Leader::Form(const Checkpoint& checkpoint, LocalExecutorOptions options) {
  return impl_->Form(checkpoint, std::move(options));
}

}  // namespace altiplano::cluster
