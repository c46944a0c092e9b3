// A GenerateRequest as it comes off the wire: refused with an error that gRPC can carry, or within every limit that the
// engine relies on.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "altiplano/inference/v1/inference.pb.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
#include "server/base/check.h"
#include "server/base/strings.h"
#include "server/frontend/error_mapping.h"
#include "server/frontend/prepare.h"
#include "server/frontend/proto_mapping.h"
#include "server/frontend/validate.h"
#include "tests/fuzz/byte_tokenizer.h"

namespace altiplano {
namespace {

constexpr int32_t kServable = 600;
constexpr TimePoint kNow = TimePoint{} + std::chrono::hours(1);

// Small enough that a small message crosses each of them.
FrontendLimits Limits() {
  FrontendLimits limits;
  limits.max_prompt_bytes = 400;
  limits.max_chat_messages = 4;
  limits.max_tools = 2;
  limits.max_sequences = 4;
  limits.max_stop_strings = 3;
  limits.max_stop_string_bytes = 8;
  limits.max_stop_ids = 3;
  limits.max_logit_bias = 3;
  limits.max_top_logprobs = 5;
  limits.max_request_id_bytes = 16;
  limits.max_tenant_bytes = 8;
  limits.max_cache_salt_bytes = 8;
  return limits;
}

ServedModel Model() {
  ServedModel model;
  model.name = "m";
  model.max_context = 700;
  model.tokenizer = std::make_shared<ByteTokenizer>();
  model.vocab_size = model.tokenizer->vocab_size();
  model.chat_format = ChatFormat::FromName("llama3.1").value();
  return model;
}

template <typename T>
bool Within(T value, T low, T high) {
  return value >= low && value <= high;  // false for NaN
}

void CheckError(const Status& status) {
  CHECK(status.code() == Code::kInvalidArgument || status.code() == Code::kNotFound ||
        status.code() == Code::kUnimplemented || status.code() == Code::kFailedPrecondition);
  const grpc::Status sent = ToGrpcStatus(status);
  google::rpc::Status details;
  google::rpc::ErrorInfo info;
  CHECK(details.ParseFromString(sent.error_details()) && details.message() == sent.error_message());
  CHECK(details.details_size() >= 1 && details.details(0).UnpackTo(&info) && !info.reason().empty());
  CHECK(!sent.error_message().empty() && IsValidUtf8(sent.error_message()));
  CHECK(sent.error_message().size() + sent.error_details().size() <= 6 << 10);  // of the 8 KiB that clients take
}

void CheckIds(const std::vector<TokenId>& ids, int32_t vocab_size) {
  for (const TokenId id : ids) CHECK(Within(id, 0, vocab_size - 1));
}

void CheckSampling(const SamplingParams& sampling, const ServedModel& model, const FrontendLimits& limits) {
  CHECK(Within(sampling.temperature, 0.0F, 100.0F));
  CHECK(sampling.temperature == 0 || sampling.temperature >= 1e-4F);
  CHECK(Within(sampling.top_k, 0, model.vocab_size - 1));
  CHECK(Within(sampling.top_p, 0.0F, 1.0F) && sampling.top_p > 0);
  CHECK(Within(sampling.min_p, 0.0F, 1.0F));
  CHECK(Within(sampling.presence_penalty, -2.0F, 2.0F) && Within(sampling.frequency_penalty, -2.0F, 2.0F));
  CHECK(Within(sampling.repetition_penalty, 0.01F, 100.0F));
  CHECK(sampling.logit_bias.size() <= static_cast<size_t>(limits.max_logit_bias));
  TokenId previous = -1;
  for (const auto& [id, bias] : sampling.logit_bias) {
    CHECK(id > previous && id < model.vocab_size && Within(bias, -100.0F, 100.0F));
    previous = id;
  }
  CHECK(Within(sampling.top_logprobs, -1, limits.max_top_logprobs));
  CHECK(Within(sampling.prompt_top_logprobs, -1, limits.max_top_logprobs));
}

void CheckRequest(const Request& request, const ServedModel& model, const FrontendLimits& limits) {
  const auto prompt = static_cast<int32_t>(request.prompt.size());
  CHECK(prompt >= 1 && request.stop.max_new_tokens >= 1);
  CHECK(prompt + request.stop.max_new_tokens <= std::min(model.max_context, kServable));
  CHECK(Within(request.stop.min_new_tokens, 0, request.stop.max_new_tokens));
  CheckIds(request.prompt, model.vocab_size);
  CheckIds(request.stop.token_ids, model.vocab_size);
  CHECK(request.stop.token_ids.size() <= static_cast<size_t>(limits.max_stop_ids));
  CHECK(Within(request.num_sequences, 1, limits.max_sequences));
  CHECK(request.id.size() <= static_cast<size_t>(limits.max_request_id_bytes));
  CHECK(request.tenant.size() <= static_cast<size_t>(limits.max_tenant_bytes));
  CHECK(request.cache_salt.size() <= static_cast<size_t>(limits.max_cache_salt_bytes));
  for (const std::string* name : {&request.id, &request.tenant}) {
    CHECK(std::all_of(name->begin(), name->end(), [](char c) { return c > ' ' && c <= '~'; }));
  }
  CHECK(request.queue_deadline > kNow && request.queue_deadline <= kNow + limits.max_queue_wait);
  CHECK(request.ttft_target >= Duration(0));
  CheckSampling(request.sampling, model, limits);
}

void CheckPrepared(const PreparedRequest& prepared, const ServedModel& model, const FrontendLimits& limits) {
  CheckRequest(*prepared.request, model, limits);
  CHECK(prepared.stop_strings.size() <= static_cast<size_t>(limits.max_stop_strings));
  for (const std::string& stop : prepared.stop_strings) {
    CHECK(Within<size_t>(stop.size(), 1, static_cast<size_t>(limits.max_stop_string_bytes)) && IsValidUtf8(stop));
  }
  CHECK(IsValidUtf8(prepared.echo));
  CHECK(prepared.echo.empty() || prepared.text);
  CHECK(prepared.time_limit >= Duration(0));
  CHECK(prepared.tools == !prepared.tool_names.empty());
}

void Take(const uint8_t* data, size_t size) {
  static const FrontendLimits limits = Limits();
  static const ServedModel model = Model();
  inference::v1::GenerateRequest message;
  if (!message.ParseFromArray(data, static_cast<int>(size))) return;
  GenerateInput input = InputFromProto(std::move(message));
  if (const Status status = ValidateInput(input, model, limits); !status.ok()) return CheckError(status);
  const StatusOr<PreparedRequest> prepared = Prepare(
      std::move(input),
      {.model = model, .limits = limits, .max_servable_tokens = kServable, .now = kNow, .client_deadline = kNever});
  if (!prepared.ok()) return CheckError(prepared.status());
  CheckPrepared(*prepared, model, limits);
}

}  // namespace
}  // namespace altiplano

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  altiplano::Take(data, size);
  return 0;
}
