#include "server/frontend/wire.h"

#include <grpcpp/impl/codegen/proto_utils.h>

#include "server/base/check.h"
#include "server/frontend/error_mapping.h"

namespace altiplano {

Status ParseMessage(grpc::ByteBuffer* bytes, google::protobuf::Message* message) {
  grpc::Status status = grpc::GenericDeserialize<grpc::ProtoBufferReader, google::protobuf::Message>(bytes, message);
  bytes->Clear();
  return status.ok() ? OkStatus() : UndecodableMessage(message->GetDescriptor()->full_name());
}

void SerializeMessage(const google::protobuf::Message& message, grpc::ByteBuffer* bytes) {
  bytes->Clear();
  bool own_buffer = false;
  grpc::Status status =
      grpc::GenericSerialize<grpc::ProtoBufferWriter, google::protobuf::Message>(message, bytes, &own_buffer);
  CHECK(status.ok());
}

}  // namespace altiplano
