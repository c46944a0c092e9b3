#include "server/frontend/server.h"

#include <algorithm>
#include <mutex>
#include <utility>

#include "server/frontend/admin_service.h"
#include "server/frontend/error_mapping.h"
#include "server/frontend/frontend_state.h"
#include "server/frontend/health_service.h"
#include "server/frontend/inference_service.h"
#include "server/frontend/listener.h"
#include "server/frontend/model_service.h"
#include "server/frontend/reflection_service.h"
#include "server/frontend/status_service.h"
#include "server/frontend/watch.h"

namespace altiplano {

namespace v1 = inference::v1;

namespace {

// For statuses and last messages to leave the sockets when calls have been told to end.
constexpr Duration kFarewell = std::chrono::seconds(1);

std::string NameOf(const char* service_full_name) {
  return service_full_name;
}

}  // namespace

class Server::Impl {
 public:
  explicit Impl(ServerOptions options) : state(std::move(options)) {}
  ~Impl() { Stop(); }

  Status Start() {
    RouteLibraryLogs();
    ASSIGN_OR_RETURN(main, Listen("--listen", state.options.listen, state.options.limits,
                                  {&inference, &models, &status, &health, &reflection_v1, &reflection_v1alpha}));
    if (state.options.admin_listen.empty()) return OkStatus();
    ASSIGN_OR_RETURN(admin_listening, Listen("--admin-listen", state.options.admin_listen, state.options.limits,
                                             {&admin, &admin_health, &admin_reflection_v1, &admin_reflection_v1alpha}));
    return OkStatus();
  }

  // Neither waits.
  void BeginDrain(Duration grace) {
    state.SetAccepting(false);
    {
      std::lock_guard lock(mutex);
      TimePoint now = Clock::Real().Now();
      kill_at = grace < kNever - now ? now + grace : kNever;
    }
    hub.Wake();
  }
  Status Resume() {
    {
      std::lock_guard lock(mutex);
      if (ending) return Status(Code::kFailedPrecondition, "the server is about to end");
      kill_at = kNever;
      state.SetServing(true);
      state.SetAccepting(true);
    }
    hub.Wake();
    return OkStatus();
  }
  void AnnounceEnd() {
    {
      std::lock_guard lock(mutex);
      ending = true;
      state.SetServing(false);
    }
    hub.Wake();
  }

  void Stop() {
    {
      std::lock_guard lock(mutex);
      if (std::exchange(stopped, true)) return;
      ending = true;
    }
    state.SetAccepting(false);
    state.SetServing(false);
    hub.FinishAll(ShutdownError());
    state.egress.queue()->PostToAll(ShutdownError());
    auto deadline = std::chrono::system_clock::now() + kFarewell;
    if (main.server != nullptr) main.server->Shutdown(deadline);
    if (admin_listening.server != nullptr) admin_listening.server->Shutdown(deadline);
  }

  // Hub's thread: ends what a drain has left after its grace.
  TimePoint Poll(TimePoint now) {
    {
      std::lock_guard lock(mutex);
      if (now < kill_at) return kill_at;
      kill_at = kNever;
    }
    state.egress.queue()->PostToAll(DrainedError());
    return kNever;
  }

  const std::vector<std::string> main_services = {
      NameOf(v1::InferenceService::service_full_name()),
      NameOf(v1::ModelService::service_full_name()),
      NameOf(v1::StatusService::service_full_name()),
      NameOf(grpc::health::v1::Health::service_full_name()),
      NameOf(grpc::reflection::v1::ServerReflection::service_full_name()),
      NameOf(grpc::reflection::v1alpha::ServerReflection::service_full_name())};
  const std::vector<std::string> admin_services = {
      NameOf(v1::AdminService::service_full_name()), NameOf(grpc::health::v1::Health::service_full_name()),
      NameOf(grpc::reflection::v1::ServerReflection::service_full_name()),
      NameOf(grpc::reflection::v1alpha::ServerReflection::service_full_name())};

  std::mutex mutex;
  TimePoint kill_at = kNever;  // guarded by mutex
  bool ending = false;         // guarded by mutex; no Resume
  bool stopped = false;        // guarded by mutex

  // Destroyed from the last to the first: the gRPC servers, which wait for their calls, before what the calls use.
  FrontendState state;
  WatchHub hub{state.live, [this](TimePoint now) { return Poll(now); }};
  InferenceService inference{&state};
  ModelService models{&state};
  StatusService status{&state, &hub};
  AdminService admin{&state,
                     {.drain = [this](Duration grace) { BeginDrain(grace); }, .resume = [this] { return Resume(); }}};
  HealthService health{&state, &hub, {main_services.begin(), main_services.end()}};
  HealthService admin_health{&state, &hub, {admin_services.begin(), admin_services.end()}};
  ReflectionV1 reflection_v1{&main_services};
  ReflectionV1Alpha reflection_v1alpha{&main_services};
  ReflectionV1 admin_reflection_v1{&admin_services};
  ReflectionV1Alpha admin_reflection_v1alpha{&admin_services};
  Listening main;
  Listening admin_listening;
};

Server::Server(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Server::~Server() = default;

StatusOr<std::unique_ptr<Server>> Server::Start(ServerOptions options) {
  auto impl = std::make_unique<Impl>(std::move(options));
  RETURN_IF_ERROR(impl->Start());
  return std::unique_ptr<Server>(new Server(std::move(impl)));
}

std::function<void()> Server::step_callback() const {
  return [queue = impl_->state.egress.queue()] { queue->Wake(); };
}

void Server::Attach(InferenceEngine* engine, ServedModel model, std::string device) {
  auto backend = std::make_shared<Backend>();
  backend->engine = engine;
  backend->model = std::move(model);
  backend->device = std::move(device);
  impl_->state.Attach(std::move(backend));
  impl_->hub.Wake();
}

void Server::SetServing(bool serving) {
  impl_->state.SetServing(serving);
  impl_->hub.Wake();
}

void Server::RefuseNew() {
  impl_->BeginDrain(Duration::max());
}

Status Server::Resume() {
  return impl_->Resume();
}

void Server::AnnounceEnd() {
  impl_->AnnounceEnd();
}

void Server::Drain(Duration grace) {
  impl_->BeginDrain(grace);
  TimePoint now = Clock::Real().Now();
  TimePoint deadline = grace < kNever - now ? now + grace : kNever;
  if (impl_->state.WaitUntilEmpty(deadline)) return;
  impl_->state.egress.queue()->PostToAll(DrainedError());
  impl_->state.WaitUntilEmpty(Clock::Real().Now() + kFarewell);
}

void Server::Stop() {
  impl_->Stop();
}

int Server::port() const {
  return impl_->main.port;
}
const std::string& Server::address() const {
  return impl_->main.address;
}
const std::string& Server::admin_address() const {
  return impl_->admin_listening.address;
}
int32_t Server::live_requests() const {
  return impl_->state.live_requests();
}

LiveObjects Server::live_objects() const {
  const LiveCounters& live = *impl_->state.live;
  return {
      .calls = live.calls, .sinks = live.sinks, .text_jobs = impl_->state.text_pool.jobs(), .watchers = live.watchers};
}

}  // namespace altiplano
