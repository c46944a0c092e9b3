// Engine: accepts requests from any thread and runs plan / execute / apply on its own. docs/life_of_a_request.md.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "server/base/clock.h"
#include "server/base/status.h"
#include "server/engine/executor.h"
#include "server/scheduler/request.h"
#include "server/scheduler/scheduler.h"

namespace altiplano {

// Where a request's events go. Engine thread: OnEvent must only append to a queue (no I/O, no lock held for long).
class RequestSink {
 public:
  virtual ~RequestSink() = default;
  virtual void OnEvent(Event event) = 0;
};

struct EngineOptions {
  SchedulerOptions scheduler;
  int32_t max_queued_requests = 512;
  int64_t max_queued_tokens = 4 << 20;  // prompt tokens waiting
  // The engine is unhealthy while a step has got nowhere for this long, or for some times as long as it was predicted
  // to take, where that is longer.
  Duration health_deadline = std::chrono::seconds(4);
  std::optional<int> replica;      // among several: which one, for logs and errors
  size_t flight_record_bytes = 0;  // of the scheduler's last steps, kept for people; 0: none
  std::string crash_record_path;   // the new file they go to if the process dies; empty: none
  // A step failed: with the flight record, "" when none is kept. Engine thread, before live requests end.
  std::function<void(const std::string& flight_record)> on_failure;
  // failed_for_good() has become true. Any thread, once.
  std::function<void()> on_failed_for_good;
  const Clock* clock = &Clock::Real();
  // After a failure: makes the ranks again, with as many KV blocks as before. Engine thread, after the old executor has
  // gone; new requests are refused meanwhile. hung: to be called, from any thread, when this will not return. Null: the
  // engine stays down.
  using Hung = std::function<void(const Status&)>;
  std::function<StatusOr<std::unique_ptr<Executor>>(const Hung& hung)> restart;
};

struct EngineLoad {
  SchedulerLoad scheduler;
  std::shared_ptr<const std::vector<TenantOptions>> tenants;  // those of scheduler.tenants and of refused; never null
  std::vector<uint64_t> refused;                              // requests for which there was no place in the queue
  int32_t block_size = 0;
  double tokens_per_second = 0;  // generated, over the last seconds
  bool draining = false;
  bool healthy = true;       // Engine::healthy
  Duration last_step_age{};  // since the last step ended; zero before the first
};
// Sums; of last_step_age the least, of step_cost_error the most, step_cost of the first. Healthy when one is, draining
// when all are.
EngineLoad Total(const std::vector<EngineLoad>& loads);

class Engine;

// Owns one live request: dropping it cancels the request. Movable.
class RequestHandle {
 public:
  RequestHandle() = default;
  RequestHandle(Engine* engine, RequestKey key) : engine_(engine), key_(key) {}
  RequestHandle(RequestHandle&& other) noexcept { *this = std::move(other); }
  RequestHandle& operator=(RequestHandle&& other) noexcept {
    std::swap(engine_, other.engine_);
    std::swap(key_, other.key_);
    return *this;
  }
  ~RequestHandle();
  void Cancel(Status why);               // idempotent; blocks are free within one step
  void StopSequence(uint32_t sequence);  // a stop string matched: FinishReason::kStop
  RequestKey key() const { return key_; }

 private:
  Engine* engine_ = nullptr;
  RequestKey key_ = 0;
};

// What the front end needs of whatever computes: an Engine, or several (replica_set.h). Any thread.
class InferenceEngine {
 public:
  virtual ~InferenceEngine() = default;

  // Never blocks. Errors, with details for the caller:
  //   RESOURCE_EXHAUSTED QUEUE_FULL or TENANT_QUEUE_FULL (retry_after from the tenant's drain rate), UNAVAILABLE
  //   DRAINING or ENGINE_DOWN, FAILED_PRECONDITION REQUEST_TOO_LARGE_FOR_SERVER.
  // On success the sink gets events until one kEnded; on error it gets none.
  virtual StatusOr<RequestHandle> Submit(std::shared_ptr<const Request> request, std::shared_ptr<RequestSink> sink) = 0;
  // Progress, not liveness: a request sent now would be computed.
  virtual bool healthy() const = 0;
  virtual std::vector<EngineLoad> loads() const = 0;  // of each replica
  virtual int32_t ResetPrefixCache() = 0;             // waits for the step that runs; returns how many blocks it freed
  // Of one replica, as a file (scheduler/flight_record.h), also while a step hangs and after a failure.
  // FAILED_PRECONDITION when none is kept, OUT_OF_RANGE when there is no such replica.
  virtual StatusOr<std::string> FlightRecord(int replica) const = 0;
  virtual int32_t max_servable_tokens() const = 0;  // prompt and answer of one sequence
};

class Engine final : public InferenceEngine {
 public:
  // on_step runs on the engine thread after the events of a step have been handed out: wake the egress thread there.
  static StatusOr<std::unique_ptr<Engine>> Start(EngineOptions options, std::unique_ptr<Executor> executor,
                                                 std::function<void()> on_step = {});
  // Stops at once: live requests end with UNAVAILABLE.
  ~Engine() override;

  StatusOr<RequestHandle> Submit(std::shared_ptr<const Request> request, std::shared_ptr<RequestSink> sink) override;

  void Drain();  // refuse new requests with UNAVAILABLE DRAINING; live ones go on
  void Resume();
  // Ends what is live with `why`. Any thread.
  void CancelAll(Status why);

  // False when a step is overdue, the device failed or a part of it is silent.
  bool healthy() const override;
  // How often it has failed: each time what it had cached is lost. Any thread.
  uint64_t failures() const;
  // It failed and will not come back: there is no `restart`, or that failed, or the first step after it did. Any
  // thread.
  bool failed_for_good() const;
  EngineLoad load() const;
  std::vector<EngineLoad> loads() const override { return {load()}; }
  int32_t ResetPrefixCache() override;
  StatusOr<std::string> FlightRecord(int replica = 0) const override;
  int32_t max_servable_tokens() const override;

 private:
  friend class RequestHandle;
  class Impl;
  explicit Engine(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace altiplano
