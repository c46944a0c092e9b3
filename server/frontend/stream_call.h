// StreamCall: StreamGenerate's way of answering. One write in flight; what comes meanwhile is merged into the next
// message. A client that leaves too much unread, or one message unread too long, is cut off.
#pragma once

#include <memory>

#include "server/frontend/generate_call.h"

namespace altiplano {

// What StreamCall needs of gRPC. Egress thread; WriteDone and CallDone notices come back through the queue.
class StreamTransport {
 public:
  virtual ~StreamTransport() = default;
  virtual void Write(const inference::v1::StreamGenerateResponse& message) = 0;  // then one WriteDone
  virtual void WriteAndFinish(const inference::v1::StreamGenerateResponse& message) = 0;
  virtual void Finish(const Status& status) = 0;  // may overtake a Write that is still in flight
  virtual void Cancel() = 0;                      // after Finish: resets the stream
};

class StreamCall : public GenerateCall {
 public:
  StreamCall(CallKey key, FrontendState* state, InferenceEngine* engine, std::unique_ptr<StreamTransport> transport)
      : GenerateCall(key, state, engine), transport_(std::move(transport)) {}

  void Flush(TimePoint now) override;

 private:
  void OnWriteDone(bool ok) override;
  TimePoint TransportTimer() const override;
  void CancelTransport() override { transport_->Cancel(); }

  // The next message, or false when nothing is to be sent now.
  bool FillNext(TimePoint now);
  void FillStarted();
  bool FillDeltas(TimePoint now);
  void Complete(TimePoint now);
  bool AnythingDue();
  int64_t PendingBytes();
  bool TooSlow(TimePoint now);

  const std::unique_ptr<StreamTransport> transport_;
  inference::v1::StreamGenerateResponse message_;
  uint64_t sequence_number_ = 0;
  bool started_ = false;
  bool in_flight_ = false;
  bool waits_ = false;  // something is due, but min_flush_interval holds it back
  TimePoint write_started_{};
  TimePoint next_deltas_{};
};

}  // namespace altiplano
