#include <grpcpp/grpcpp.h>

#include <atomic>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>

#include "altiplano/cluster/v1/cluster.grpc.pb.h"
#include "kernels/ops.h"
#include "server/base/hmac.h"
#include "server/base/log.h"
#include "server/base/strings.h"
#include "server/cluster/data_links.h"
#include "server/cluster/group.h"
#include "server/cluster/heartbeat.h"
#include "server/cluster/plan_proto.h"
#include "server/cluster/secret.h"
#include "server/scheduler/plan_check.h"

namespace altiplano::cluster {

namespace {

constexpr auto kLastWord = std::chrono::seconds(3);

v1::FollowerMessage FailureMessage(const Status& status) {
  StepResult result;
  result.status = status;
  v1::FollowerMessage message;
  ResultToProto(result, message.mutable_step_done());
  return message;
}

// The call to the leader: one thread reads, one writes. What is sent waits in a queue, so that nobody but the writer
// waits for a network that takes nothing more.
class Call {
 public:
  Call(const GroupOptions& options, v1::LeaderService::Stub& stub)
      : options_(options), stream_(stub.Join(&context_)), last_heard_(Now()) {
    reader_ = std::thread([this] { Read(); });
    writer_ = std::thread([this] { Write(); });
  }
  ~Call() {
    context_.TryCancel();
    {
      std::lock_guard lock(mutex_);
      closed_ = true;
    }
    changed_.notify_all();
    reader_.join();
    writer_.join();
  }

  // The first is the hello. Any thread.
  void Send(v1::FollowerMessage message) {
    {
      std::lock_guard lock(mutex_);
      outbox_.push_back(std::move(message));
    }
    changed_.notify_all();
  }

  // The next heartbeat says so. Any thread.
  void GotOn() { got_on_ = true; }

  // The last that this node says: until the leader has hung up, or for kLastWord. Any thread.
  void SendFarewell(const Status& status) {
    Send(FailureMessage(status));
    std::unique_lock lock(mutex_);
    changed_.wait_for(lock, kLastWord, [this] { return closed_; });
  }

  // The last message was that the group has ended. The thread that calls Next.
  bool over() const { return over_; }

  // What the leader sends next, but for heartbeats. An error: the call is over; CANCELLED: options.cancelled says so.
  StatusOr<v1::LeaderMessage> Next() {
    std::unique_lock lock(mutex_);
    for (;;) {
      if (!inbox_.empty()) {
        v1::LeaderMessage message = std::move(inbox_.front());
        inbox_.pop_front();
        over_ = message.has_ended();
        return message;
      }
      if (closed_) break;
      if (options_.cancelled && options_.cancelled()) return Status(Code::kCancelled, "cancelled");
      if (Now() - last_heard_ > options_.silence) {
        return Status(Code::kUnavailable, StrCat("no word for ", options_.silence.count(), " ms from the leader"));
      }
      changed_.wait_for(lock, kPollInterval);
    }
    lock.unlock();
    if (!end_.ok()) return end_;  // a call is finished once
    const grpc::Status status = stream_->Finish();
    if (status.error_code() == grpc::StatusCode::UNIMPLEMENTED) {
      return end_ = Status(Code::kFailedPrecondition,
                           StrCat("what answers at ", options_.place.leader,
                                  " leads no nodes: --leader is the leader's own --leader, not its --listen"));
    }
    // Cut by the leader counts as hung up: CANCELLED is for options.cancelled alone.
    end_ = status.ok() || status.error_code() == grpc::StatusCode::CANCELLED
               ? Status(Code::kUnavailable, "the leader has hung up")
               : Status(static_cast<Code>(status.error_code()), status.error_message());
    return end_;
  }

 private:
  void Read() {
    v1::LeaderMessage message;
    while (stream_->Read(&message)) {
      std::lock_guard lock(mutex_);
      last_heard_ = Now();
      if (message.has_heartbeat()) continue;
      inbox_.push_back(std::move(message));
      changed_.notify_all();
    }
    std::lock_guard lock(mutex_);
    closed_ = true;
    changed_.notify_all();
  }

  // What is to be sent; heartbeats while there is nothing.
  void Write() {
    const auto interval = HeartbeatInterval(options_);
    bool greeted = false;
    std::unique_lock lock(mutex_);
    for (;;) {
      changed_.wait_for(lock, interval, [&] { return closed_ || !outbox_.empty(); });
      if (closed_) return;
      v1::FollowerMessage message;
      if (!outbox_.empty()) {
        message = std::move(outbox_.front());
        outbox_.pop_front();
        greeted = true;
      } else {
        message.mutable_heartbeat()->set_progress(got_on_.exchange(false));
      }
      if (!greeted) continue;
      lock.unlock();
      stream_->Write(message);  // when that fails, so does Read
      lock.lock();
    }
  }

