#include "server/frontend/frontend_state.h"

#include <utility>

#include "server/base/check.h"
#include "server/frontend/error_mapping.h"

namespace altiplano {

namespace {
constexpr int32_t kMaxAdminJobs = 16;
}  // namespace

FrontendState::FrontendState(ServerOptions server_options)
    : options(std::move(server_options)),
      start(Clock::Real().Now()),
      text_pool(options.text_threads, options.limits.max_unprepared_requests, options.limits.max_unprepared_bytes),
      admin_pool(1, kMaxAdminJobs, 0) {}

void FrontendState::Attach(std::shared_ptr<const Backend> backend) {
  std::lock_guard lock(mutex_);
  CHECK(backend_ == nullptr);
  backend_ = std::move(backend);
}

std::shared_ptr<const Backend> FrontendState::backend() const {
  std::lock_guard lock(mutex_);
  return backend_;
}

StatusOr<std::shared_ptr<const Backend>> FrontendState::Loaded() const {
  auto loaded = backend();
  if (loaded == nullptr) return LoadingError();
  return loaded;
}

StatusOr<std::shared_ptr<const Backend>> FrontendState::Enter() {
  std::lock_guard lock(mutex_);
  if (!accepting_) return DrainingError();
  if (backend_ == nullptr) return LoadingError();
  ++live_requests_;
  return backend_;
}

void FrontendState::Leave() {
  std::lock_guard lock(mutex_);
  CHECK(live_requests_ > 0);
  if (--live_requests_ == 0) changed_.notify_all();
}

int32_t FrontendState::live_requests() const {
  std::lock_guard lock(mutex_);
  return live_requests_;
}

bool FrontendState::WaitUntilEmpty(TimePoint deadline) {
  std::unique_lock lock(mutex_);
  return changed_.wait_until(lock, deadline, [&] { return live_requests_ == 0; });
}

void FrontendState::SetServing(bool serving) {
  std::lock_guard lock(mutex_);
  serving_ = serving;
}

void FrontendState::SetAccepting(bool accepting) {
  std::lock_guard lock(mutex_);
  accepting_ = accepting;
}

bool FrontendState::accepting() const {
  std::lock_guard lock(mutex_);
  return accepting_;
}

bool FrontendState::Healthy() const {
  std::shared_ptr<const Backend> current;
  {
    std::lock_guard lock(mutex_);
    if (!serving_ || !accepting_) return false;
    current = backend_;
  }
  return current != nullptr && current->engine->healthy();
}

}  // namespace altiplano
