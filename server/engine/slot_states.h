// SlotStates: what the sampler remembers about each running sequence, by slot. Written by the rank worker's thread
// only.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/device.h"
#include "kernels/ops.h"
#include "server/scheduler/step_plan.h"

namespace altiplano {

class SlotStates {
 public:
  // Counts of tokens lie in the stream's device memory, taken here for all slots; on the CPU the system gives it when
  // it is used. Null when it cannot be had.
  static std::unique_ptr<SlotStates> Create(const Stream& stream, int32_t slots, int64_t vocab,
                                            std::vector<TokenId> eos_ids);

  void Init(Stream& stream, const SlotInit& init);
  // Parameters for sampling the token after `planned`'s last position. Pointers stay valid until the slot's next Init.
  SampleParams Params(const PlannedSequence& planned) const;
  // Alternatives wanted with each prompt log-probability of the slot's request.
  int32_t prompt_top(int32_t slot) const {
    return states_[static_cast<size_t>(slot)].request->sampling.prompt_top_logprobs;
  }

 private:
  struct State {
    std::shared_ptr<const Request> request;
    uint32_t sequence = 0;
    std::vector<int32_t> bias_ids;
    std::vector<float> bias_values;
    std::vector<int32_t> stop_ids;  // what min_new_tokens forbids: EOS unless ignored, and the request's stop ids
  };
  // A slot's counts on their way to a GPU: pinned, and free again when the copy has gone out.
  struct Upload {
    Buffer host;
    std::unique_ptr<StreamEvent> copied;
  };

  SlotStates(int32_t slots, int64_t vocab, std::vector<TokenId> eos_ids);
  size_t HistoryBytes() const;  // of a slot: output counts [V] u16, in prompt [V] u8
  char* HistoryOf(int32_t slot) const;
  void FillHistory(const SlotInit& init, char* history) const;
  void UploadHistory(Stream& stream, const SlotInit& init);

  const int64_t vocab_;
  const std::vector<TokenId> eos_ids_;
  std::vector<State> states_;
  Buffer histories_;             // [slots][HistoryBytes()]
  std::vector<Upload> uploads_;  // take turns; none on the CPU
  size_t turn_ = 0;
};

}  // namespace altiplano
