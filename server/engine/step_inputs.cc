#include "server/engine/step_inputs.h"

#include <algorithm>

#include "server/base/check.h"

namespace altiplano {

namespace {

constexpr int64_t kAlign = 16;  // elements: each array begins on a line of 64 bytes

int64_t Aligned(int64_t elements) {
  return (elements + kAlign - 1) / kAlign * kAlign;
}

// Lays arrays out one after the other in a block of host memory; their views are of where it goes.
class Packer {
 public:
  Packer(const Buffer& host, const Buffer& device)
      : host_(static_cast<int32_t*>(host.data())), place_(device ? device : host) {}

  // Room for an array; *view is where ops will find it.
  int32_t* Add(std::initializer_list<int64_t> shape, TensorView* view) {
    *view = TensorView::Make(static_cast<int32_t*>(place_.data()) + used_, DType::kI32, shape, place_.device());
    int32_t* data = host_ + used_;
    used_ += Aligned(view->elements());
    return data;
  }
  // Of an array's room only its first elements are in use, and nothing comes behind it.
  void Shorten(TensorView* last, int64_t elements) {
    used_ -= Aligned(last->elements()) - Aligned(elements);
    *last = last->first(elements);
  }
  size_t bytes() const { return static_cast<size_t>(used_) * sizeof(int32_t); }

