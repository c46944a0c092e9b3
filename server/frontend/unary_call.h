// UnaryCall: Generate's way of answering: everything at the end, in one message.
#pragma once

#include <memory>

#include "server/frontend/generate_call.h"

namespace altiplano {

// What UnaryCall needs of gRPC. Egress thread; one CallDone notice comes back through the queue.
class UnaryTransport {
 public:
  virtual ~UnaryTransport() = default;
  virtual void Finish(const Status& status, const inference::v1::GenerateResponse& response) = 0;
  virtual void Cancel() = 0;  // after Finish: resets the stream
};

class UnaryCall : public GenerateCall {
 public:
  UnaryCall(CallKey key, FrontendState* state, InferenceEngine* engine, std::unique_ptr<UnaryTransport> transport)
      : GenerateCall(key, state, engine), transport_(std::move(transport)) {}

  void Flush(TimePoint now) override;

 private:
  TimePoint TransportTimer() const override { return kNever; }
  void CancelTransport() override { transport_->Cancel(); }

  const std::unique_ptr<UnaryTransport> transport_;
};

}  // namespace altiplano
