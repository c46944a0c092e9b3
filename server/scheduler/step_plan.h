// StepPlan: all that workers learn about one step. Immutable, plain values, shared by every rank.
// StepResult: what came back. Event: what the scheduler tells a request's owner after applying it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "server/base/clock.h"
#include "server/base/status.h"
#include "server/base/types.h"
#include "server/scheduler/request.h"

namespace altiplano {

// A sequence's row of state on the executor (last sampled token, penalty counts) from admission until it ends or is
// preempted; then the slot is reused. An init comes in the plan in which the sequence first runs with that slot.
struct SlotInit {
  int32_t slot = 0;
  uint32_t sequence = 0;                   // index among the request's sequences
  std::shared_ptr<const Request> request;  // sampling parameters, alive as long as the plan and the slot
  std::vector<TokenId> output_history;     // tokens generated before a preemption; empty unless penalties need them
};

// One sequence's part of a step: `num_tokens` new positions, computed in order.
//
//   position:  0 ............. first_position ............. first_position + num_tokens
//              |-- in the cache --|-- tokens of this step ------|
//   blocks  :  |-- known_blocks --|---- new_blocks() ----|      num_blocks cover all of it
//
// Plans are executed in order and a sequence's blocks never change, so that each is named once: in the first plan that
// needs it, and all of them again when the sequence comes to a slot. Executors keep the rest by slot.
struct PlannedSequence {
  RequestKey request = 0;
  uint32_t sequence = 0;
  int32_t slot = 0;
  int32_t first_position = 0;
  int32_t num_tokens = 0;
  int32_t token_begin = 0;   // into StepPlan::tokens
  int32_t block_begin = 0;   // into StepPlan::block_ids: the new ones
  int32_t num_blocks = 0;    // from position 0 on
  int32_t known_blocks = 0;  // of these, from earlier plans for this slot; 0 in the first plan of a sequence there
  // The last token's value is not known to the plan: it is what this slot sampled in the step before (tokens[] holds
  // -1).
  bool input_from_slot = false;
  bool sample = false;     // sample the next token from the last position's logits
  bool ban_stops = false;  // EOS and stop ids may not be sampled (min_new_tokens)
  // Prompt log-probabilities wanted for the tokens at positions first_position + 1 ... first_position +
  // num_prompt_scores; their ids are prompt_score_ids[prompt_score_begin ...].
  int32_t num_prompt_scores = 0;
  int32_t prompt_score_begin = 0;

  int32_t new_blocks() const { return num_blocks - known_blocks; }
};

struct StepPlan {
  uint64_t step = 0;  // 1, 2, 3, ...
  std::vector<PlannedSequence> sequences;
  std::vector<TokenId> tokens;
  std::vector<int32_t> block_ids;
  std::vector<TokenId> prompt_score_ids;
  std::vector<SlotInit> slot_inits;
  int32_t num_prefill_tokens = 0;  // of `tokens`; for metrics
};

struct TopLogprob {
  TokenId token = 0;
  float logprob = 0;
};

struct TokenScore {
  TokenId token = -1;
  bool finite = true;  // false: the logits held NaN or infinity, the sequence fails with INTERNAL
  float logprob = 0;
  int32_t rank = 0;
  std::vector<TopLogprob> top;
};

struct StepResult {
  uint64_t step = 0;
  Status status;                    // not OK: the device failed; nothing below is valid, the engine stops serving
  std::vector<TokenScore> sampled;  // one for each planned sequence with `sample`, in plan order
  std::vector<std::vector<TokenScore>> prompt_scores;  // one for each planned sequence with num_prompt_scores > 0
  Duration device_time{};
};

struct RequestTiming {
  Duration queued{};       // arrival to admission
  Duration first_token{};  // arrival to first token; zero if there was none
  Duration total{};
  uint32_t preemptions = 0;
};

struct Event {
  enum class Kind : uint8_t {
    kAdmitted,      // cached_tokens, timing.queued. Once, first.
    kPromptScores,  // prompt_scores: one or more, in order, before the first token
    kToken,         // sequence, score; finish set with a sequence's last token
    kFinished,  // sequence, finish: it ended without a further token (time limit, cancelled, stopped by the front end)
    kEnded,     // status, timing: the request is over, nothing follows. Once, last.
  };
  Kind kind = Kind::kToken;
  uint32_t sequence = 0;
  RequestKey request = 0;
  FinishReason finish = FinishReason::kNone;
  TokenId stop_token = -1;  // which stop id or EOS ended it
  uint32_t cached_tokens = 0;
  TokenScore score;
  std::vector<TokenScore> prompt_scores;
  RequestTiming timing;
  Status status;
};

}  // namespace altiplano
