#include "server/frontend/reflection_service.h"

#include <google/protobuf/descriptor.h>
#include <google/protobuf/descriptor.pb.h>

#include <set>

#include "server/base/strings.h"

namespace altiplano {

namespace {

using google::protobuf::Descriptor;
using google::protobuf::DescriptorPool;
using google::protobuf::FieldDescriptor;
using google::protobuf::FileDescriptor;

template <typename Response>
void AnswerError(std::string message, Response* response) {
  response->mutable_error_response()->set_error_code(grpc::StatusCode::NOT_FOUND);
  response->mutable_error_response()->set_error_message(std::move(message));
}

// The file, then what it imports, each once.
template <typename Response>
void AddFile(const FileDescriptor* file, std::set<std::string>* seen, Response* out) {
  if (!seen->insert(file->name()).second) return;
  google::protobuf::FileDescriptorProto proto;
  file->CopyTo(&proto);
  out->add_file_descriptor_proto(proto.SerializeAsString());
  for (int i = 0; i < file->dependency_count(); ++i) AddFile(file->dependency(i), seen, out);
}

template <typename Response>
void AnswerFile(const FileDescriptor* file, std::string_view kind, std::string_view name, Response* response) {
  if (file == nullptr) return AnswerError(StrCat("no ", kind, " \"", name, "\""), response);
  std::set<std::string> seen;
  AddFile(file, &seen, response->mutable_file_descriptor_response());
}

template <typename Response>
void AnswerExtensionNumbers(const std::string& type, Response* response) {
  const DescriptorPool* pool = DescriptorPool::generated_pool();
  const Descriptor* descriptor = pool->FindMessageTypeByName(type);
  if (descriptor == nullptr) return AnswerError(StrCat("no message type \"", type, "\""), response);
  std::vector<const FieldDescriptor*> extensions;
  pool->FindAllExtensions(descriptor, &extensions);
  auto* out = response->mutable_all_extension_numbers_response();
  out->set_base_type_name(type);
  for (const FieldDescriptor* extension : extensions) out->add_extension_number(extension->number());
}

template <typename Response>
void AnswerExtension(const std::string& type, int number, Response* response) {
  const DescriptorPool* pool = DescriptorPool::generated_pool();
  const Descriptor* descriptor = pool->FindMessageTypeByName(type);
  const FieldDescriptor* extension = descriptor != nullptr ? pool->FindExtensionByNumber(descriptor, number) : nullptr;
  AnswerFile(extension != nullptr ? extension->file() : nullptr, "extension", StrCat(type, " ", number), response);
}

// One stream: read, answer, read. Deletes itself. After a cancel the pending operation fails, which ends it.
template <typename Request, typename Response>
class Reactor final : public grpc::ServerBidiReactor<Request, Response> {
 public:
  explicit Reactor(const std::vector<std::string>* services) : services_(services) { this->StartRead(&request_); }
  void OnReadDone(bool ok) override {
    if (!ok) return this->Finish(grpc::Status::OK);
    response_.Clear();
    AnswerReflection(request_, *services_, &response_);
    this->StartWrite(&response_);
  }
  void OnWriteDone(bool ok) override {
    if (!ok) return this->Finish(grpc::Status::CANCELLED);
    this->StartRead(&request_);
  }
  void OnDone() override { delete this; }

 private:
  const std::vector<std::string>* const services_;
  Request request_;
  Response response_;
};

}  // namespace

template <typename Request, typename Response>
void AnswerReflection(const Request& request, const std::vector<std::string>& services, Response* response) {
  const DescriptorPool* pool = DescriptorPool::generated_pool();
  response->set_valid_host(request.host());
  *response->mutable_original_request() = request;
  switch (request.message_request_case()) {
    case Request::kListServices:
      for (const std::string& name : services)
        response->mutable_list_services_response()->add_service()->set_name(name);
      break;
    case Request::kFileByFilename:
      AnswerFile(pool->FindFileByName(request.file_by_filename()), "file", request.file_by_filename(), response);
      break;
    case Request::kFileContainingSymbol:
      AnswerFile(pool->FindFileContainingSymbol(request.file_containing_symbol()), "symbol",
                 request.file_containing_symbol(), response);
      break;
    case Request::kFileContainingExtension: {
      const auto& asked = request.file_containing_extension();
      AnswerExtension(asked.containing_type(), asked.extension_number(), response);
      break;
    }
    case Request::kAllExtensionNumbersOfType:
      AnswerExtensionNumbers(request.all_extension_numbers_of_type(), response);
      break;
    case Request::MESSAGE_REQUEST_NOT_SET:
      response->mutable_error_response()->set_error_code(grpc::StatusCode::INVALID_ARGUMENT);
      response->mutable_error_response()->set_error_message("the request asks for nothing that is known here");
      break;
  }
}

template void AnswerReflection(const grpc::reflection::v1::ServerReflectionRequest&, const std::vector<std::string>&,
                               grpc::reflection::v1::ServerReflectionResponse*);
template void AnswerReflection(const grpc::reflection::v1alpha::ServerReflectionRequest&,
                               const std::vector<std::string>&, grpc::reflection::v1alpha::ServerReflectionResponse*);

grpc::ServerBidiReactor<grpc::reflection::v1::ServerReflectionRequest, grpc::reflection::v1::ServerReflectionResponse>*
ReflectionV1::ServerReflectionInfo(grpc::CallbackServerContext*) {
  return new Reactor<grpc::reflection::v1::ServerReflectionRequest, grpc::reflection::v1::ServerReflectionResponse>(
      services_);
}

grpc::ServerBidiReactor<grpc::reflection::v1alpha::ServerReflectionRequest,
                        grpc::reflection::v1alpha::ServerReflectionResponse>*
ReflectionV1Alpha::ServerReflectionInfo(grpc::CallbackServerContext*) {
  return new Reactor<grpc::reflection::v1alpha::ServerReflectionRequest,
                     grpc::reflection::v1alpha::ServerReflectionResponse>(services_);
}

}  // namespace altiplano
