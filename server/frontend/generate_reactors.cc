#include "server/frontend/generate_reactors.h"

#include "server/frontend/error_mapping.h"
#include "server/frontend/wire.h"

namespace altiplano {

grpc::Status CallContext::FinalStatus(const Status& status) {
  std::lock_guard lock(mutex_);
  return altiplano::FinalStatus(status, context_);
}

void CallContext::TryCancel() {
  std::lock_guard lock(mutex_);
  if (context_ != nullptr) context_->TryCancel();
}

void CallContext::Done() {
  std::lock_guard lock(mutex_);
  context_ = nullptr;
}

void StreamReactor::Write(const inference::v1::StreamGenerateResponse& message) {
  SerializeMessage(message, &outgoing_);
  StartWrite(&outgoing_);
}

void StreamReactor::WriteAndFinish(const inference::v1::StreamGenerateResponse& message) {
  SerializeMessage(message, &outgoing_);
  StartWriteAndFinish(&outgoing_, grpc::WriteOptions(), grpc::Status::OK);
}

void StreamReactor::Finish(const Status& status) {
  grpc::ServerWriteReactor<grpc::ByteBuffer>::Finish(context_.FinalStatus(status));
}

void StreamReactor::OnWriteDone(bool ok) {
  queue_->Post(key_, WriteDone{ok});
}

void StreamReactor::OnCancel() {
  queue_->Post(key_, ClientGone{});
}

void StreamReactor::OnDone() {
  context_.Done();
  // The egress thread may delete this as soon as it has the notice.
  std::shared_ptr<EgressQueue> queue = queue_;
  queue->Post(key_, CallDone{});
}

void UnaryReactor::Finish(const Status& status, const inference::v1::GenerateResponse& response) {
  if (status.ok()) SerializeMessage(response, response_);
  grpc::ServerUnaryReactor::Finish(context_.FinalStatus(status));
}

void UnaryReactor::OnCancel() {
  queue_->Post(key_, ClientGone{});
}

void UnaryReactor::OnDone() {
  context_.Done();
  std::shared_ptr<EgressQueue> queue = queue_;
  queue->Post(key_, CallDone{});
}

}  // namespace altiplano
