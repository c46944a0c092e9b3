// Messages to and from the bytes gRPC carries. Handlers take bytes because gRPC 1.51 answers UNIMPLEMENTED to a message
// that it cannot parse (bad UTF-8 included), where INVALID_ARGUMENT is due; parsing also moves off gRPC's threads.
#pragma once

#include <google/protobuf/message.h>
#include <grpcpp/grpcpp.h>

#include "server/base/status.h"

namespace altiplano {

// INVALID_ARGUMENT UNDECODABLE_MESSAGE. Frees the bytes.
Status ParseMessage(grpc::ByteBuffer* bytes, google::protobuf::Message* message);
void SerializeMessage(const google::protobuf::Message& message, grpc::ByteBuffer* bytes);

}  // namespace altiplano
