#include <algorithm>

#include "server/engine/engine.h"

namespace altiplano {

namespace {

void Add(const SchedulerLoad& one, SchedulerLoad* total) {
  total->running_requests += one.running_requests;
  total->waiting_requests += one.waiting_requests;
  total->waiting_tokens += one.waiting_tokens;
  total->blocks_total += one.blocks_total;
  total->blocks_used += one.blocks_used;
  total->blocks_cached += one.blocks_cached;
  total->steps += one.steps;
  total->preemptions += one.preemptions;
  total->prompt_tokens += one.prompt_tokens;
  total->cached_tokens += one.cached_tokens;
  total->generated_tokens += one.generated_tokens;
  total->late_tokens += one.late_tokens;
  total->late_total += one.late_total;
  total->late_most = std::max(total->late_most, one.late_most);
  total->targets_met += one.targets_met;
  total->targets_missed += one.targets_missed;
  total->hopeless += one.hopeless;
  total->measured_steps += one.measured_steps;
  total->step_cost_error = std::max(total->step_cost_error, one.step_cost_error);
  for (size_t i = 0; i < total->tenants.size(); ++i) {
    total->tenants[i].running_sequences += one.tenants[i].running_sequences;
    total->tenants[i].waiting_requests += one.tenants[i].waiting_requests;
    total->tenants[i].waiting_tokens += one.tenants[i].waiting_tokens;
    total->tenants[i].prompt_tokens += one.tenants[i].prompt_tokens;
    total->tenants[i].generated_tokens += one.tenants[i].generated_tokens;
  }
}

}  // namespace

EngineLoad Total(const std::vector<EngineLoad>& loads) {
  EngineLoad total = loads.front();
  for (size_t i = 1; i < loads.size(); ++i) {
    const EngineLoad& one = loads[i];
    Add(one.scheduler, &total.scheduler);
    for (size_t tenant = 0; tenant < total.refused.size(); ++tenant) total.refused[tenant] += one.refused[tenant];
    total.tokens_per_second += one.tokens_per_second;
    total.draining = total.draining && one.draining;
    total.healthy = total.healthy || one.healthy;
    total.last_step_age = std::min(total.last_step_age, one.last_step_age);
  }
  return total;
}

}  // namespace altiplano
