#include "server/frontend/health_service.h"

#include "server/base/strings.h"
#include "server/frontend/unary.h"

namespace altiplano {

using grpc::health::v1::HealthCheckRequest;
using grpc::health::v1::HealthCheckResponse;

namespace {

HealthCheckResponse::ServingStatus StatusOf(const FrontendState& state) {
  return state.Healthy() ? HealthCheckResponse::SERVING : HealthCheckResponse::NOT_SERVING;
}

}  // namespace

grpc::ServerUnaryReactor* HealthService::Check(grpc::CallbackServerContext* context, const grpc::ByteBuffer* request,
                                               grpc::ByteBuffer* response) {
  return AnswerUnary<HealthCheckRequest, HealthCheckResponse>(
      context, request, response, [this](const HealthCheckRequest& in, HealthCheckResponse* out) {
        if (!Known(in.service())) {
          ErrorDetail detail;
          detail.reason = "SERVICE_NOT_FOUND";
          return Status(Code::kNotFound, StrCat("no service \"", Shorten(in.service(), 256), "\" here"), detail);
        }
        out->set_status(StatusOf(*state_));
        return OkStatus();
      });
}

grpc::ServerWriteReactor<grpc::ByteBuffer>* HealthService::Watch(grpc::CallbackServerContext* context,
                                                                 const grpc::ByteBuffer* request) {
  HealthCheckRequest in;
  grpc::ByteBuffer bytes = *request;
  if (Status status = ParseMessage(&bytes, &in); !status.ok()) return new RefusedStream(context, status);
  // A service that is not known now might come: the protocol keeps such a watch open.
  bool known = Known(in.service());
  return new WatchReactor(hub_,
                          [this, known, sent = std::optional<HealthCheckResponse::ServingStatus>()](
                              TimePoint) mutable -> std::optional<grpc::ByteBuffer> {
                            auto status = known ? StatusOf(*state_) : HealthCheckResponse::SERVICE_UNKNOWN;
                            if (sent == status) return std::nullopt;
                            sent = status;
                            HealthCheckResponse message;
                            message.set_status(status);
                            grpc::ByteBuffer out;
                            SerializeMessage(message, &out);
                            return out;
                          });
}

}  // namespace altiplano
