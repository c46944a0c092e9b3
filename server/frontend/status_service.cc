#include "server/frontend/status_service.h"

#include "server/base/log.h"
#include "server/base/strings.h"
#include "server/frontend/proto_mapping.h"
#include "server/frontend/unary.h"
#include "server/frontend/validate.h"

namespace altiplano {

namespace v1 = inference::v1;

namespace {

constexpr Duration kDefaultInterval = std::chrono::seconds(1);
constexpr Duration kLeastInterval = std::chrono::milliseconds(100);
constexpr size_t kMaxReasonBytes = 256;

void FillStepCost(const StepCost& cost, v1::StepCost* out) {
  out->set_step_us(cost.step_us);
  out->set_weights_us(cost.weights_us);
  out->set_token_us(cost.token_us);
  out->set_sequence_us(cost.sequence_us);
  out->set_kv_token_us(cost.kv_token_us);
  out->set_attention_us(cost.attention_us);
}

void FillDevices(const std::vector<DeviceMemory>& devices, v1::GetServerInfoResponse* out) {
  for (const DeviceMemory& one : devices) {
    v1::DeviceMemory* device = out->add_devices();
    device->set_device(one.device);
    device->set_replica(static_cast<uint32_t>(one.replica));
    for (const int rank : one.ranks) device->add_ranks(static_cast<uint32_t>(rank));
    device->set_weight_bytes(one.weight_bytes);
    device->set_activation_bytes(one.activation_bytes);
    device->set_kv_cache_bytes(one.kv_cache_bytes);
    device->set_free_bytes(one.free_bytes);
    device->set_total_bytes(one.total_bytes);
  }
}

void FillTenants(const EngineLoad& load, v1::Load* out) {
  for (size_t i = 0; i < load.tenants->size(); ++i) {
    const TenantOptions& options = (*load.tenants)[i];
    const TenantLoad& one = load.scheduler.tenants[i];
    v1::TenantLoad* tenant = out->add_tenants();
    tenant->set_name(options.name);
    tenant->set_weight(static_cast<uint32_t>(options.weight));
    tenant->set_running_sequences(static_cast<uint32_t>(one.running_sequences));
    tenant->set_waiting_requests(static_cast<uint32_t>(one.waiting_requests));
    tenant->set_waiting_tokens(static_cast<uint64_t>(one.waiting_tokens));
    tenant->set_prompt_tokens(one.prompt_tokens);
    tenant->set_generated_tokens(one.generated_tokens);
    tenant->set_refused_requests(load.refused[i]);
  }
}

void FillLoad(const FrontendState& state, const InferenceEngine& engine, v1::Load* out) {
  const std::vector<EngineLoad> loads = engine.loads();
  const EngineLoad load = Total(loads);
  out->set_running_requests(static_cast<uint32_t>(load.scheduler.running_requests));
  out->set_waiting_requests(static_cast<uint32_t>(load.scheduler.waiting_requests));
  out->set_kv_blocks_total(static_cast<uint64_t>(load.scheduler.blocks_total));
  out->set_kv_blocks_used(static_cast<uint64_t>(load.scheduler.blocks_used));
  out->set_kv_blocks_cached(static_cast<uint64_t>(load.scheduler.blocks_cached));
  out->set_kv_block_tokens(static_cast<uint32_t>(load.block_size));
  out->set_steps(load.scheduler.steps);
  out->set_tokens_per_second(load.tokens_per_second);
  out->set_draining(load.draining || !state.accepting());
  out->set_late_tokens(load.scheduler.late_tokens);
  *out->mutable_late_total() = DurationToProto(load.scheduler.late_total);
  *out->mutable_late_most() = DurationToProto(load.scheduler.late_most);
  FillStepCost(load.scheduler.step_cost, out->mutable_step_cost());
  out->set_measured_steps(load.scheduler.measured_steps);
  out->set_step_cost_error(load.scheduler.step_cost_error);
  out->set_targets_met(load.scheduler.targets_met);
  out->set_targets_missed(load.scheduler.targets_missed);
  out->set_hopeless_requests(load.scheduler.hopeless);
  FillTenants(load, out);
  for (const EngineLoad& one : loads) {
    v1::ReplicaLoad* replica = out->add_replicas();
    replica->set_healthy(one.healthy);
    replica->set_running_requests(static_cast<uint32_t>(one.scheduler.running_requests));
    replica->set_waiting_requests(static_cast<uint32_t>(one.scheduler.waiting_requests));
    replica->set_kv_blocks_total(static_cast<uint64_t>(one.scheduler.blocks_total));
    replica->set_kv_blocks_used(static_cast<uint64_t>(one.scheduler.blocks_used));
    replica->set_kv_blocks_cached(static_cast<uint64_t>(one.scheduler.blocks_cached));
    replica->set_steps(one.scheduler.steps);
    replica->set_tokens_per_second(one.tokens_per_second);
  }
}

Status CancelledByAdmin(const std::string& reason) {
  ErrorDetail detail;
  detail.reason = "CANCELLED_BY_ADMIN";
  std::string why = Shorten(reason, kMaxReasonBytes);
  if (!why.empty()) detail.metadata = {{"reason", why}};
  return Status(Code::kAborted, StrCat("the request was cancelled by an operator", why.empty() ? "" : ": ", why),
                std::move(detail));
}

}  // namespace

grpc::ServerUnaryReactor* StatusService::GetServerInfo(grpc::CallbackServerContext* context,
                                                       const grpc::ByteBuffer* request, grpc::ByteBuffer* response) {
  return AnswerUnary<v1::GetServerInfoRequest, v1::GetServerInfoResponse>(
      context, request, response, [this](const v1::GetServerInfoRequest&, v1::GetServerInfoResponse* out) {
        auto backend = state_->backend();
        out->set_version(state_->options.version);
        out->set_commit(state_->options.commit);
        bool known = backend != nullptr && !backend->device.empty();
        out->set_device(known ? backend->device : state_->options.device);
        if (backend != nullptr) FillDevices(backend->model.devices, out);
        *out->mutable_uptime() = DurationToProto(Clock::Real().Now() - state_->start);
        return OkStatus();
      });
}

grpc::ServerUnaryReactor* StatusService::GetLoad(grpc::CallbackServerContext* context, const grpc::ByteBuffer* request,
                                                 grpc::ByteBuffer* response) {
  return AnswerUnary<v1::GetLoadRequest, v1::Load>(context, request, response,
                                                   [this](const v1::GetLoadRequest&, v1::Load* out) {
                                                     auto backend = state_->Loaded();
                                                     if (!backend.ok()) return backend.status();
                                                     FillLoad(*state_, *(*backend)->engine, out);
                                                     return OkStatus();
                                                   });
}

grpc::ServerWriteReactor<grpc::ByteBuffer>* StatusService::WatchLoad(grpc::CallbackServerContext* context,
                                                                     const grpc::ByteBuffer* request) {
  v1::WatchLoadRequest in;
  grpc::ByteBuffer bytes = *request;
  if (Status status = ParseMessage(&bytes, &in); !status.ok()) return new RefusedStream(context, status);
  Duration interval = kDefaultInterval;
  if (in.has_interval()) {
    auto asked = ToDuration(DurationFromProto(in.interval()));
    if (!asked || *asked < kLeastInterval) {
      return new RefusedStream(context, InvalidField("interval", "must be in [100 ms, ten years]"));
    }
    interval = *asked;
  }
  auto backend = state_->Loaded();
  if (!backend.ok()) return new RefusedStream(context, backend.status());
  return new WatchReactor(hub_,
                          [this, backend = *backend, interval,
                           due = TimePoint{}](TimePoint now) mutable -> std::optional<grpc::ByteBuffer> {
                            if (now < due) return std::nullopt;
                            due = now + interval;
                            v1::Load message;
                            FillLoad(*state_, *backend->engine, &message);
                            grpc::ByteBuffer out;
                            SerializeMessage(message, &out);
                            return out;
                          });
}

grpc::ServerUnaryReactor* StatusService::CancelRequests(grpc::CallbackServerContext* context,
                                                        const grpc::ByteBuffer* request, grpc::ByteBuffer* response) {
  return AnswerUnary<v1::CancelRequestsRequest, v1::CancelRequestsResponse>(
      context, request, response, [this](const v1::CancelRequestsRequest& in, v1::CancelRequestsResponse* out) {
        Status why = CancelledByAdmin(in.reason());
        for (const std::string& id : in.request_ids()) {
          auto key = state_->registry.Find(id);
          if (!key) continue;
          state_->egress.queue()->Post(*key, Killed{why});
          out->add_cancelled_request_ids(id);
          log::Info("request cancelled by an operator", {{"request_id", id}});
        }
        return OkStatus();
      });
}

}  // namespace altiplano
