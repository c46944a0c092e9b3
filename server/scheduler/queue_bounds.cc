#include "server/scheduler/queue_bounds.h"

#include <algorithm>
#include <utility>

#include "server/base/check.h"
#include "server/base/strings.h"

namespace altiplano {

QueueBounds::QueueBounds(Options options) : options_(std::move(options)), tenants_(options_.tenants.size()) {
  int64_t weights = 0;
  for (const TenantOptions& tenant : options_.tenants) weights += tenant.weight;
  for (size_t i = 0; i < tenants_.size(); ++i) {
    const int64_t weight = options_.tenants[i].weight;
    tenants_[i].own_requests = static_cast<int32_t>(std::max<int64_t>(1, options_.max_requests * weight / weights));
    tenants_[i].own_tokens = options_.max_tokens / weights * weight;
  }
}

Status QueueBounds::Enter(size_t index, int64_t prompt_tokens, TimePoint now) {
  Tenant& tenant = tenants_[index];
  const TenantOptions& limits = options_.tenants[index];
  // The first of a tenant may have any number of tokens: it could never be served otherwise.
  const bool first = tenant.requests == 0;
  if ((limits.max_queued_requests > 0 && tenant.requests >= limits.max_queued_requests) ||
      (limits.max_queued_tokens > 0 && !first && tenant.tokens + prompt_tokens > limits.max_queued_tokens)) {
    return Refuse(index, true, now);
  }
  // Others may fill the whole queue while a tenant is away, but not keep it out with that.
  const bool fits = requests_ < options_.max_requests || tenant.requests < tenant.own_requests;
  const bool tokens_fit =
      first || tokens_ + prompt_tokens <= options_.max_tokens || tenant.tokens + prompt_tokens <= tenant.own_tokens;
  if (!fits || !tokens_fit) return Refuse(index, false, now);
  ++tenant.requests;
  tenant.tokens += prompt_tokens;
  ++requests_;
  tokens_ += prompt_tokens;
  return OkStatus();
}

void QueueBounds::Leave(size_t index, int64_t prompt_tokens, bool admitted, TimePoint now) {
  Tenant& tenant = tenants_[index];
  --tenant.requests;
  tenant.tokens -= prompt_tokens;
  --requests_;
  tokens_ -= prompt_tokens;
  CHECK(tenant.requests >= 0 && tenant.tokens >= 0);
  if (admitted) tenant.admissions.Add(now, 1);
}

// The hint: how long half of what the tenant has waiting takes at the rate at which its requests were admitted lately.
// Half, because then there is room and the queue has not run dry.
Status QueueBounds::Refuse(size_t index, bool own_limit, TimePoint now) {
  Tenant& tenant = tenants_[index];
  ++tenant.refused;
  const double rate = std::max(tenant.admissions.PerSecond(now), 0.1);
  const double seconds = std::clamp(tenant.requests / rate / 2, 0.1, 60.0);
  ErrorDetail detail;
  detail.reason = own_limit ? "TENANT_QUEUE_FULL" : "QUEUE_FULL";
  detail.retry_after = std::chrono::milliseconds(static_cast<int64_t>(seconds * 1000));
  detail.metadata = {{"queued_requests", StrCat(requests_)},
                     {"max_queued_requests", StrCat(options_.max_requests)},
                     {"queued_tokens", StrCat(tokens_)},
                     {"max_queued_tokens", StrCat(options_.max_tokens)}};
  if (!own_limit) {
    return Status(Code::kResourceExhausted,
                  StrCat("the queue is full: ", requests_, " requests with ", tokens_, " prompt tokens are waiting"),
                  std::move(detail));
  }
  const TenantOptions& limits = options_.tenants[index];
  detail.metadata = {
      {"tenant", limits.name}, {"queued_requests", StrCat(tenant.requests)}, {"queued_tokens", StrCat(tenant.tokens)}};
  // 0 is no limit, and would read as the least.
  if (limits.max_queued_requests > 0) detail.metadata["max_queued_requests"] = StrCat(limits.max_queued_requests);
  if (limits.max_queued_tokens > 0) detail.metadata["max_queued_tokens"] = StrCat(limits.max_queued_tokens);
  return Status(Code::kResourceExhausted,
                StrCat("tenant ", limits.name, " has ", tenant.requests, " requests with ", tenant.tokens,
                       " prompt tokens waiting, which is its limit"),
                std::move(detail));
}

std::vector<uint64_t> QueueBounds::refused() const {
  std::vector<uint64_t> refused;
  for (const Tenant& tenant : tenants_) refused.push_back(tenant.refused);
  return refused;
}

}  // namespace altiplano
