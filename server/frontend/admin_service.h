// AdminService: for operators, on its own listener.
#pragma once

#include <grpcpp/grpcpp.h>

#include <functional>

#include "altiplano/inference/v1/admin.grpc.pb.h"
#include "server/frontend/frontend_state.h"

namespace altiplano {

class AdminService final : public inference::v1::AdminService::WithRawCallbackMethod_Drain<
                               inference::v1::AdminService::WithRawCallbackMethod_Resume<
                                   inference::v1::AdminService::WithRawCallbackMethod_ResetPrefixCache<
                                       inference::v1::AdminService::WithRawCallbackMethod_SetLogLevel<
                                           inference::v1::AdminService::WithRawCallbackMethod_DumpFlightRecord<
                                               inference::v1::AdminService::Service>>>>> {
 public:
  // What draining means is the server's business. Neither function waits.
  struct Actions {
    std::function<void(Duration grace)> drain;
    std::function<Status()> resume;
  };
  AdminService(FrontendState* state, Actions actions) : state_(state), actions_(std::move(actions)) {}

  grpc::ServerUnaryReactor* Drain(grpc::CallbackServerContext* context, const grpc::ByteBuffer* request,
                                  grpc::ByteBuffer* response) override;
  grpc::ServerUnaryReactor* Resume(grpc::CallbackServerContext* context, const grpc::ByteBuffer* request,
                                   grpc::ByteBuffer* response) override;
  grpc::ServerUnaryReactor* ResetPrefixCache(grpc::CallbackServerContext* context, const grpc::ByteBuffer* request,
                                             grpc::ByteBuffer* response) override;
  grpc::ServerUnaryReactor* SetLogLevel(grpc::CallbackServerContext* context, const grpc::ByteBuffer* request,
                                        grpc::ByteBuffer* response) override;
  grpc::ServerWriteReactor<grpc::ByteBuffer>* DumpFlightRecord(grpc::CallbackServerContext* context,
                                                               const grpc::ByteBuffer* request) override;

 private:
  FrontendState* const state_;
  const Actions actions_;
};

}  // namespace altiplano
