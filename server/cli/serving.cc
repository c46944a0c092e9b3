#include "server/cli/serving.h"

#include <algorithm>
#include <utility>

#include "server/base/log.h"
#include "server/cli/units.h"
#include "server/cli/version.h"
#include "server/frontend/server.h"

namespace altiplano::cli {

namespace {

int64_t Size(const std::string& text) {
  return static_cast<int64_t>(CheckedBytes(text));
}
int32_t SmallSize(const std::string& text) {
  return static_cast<int32_t>(std::min<int64_t>(Size(text), INT32_MAX));
}

ServedModel Describe(const LoadedModel& model, const config::v1::ServerConfig& settings) {
  const ModelConfig& config = model.checkpoint->config();
  const GenerationDefaults& generation = model.checkpoint->generation_defaults();
  ServedModel served;
  served.name = model.name;
  served.architecture = config.architecture;
  served.parameters = config.parameters();
  served.max_context = model.max_context;
  served.vocab_size = static_cast<int32_t>(config.vocab);
  served.weight_dtype = model.dtype;
  served.kv_dtype = model.dtype;
  served.tensor_parallel = model.tensor_parallel;
  served.pipeline_parallel = model.pipeline_parallel;
  served.eos_ids = generation.eos_ids;
  served.defaults.temperature = generation.temperature;
  served.defaults.top_p = generation.top_p;
  served.defaults.min_p = generation.min_p;
  served.defaults.top_k = generation.top_k;
  served.defaults.repetition_penalty = generation.repetition_penalty;
  served.tokenizer = model.text.tokenizer;
  served.chat_format = model.text.chat_format;
  served.devices = model.devices;
  if (settings.kv().prefix_cache()) served.features.emplace_back("prefix_cache");
  return served;
}

}  // namespace

FrontendLimits LimitsOf(const config::v1::Limits& config) {
  FrontendLimits limits;
  limits.max_message_bytes = SmallSize(config.message_size());
  limits.max_streams_per_connection = static_cast<int32_t>(config.streams_per_connection());
  limits.keepalive_time = CheckedDuration(config.keepalive_time());
  limits.keepalive_timeout = CheckedDuration(config.keepalive_timeout());
  limits.min_client_ping_interval = CheckedDuration(config.min_client_ping_interval());
  limits.max_prompt_bytes = Size(config.prompt_size());
  limits.max_chat_messages = static_cast<int32_t>(config.chat_messages());
  limits.max_tools = static_cast<int32_t>(config.tools());
  limits.max_sequences = static_cast<int32_t>(config.sequences());
  limits.max_stop_strings = static_cast<int32_t>(config.stop_strings());
  limits.max_stop_string_bytes = SmallSize(config.stop_string_size());
  limits.max_stop_ids = static_cast<int32_t>(config.stop_ids());
  limits.max_logit_bias = static_cast<int32_t>(config.logit_bias());
  limits.max_top_logprobs = static_cast<int32_t>(config.top_logprobs());
  limits.max_request_id_bytes = SmallSize(config.request_id_size());
  limits.max_tenant_bytes = SmallSize(config.tenant_size());
  limits.max_cache_salt_bytes = SmallSize(config.cache_salt_size());
  limits.max_queue_wait = CheckedDuration(config.queue_wait());
  limits.max_unprepared_requests = static_cast<int32_t>(config.unprepared_requests());
  limits.max_unprepared_bytes = Size(config.unprepared_size());
  limits.max_unread_bytes = Size(config.unread_size());
  limits.max_unread_time = CheckedDuration(config.unread_time());
  return limits;
}

void InitLog(const config::v1::Log& config) {
  log::Format format = config.format() == "json"   ? log::Format::kJson
                       : config.format() == "text" ? log::Format::kText
                                                   : log::Format::kAuto;
  log::Init(log::ParseLevel(config.level()).value(), format);
}

class Serving::Impl {
 public:
  config::v1::ServerConfig config;
  LoadedModel model;               // outlives the server: it goes last
  std::unique_ptr<Server> server;  // not null
};

Serving::Serving(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Serving::~Serving() {
  Stop();
}

StatusOr<std::unique_ptr<Serving>> Serving::Listen(const config::v1::ServerConfig& config) {
  ServerOptions options;
  options.listen = config.listen();
  options.admin_listen = config.admin_listen();
  options.limits = LimitsOf(config.limits());
  options.text_threads = static_cast<int32_t>(config.threads().text());
  options.version = kVersion;
  options.commit = kCommit;
  options.drain_grace = CheckedDuration(config.drain().timeout());
  auto impl = std::make_unique<Impl>();
  impl->config = config;
  ASSIGN_OR_RETURN(impl->server, Server::Start(std::move(options)));
  return std::unique_ptr<Serving>(new Serving(std::move(impl)));
}

Status Serving::Load(LoadHooks hooks) {
  hooks.on_step = impl_->server->step_callback();
  ASSIGN_OR_RETURN(impl_->model, LoadModel(impl_->config, hooks));
  impl_->server->Attach(impl_->model.engine.get(), Describe(impl_->model, impl_->config), impl_->model.device);
  return OkStatus();
}

void Serving::AnnounceEnd() {
  impl_->server->AnnounceEnd();
}
void Serving::RefuseNew() {
  impl_->server->RefuseNew();
}
int32_t Serving::live_requests() const {
  return impl_->server->live_requests();
}
bool Serving::failed_for_good() const {
  return impl_->model.engine->failed_for_good();
}
void Serving::Stop() {
  impl_->server->Stop();
}

const std::string& Serving::address() const {
  return impl_->server->address();
}
const std::string& Serving::admin_address() const {
  return impl_->server->admin_address();
}
const LoadedModel& Serving::model() const {
  return impl_->model;
}

}  // namespace altiplano::cli
