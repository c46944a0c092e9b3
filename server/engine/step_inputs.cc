#include "server/engine/step_inputs.h"

#include <algorithm>

#include "server/base/check.h"

namespace altiplano {

namespace {
TensorView View(std::vector<int32_t>& data, std::initializer_list<int64_t> shape) {
  return TensorView::Make(data.data(), DType::kI32, shape);
}
}  // namespace

StepInputBuilder::StepInputBuilder(int32_t max_tokens, int32_t max_sequences, int32_t max_pages, int32_t page_size)
    : max_tokens_(max_tokens), max_sequences_(max_sequences), max_pages_(max_pages), page_size_(page_size) {
  ids_.reserve(static_cast<size_t>(max_tokens));
  positions_.reserve(static_cast<size_t>(max_tokens));
  slots_.reserve(static_cast<size_t>(max_tokens));
  q_begin_.reserve(static_cast<size_t>(max_sequences) + 1);
  context_lengths_.reserve(static_cast<size_t>(max_sequences));
}

StepInputs StepInputBuilder::Build(const StepPlan& plan, const std::vector<TokenId>& last_sampled) {
  const auto sequences = static_cast<int64_t>(plan.sequences.size());
  CHECK(static_cast<int64_t>(plan.tokens.size()) <= max_tokens_ && sequences <= max_sequences_);
  int32_t pages = 1;
  for (const PlannedSequence& sequence : plan.sequences) pages = std::max(pages, sequence.num_blocks);
  CHECK(pages <= max_pages_);

  ids_.clear();
  positions_.clear();
  slots_.clear();
  q_begin_.assign(1, 0);
  context_lengths_.clear();
  block_tables_.assign(static_cast<size_t>(sequences * pages), 0);
  for (size_t b = 0; b < plan.sequences.size(); ++b) {
    const PlannedSequence& sequence = plan.sequences[b];
    const int32_t* blocks = plan.block_ids.data() + sequence.block_begin;
    std::copy_n(blocks, sequence.num_blocks, block_tables_.begin() + static_cast<ptrdiff_t>(b) * pages);
    const TokenId* tokens = plan.tokens.data() + sequence.token_begin;
    for (int32_t i = 0; i < sequence.num_tokens; ++i) {
      int32_t position = sequence.first_position + i;
      ids_.push_back(tokens[i]);
      positions_.push_back(position);
      slots_.push_back(blocks[position / page_size_] * page_size_ + position % page_size_);
    }
    if (sequence.input_from_slot) ids_.back() = last_sampled[static_cast<size_t>(sequence.slot)];
    q_begin_.push_back(static_cast<int32_t>(ids_.size()));
    context_lengths_.push_back(sequence.first_position + sequence.num_tokens);
  }

  const auto tokens = static_cast<int64_t>(ids_.size());
  StepInputs inputs;
  inputs.ids = View(ids_, {tokens});
  inputs.positions = View(positions_, {tokens});
  inputs.slots = View(slots_, {tokens});
  inputs.q_begin = View(q_begin_, {sequences + 1});
  inputs.context_lengths = View(context_lengths_, {sequences});
  inputs.block_tables = View(block_tables_, {sequences, pages});
  return inputs;
}

}  // namespace altiplano
