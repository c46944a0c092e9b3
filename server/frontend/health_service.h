// grpc.health.v1: SERVING means progress, not a living process (FrontendState::Healthy). "" and every service by name.
#pragma once

#include <grpcpp/grpcpp.h>

#include <set>
#include <string>

#include "grpc/health/v1/health.grpc.pb.h"
#include "server/frontend/frontend_state.h"
#include "server/frontend/watch.h"

namespace altiplano {

class HealthService final
    : public grpc::health::v1::Health::WithRawCallbackMethod_Check<
          grpc::health::v1::Health::WithRawCallbackMethod_Watch<grpc::health::v1::Health::Service>> {
 public:
  // services: full names that may be asked for, besides "".
  HealthService(FrontendState* state, WatchHub* hub, std::set<std::string> services)
      : state_(state), hub_(hub), services_(std::move(services)) {}

  grpc::ServerUnaryReactor* Check(grpc::CallbackServerContext* context, const grpc::ByteBuffer* request,
                                  grpc::ByteBuffer* response) override;
  grpc::ServerWriteReactor<grpc::ByteBuffer>* Watch(grpc::CallbackServerContext* context,
                                                    const grpc::ByteBuffer* request) override;

 private:
  bool Known(const std::string& service) const { return service.empty() || services_.contains(service); }

  FrontendState* const state_;
  WatchHub* const hub_;
  const std::set<std::string> services_;
};

}  // namespace altiplano