  const GroupOptions& options_;
  grpc::ClientContext context_;
  const std::unique_ptr<grpc::ClientReaderWriter<v1::FollowerMessage, v1::LeaderMessage>> stream_;
  std::mutex mutex_;  // guards what follows
  std::condition_variable changed_;
  std::deque<v1::LeaderMessage> inbox_;
  std::deque<v1::FollowerMessage> outbox_;
  SteadyTime last_heard_;
  bool closed_ = false;
  std::atomic<bool> got_on_{false};
  // Of the thread that calls Next.
  bool over_ = false;
  Status end_;  // how the call ended
  std::thread reader_, writer_;
};

static_assert(PlanCheck::kMostTopLogprobs == kMaxTopLogprobs);

// Launches what the leader plans, and sends back what becomes of it.
class Work : private ExecutorObserver {
 public:
  // samples: this node has the last stage.
  Work(Call* call, std::unique_ptr<LocalExecutor> executor, TokenId vocab, bool samples)
      : call_(*call), samples_(samples), executor_(std::move(executor)), check_(executor_->scheduler_options(), vocab) {
    executor_->Watch(this);
    results_ = std::thread([this] { SendResults(); });
  }
  ~Work() override {
    executor_->Abort("the group has ended");
    results_.join();
  }
  // INTERNAL: a plan that cannot be carried out.
  Status Launch(const v1::Plan& message) {
    auto plan = PlanFromProto(message);
    const std::string wrong = plan == nullptr ? "biases without tokens" : check_.Check(*plan);
    if (!wrong.empty()) return Status(Code::kInternal, StrCat("the leader sent a plan that cannot be: ", wrong));
    executor_->Launch(std::move(plan));
    return OkStatus();
  }

 private:
  // A node without the last stage has nothing to tell but a failure.
  void SendResults() {
    for (;;) {
      const StepResult result = executor_->Wait();
      if (result.status.ok() && !samples_) continue;
      v1::FollowerMessage message;
      ResultToProto(result, message.mutable_step_done());
      call_.Send(message);
      if (!result.status.ok()) return;
    }
  }
  void OnProgress() override { call_.GotOn(); }
  // An executor of one process tells of these by the results of steps.
  void OnFailure(Status) override {}
  void OnSilence(bool) override {}

