// RequestRegistry: which client-chosen ids are live, for ALREADY_EXISTS and CancelRequests. Ids are opaque here; the
// server's own keys are CallKeys. Any thread.
#pragma once

#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>

#include "server/frontend/egress.h"

namespace altiplano {

class RequestRegistry {
 public:
  // False: the id is live.
  bool Add(const std::string& id, CallKey key) {
    std::lock_guard lock(mutex_);
    return live_.emplace(id, key).second;
  }
  // Nothing when the id is another call's.
  void Remove(const std::string& id, CallKey key) {
    std::lock_guard lock(mutex_);
    if (auto it = live_.find(id); it != live_.end() && it->second == key) live_.erase(it);
  }
  std::optional<CallKey> Find(const std::string& id) const {
    std::lock_guard lock(mutex_);
    auto it = live_.find(id);
    if (it == live_.end()) return std::nullopt;
    return it->second;
  }

 private:
  mutable std::mutex mutex_;
  std::unordered_map<std::string, CallKey> live_;
};

}  // namespace altiplano
