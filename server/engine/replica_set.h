// ReplicaSet: several engines of the same model behind one front end. Each has its own ranks, KV pool and queue; a
// request lives on one of them from Submit to its end. One that has failed, or whose step is overdue, gets no new
// requests while others serve.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "server/engine/engine.h"

namespace altiplano {

class ReplicaSet final : public InferenceEngine {
 public:
  // At least one. prefix_cache: whether they keep blocks of finished requests.
  ReplicaSet(std::vector<std::unique_ptr<Engine>> replicas, bool prefix_cache);
  // Stops at once: live requests end with UNAVAILABLE.
  ~ReplicaSet() override;

  // Goes to the replica that ReplicaRouter likes best of those that take it.
  StatusOr<RequestHandle> Submit(std::shared_ptr<const Request> request, std::shared_ptr<RequestSink> sink) override;
  bool healthy() const override;  // one is
  std::vector<EngineLoad> loads() const override;
  int32_t ResetPrefixCache() override;
  StatusOr<std::string> FlightRecord(int replica) const override;
  int32_t max_servable_tokens() const override;  // by each of them

  bool failed_for_good() const;  // all have
  int size() const { return static_cast<int>(replicas_.size()); }

 private:
  class Routing;
  class TrackingSink;

  const std::shared_ptr<Routing> routing_;  // null for one replica; sinks share it
  const std::vector<std::unique_ptr<Engine>> replicas_;
};

}  // namespace altiplano
