// StepInputs from a StepPlan: the flat index arrays that one step's ops read. Buffers are sized once and reused.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/tensor.h"
#include "server/model/llama.h"
#include "server/scheduler/step_plan.h"

namespace altiplano {

class StepInputBuilder {
 public:
  StepInputBuilder(int32_t max_tokens, int32_t max_sequences, int32_t max_pages, int32_t page_size);

  // last_sampled[slot]: what the slot sampled in the step before, for inputs that the plan does not know by value.
  // The views are host memory of this object, valid until the next call.
  StepInputs Build(const StepPlan& plan, const std::vector<TokenId>& last_sampled);

 private:
  const int32_t max_tokens_, max_sequences_, max_pages_, page_size_;
  std::vector<int32_t> ids_, positions_, slots_, q_begin_, context_lengths_, block_tables_;
};

}  // namespace altiplano
