#include "server/cli/client.h"

#include <google/rpc/error_details.pb.h>
#include <google/rpc/status.pb.h>
#include <grpcpp/channel.h>
#include <grpcpp/client_context.h>
#include <grpcpp/create_channel.h>
#include <grpcpp/support/client_callback.h>

#include <climits>
#include <optional>

#include "altiplano/inference/v1/admin.grpc.pb.h"
#include "altiplano/inference/v1/inference.grpc.pb.h"
#include "altiplano/inference/v1/model.grpc.pb.h"
#include "altiplano/inference/v1/status.grpc.pb.h"
#include "grpc/health/v1/health.grpc.pb.h"
#include "server/base/strings.h"
#include "server/cli/units.h"

namespace altiplano::cli {

namespace {

constexpr int kMaxMessageBytes = 64 << 20;  // prompt log-probabilities of a long context are large

std::chrono::system_clock::time_point In(Duration wait) {
  return std::chrono::system_clock::now() + std::chrono::duration_cast<std::chrono::system_clock::duration>(wait);
}

Duration ToDuration(const google::protobuf::Duration& d) {
  return std::chrono::seconds(d.seconds()) + std::chrono::nanoseconds(d.nanos());
}

// Turns the messages of one stream into an Answer, from the moment it is made.
class StreamRecorder {
 public:
  explicit StreamRecorder(Answer* answer) : answer_(*answer), begin_(Clock::Real().Now()) {}

  void Take(const v1::StreamGenerateResponse& response, const Client::OnDelta& on_delta) {
    const TimePoint now = Clock::Real().Now();
    gap_ = gap_ || response.sequence_number() != expected_++;
    if (response.has_started()) answer_.prompt = response.started();
    if (response.has_completed()) {
      answer_.usage = response.completed().usage();
      answer_.timing = response.completed().timing();
    }
    if (!response.has_deltas()) return;
    uint64_t tokens = 0;
    for (const v1::Delta& delta : response.deltas().items()) tokens += delta.num_tokens();
    if (last_ == TimePoint{}) {
      answer_.first_token = now - begin_;
      answer_.first_tokens = tokens;
    } else {
      answer_.intervals.push_back(now - last_);
    }
    last_ = now;
    answer_.tokens += tokens;
    for (const v1::Delta& delta : response.deltas().items()) {
      if (delta.has_finish()) answer_.finishes.push_back(delta.finish());
      on_delta(delta);
    }
  }
  Status Finish(const grpc::Status& end) {
    answer_.total = Clock::Real().Now() - begin_;
    Status status = FromGrpc(end);
    if (status.ok() && gap_) return Status(Code::kDataLoss, "the stream has a gap in its sequence numbers");
    return status;
  }

 private:
  Answer& answer_;
  const TimePoint begin_;
  TimePoint last_{};  // message with deltas
  uint64_t expected_ = 0;
  bool gap_ = false;
};

}  // namespace

// One call of StartGenerate; deletes itself after its end.
class GenerateReactor : public grpc::ClientReadReactor<v1::StreamGenerateResponse> {
 public:
  GenerateReactor(Client::OnDelta on_delta, Client::OnEnd done, Cancellation* cancellation)
      : on_delta_(std::move(on_delta)), done_(std::move(done)), cancellation_(cancellation) {}

  void Start(v1::InferenceService::Stub* stub, const v1::GenerateRequest& request) {
    *message_.mutable_request() = request;
    recorder_.emplace(&answer_);
    if (cancellation_ != nullptr) cancellation_->Enter(context_);
    stub->async()->StreamGenerate(context_.get(), &message_, this);
    StartRead(&response_);
    StartCall();
  }
  void OnReadDone(bool ok) override {
    if (!ok) return;  // the end: OnDone follows
    recorder_->Take(response_, on_delta_);
    StartRead(&response_);
  }
  void OnDone(const grpc::Status& end) override {
    if (cancellation_ != nullptr) cancellation_->Leave(context_);
    Status status = recorder_->Finish(end);
    Answer answer = std::move(answer_);
    Client::OnEnd done = std::move(done_);
    delete this;  // whoever hears of the end may destroy the client: nothing of the call may be left
    done(status, std::move(answer));
  }

