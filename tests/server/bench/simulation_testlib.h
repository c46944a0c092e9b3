// What tests of simulations begin with.
#pragma once

#include "server/bench/dataset.h"
#include "server/bench/simulation.h"

namespace altiplano::bench {

// Steps of 10 ms whatever is in them, and of 64 tokens at most.
inline SimulationOptions TenMillisecondSteps(int32_t max_running = 8) {
  SimulationOptions options;
  options.scheduler.num_blocks = 1000;
  options.scheduler.block_size = 16;
  options.scheduler.max_running = max_running;
  options.scheduler.token_budget = 64;
  options.scheduler.max_context = 1000;
  options.cost = {
      .step_us = 10000, .weights_us = 0, .token_us = 0, .sequence_us = 0, .kv_token_us = 0, .attention_us = 0};
  return options;
}

inline Dataset RandomRequests(int64_t count, int32_t input_len, int32_t output_len, int32_t prefix_len = 0) {
  DatasetOptions options;
  options.num_prompts = count;
  options.input_len = input_len;
  options.output_len = output_len;
  options.prefix_len = prefix_len;
  return *LoadDataset(options, nullptr);
}

}  // namespace altiplano::bench