 private:
  int32_t* const host_;
  const Buffer& place_;
  int64_t used_ = 0;
};

}  // namespace

StepInputBuilder::StepInputBuilder(const Limits& limits)
    : limits_(limits),
      slots_(static_cast<size_t>(limits.slots)),
      tables_(std::make_unique_for_overwrite<int32_t[]>(static_cast<size_t>(limits.slots) *
                                                        static_cast<size_t>(limits.max_blocks()))) {}

int64_t StepInputBuilder::MaxListWords() const {
  if (limits_.attention.kv_heads == 0) return 0;
  return cuda::AttentionListWords(limits_.attention, limits_.max_tokens, limits_.max_sequences());
}

size_t StepInputBuilder::MaxBytes() const {
  const int64_t tokens = limits_.max_tokens, sequences = limits_.max_sequences();
  const int64_t pages = limits_.max_blocks();
  const int64_t elements = 4 * Aligned(tokens)           // ids, positions, slots, score rows
                           + 3 * Aligned(sequences + 1)  // q_begin, lengths, sample rows
                           + Aligned(sequences * pages) + Aligned(MaxListWords());
  return static_cast<size_t>(elements) * sizeof(int32_t);
}

std::optional<StepInputBuilder> StepInputBuilder::Create(const Stream& stream, const Limits& limits) {
  StepInputBuilder builder(limits);
  for (Buffer& host : builder.host_) {
    host = Buffer::AllocateHost(stream, builder.MaxBytes());
    if (!host) return std::nullopt;
  }
  if (stream.device() == Device::kCpu) return builder;
  builder.device_ = Buffer::Allocate(stream, builder.MaxBytes());
  if (!builder.device_) return std::nullopt;
  return builder;
}

StepInputBuilder::Step StepInputBuilder::Build(Stream& stream, const StepPlan& plan, const DecodeShape* padded) {
  auto tokens = static_cast<int64_t>(plan.tokens.size()), sequences = static_cast<int64_t>(plan.sequences.size());
  int32_t pages = 1;
  int64_t sampling = 0, scores = 0;
  for (const PlannedSequence& sequence : plan.sequences) {
    pages = std::max(pages, sequence.num_blocks);
    sampling += sequence.sample;
    scores += sequence.num_prompt_scores;
  }
  int64_t rows = sampling;
  if (padded != nullptr) {
    CHECK(tokens == sequences && sequences <= padded->sequences && pages <= padded->pages && scores == 0);
    tokens = sequences = rows = padded->sequences;
    pages = padded->pages;
  }
  CHECK(tokens <= limits_.max_tokens && sequences <= limits_.max_sequences() && pages <= limits_.max_blocks());

  const Buffer& host = host_[turn_++ % host_.size()];
  Packer packer(host, device_);
  Step step;
  int32_t* id = packer.Add({tokens}, &step.inputs.ids);
  int32_t* position = packer.Add({tokens}, &step.inputs.positions);
  int32_t* slot = packer.Add({tokens}, &step.inputs.slots);
  int32_t* q_begin = packer.Add({sequences + 1}, &step.inputs.q_begin);
  int32_t* context_length = packer.Add({sequences}, &step.inputs.context_lengths);
  int32_t* sample_row = packer.Add({rows}, &step.padded_sample_rows);
  int32_t* score_row = packer.Add({scores}, &step.score_rows);
  int32_t* table = packer.Add({sequences, pages}, &step.inputs.block_tables);
  const int32_t *const q_begins = q_begin, *const lengths = context_length;
  const int64_t all_sequences = sequences;

  step.sample_rows = step.padded_sample_rows.first(sampling);

  int32_t row = 0, sampled = 0;
  *q_begin++ = 0;
  for (const PlannedSequence& sequence : plan.sequences) {
    const int32_t* blocks = BlocksOf(plan, sequence);
    std::fill(std::copy_n(blocks, sequence.num_blocks, table), table + pages, 0);
    table += pages;
    for (int32_t i = 0; i < sequence.num_prompt_scores; ++i) *score_row++ = row + i;
    for (int32_t i = 0; i < sequence.num_tokens; ++i) {
      const int32_t at = sequence.first_position + i;
      *id++ = plan.tokens[static_cast<size_t>(sequence.token_begin + i)];
      *position++ = at;
      *slot++ = blocks[at / limits_.page_size] * limits_.page_size + at % limits_.page_size;
    }
    int32_t& sampled_at = slots_[static_cast<size_t>(sequence.slot)].sampled_at;
    if (sequence.input_from_slot) id[-1] = -1 - sampled_at;
    row += sequence.num_tokens;
    if (sequence.sample) {
      *sample_row++ = row - 1;
      sampled_at = sampled++;
    }
    *q_begin++ = row;
    *context_length++ = sequence.first_position + sequence.num_tokens;
  }
  for (const auto planned = static_cast<int64_t>(plan.sequences.size()); sequences > planned; --sequences) {
    *id++ = 0;
    *position++ = 0;
    *slot++ = -1;
    *q_begin++ = row;
    *context_length++ = 0;
    table = std::fill_n(table, pages, 0);
  }
  std::fill_n(sample_row, rows - sampling, 0);
  if (limits_.attention.kv_heads > 0) {
    TensorView list;
    int32_t* words = packer.Add({cuda::AttentionListWords(limits_.attention, tokens, all_sequences)}, &list);
    step.inputs.attention_work =
        cuda::PlanAttention(limits_.attention, q_begins, lengths, all_sequences, tokens, words);
    packer.Shorten(&list, step.inputs.attention_work.list.elements());
    step.inputs.attention_work.list = list;
    if (padded != nullptr) {
      step.inputs.attention_work =
          cuda::MostDecodeWork(limits_.attention, all_sequences, int64_t{padded->pages} * limits_.page_size, list);
    }
  }
  if (device_) Copy(stream, device_.data(), stream.device(), host.data(), Device::kCpu, packer.bytes());
  return step;
}

// The slot's row of tables_ with the sequence's new blocks behind those that are known.
const int32_t* StepInputBuilder::BlocksOf(const StepPlan& plan, const PlannedSequence& sequence) {
  const auto at = static_cast<size_t>(sequence.slot);
  CHECK(sequence.known_blocks == 0 || sequence.known_blocks == slots_[at].blocks);
  int32_t* row = tables_.get() + at * static_cast<size_t>(limits_.max_blocks());
  std::copy_n(plan.block_ids.data() + sequence.block_begin, sequence.new_blocks(), row + sequence.known_blocks);
  slots_[at].blocks = sequence.num_blocks;
  return row;
}

}  // namespace altiplano
