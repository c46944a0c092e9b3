// From Status to what goes over the wire: gRPC code and message, google.rpc.Status in grpc-status-details-bin, and
// grpc-retry-pushback-ms where it is worth trying again. The errors that several services share are made here too.
#pragma once

#include <grpcpp/support/status.h>

#include <string>
#include <string_view>
#include <vector>

#include "server/base/status.h"

namespace grpc {
class ServerContextBase;
}  // namespace grpc

namespace altiplano {

inline constexpr std::string_view kErrorDomain = "altiplano.inference.v1";

// The ErrorInfo's: the status's own, else one by its code. Empty of OK.
std::string_view ReasonOf(const Status& status);

// Every error carries one ErrorInfo; BadRequest and RetryInfo when the detail has fields or a delay. Long messages and
// lists are cut: all of it travels in HTTP/2 headers, of which clients take 8 KiB.
grpc::Status ToGrpcStatus(const Status& status);

// ToGrpcStatus, and the trailer for clients that retry on their own. Before Finish.
grpc::Status FinalStatus(const Status& status, grpc::ServerContextBase* context);

Status InvalidFields(std::vector<FieldViolation> violations);  // INVALID_ARGUMENT; not empty
Status InvalidField(std::string field, std::string description);
Status UndecodableMessage(std::string_view message_type);           // INVALID_ARGUMENT
Status Unsupported(std::string_view feature, std::string message);  // UNIMPLEMENTED FEATURE
Status LoadingError();                                              // UNAVAILABLE LOADING
Status DrainingError();                                             // UNAVAILABLE DRAINING
Status DrainedError();                                              // same, for calls that outlived a drain's grace
Status ShutdownError();                                             // same, for calls that were live at the end
Status ModelNotFound(std::string_view asked, std::string_view served);

// `text` cut to at most `bytes` at the end of a code point, "..." in place of what is gone.
std::string Shorten(std::string_view text, size_t bytes);

}  // namespace altiplano
