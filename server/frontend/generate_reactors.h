// The gRPC ends of generations. Reactions run on gRPC's threads and only post notices; everything else is called on the
// egress thread, which also deletes them (with their call) after CallDone.
#pragma once

#include <grpcpp/grpcpp.h>

#include <memory>
#include <mutex>

#include "server/frontend/egress.h"
#include "server/frontend/stream_call.h"
#include "server/frontend/unary_call.h"

namespace altiplano {

// gRPC's context of a call, usable until OnDone and not a moment longer.
class CallContext {
 public:
  explicit CallContext(grpc::CallbackServerContext* context) : context_(context) {}
  // Egress thread, before Finish: sets trailers.
  grpc::Status FinalStatus(const Status& status);
  void TryCancel();
  void Done();

 private:
  std::mutex mutex_;
  grpc::CallbackServerContext* context_;  // null after Done
};

class StreamReactor final : public grpc::ServerWriteReactor<grpc::ByteBuffer>, public StreamTransport {
 public:
  StreamReactor(CallKey key, std::shared_ptr<EgressQueue> queue, grpc::CallbackServerContext* context)
      : key_(key), queue_(std::move(queue)), context_(context) {}

  void Write(const inference::v1::StreamGenerateResponse& message) override;
  void WriteAndFinish(const inference::v1::StreamGenerateResponse& message) override;
  void Finish(const Status& status) override;
  void Cancel() override { context_.TryCancel(); }

  void OnWriteDone(bool ok) override;
  void OnCancel() override;
  void OnDone() override;

 private:
  const CallKey key_;
  const std::shared_ptr<EgressQueue> queue_;
  CallContext context_;
  grpc::ByteBuffer outgoing_;  // lives until its write is done
};

class UnaryReactor final : public grpc::ServerUnaryReactor, public UnaryTransport {
 public:
  UnaryReactor(CallKey key, std::shared_ptr<EgressQueue> queue, grpc::CallbackServerContext* context,
               grpc::ByteBuffer* response)
      : key_(key), queue_(std::move(queue)), context_(context), response_(response) {}

  void Finish(const Status& status, const inference::v1::GenerateResponse& response) override;
  void Cancel() override { context_.TryCancel(); }

  void OnCancel() override;
  void OnDone() override;

 private:
  const CallKey key_;
  const std::shared_ptr<EgressQueue> queue_;
  CallContext context_;
  grpc::ByteBuffer* const response_;
};

}  // namespace altiplano
