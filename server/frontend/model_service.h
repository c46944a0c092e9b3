// ModelService: what is served.
#pragma once

#include <grpcpp/grpcpp.h>

#include "altiplano/inference/v1/model.grpc.pb.h"
#include "server/frontend/frontend_state.h"

namespace altiplano {

class ModelService final
    : public inference::v1::ModelService::WithRawCallbackMethod_ListModels<
          inference::v1::ModelService::WithRawCallbackMethod_GetModel<inference::v1::ModelService::Service>> {
 public:
  explicit ModelService(FrontendState* state) : state_(state) {}

  grpc::ServerUnaryReactor* ListModels(grpc::CallbackServerContext* context, const grpc::ByteBuffer* request,
                                       grpc::ByteBuffer* response) override;
  grpc::ServerUnaryReactor* GetModel(grpc::CallbackServerContext* context, const grpc::ByteBuffer* request,
                                     grpc::ByteBuffer* response) override;

 private:
  FrontendState* const state_;
};

}  // namespace altiplano
