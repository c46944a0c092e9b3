#include "server/scheduler/plan_check.h"

#include <algorithm>
#include <cmath>

#include "server/base/strings.h"

namespace altiplano {

namespace {

// Whether [begin, begin + n) lies in [0, size), and n is not negative.
bool Within(int64_t begin, int64_t n, size_t size) {
  return begin >= 0 && n >= 0 && begin + n <= static_cast<int64_t>(size);
}

bool AreFinite(const SamplingParams& params) {
  bool finite = true;
  for (const float value : {params.temperature, params.top_p, params.min_p, params.presence_penalty,
                            params.frequency_penalty, params.repetition_penalty}) {
    finite = finite && std::isfinite(value);
  }
  for (const auto& [id, bias] : params.logit_bias) finite = finite && std::isfinite(bias);
  return finite;
}

}  // namespace

PlanCheck::PlanCheck(const SchedulerOptions& options, TokenId vocab)
    : num_blocks_(options.num_blocks),
      block_size_(options.block_size),
      token_budget_(options.token_budget),
      max_context_(options.max_context),
      vocab_(vocab),
      slots_(static_cast<size_t>(options.max_running)),
      written_in_(static_cast<size_t>(options.num_blocks)) {}

bool PlanCheck::AreTokens(const std::vector<TokenId>& ids) const {
  return std::all_of(ids.begin(), ids.end(), [this](TokenId id) { return IsToken(id); });
}

std::string PlanCheck::Check(const StepPlan& plan) {
  const auto wrong = [&](std::string what) { return StrCat("step ", plan.step, ": ", what); };
  if (plan.step <= step_) return wrong(StrCat("comes after step ", step_));
  step_ = plan.step;
  if (plan.tokens.size() > static_cast<size_t>(token_budget_)) {
    return wrong(StrCat(plan.tokens.size(), " tokens, at most ", token_budget_));
  }
  if (!Within(0, plan.num_prefill_tokens, plan.tokens.size())) return wrong("the number of its prompts' tokens");
  if (!AreTokens(plan.prompt_score_ids)) return wrong("a scored token is not in the vocabulary");
  for (const int32_t block : plan.block_ids) {
    if (block < 0 || block >= num_blocks_) return wrong(StrCat("block ", block, " of ", num_blocks_));
  }
  for (const SlotInit& init : plan.slot_inits) {
    if (std::string error = CheckInit(init); !error.empty()) return wrong(std::move(error));
  }
  size_t tokens = 0;
  for (const PlannedSequence& sequence : plan.sequences) {
    if (std::string error = CheckSequence(plan, sequence); !error.empty()) return wrong(std::move(error));
    tokens += static_cast<size_t>(sequence.num_tokens);
  }
  if (tokens != plan.tokens.size()) {
    return wrong(StrCat(plan.tokens.size(), " tokens, of which its sequences have ", tokens));
  }
  for (Slot& slot : slots_) slot.sampled_last = false;
  for (const PlannedSequence& sequence : plan.sequences) {
    slots_[static_cast<size_t>(sequence.slot)].sampled_last = sequence.sample;
  }
  return "";
}

std::string PlanCheck::CheckInit(const SlotInit& init) {
  if (!Within(init.slot, 1, slots_.size())) return StrCat("slot ", init.slot, " of ", slots_.size());
  const auto wrong = [&](std::string_view what) { return StrCat("slot ", init.slot, ": ", what); };
  const Request& request = *init.request;
  if (!AreTokens(request.prompt) || !AreTokens(init.output_history) || !AreTokens(request.stop.token_ids)) {
    return wrong("a token that is not in the vocabulary");
  }
  for (const auto& [id, bias] : request.sampling.logit_bias) {
    if (!IsToken(id)) return wrong("the bias of a token that is not in the vocabulary");
  }
  if (!AreFinite(request.sampling)) return wrong("a sampling parameter that is no number");
  for (const int32_t top : {request.sampling.top_logprobs, request.sampling.prompt_top_logprobs}) {
    if (top < -1 || top > kMostTopLogprobs) return wrong(StrCat(top, " log-probabilities"));
  }
  Slot& slot = slots_[static_cast<size_t>(init.slot)];
  slot.taken = true;
  slot.sampled_last = false;
  slot.blocks.clear();
  return "";
}

std::string PlanCheck::CheckSequence(const StepPlan& plan, const PlannedSequence& s) {
  if (!Within(s.slot, 1, slots_.size())) return StrCat("slot ", s.slot, " of ", slots_.size());
  const auto wrong = [&](std::string what) { return StrCat("slot ", s.slot, ": ", what); };
  Slot& slot = slots_[static_cast<size_t>(s.slot)];
  if (!slot.taken) return wrong("nobody has come to it");
  if (slot.planned_in == plan.step) return wrong("twice");
  slot.planned_in = plan.step;
  if (s.num_tokens < 1 || !Within(s.token_begin, s.num_tokens, plan.tokens.size())) {
    return wrong(StrCat("tokens from ", s.token_begin, ", ", s.num_tokens, " of ", plan.tokens.size()));
  }
  for (int32_t i = 0; i < s.num_tokens; ++i) {
    if (s.input_from_slot && i + 1 == s.num_tokens) continue;
    const TokenId id = plan.tokens[static_cast<size_t>(s.token_begin + i)];
    if (!IsToken(id)) return wrong(StrCat("token ", id, " is not in the vocabulary"));
  }
  if (s.input_from_slot && !slot.sampled_last) return wrong("it has sampled nothing");
  const int64_t end = int64_t{s.first_position} + s.num_tokens;
  if (s.first_position < 0 || end > max_context_) {
    return wrong(StrCat("positions ", s.first_position, " to ", end, " of ", max_context_));
  }
  const int64_t most_blocks = (int64_t{max_context_} + block_size_ - 1) / block_size_;
  if (s.num_blocks > most_blocks || int64_t{s.num_blocks} * block_size_ < end) {
    return wrong(StrCat(s.num_blocks, " blocks of ", block_size_, " for ", end, " positions"));
  }
  const auto named = static_cast<int32_t>(slot.blocks.size());
  if (s.known_blocks < 0 || s.known_blocks > s.num_blocks || (s.known_blocks > 0 && s.known_blocks != named)) {
    return wrong(StrCat(s.known_blocks, " known blocks, it has named ", named));
  }
  if (!Within(s.block_begin, s.new_blocks(), plan.block_ids.size())) {
    return wrong(StrCat("blocks from ", s.block_begin, ", ", s.new_blocks(), " of ", plan.block_ids.size()));
  }
  const auto new_blocks = plan.block_ids.begin() + s.block_begin;
  slot.blocks.resize(static_cast<size_t>(s.known_blocks));
  slot.blocks.insert(slot.blocks.end(), new_blocks, new_blocks + s.new_blocks());
  if (std::string error = CheckWrites(plan, s, slot.blocks); !error.empty()) return wrong(std::move(error));
  if (s.num_prompt_scores > s.num_tokens ||
      !Within(s.prompt_score_begin, s.num_prompt_scores, plan.prompt_score_ids.size())) {
    return wrong(
        StrCat("scores from ", s.prompt_score_begin, ", ", s.num_prompt_scores, " of ", plan.prompt_score_ids.size()));
  }
  return "";
}

// Blocks are shared by sequences that have the same tokens in them, and those are full: each that a step writes to is
// one sequence's alone. Ranks store keys and values by several threads, in no order.
std::string PlanCheck::CheckWrites(const StepPlan& plan, const PlannedSequence& s, const std::vector<int32_t>& blocks) {
  const int32_t last = (s.first_position + s.num_tokens - 1) / block_size_;
  for (int32_t i = s.first_position / block_size_; i <= last; ++i) {
    const int32_t block = blocks[static_cast<size_t>(i)];
    uint64_t& written_in = written_in_[static_cast<size_t>(block)];
    if (written_in == plan.step) return StrCat("block ", block, " is written to twice");
    written_in = plan.step;
  }
  return "";
}

}  // namespace altiplano
