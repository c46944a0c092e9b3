// FrontendState: what every service of one server shares: the model when it is there, whether requests are taken, and
// how many are live.
#pragma once

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>

#include "server/base/clock.h"
#include "server/engine/engine.h"
#include "server/frontend/egress.h"
#include "server/frontend/request_registry.h"
#include "server/frontend/server.h"
#include "server/frontend/work_pool.h"

namespace altiplano {

struct LiveCounters {
  std::atomic<int64_t> calls{0};
  std::atomic<int64_t> sinks{0};
  std::atomic<int64_t> watchers{0};
};

struct Backend {
  InferenceEngine* engine = nullptr;
  ServedModel model;
  std::string device;
};

class FrontendState {
 public:
  explicit FrontendState(ServerOptions server_options);

  const ServerOptions options;
  const TimePoint start;
  const std::shared_ptr<LiveCounters> live = std::make_shared<LiveCounters>();
  RequestRegistry registry;
  Egress egress;
  WorkPool text_pool;   // after egress: its jobs post there
  WorkPool admin_pool;  // for admin calls that wait for the engine

  void Attach(std::shared_ptr<const Backend> backend);
  std::shared_ptr<const Backend> backend() const;           // null: none yet
  StatusOr<std::shared_ptr<const Backend>> Loaded() const;  // UNAVAILABLE LOADING

  // Counts a generation in, or says why not: LOADING, DRAINING. On success Leave() is due exactly once.
  StatusOr<std::shared_ptr<const Backend>> Enter();
  void Leave();
  int32_t live_requests() const;
  // Until no generation is live.
  bool WaitUntilEmpty(TimePoint deadline);

  void SetServing(bool serving);
  void SetAccepting(bool accepting);
  bool accepting() const;
  // Health: a model, serving, accepting, and an engine that makes progress.
  bool Healthy() const;

 private:
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::shared_ptr<const Backend> backend_;
  bool serving_ = true;
  bool accepting_ = true;
  int32_t live_requests_ = 0;
};

}  // namespace altiplano
