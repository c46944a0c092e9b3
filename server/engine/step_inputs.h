// From a StepPlan to what one step's ops read: index arrays, packed into one block of host memory and sent to the
// device in one copy. Memory is taken once.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "kernels/device.h"
#include "kernels/tensor.h"
#include "server/engine/decode_graphs.h"
#include "server/model/llama.h"
#include "server/scheduler/step_plan.h"

namespace altiplano {

class StepInputBuilder {
 public:
  struct Limits {
    int32_t slots = 0;
    int32_t max_tokens = 0;   // of a step
    int32_t max_context = 0;  // tokens of a sequence
    int32_t page_size = 0;
    cuda::AttentionSizes attention = {};  // CUDA: the model's
    // Of a step: each has a slot and a token.
    int32_t max_sequences() const { return std::min(slots, max_tokens); }
    int32_t max_blocks() const { return max_context / page_size + 1; }  // of a sequence
  };
  struct Step {
    StepInputs inputs;  // `sampled` is left empty
    // Rows of the step's tokens, in the order of the plan.
    TensorView sample_rows;         // [R] i32: the last token of each sequence with `sample`
    TensorView padded_sample_rows;  // [R], or of a padded step [its sequences]: the same and then row 0 again and again
    TensorView score_rows;          // [Q] i32: the tokens before those whose prompt log-probabilities are wanted
  };

  // nullopt when the memory cannot be had.
  static std::optional<StepInputBuilder> Create(const Stream& stream, const Limits& limits);

  // Views of the stream's device memory. The copy goes out in stream order, and the host's block is used again in the
  // call after the next: by then the stream must have come to the copy. An input that the plan does not know by value
  // becomes -1 - r, where the step before sampled it as the r-th. Wants every plan in turn: each names new blocks only.
  //
  // padded: a shape that the step fits, and whose views are then the same in every call. The tokens behind the plan's
  // are of no sequence: their id is 0, they are stored nowhere and attend to nothing, so that no other row sees them.
  Step Build(Stream& stream, const StepPlan& plan, const DecodeShape* padded = nullptr);

  const Limits& limits() const { return limits_; }

 private:
  // What is remembered about a slot's sequence.
  struct Slot {
    int32_t sampled_at = -1;  // as the how manieth it sampled in the step before
    int32_t blocks = 0;       // in its row of tables_
  };

  explicit StepInputBuilder(const Limits& limits);
  size_t MaxBytes() const;
  const int32_t* BlocksOf(const StepPlan& plan, const PlannedSequence& sequence);
  int64_t MaxListWords() const;

  Limits limits_;
  std::array<Buffer, 2> host_;         // take turns
  Buffer device_;                      // empty on the CPU, where ops read the host's block
  size_t turn_ = 0;                    // of host_
  std::vector<Slot> slots_;            // [slots]
  std::unique_ptr<int32_t[]> tables_;  // [slots][max_blocks()], not written before: the system gives what is used
};

}  // namespace altiplano