  Call& call_;
  const bool samples_;
  const std::unique_ptr<LocalExecutor> executor_;
  PlanCheck check_;  // of Launch's thread
  std::thread results_;
};

// What to do about a message that is not one of those expected now.
Status Unexpected(const v1::LeaderMessage& message) {
  if (!message.has_ended()) return Status(Code::kInternal, "the leader sent what was not expected");
  if (message.ended().reason().empty()) return Status(Code::kAborted, "the leader has stopped");
  return Status(message.ended().start_hung() ? Code::kDeadlineExceeded : Code::kUnavailable, message.ended().reason());
}

Status Serve(const GroupOptions& options, Call& call, const DataListener& listener, const v1::Formed& formed,
             const Checkpoint& checkpoint, LocalExecutorOptions executor_options,
             const std::function<void()>& on_ready) {
  const Place& place = options.place;
  if (formed.data_addresses_size() != place.nodes) {
    return Status(Code::kInternal, StrCat("the leader named the data addresses of ", formed.data_addresses_size(),
                                          " nodes, there are ", place.nodes));
  }
  const int after = (place.rank + 1) % place.nodes;
  ASSIGN_OR_RETURN(DataLinks links, ConnectDataLinks(listener,
                                                     {.token = formed.token(),
                                                      .node = place.rank,
                                                      .nodes = place.nodes,
                                                      .ranks = executor_options.ranks,
                                                      .next_address = formed.data_addresses(after),
                                                      .link_patience = executor_options.patience},
                                                     options.silence, options.cancelled));
  executor_options.local_stages = executor_options.stages / place.nodes;
  executor_options.first_stage = executor_options.local_stages * place.rank;
  executor_options.outer_previous = std::move(links.previous);
  executor_options.outer_next = std::move(links.next);
  executor_options.meet = [&call]() -> Status {
    v1::FollowerMessage loaded;
    loaded.mutable_loaded();
    call.Send(loaded);
    ASSIGN_OR_RETURN(const v1::LeaderMessage message, call.Next());
    return message.has_warm_up() ? OkStatus() : Unexpected(message);
  };
  if (auto tell = executor_options.on_start_hang) {
    executor_options.on_start_hang = [&call, tell](const Status& status) {
      call.SendFarewell(status);
      tell(status);
    };
  }
  const bool samples = place.rank == place.nodes - 1;
  ASSIGN_OR_RETURN(auto executor, LocalExecutor::Create(checkpoint, std::move(executor_options)));
  v1::FollowerMessage warmed_up;
  warmed_up.mutable_warmed_up()->set_num_blocks(static_cast<uint32_t>(executor->scheduler_options().num_blocks));
  call.Send(warmed_up);
  Work work(&call, std::move(executor), static_cast<TokenId>(checkpoint.config().vocab), samples);
  ASSIGN_OR_RETURN(v1::LeaderMessage message, call.Next());
  if (!message.has_serving()) return Unexpected(message);
  on_ready();
  for (;;) {
    ASSIGN_OR_RETURN(message, call.Next());
    if (!message.has_plan()) return Unexpected(message);
    RETURN_IF_ERROR(work.Launch(message.plan()));
  }
}

// Says hello, and proves to the leader, and has it prove, that the secret is known. What the leader says then.
StatusOr<v1::LeaderMessage> Introduce(const GroupOptions& options, Call& call, v1::FollowerMessage hello) {
  if (options.secret.empty()) {
    call.Send(hello);
    return call.Next();
  }
  Exchange exchange{.follower_nonce = RandomToken(),
                    .leader_nonce = "",
                    .node = options.place.rank,
                    .data_address = hello.hello().data_address()};
  hello.mutable_hello()->set_nonce(exchange.follower_nonce);
  call.Send(hello);
  ASSIGN_OR_RETURN(const v1::LeaderMessage message, call.Next());
  if (message.has_ended()) return message;
  exchange.leader_nonce = message.challenge().nonce();
  if (!EqualInConstantTime(message.challenge().proof(), LeaderProof(options.secret, exchange))) {
    return Status(Code::kFailedPrecondition,
                  StrCat("the leader at ", options.place.leader, " does not know the secret of --node-secret-file"));
  }
  v1::FollowerMessage answer;
  answer.set_proof(FollowerProof(options.secret, exchange));
  call.Send(answer);
  return call.Next();
}

}  // namespace

Status Follow(const GroupOptions& options, const Checkpoint& checkpoint, LocalExecutorOptions executor_options,
              const std::function<void()>& on_ready) {
  const SteadyTime end = Now() + options.join_patience;
  // The leader's name may not be known yet.
  StatusOr<std::string> host = LocalAddressTowards(options.place.leader);
  while (!host.ok() && Now() < end && !(options.cancelled && options.cancelled())) {
    std::this_thread::sleep_for(4 * kPollInterval);
    host = LocalAddressTowards(options.place.leader);
  }
  RETURN_IF_ERROR(host.status());
  ASSIGN_OR_RETURN(const auto listener, DataListener::Start(*host));
  v1::FollowerMessage hello;
  hello.mutable_hello()->set_node_rank(static_cast<uint32_t>(options.place.rank));
  hello.mutable_hello()->mutable_terms()->insert(options.terms.begin(), options.terms.end());
  hello.mutable_hello()->set_data_address(listener->address());
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(-1);
  // A connection of its own for each attempt: one that was refused once is left alone by gRPC for seconds.
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  for (bool told = false;; told = true) {
    const auto stub = v1::LeaderService::NewStub(
        grpc::CreateCustomChannel(options.place.leader, grpc::InsecureChannelCredentials(), arguments));
    Call call(options, *stub);
    const auto formed = Introduce(options, call, hello);
    if (formed.ok() && formed->has_formed()) {
      log::Info("the group is complete: loading", {{"node", options.place.rank}});
      Status status =
          Serve(options, call, *listener, formed->formed(), checkpoint, std::move(executor_options), on_ready);
      if (!status.ok() && status.code() != Code::kAborted && !call.over()) {
        call.Send(FailureMessage(status));
        auto last = call.Next();  // the leader hears it before the call goes
        while (last.ok() && !call.over()) last = call.Next();
        // It may know a cause of what this node has only suffered from.
        if (last.ok() && status.code() == Code::kUnavailable) status = Unexpected(*last);
      }
      return status.code() == Code::kAborted ? OkStatus() : status;
    }
    const Status why = formed.ok() ? Unexpected(*formed) : formed.status();
    const bool may_come = why.code() == Code::kUnavailable || why.code() == Code::kAlreadyExists;
    if (!may_come) return why;
    if (Now() > end) {
      return Status(why.code(), StrCat("the leader at ", options.place.leader, " did not take this node in within ",
                                       "--join-timeout (", options.join_patience.count(), " ms): ", why.message(),
                                       formed.ok() ? "" : "; is node 0 running, and does this node reach it there?"));
    }
    if (!told) {
      log::Warn("the leader has not taken this node in yet: asking on until --join-timeout",
                {{"leader", options.place.leader}, {"why", why.message()}});
    }
    std::this_thread::sleep_for(4 * kPollInterval);
  }
}

}  // namespace altiplano::cluster