 private:
  const Client::OnDelta on_delta_;
  Client::OnEnd done_;
  Cancellation* const cancellation_;
  const std::shared_ptr<grpc::ClientContext> context_ = std::make_shared<grpc::ClientContext>();
  v1::StreamGenerateRequest message_;
  v1::StreamGenerateResponse response_;
  Answer answer_;
  std::optional<StreamRecorder> recorder_;
};

double Answer::TokensPerSecond() const {
  // The server's own times: here several tokens may have come in one message.
  const double decode = Seconds(ToDuration(timing.total()) - ToDuration(timing.first_token()));
  const uint64_t firsts = finishes.size();  // each sequence has a first token
  if (decode > 0 && usage.completion_tokens() > firsts) {
    return static_cast<double>(usage.completion_tokens() - firsts) / decode;
  }
  double seconds = Seconds(total - first_token);
  return tokens > first_tokens && seconds > 0 ? static_cast<double>(tokens - first_tokens) / seconds : 0;
}

// Not with the mutex held: ending a call may run what comes after its end, Leave() among it, on this thread.
void Cancellation::Cancel() {
  std::unordered_set<Context> contexts;
  {
    std::lock_guard lock(mutex_);
    cancelled_ = true;
    contexts = contexts_;
  }
  for (const Context& context : contexts) context->TryCancel();
}

void Cancellation::Reset() {
  std::lock_guard lock(mutex_);
  cancelled_ = false;
}

bool Cancellation::cancelled() {
  std::lock_guard lock(mutex_);
  return cancelled_;
}

void Cancellation::Enter(const Context& context) {
  std::lock_guard lock(mutex_);
  contexts_.insert(context);
  if (cancelled_) context->TryCancel();
}

void Cancellation::Leave(const Context& context) {
  std::lock_guard lock(mutex_);
  contexts_.erase(context);
}

struct Client::Stubs {
  explicit Stubs(const std::shared_ptr<grpc::Channel>& channel)
      : inference(v1::InferenceService::NewStub(channel)),
        model(v1::ModelService::NewStub(channel)),
        status(v1::StatusService::NewStub(channel)) {}

  const std::unique_ptr<v1::InferenceService::Stub> inference;
  const std::unique_ptr<v1::ModelService::Stub> model;
  const std::unique_ptr<v1::StatusService::Stub> status;
};

Client::Client(std::shared_ptr<grpc::Channel> channel)
    : channel_(std::move(channel)), stubs_(std::make_unique<Stubs>(channel_)) {}

Client::~Client() = default;

StatusOr<std::unique_ptr<Client>> Client::Connect(const std::string& url, Duration wait) {
  const std::string target(AddressOfUrl(url));
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(kMaxMessageBytes);
  arguments.SetMaxSendMessageSize(kMaxMessageBytes);
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  arguments.SetInt(GRPC_ARG_CLIENT_IDLE_TIMEOUT_MS, INT_MAX);  // a local server's socket has no name to come back to
  arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 100);
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 100);
  auto channel = grpc::CreateCustomChannel(target, grpc::InsecureChannelCredentials(), arguments);
  if (!channel->WaitForConnected(In(wait))) {
    return Status(Code::kUnavailable, StrCat("no server answers at ", target));
  }
  return std::unique_ptr<Client>(new Client(std::move(channel)));
}

Status Client::StreamGenerate(const v1::GenerateRequest& request, const OnDelta& on_delta, Answer* answer,
                              Cancellation* cancellation) {
  v1::StreamGenerateRequest message;
  *message.mutable_request() = request;
  const auto context = std::make_shared<grpc::ClientContext>();
  if (cancellation != nullptr) cancellation->Enter(context);
  StreamRecorder recorder(answer);
  auto reader = stubs_->inference->StreamGenerate(context.get(), message);
  v1::StreamGenerateResponse response;
  while (reader->Read(&response)) recorder.Take(response, on_delta);
  Status status = recorder.Finish(reader->Finish());
  if (cancellation != nullptr) cancellation->Leave(context);
  return status;
}

void Client::StartGenerate(const v1::GenerateRequest& request, OnDelta on_delta, OnEnd done,
                           Cancellation* cancellation) {
  auto* call = new GenerateReactor(std::move(on_delta), std::move(done), cancellation);
  call->Start(stubs_->inference.get(), request);
}

