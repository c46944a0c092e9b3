#include "server/frontend/admin_service.h"

#include <algorithm>
#include <string>
#include <utility>

#include "server/base/log.h"
#include "server/frontend/proto_mapping.h"
#include "server/frontend/unary.h"
#include "server/frontend/validate.h"

namespace altiplano {

namespace v1 = inference::v1;

namespace {

constexpr size_t kChunkBytes = 256 << 10;

// One flight record, in chunks; deletes itself after its end.
class FlightRecordStream final : public grpc::ServerWriteReactor<grpc::ByteBuffer> {
 public:
  explicit FlightRecordStream(grpc::CallbackServerContext* context) : context_(context) {}

  void Begin(StatusOr<std::string> record) {
    if (!record.ok()) return Finish(FinalStatus(record.status(), context_));
    record_ = std::move(*record);
    WriteNext();
  }
  void OnWriteDone(bool ok) override { ok ? WriteNext() : Finish(grpc::Status::CANCELLED); }
  void OnDone() override { delete this; }

 private:
  void WriteNext() {
    if (sent_ == record_.size()) return Finish(grpc::Status::OK);
    v1::DumpFlightRecordResponse response;
    response.set_chunk(record_.substr(sent_, kChunkBytes));
    sent_ += response.chunk().size();
    SerializeMessage(response, &bytes_);
    StartWrite(&bytes_);
  }

  grpc::CallbackServerContext* const context_;
  std::string record_;
  size_t sent_ = 0;
  grpc::ByteBuffer bytes_;  // of the write in flight
};

}  // namespace

grpc::ServerUnaryReactor* AdminService::Drain(grpc::CallbackServerContext* context, const grpc::ByteBuffer* request,
                                              grpc::ByteBuffer* response) {
  return AnswerUnary<v1::DrainRequest, v1::DrainResponse>(
      context, request, response, [this](const v1::DrainRequest& in, v1::DrainResponse* out) {
        Duration grace = state_->options.drain_grace;
        if (in.has_grace()) {
          auto asked = ToDuration(DurationFromProto(in.grace()));
          bool zero = in.grace().seconds() == 0 && in.grace().nanos() == 0;
          if (!asked && !zero) return InvalidField("grace", "must be in [0, ten years]");
          grace = asked.value_or(Duration(0));
        }
        log::Info("draining, as an operator asks", {{"grace_s", Seconds(grace)}});
        actions_.drain(grace);
        out->set_live_requests(static_cast<uint32_t>(state_->live_requests()));
        return OkStatus();
      });
}

grpc::ServerUnaryReactor* AdminService::Resume(grpc::CallbackServerContext* context, const grpc::ByteBuffer* request,
                                               grpc::ByteBuffer* response) {
  return AnswerUnary<v1::ResumeRequest, v1::ResumeResponse>(context, request, response,
                                                            [this](const v1::ResumeRequest&, v1::ResumeResponse*) {
                                                              log::Info("resuming, as an operator asks");
                                                              return actions_.resume();
                                                            });
}

// The engine answers between two steps, so this waits elsewhere.
grpc::ServerUnaryReactor* AdminService::ResetPrefixCache(grpc::CallbackServerContext* context, const grpc::ByteBuffer*,
                                                         grpc::ByteBuffer* response) {
  auto backend = state_->Loaded();
  if (!backend.ok()) return FinishUnary(context, backend.status());
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  bool taken = state_->admin_pool.Run([=, engine = (*backend)->engine] {
    v1::ResetPrefixCacheResponse out;
    out.set_freed_blocks(static_cast<uint64_t>(engine->ResetPrefixCache()));
    log::Info("prefix cache emptied, as an operator asks", {{"freed_blocks", out.freed_blocks()}});
    SerializeMessage(out, response);
    reactor->Finish(grpc::Status::OK);
  });
  if (!taken) {
    reactor->Finish(FinalStatus(Status(Code::kResourceExhausted, "too many admin calls wait for the engine"), context));
  }
  return reactor;
}

grpc::ServerUnaryReactor* AdminService::SetLogLevel(grpc::CallbackServerContext* context,
                                                    const grpc::ByteBuffer* request, grpc::ByteBuffer* response) {
  return AnswerUnary<v1::SetLogLevelRequest, v1::SetLogLevelResponse>(
      context, request, response, [](const v1::SetLogLevelRequest& in, v1::SetLogLevelResponse*) {
        if (!log::ParseLevel(in.level()).ok()) {
          return InvalidField("level", "must be one of debug, info, warn, error, off");
        }
        // Before or after: as long as the more talkative level holds.
        const auto tell = [&] { log::Info("log level set, as an operator asks", {{"level", in.level()}}); };
        const bool told = log::Enabled(log::Level::kInfo);
        if (told) tell();
        RETURN_IF_ERROR(log::SetLevel(in.level()));
        if (!told) tell();
        return OkStatus();
      });
}

// Copying and hashing tens of megabytes is nothing for gRPC's threads.
grpc::ServerWriteReactor<grpc::ByteBuffer>* AdminService::DumpFlightRecord(grpc::CallbackServerContext* context,
                                                                           const grpc::ByteBuffer* request) {
  v1::DumpFlightRecordRequest in;
  grpc::ByteBuffer bytes = *request;
  if (Status status = ParseMessage(&bytes, &in); !status.ok()) return new RefusedStream(context, status);
  auto backend = state_->Loaded();
  if (!backend.ok()) return new RefusedStream(context, backend.status());
  auto* stream = new FlightRecordStream(context);
  bool taken = state_->admin_pool.Run([stream, engine = (*backend)->engine, replica = in.replica()] {
    stream->Begin(engine->FlightRecord(static_cast<int>(std::min<uint32_t>(replica, INT32_MAX))));
  });
  if (!taken) stream->Begin(Status(Code::kResourceExhausted, "too many admin calls wait for the engine"));
  return stream;
}

}  // namespace altiplano
