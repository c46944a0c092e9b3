// SlotStates: what the sampler remembers about each running sequence, by slot. Written by the rank worker's thread
// only.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/ops.h"
#include "server/scheduler/step_plan.h"

namespace altiplano {

class SlotStates {
 public:
  SlotStates(int32_t slots, int64_t vocab, std::vector<TokenId> eos_ids);

  void Init(const SlotInit& init);
  // Parameters for sampling the token after `planned`'s last position. Pointers stay valid until the slot's next Init.
  SampleParams Params(const PlannedSequence& planned) const;
  // Alternatives wanted with each prompt log-probability of the slot's request.
  int32_t prompt_top(int32_t slot) const {
    return states_[static_cast<size_t>(slot)].request->sampling.prompt_top_logprobs;
  }
  void Record(int32_t slot, TokenId sampled);

  const std::vector<TokenId>& last_sampled() const { return last_sampled_; }

 private:
  struct State {
    std::shared_ptr<const Request> request;
    uint32_t sequence = 0;
    std::vector<int32_t> bias_ids;
    std::vector<float> bias_values;
    std::vector<int32_t> stop_ids;        // what min_new_tokens forbids: EOS unless ignored, and the request's stop ids
    std::vector<uint16_t> output_counts;  // [V]; empty when no penalty needs it
    std::vector<uint8_t> in_prompt;       // [V]
  };

  const int64_t vocab_;
  const std::vector<TokenId> eos_ids_;
  std::vector<State> states_;
  std::vector<TokenId> last_sampled_;
};

}  // namespace altiplano
