// What services answer with: refusals, and one-message calls whose request is bytes (see wire.h).
#pragma once

#include <grpcpp/grpcpp.h>

#include <utility>

#include "server/frontend/error_mapping.h"
#include "server/frontend/wire.h"

namespace altiplano {

inline grpc::ServerUnaryReactor* FinishUnary(grpc::CallbackServerContext* context, const Status& status) {
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  reactor->Finish(FinalStatus(status, context));
  return reactor;
}

// Answers on the spot: handle(const Request&, Response*) -> Status must not wait for anything.
template <typename Request, typename Response, typename Handle>
grpc::ServerUnaryReactor* AnswerUnary(grpc::CallbackServerContext* context, const grpc::ByteBuffer* in,
                                      grpc::ByteBuffer* out, Handle&& handle) {
  Request request;
  grpc::ByteBuffer bytes = *in;  // shares the slices
  Status status = ParseMessage(&bytes, &request);
  Response response;
  if (status.ok()) status = std::forward<Handle>(handle)(request, &response);
  if (status.ok()) SerializeMessage(response, out);
  return FinishUnary(context, status);
}

// A stream that is over before it began.
class RefusedStream final : public grpc::ServerWriteReactor<grpc::ByteBuffer> {
 public:
  RefusedStream(grpc::CallbackServerContext* context, const Status& status) { Finish(FinalStatus(status, context)); }
  void OnDone() override { delete this; }
};

}  // namespace altiplano
