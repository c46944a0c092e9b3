// StatusService: what routers and dashboards ask.
#pragma once

#include <grpcpp/grpcpp.h>

#include "altiplano/inference/v1/status.grpc.pb.h"
#include "server/frontend/frontend_state.h"
#include "server/frontend/watch.h"

namespace altiplano {

class StatusService final : public inference::v1::StatusService::WithRawCallbackMethod_GetServerInfo<
                                inference::v1::StatusService::WithRawCallbackMethod_GetLoad<
                                    inference::v1::StatusService::WithRawCallbackMethod_WatchLoad<
                                        inference::v1::StatusService::WithRawCallbackMethod_CancelRequests<
                                            inference::v1::StatusService::Service>>>> {
 public:
  StatusService(FrontendState* state, WatchHub* hub) : state_(state), hub_(hub) {}

  grpc::ServerUnaryReactor* GetServerInfo(grpc::CallbackServerContext* context, const grpc::ByteBuffer* request,
                                          grpc::ByteBuffer* response) override;
  grpc::ServerUnaryReactor* GetLoad(grpc::CallbackServerContext* context, const grpc::ByteBuffer* request,
                                    grpc::ByteBuffer* response) override;
  grpc::ServerWriteReactor<grpc::ByteBuffer>* WatchLoad(grpc::CallbackServerContext* context,
                                                        const grpc::ByteBuffer* request) override;
  grpc::ServerUnaryReactor* CancelRequests(grpc::CallbackServerContext* context, const grpc::ByteBuffer* request,
                                           grpc::ByteBuffer* response) override;

 private:
  FrontendState* const state_;
  WatchHub* const hub_;
};

}  // namespace altiplano
