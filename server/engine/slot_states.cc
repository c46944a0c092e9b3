#include "server/engine/slot_states.h"

#include <limits>
#include <utility>

namespace altiplano {

SlotStates::SlotStates(int32_t slots, int64_t vocab, std::vector<TokenId> eos_ids)
    : vocab_(vocab),
      eos_ids_(std::move(eos_ids)),
      states_(static_cast<size_t>(slots)),
      last_sampled_(static_cast<size_t>(slots), -1) {}

void SlotStates::Init(const SlotInit& init) {
  State& state = states_[static_cast<size_t>(init.slot)];
  state.request = init.request;
  state.sequence = init.sequence;
  const SamplingParams& sampling = init.request->sampling;
  state.bias_ids.clear();
  state.bias_values.clear();
  for (const auto& [id, bias] : sampling.logit_bias) {
    state.bias_ids.push_back(id);
    state.bias_values.push_back(bias);
  }
  state.stop_ids = init.request->stop.token_ids;
  if (!init.request->stop.ignore_eos) state.stop_ids.insert(state.stop_ids.end(), eos_ids_.begin(), eos_ids_.end());
  state.output_counts.clear();
  state.in_prompt.clear();
  if (sampling.NeedsHistory()) {
    state.output_counts.assign(static_cast<size_t>(vocab_), 0);
    state.in_prompt.assign(static_cast<size_t>(vocab_), 0);
    for (TokenId id : init.request->prompt) state.in_prompt[static_cast<size_t>(id)] = 1;
    for (TokenId id : init.output_history) Record(init.slot, id);
  }
}

SampleParams SlotStates::Params(const PlannedSequence& planned) const {
  const State& state = states_[static_cast<size_t>(planned.slot)];
  const SamplingParams& sampling = state.request->sampling;
  SampleParams params;
  params.temperature = sampling.temperature;
  params.top_k = sampling.top_k;
  params.top_p = sampling.top_p;
  params.min_p = sampling.min_p;
  params.presence_penalty = sampling.presence_penalty;
  params.frequency_penalty = sampling.frequency_penalty;
  params.repetition_penalty = sampling.repetition_penalty;
  params.seed = sampling.seed;
  params.sequence = state.sequence;
  params.position = planned.first_position + planned.num_tokens;
  params.top_logprobs = sampling.top_logprobs;
  params.bias_ids = state.bias_ids.data();
  params.bias_values = state.bias_values.data();
  params.num_bias = static_cast<int32_t>(state.bias_ids.size());
  if (planned.ban_stops) {
    params.banned_ids = state.stop_ids.data();
    params.num_banned = static_cast<int32_t>(state.stop_ids.size());
  }
  if (!state.output_counts.empty()) {
    params.output_counts = state.output_counts.data();
    params.in_prompt = state.in_prompt.data();
  }
  return params;
}

void SlotStates::Record(int32_t slot, TokenId sampled) {
  last_sampled_[static_cast<size_t>(slot)] = sampled;
  State& state = states_[static_cast<size_t>(slot)];
  if (state.output_counts.empty() || sampled < 0) return;
  uint16_t& count = state.output_counts[static_cast<size_t>(sampled)];
  if (count < std::numeric_limits<uint16_t>::max()) ++count;
}

}  // namespace altiplano
