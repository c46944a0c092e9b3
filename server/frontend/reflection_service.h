// Server reflection v1 and v1alpha over the generated descriptors (gRPC 1.51 brings v1alpha only, and lists services
// that it cannot describe). The versions differ in their package only.
#pragma once

#include <grpcpp/grpcpp.h>

#include <string>
#include <vector>

#include "grpc/reflection/v1/reflection.grpc.pb.h"
#include "grpc/reflection/v1alpha/reflection.grpc.pb.h"

namespace altiplano {

// One question, one answer; both of either version's types. Exposed for tests.
template <typename Request, typename Response>
void AnswerReflection(const Request& request, const std::vector<std::string>& services, Response* response);

// services: full names, as they are to be listed.
class ReflectionV1 final : public grpc::reflection::v1::ServerReflection::CallbackService {
 public:
  explicit ReflectionV1(const std::vector<std::string>* services) : services_(services) {}
  grpc::ServerBidiReactor<grpc::reflection::v1::ServerReflectionRequest,
                          grpc::reflection::v1::ServerReflectionResponse>*
  ServerReflectionInfo(grpc::CallbackServerContext* context) override;

 private:
  const std::vector<std::string>* const services_;
};

class ReflectionV1Alpha final : public grpc::reflection::v1alpha::ServerReflection::CallbackService {
 public:
  explicit ReflectionV1Alpha(const std::vector<std::string>* services) : services_(services) {}
  grpc::ServerBidiReactor<grpc::reflection::v1alpha::ServerReflectionRequest,
                          grpc::reflection::v1alpha::ServerReflectionResponse>*
  ServerReflectionInfo(grpc::CallbackServerContext* context) override;

 private:
  const std::vector<std::string>* const services_;
};

}  // namespace altiplano