StatusOr<v1::TokenizeResponse> Client::Tokenize(const v1::TokenizeRequest& request) {
  grpc::ClientContext context;
  v1::TokenizeResponse response;
  RETURN_IF_ERROR(FromGrpc(stubs_->inference->Tokenize(&context, request, &response)));
  return response;
}

StatusOr<v1::DetokenizeResponse> Client::Detokenize(const v1::DetokenizeRequest& request) {
  grpc::ClientContext context;
  v1::DetokenizeResponse response;
  RETURN_IF_ERROR(FromGrpc(stubs_->inference->Detokenize(&context, request, &response)));
  return response;
}

StatusOr<v1::ListModelsResponse> Client::ListModels() {
  grpc::ClientContext context;
  v1::ListModelsResponse response;
  RETURN_IF_ERROR(FromGrpc(stubs_->model->ListModels(&context, {}, &response)));
  return response;
}

StatusOr<v1::GetServerInfoResponse> Client::GetServerInfo() {
  grpc::ClientContext context;
  v1::GetServerInfoResponse response;
  RETURN_IF_ERROR(FromGrpc(stubs_->status->GetServerInfo(&context, {}, &response)));
  return response;
}

StatusOr<v1::Load> Client::GetLoad() {
  grpc::ClientContext context;
  v1::Load response;
  RETURN_IF_ERROR(FromGrpc(stubs_->status->GetLoad(&context, {}, &response)));
  return response;
}

StatusOr<std::string> Client::DumpFlightRecord(uint32_t replica) {
  auto stub = v1::AdminService::NewStub(channel_);
  grpc::ClientContext context;
  v1::DumpFlightRecordRequest request;
  request.set_replica(replica);
  auto reader = stub->DumpFlightRecord(&context, request);
  std::string record;
  v1::DumpFlightRecordResponse response;
  while (reader->Read(&response)) record += response.chunk();
  RETURN_IF_ERROR(FromGrpc(reader->Finish()));
  return record;
}

StatusOr<std::string> Client::Health(const std::string& service, Duration timeout) {
  auto stub = grpc::health::v1::Health::NewStub(channel_);
  grpc::ClientContext context;
  context.set_deadline(In(timeout));
  grpc::health::v1::HealthCheckRequest request;
  grpc::health::v1::HealthCheckResponse response;
  request.set_service(service);
  RETURN_IF_ERROR(FromGrpc(stub->Check(&context, request, &response)));
  return grpc::health::v1::HealthCheckResponse::ServingStatus_Name(response.status());
}

Status FromGrpc(const grpc::Status& status) {
  if (status.ok()) return OkStatus();
  ErrorDetail detail;
  google::rpc::Status rich;
  if (rich.ParseFromString(status.error_details())) {
    for (const google::protobuf::Any& any : rich.details()) {
      google::rpc::ErrorInfo info;
      google::rpc::BadRequest bad;
      google::rpc::RetryInfo retry;
      if (any.UnpackTo(&info)) {
        detail.reason = info.reason();
        detail.metadata.insert(info.metadata().begin(), info.metadata().end());
      } else if (any.UnpackTo(&bad)) {
        for (const auto& violation : bad.field_violations()) {
          detail.field_violations.push_back({violation.field(), violation.description()});
        }
      } else if (any.UnpackTo(&retry)) {
        detail.retry_after = std::chrono::duration_cast<std::chrono::milliseconds>(ToDuration(retry.retry_delay()));
      }
    }
  }
  return Status(static_cast<Code>(status.error_code()), status.error_message(), std::move(detail));
}

std::string DescribeError(const Status& status) {
  std::string out = status.ToString();
  const ErrorDetail* detail = status.detail();
  if (detail == nullptr) return out;
  for (const FieldViolation& violation : detail->field_violations) {
    if (status.message().find(violation.description) != std::string::npos) continue;
    out += StrCat("\n  ", violation.field, ": ", violation.description);
  }
  std::string facts;
  for (const auto& [key, value] : detail->metadata) facts += StrCat(facts.empty() ? "" : ", ", key, " ", value);
  if (!detail->reason.empty()) {
    out += StrCat("\n  reason ", detail->reason, facts.empty() ? "" : StrCat(" (", facts, ")"));
  }
  if (detail->retry_after) out += StrCat("\n  retry after ", detail->retry_after->count(), " ms");
  return out;
}

}  // namespace altiplano::cli
