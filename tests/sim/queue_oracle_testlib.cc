#include "tests/sim/queue_oracle_testlib.h"

#include <algorithm>
#include <utility>

#include "server/base/strings.h"

namespace altiplano::sim {

QueueOracle::QueueOracle(QueueBounds::Options options, Counts* counts)
    : options_(std::move(options)), counts_(*counts) {}

QueueOracle::Sum QueueOracle::OfTenant(size_t tenant) const {
  Sum sum;
  for (const Member& member : waiting_) {
    if (member.tenant != tenant) continue;
    ++sum.requests;
    sum.tokens += member.tokens;
  }
  return sum;
}

QueueOracle::Sum QueueOracle::OfAll() const {
  Sum sum;
  for (const Member& member : waiting_) {
    ++sum.requests;
    sum.tokens += member.tokens;
  }
  return sum;
}

// The tenant's own limits come first. Those of all keep nobody out who has less waiting than its weight's part of them;
// the first of a tenant may have any number of tokens.
std::string QueueOracle::Refusal(size_t index, int64_t prompt_tokens) {
  const TenantOptions& tenant = options_.tenants[index];
  const Sum own = OfTenant(index), all = OfAll();
  const bool first = own.requests == 0;
  if (tenant.max_queued_requests > 0 && own.requests + 1 > tenant.max_queued_requests) return "TENANT_QUEUE_FULL";
  if (tenant.max_queued_tokens > 0 && !first && own.tokens + prompt_tokens > tenant.max_queued_tokens) {
    return "TENANT_QUEUE_FULL";
  }
  int64_t weights = 0;
  for (const TenantOptions& each : options_.tenants) weights += each.weight;
  const int64_t own_requests = std::max<int64_t>(1, options_.max_requests * tenant.weight / weights);
  const int64_t own_tokens = options_.max_tokens / weights * tenant.weight;
  const bool over_requests = all.requests + 1 > options_.max_requests;
  const bool over_tokens = !first && all.tokens + prompt_tokens > options_.max_tokens;
  if (over_requests && own.requests + 1 > own_requests) return "QUEUE_FULL";
  if (over_tokens && own.tokens + prompt_tokens > own_tokens) return "QUEUE_FULL";
  counts_.over_the_bounds += over_requests || over_tokens;
  return "";
}

// Half of what the tenant has waiting, at the rate of its admissions over the last five whole seconds.
std::chrono::milliseconds QueueOracle::Hint(size_t tenant, TimePoint now) const {
  using std::chrono::seconds;
  const auto this_second = std::chrono::floor<seconds>(now);
  const auto lately = [&](const Admission& admission) {
    const auto second = std::chrono::floor<seconds>(admission.at);
    return admission.tenant == tenant && second < this_second && second >= this_second - seconds(5);
  };
  const auto drained = std::ranges::count_if(admissions_, lately);
  counts_.hints_by_rate += drained > 0;
  const double rate = std::max(0.1, static_cast<double>(drained) / 5);
  const double wait = static_cast<double>(OfTenant(tenant).requests) / rate / 2;
  return std::chrono::milliseconds(static_cast<int64_t>(std::clamp(wait, 0.1, 60.0) * 1000));
}

std::string QueueOracle::JudgeEntry(size_t tenant, int64_t prompt_tokens, const Status& said, TimePoint now) {
  const std::string refusal = Refusal(tenant, prompt_tokens);
  if (said.reason() != refusal) return StrCat("the queue says \"", said.reason(), "\", not \"", refusal, "\"");
  if (refusal.empty()) {
    waiting_.push_back({tenant, prompt_tokens});
    return "";
  }
  ++(refusal == "QUEUE_FULL" ? counts_.queue_full : counts_.tenant_queue_full);
  if (said.code() != Code::kResourceExhausted) return "the queue is full with another code";
  const auto hint = said.detail()->retry_after.value_or(std::chrono::milliseconds(0)), expected = Hint(tenant, now);
  return hint == expected ? "" : StrCat("come back in ", hint.count(), " ms, not in ", expected.count());
}

void QueueOracle::Leave(size_t tenant, int64_t prompt_tokens, bool admitted, TimePoint now) {
  const auto same = [&](const Member& m) { return m.tenant == tenant && m.tokens == prompt_tokens; };
  waiting_.erase(std::ranges::find_if(waiting_, same));
  if (admitted) admissions_.push_back({tenant, now});
}

}  // namespace altiplano::sim
