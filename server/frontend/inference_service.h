// InferenceService. Handlers run on gRPC's threads: they count the call in, hand its bytes to the text pool and return.
#pragma once

#include <grpcpp/grpcpp.h>

#include "altiplano/inference/v1/inference.grpc.pb.h"
#include "server/frontend/frontend_state.h"

namespace altiplano {

class InferenceService final : public inference::v1::InferenceService::WithRawCallbackMethod_Generate<
                                   inference::v1::InferenceService::WithRawCallbackMethod_StreamGenerate<
                                       inference::v1::InferenceService::WithRawCallbackMethod_Tokenize<
                                           inference::v1::InferenceService::WithRawCallbackMethod_Detokenize<
                                               inference::v1::InferenceService::Service>>>> {
 public:
  explicit InferenceService(FrontendState* state) : state_(state) {}

  grpc::ServerUnaryReactor* Generate(grpc::CallbackServerContext* context, const grpc::ByteBuffer* request,
                                     grpc::ByteBuffer* response) override;
  grpc::ServerWriteReactor<grpc::ByteBuffer>* StreamGenerate(grpc::CallbackServerContext* context,
                                                             const grpc::ByteBuffer* request) override;
  grpc::ServerUnaryReactor* Tokenize(grpc::CallbackServerContext* context, const grpc::ByteBuffer* request,
                                     grpc::ByteBuffer* response) override;
  grpc::ServerUnaryReactor* Detokenize(grpc::CallbackServerContext* context, const grpc::ByteBuffer* request,
                                       grpc::ByteBuffer* response) override;

 private:
  FrontendState* const state_;
};

}  // namespace altiplano
