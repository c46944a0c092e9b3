// QueueBounds: who may still join the queue of a scheduler, and when to come back if not. One thread at a time.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "server/base/clock.h"
#include "server/base/status.h"
#include "server/scheduler/rate_meter.h"
#include "server/scheduler/tenants.h"

namespace altiplano {

class QueueBounds {
 public:
  struct Options {
    int32_t max_requests = 512;
    int64_t max_tokens = 4 << 20;        // prompt tokens
    std::vector<TenantOptions> tenants;  // complete
  };
  explicit QueueBounds(Options options);

  // OK: the request waits from now on. Else RESOURCE_EXHAUSTED, QUEUE_FULL or TENANT_QUEUE_FULL, with retry_after.
  Status Enter(size_t tenant, int64_t prompt_tokens, TimePoint now);
  // It was admitted, or ended before.
  void Leave(size_t tenant, int64_t prompt_tokens, bool admitted, TimePoint now);

  // Requests that were refused, by tenant.
  std::vector<uint64_t> refused() const;

 private:
  struct Tenant {
    int32_t requests = 0;
    int64_t tokens = 0;
    // With no more than these it is let in though others have filled the queue.
    int32_t own_requests = 0;
    int64_t own_tokens = 0;
    RateMeter admissions;
    uint64_t refused = 0;
  };
  Status Refuse(size_t index, bool own_limit, TimePoint now);

  const Options options_;
  int32_t requests_ = 0;
  int64_t tokens_ = 0;
  std::vector<Tenant> tenants_;
};

}  // namespace altiplano
