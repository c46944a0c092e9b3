#include "server/cli/client.h"

#include <google/rpc/error_details.pb.h>
#include <google/rpc/status.pb.h>
#include <grpcpp/create_channel.h>

#include "grpc/health/v1/health.grpc.pb.h"
#include "server/base/strings.h"

namespace altiplano::cli {

namespace {

constexpr int kMaxMessageBytes = 64 << 20;  // prompt log-probabilities of a long context are large

std::chrono::system_clock::time_point In(Duration wait) {
  return std::chrono::system_clock::now() + std::chrono::duration_cast<std::chrono::system_clock::duration>(wait);
}

Duration ToDuration(const google::protobuf::Duration& d) {
  return std::chrono::seconds(d.seconds()) + std::chrono::nanoseconds(d.nanos());
}

}  // namespace

double Answer::TokensPerSecond() const {
  double seconds = Seconds(total - first_token);
  return tokens > first_tokens_ && seconds > 0 ? static_cast<double>(tokens - first_tokens_) / seconds : 0;
}

void Cancellation::Cancel() {
  std::lock_guard lock(mutex_);
  cancelled_ = true;
  if (context_ != nullptr) context_->TryCancel();
}

void Cancellation::Reset() {
  std::lock_guard lock(mutex_);
  cancelled_ = false;
}

bool Cancellation::cancelled() {
  std::lock_guard lock(mutex_);
  return cancelled_;
}

void Cancellation::Enter(grpc::ClientContext* context) {
  std::lock_guard lock(mutex_);
  context_ = context;
  if (cancelled_) context_->TryCancel();
}

void Cancellation::Leave() {
  std::lock_guard lock(mutex_);
  context_ = nullptr;
}

Client::Client(std::shared_ptr<grpc::Channel> channel)
    : channel_(std::move(channel)),
      inference_stub_(v1::InferenceService::NewStub(channel_)),
      model_stub_(v1::ModelService::NewStub(channel_)),
      status_stub_(v1::StatusService::NewStub(channel_)) {}

StatusOr<std::unique_ptr<Client>> Client::Connect(const std::string& url, Duration wait) {
  std::string target = url;
  for (std::string_view scheme : {"grpc://", "http://"}) {
    if (target.starts_with(scheme)) target = target.substr(scheme.size());
  }
  while (target.ends_with('/') && !target.starts_with("unix:")) target.pop_back();
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(kMaxMessageBytes);
  arguments.SetMaxSendMessageSize(kMaxMessageBytes);
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
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
  grpc::ClientContext context;
  if (cancellation != nullptr) cancellation->Enter(&context);
  TimePoint begin = Clock::Real().Now(), last{};
  auto reader = inference_stub_->StreamGenerate(&context, message);
  v1::StreamGenerateResponse response;
  uint64_t expected = 0;
  bool gap = false;
  while (reader->Read(&response)) {
    TimePoint now = Clock::Real().Now();
    gap = gap || response.sequence_number() != expected++;
    if (response.has_started()) answer->prompt = response.started();
    if (response.has_completed()) {
      answer->usage = response.completed().usage();
      answer->timing = response.completed().timing();
    }
    if (!response.has_deltas()) continue;
    uint64_t tokens = 0;
    for (const v1::Delta& delta : response.deltas().items()) tokens += delta.num_tokens();
    if (last == TimePoint{}) {
      answer->first_token = now - begin;
      answer->first_tokens_ = tokens;
    } else {
      answer->intervals.push_back(now - last);
    }
    last = now;
    answer->tokens += tokens;
    for (const v1::Delta& delta : response.deltas().items()) {
      if (delta.has_finish()) answer->finishes.push_back(delta.finish());
      on_delta(delta);
    }
  }
  Status status = FromGrpc(reader->Finish());
  answer->total = Clock::Real().Now() - begin;
  if (cancellation != nullptr) cancellation->Leave();
  if (status.ok() && gap) return Status(Code::kDataLoss, "the stream has a gap in its sequence numbers");
  return status;
}

StatusOr<v1::TokenizeResponse> Client::Tokenize(const v1::TokenizeRequest& request) {
  grpc::ClientContext context;
  v1::TokenizeResponse response;
  RETURN_IF_ERROR(FromGrpc(inference_stub_->Tokenize(&context, request, &response)));
  return response;
}

StatusOr<v1::DetokenizeResponse> Client::Detokenize(const v1::DetokenizeRequest& request) {
  grpc::ClientContext context;
  v1::DetokenizeResponse response;
  RETURN_IF_ERROR(FromGrpc(inference_stub_->Detokenize(&context, request, &response)));
  return response;
}

StatusOr<v1::ListModelsResponse> Client::ListModels() {
  grpc::ClientContext context;
  v1::ListModelsResponse response;
  RETURN_IF_ERROR(FromGrpc(model_stub_->ListModels(&context, {}, &response)));
  return response;
}

StatusOr<v1::GetServerInfoResponse> Client::GetServerInfo() {
  grpc::ClientContext context;
  v1::GetServerInfoResponse response;
  RETURN_IF_ERROR(FromGrpc(status_stub_->GetServerInfo(&context, {}, &response)));
  return response;
}

StatusOr<v1::Load> Client::GetLoad() {
  grpc::ClientContext context;
  v1::Load response;
  RETURN_IF_ERROR(FromGrpc(status_stub_->GetLoad(&context, {}, &response)));
  return response;
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
