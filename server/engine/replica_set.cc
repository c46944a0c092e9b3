#include "server/engine/replica_set.h"

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <utility>

#include "server/base/check.h"
#include "server/base/strings.h"
#include "server/engine/replica_router.h"

namespace altiplano {

// The router, which any thread that submits and every engine's thread talk to.
class ReplicaSet::Routing {
 public:
  // By the smallest pool, where they differ: a router that forgets early costs less than one that remembers too long.
  Routing(const std::vector<std::unique_ptr<Engine>>& replicas, bool prefix_cache)
      : router(static_cast<int>(replicas.size()), replicas.front()->load().block_size,
               prefix_cache ? FewestBlocks(replicas) : 0),
        failures_(replicas.size()) {}

  std::mutex mutex;
  ReplicaRouter router;  // guarded by mutex

  // Under mutex: a replica that has failed, `failures` times by now, has an empty cache from then on. One that is only
  // overdue keeps what it has.
  void ForgetIfFailed(size_t replica, uint64_t failures) {
    if (std::exchange(failures_[replica], failures) != failures) router.Forget(static_cast<int>(replica));
  }

 private:
  static int32_t FewestBlocks(const std::vector<std::unique_ptr<Engine>>& replicas) {
    int32_t fewest = INT32_MAX;
    for (const auto& replica : replicas) fewest = std::min(fewest, replica->load().scheduler.blocks_total);
    return fewest;
  }

  std::vector<uint64_t> failures_;  // guarded by mutex: of each replica, as last seen
};

// Tells the router how far a request is, before its owner learns of it.
class ReplicaSet::TrackingSink : public RequestSink {
 public:
  TrackingSink(std::shared_ptr<Routing> routing, std::shared_ptr<RequestSink> sink)
      : routing_(std::move(routing)), sink_(std::move(sink)) {}

  void Sent(ReplicaRouter::Work work) { work_ = work; }  // under the routing's mutex, before any event
  ReplicaRouter::Work* work() { return &work_; }

  void OnEvent(Event event) override {
    const bool first_token = event.kind == Event::Kind::kToken && !std::exchange(computed_, true);
    if (first_token || event.kind == Event::Kind::kEnded) {
      std::lock_guard lock(routing_->mutex);
      first_token ? routing_->router.Computed(&work_) : routing_->router.Ended(&work_);
    }
    sink_->OnEvent(std::move(event));
  }

 private:
  const std::shared_ptr<Routing> routing_;
  const std::shared_ptr<RequestSink> sink_;
  ReplicaRouter::Work work_;  // guarded by the routing's mutex
  bool computed_ = false;     // engine thread
};

ReplicaSet::ReplicaSet(std::vector<std::unique_ptr<Engine>> replicas, bool prefix_cache)
    : routing_(replicas.size() > 1 ? std::make_shared<Routing>(replicas, prefix_cache) : nullptr),
      replicas_(std::move(replicas)) {
  CHECK(!replicas_.empty());
}

ReplicaSet::~ReplicaSet() = default;

StatusOr<RequestHandle> ReplicaSet::Submit(std::shared_ptr<const Request> request, std::shared_ptr<RequestSink> sink) {
  if (routing_ == nullptr) return replicas_.front()->Submit(std::move(request), std::move(sink));
  const auto tracking = std::make_shared<TrackingSink>(routing_, std::move(sink));
  std::vector<bool> healthy;
  for (const auto& replica : replicas_) healthy.push_back(replica->healthy());
  // Held until the request is counted: its first events, and the next Submit, wait for that.
  std::lock_guard lock(routing_->mutex);
  for (size_t i = 0; i < replicas_.size(); ++i) routing_->ForgetIfFailed(i, replicas_[i]->failures());
  const ReplicaRouter::Route route = routing_->router.Find(*request);
  Status refused;
  for (const int index : route.order) {
    const auto at = static_cast<size_t>(index);
    if (!healthy[at]) continue;
    tracking->Sent(routing_->router.Sent(*request, route, index));
    auto handle = replicas_[at]->Submit(request, tracking);
    if (handle.ok()) return handle;
    routing_->router.Ended(tracking->work());
    if (refused.ok() || refused.reason() == "ENGINE_DOWN") refused = handle.status();
  }
  // None is healthy: one of them says why.
  if (refused.ok()) return replicas_[static_cast<size_t>(route.order.front())]->Submit(request, tracking);
  return refused;
}

bool ReplicaSet::healthy() const {
  return std::any_of(replicas_.begin(), replicas_.end(), [](const auto& replica) { return replica->healthy(); });
}

bool ReplicaSet::failed_for_good() const {
  return std::all_of(replicas_.begin(), replicas_.end(),
                     [](const auto& replica) { return replica->failed_for_good(); });
}

std::vector<EngineLoad> ReplicaSet::loads() const {
  std::vector<EngineLoad> loads;
  for (const auto& replica : replicas_) loads.push_back(replica->load());
  return loads;
}

int32_t ReplicaSet::ResetPrefixCache() {
  int32_t freed = 0;
  for (size_t i = 0; i < replicas_.size(); ++i) {
    freed += replicas_[i]->ResetPrefixCache();
    if (routing_ == nullptr) continue;
    std::lock_guard lock(routing_->mutex);
    routing_->router.Forget(static_cast<int>(i));
  }
  return freed;
}

StatusOr<std::string> ReplicaSet::FlightRecord(int replica) const {
  if (size() == 1) return replicas_.front()->FlightRecord(replica);
  if (replica < 0 || replica >= size()) {
    return Status(Code::kOutOfRange, StrCat("there is no replica ", replica, ": this server has ", size(),
                                            ", numbered 0 to ", size() - 1));
  }
  return replicas_[static_cast<size_t>(replica)]->FlightRecord();
}

int32_t ReplicaSet::max_servable_tokens() const {
  int32_t tokens = INT32_MAX;
  for (const auto& replica : replicas_) tokens = std::min(tokens, replica->max_servable_tokens());
  return tokens;
}

}  // namespace altiplano
