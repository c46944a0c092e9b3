#include "server/frontend/inference_service.h"

#include <chrono>
#include <memory>
#include <utility>

#include "server/base/strings.h"
#include "server/frontend/error_mapping.h"
#include "server/frontend/generate_reactors.h"
#include "server/frontend/prepare.h"
#include "server/frontend/proto_mapping.h"
#include "server/frontend/random_id.h"
#include "server/frontend/unary.h"
#include "server/frontend/validate.h"

namespace altiplano {

namespace v1 = inference::v1;

namespace {

// gRPC's deadline is on the wall clock; none is centuries away.
TimePoint ClientDeadline(const grpc::CallbackServerContext& context) {
  constexpr auto kCenturies = std::chrono::hours(24 * 365 * 100);
  auto left = context.deadline() - std::chrono::system_clock::now();
  if (left > kCenturies) return kNever;
  return Clock::Real().Now() + std::chrono::duration_cast<Duration>(left);
}

Status TextPoolFull() {
  ErrorDetail detail;
  detail.reason = "QUEUE_FULL";
  detail.retry_after = std::chrono::seconds(1);
  return Status(Code::kResourceExhausted, "too many requests wait to be tokenized", std::move(detail));
}

Status DuplicateId(const std::string& id) {
  ErrorDetail detail;
  detail.reason = "DUPLICATE_REQUEST_ID";
  detail.metadata = {{"request_id", id}};
  return Status(Code::kAlreadyExists, StrCat("a request with the id \"", id, "\" is live"), std::move(detail));
}

// What the text pool needs of one generation.
struct Arrival {
  CallKey key = 0;
  FrontendState* state = nullptr;
  std::shared_ptr<const Backend> backend;
  grpc::ByteBuffer bytes;
  bool stream = false;
  TimePoint now{};
  TimePoint client_deadline = kNever;
};

StatusOr<GenerateInput> Parse(Arrival* arrival) {
  if (!arrival->stream) {
    v1::GenerateRequest request;
    RETURN_IF_ERROR(ParseMessage(&arrival->bytes, &request));
    return InputFromProto(std::move(request));
  }
  v1::StreamGenerateRequest request;
  RETURN_IF_ERROR(ParseMessage(&arrival->bytes, &request));
  GenerateInput input = InputFromProto(std::move(*request.mutable_request()));
  DurationInput interval = DurationFromProto(request.min_flush_interval());
  if (interval.seconds != 0 || interval.nanos != 0) input.min_flush_interval = interval;
  return input;
}

// Text pool. The result goes to the egress thread whatever it is.
Prepared PrepareArrival(Arrival* arrival) {
  const Backend& backend = *arrival->backend;
  const FrontendLimits& limits = arrival->state->options.limits;
  auto refused = [](std::string id, Status status) { return Prepared{std::move(id), std::move(status), nullptr}; };
  auto input = Parse(arrival);
  if (!input.ok()) return refused(RandomUuid(), input.status());
  const bool chosen = IsRequestId(input->request_id, limits);
  std::string id = chosen ? input->request_id : RandomUuid();
  if (Status status = ValidateInput(*input, backend.model, limits); !status.ok()) return refused(id, status);
  input->request_id = id;
  if (!arrival->state->registry.Add(id, arrival->key)) return refused(id, DuplicateId(id));
  auto prepared = Prepare(std::move(*input), {.model = backend.model,
                                              .limits = limits,
                                              .max_servable_tokens = backend.engine->max_servable_tokens(),
                                              .now = arrival->now,
                                              .client_deadline = arrival->client_deadline});
  return Prepared{std::move(id), std::move(prepared), backend.model.tokenizer};
}

void SendToTextPool(Arrival arrival) {
  FrontendState* state = arrival.state;
  CallKey key = arrival.key;
  auto bytes = static_cast<int64_t>(arrival.bytes.Length());
  auto shared = std::make_shared<Arrival>(std::move(arrival));
  bool taken = state->text_pool.Run(
      [shared] { shared->state->egress.queue()->Post(shared->key, PrepareArrival(shared.get())); }, bytes);
  if (!taken) state->egress.queue()->Post(key, Prepared{RandomUuid(), TextPoolFull(), nullptr});
}

// Tokenize and Detokenize: `handle(Request, const ServedModel&, Response*)` runs on the text pool.
template <typename Request, typename Response, typename Handle>
grpc::ServerUnaryReactor* OnTextPool(FrontendState* state, grpc::CallbackServerContext* context,
                                     const grpc::ByteBuffer* in, grpc::ByteBuffer* out, Handle handle) {
  auto backend = state->Enter();
  if (!backend.ok()) return FinishUnary(context, backend.status());
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  auto bytes = std::make_shared<grpc::ByteBuffer>(*in);
  bool taken = state->text_pool.Run(
      [=, model = *backend] {
        Request request;
        Response response;
        Status status = ParseMessage(bytes.get(), &request);
        if (status.ok()) status = ValidateModelName(request.model(), model->model);
        if (status.ok()) status = handle(std::move(request), model->model, &response);
        if (status.ok()) SerializeMessage(response, out);
        state->Leave();
        reactor->Finish(FinalStatus(status, context));
      },
      static_cast<int64_t>(bytes->Length()));
  if (!taken) {
    state->Leave();
    reactor->Finish(FinalStatus(TextPoolFull(), context));
  }
  return reactor;
}

void FillTokens(const std::vector<TokenId>& ids, v1::TokenizeResponse* response) {
  response->mutable_token_ids()->Assign(ids.begin(), ids.end());
  response->set_count(static_cast<uint32_t>(ids.size()));
}

Status TokenizeNow(v1::TokenizeRequest&& request, const ServedModel& model, const FrontendLimits& limits,
                   v1::TokenizeResponse* response) {
  switch (request.input_case()) {
    case v1::TokenizeRequest::kText:
      RETURN_IF_ERROR(ValidateText(request.text(), "text", limits));
      FillTokens(EncodeText(request.text(), request.omit_bos(), *model.tokenizer), response);
      return OkStatus();
    case v1::TokenizeRequest::kChat: {
      if (request.omit_bos()) return InvalidField("omit_bos", "goes with text only: a chat format has its own tokens");
      ChatInput chat = ChatFromProto(std::move(*request.mutable_chat()));
      RETURN_IF_ERROR(ValidateChat(chat, "chat", model, limits));
      ASSIGN_OR_RETURN(RenderedPrompt rendered, RenderChat(std::move(chat), model));
      FillTokens(rendered.ids, response);
      response->set_rendered(std::move(rendered.text));
      return OkStatus();
    }
    case v1::TokenizeRequest::INPUT_NOT_SET:
      break;
  }
  return InvalidField("input", "is missing: text or chat is needed");
}

Status DetokenizeNow(const v1::DetokenizeRequest& request, const ServedModel& model, v1::DetokenizeResponse* response) {
  std::vector<uint32_t> ids(request.token_ids().begin(), request.token_ids().end());
  RETURN_IF_ERROR(ValidateTokenIds(ids, "token_ids", model.vocab_size));
  response->set_text(DecodeTokens({ids.begin(), ids.end()}, request.keep_special_tokens(), model.tokenizer));
  return OkStatus();
}

}  // namespace

grpc::ServerUnaryReactor* InferenceService::Generate(grpc::CallbackServerContext* context,
                                                     const grpc::ByteBuffer* request, grpc::ByteBuffer* response) {
  auto backend = state_->Enter();
  if (!backend.ok()) return FinishUnary(context, backend.status());
  CallKey key = state_->egress.NewKey();
  const auto& queue = state_->egress.queue();
  auto reactor = std::make_unique<UnaryReactor>(key, queue, context, response);
  UnaryReactor* result = reactor.get();
  queue->Post(key, Started{std::make_unique<UnaryCall>(key, state_, (*backend)->engine, std::move(reactor))});
  SendToTextPool({.key = key,
                  .state = state_,
                  .backend = *backend,
                  .bytes = *request,
                  .stream = false,
                  .now = Clock::Real().Now(),
                  .client_deadline = ClientDeadline(*context)});
  return result;
}

grpc::ServerWriteReactor<grpc::ByteBuffer>* InferenceService::StreamGenerate(grpc::CallbackServerContext* context,
                                                                             const grpc::ByteBuffer* request) {
  auto backend = state_->Enter();
  if (!backend.ok()) return new RefusedStream(context, backend.status());
  CallKey key = state_->egress.NewKey();
  const auto& queue = state_->egress.queue();
  auto reactor = std::make_unique<StreamReactor>(key, queue, context);
  StreamReactor* result = reactor.get();
  queue->Post(key, Started{std::make_unique<StreamCall>(key, state_, (*backend)->engine, std::move(reactor))});
  SendToTextPool({.key = key,
                  .state = state_,
                  .backend = *backend,
                  .bytes = *request,
                  .stream = true,
                  .now = Clock::Real().Now(),
                  .client_deadline = ClientDeadline(*context)});
  return result;
}

grpc::ServerUnaryReactor* InferenceService::Tokenize(grpc::CallbackServerContext* context,
                                                     const grpc::ByteBuffer* request, grpc::ByteBuffer* response) {
  return OnTextPool<v1::TokenizeRequest, v1::TokenizeResponse>(
      state_, context, request, response,
      [limits = &state_->options.limits](v1::TokenizeRequest&& in, const ServedModel& model,
                                         v1::TokenizeResponse* out) {
        return TokenizeNow(std::move(in), model, *limits, out);
      });
}

grpc::ServerUnaryReactor* InferenceService::Detokenize(grpc::CallbackServerContext* context,
                                                       const grpc::ByteBuffer* request, grpc::ByteBuffer* response) {
  return OnTextPool<v1::DetokenizeRequest, v1::DetokenizeResponse>(
      state_, context, request, response,
      [](v1::DetokenizeRequest&& in, const ServedModel& model, v1::DetokenizeResponse* out) {
        return DetokenizeNow(in, model, out);
      });
}

}  // namespace altiplano
