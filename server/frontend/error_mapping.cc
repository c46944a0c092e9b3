#include "server/frontend/error_mapping.h"

#include <google/protobuf/util/time_util.h>
#include <grpcpp/server_context.h>

#include <utility>

#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
#include "server/base/strings.h"

namespace altiplano {

namespace {

// The message goes out twice (grpc-message, percent-encoded, and inside the details).
constexpr size_t kMaxMessageBytes = 1024;
constexpr size_t kMaxDescriptionBytes = 256;
constexpr size_t kMaxViolationBytes = 2048;
constexpr auto kRetryUnavailable = std::chrono::seconds(1);

void AddBadRequest(const ErrorDetail& detail, google::rpc::Status* out) {
  if (detail.field_violations.empty()) return;
  google::rpc::BadRequest bad;
  size_t bytes = 0;
  for (const FieldViolation& violation : detail.field_violations) {
    auto* field = bad.add_field_violations();
    field->set_field(Shorten(violation.field, kMaxDescriptionBytes));
    field->set_description(Shorten(violation.description, kMaxDescriptionBytes));
    bytes += field->ByteSizeLong();
    if (bytes > kMaxViolationBytes) break;
  }
  out->add_details()->PackFrom(bad);
}

Status Unavailable(std::string reason, std::string message) {
  ErrorDetail detail;
  detail.reason = std::move(reason);
  detail.retry_after = kRetryUnavailable;
  return Status(Code::kUnavailable, std::move(message), std::move(detail));
}

}  // namespace

std::string Shorten(std::string_view text, size_t bytes) {
  if (text.size() <= bytes) return std::string(text);
  size_t end = bytes - 3;
  while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xC0) == 0x80) --end;
  return StrCat(text.substr(0, end), "...");
}

std::string_view ReasonOf(const Status& status) {
  if (status.ok() || !status.reason().empty()) return status.reason();
  if (status.code() == Code::kInvalidArgument) return "INVALID_FIELD";
  if (status.code() == Code::kInternal) return "ENGINE_FAULT";
  return CodeName(status.code());
}

grpc::Status ToGrpcStatus(const Status& status) {
  if (status.ok()) return grpc::Status::OK;
  google::rpc::Status out;
  out.set_code(static_cast<int>(status.code()));
  out.set_message(Shorten(status.message(), kMaxMessageBytes));
  google::rpc::ErrorInfo info;
  info.set_reason(std::string(ReasonOf(status)));
  info.set_domain(std::string(kErrorDomain));
  const ErrorDetail* detail = status.detail();
  if (detail != nullptr) {
    for (const auto& [key, value] : detail->metadata) (*info.mutable_metadata())[key] = Shorten(value, 256);
  }
  out.add_details()->PackFrom(info);
  if (detail != nullptr) {
    AddBadRequest(*detail, &out);
    if (detail->retry_after) {
      google::rpc::RetryInfo retry;
      *retry.mutable_retry_delay() =
          google::protobuf::util::TimeUtil::MillisecondsToDuration(detail->retry_after->count());
      out.add_details()->PackFrom(retry);
    }
  }
  return grpc::Status(static_cast<grpc::StatusCode>(status.code()), out.message(), out.SerializeAsString());
}

grpc::Status FinalStatus(const Status& status, grpc::ServerContextBase* context) {
  if (const ErrorDetail* detail = status.detail(); detail != nullptr && detail->retry_after) {
    context->AddTrailingMetadata("grpc-retry-pushback-ms", StrCat(detail->retry_after->count()));
  }
  return ToGrpcStatus(status);
}

Status InvalidFields(std::vector<FieldViolation> violations) {
  std::string message;
  for (const FieldViolation& violation : violations) {
    if (!message.empty()) message += "; ";
    message += StrCat(violation.field, " ", violation.description);
    if (message.size() > kMaxMessageBytes) break;
  }
  ErrorDetail detail;
  detail.reason = "INVALID_FIELD";
  detail.field_violations = std::move(violations);
  return Status(Code::kInvalidArgument, std::move(message), std::move(detail));
}

Status InvalidField(std::string field, std::string description) {
  return InvalidFields({{std::move(field), std::move(description)}});
}

Status UndecodableMessage(std::string_view message_type) {
  ErrorDetail detail;
  detail.reason = "UNDECODABLE_MESSAGE";
  return Status(Code::kInvalidArgument,
                StrCat("not a valid ", message_type, ": malformed, nested too deep, or text in it is not UTF-8"),
                std::move(detail));
}

Status Unsupported(std::string_view feature, std::string message) {
  ErrorDetail detail;
  detail.reason = "FEATURE";
  detail.metadata = {{"feature", std::string(feature)}};
  return Status(Code::kUnimplemented, std::move(message), std::move(detail));
}

Status LoadingError() {
  return Unavailable("LOADING", "the model is being loaded");
}

Status DrainingError() {
  return Unavailable("DRAINING", "the server is draining and takes no new requests");
}

Status DrainedError() {
  return Unavailable("DRAINING", "the server is draining and its grace for live calls is over");
}

Status ShutdownError() {
  return Unavailable("DRAINING", "the server is shutting down");
}

Status ModelNotFound(std::string_view asked, std::string_view served) {
  ErrorDetail detail;
  detail.reason = "MODEL_NOT_FOUND";
  detail.metadata = {{"model", Shorten(asked, 256)}, {"served", std::string(served)}};
  return Status(Code::kNotFound, StrCat("model \"", Shorten(asked, 256), "\" is not served here; \"", served, "\" is"),
                std::move(detail));
}

}  // namespace altiplano
