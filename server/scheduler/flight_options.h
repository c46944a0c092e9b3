// The options of a scheduler in a flight record: one list of fields, for writing and for reading. A field that decides
// anything belongs here: tests/sim replays worlds with all of them.
#pragma once

#include "server/scheduler/scheduler.h"

namespace altiplano {

// visit(field) for each, in the order of the file.
template <typename Options, typename Visit>
void VisitFlightOptions(Options& options, Visit&& visit) {
  visit(options.num_blocks);
  visit(options.block_size);
  visit(options.max_running);
  visit(options.token_budget);
  visit(options.max_context);
  visit(options.prefix_cache);
  visit(options.max_itl);
  visit(options.step_cost.step_us);
  visit(options.step_cost.weights_us);
  visit(options.step_cost.token_us);
  visit(options.step_cost.sequence_us);
  visit(options.step_cost.kv_token_us);
  visit(options.step_cost.attention_us);
  visit(options.learn_step_cost);
  visit(options.default_ttft_target);
  visit(options.priority_ageing);
  visit(options.tenants);
}

}  // namespace altiplano
