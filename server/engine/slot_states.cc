#include "server/engine/slot_states.h"

#include <cstring>
#include <limits>
#include <utility>

namespace altiplano {

namespace {
constexpr size_t kUploads = 8;  // sequences with penalties that may begin at once without waiting for their copies
}  // namespace

SlotStates::SlotStates(int32_t slots, int64_t vocab, std::vector<TokenId> eos_ids)
    : vocab_(vocab), eos_ids_(std::move(eos_ids)), states_(static_cast<size_t>(slots)) {}

std::unique_ptr<SlotStates> SlotStates::Create(const Stream& stream, int32_t slots, int64_t vocab,
                                               std::vector<TokenId> eos_ids) {
  std::unique_ptr<SlotStates> states(new SlotStates(slots, vocab, std::move(eos_ids)));
  states->histories_ = Buffer::Allocate(stream, static_cast<size_t>(slots) * states->HistoryBytes());
  if (!states->histories_) return nullptr;
  if (stream.device() == Device::kCpu) return states;
  states->uploads_.resize(kUploads);
  for (Upload& upload : states->uploads_) {
    upload.host = Buffer::AllocateHost(stream, states->HistoryBytes());
    upload.copied = StreamEvent::Create(stream);
    if (!upload.host || upload.copied == nullptr) return nullptr;
  }
  return states;
}

size_t SlotStates::HistoryBytes() const {
  return (static_cast<size_t>(vocab_) * (sizeof(uint16_t) + sizeof(uint8_t)) + 63) / 64 * 64;
}

char* SlotStates::HistoryOf(int32_t slot) const {
  return static_cast<char*>(histories_.data()) + static_cast<size_t>(slot) * HistoryBytes();
}

void SlotStates::Init(Stream& stream, const SlotInit& init) {
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
  if (!sampling.NeedsHistory()) return;
  uploads_.empty() ? FillHistory(init, HistoryOf(init.slot)) : UploadHistory(stream, init);
}

void SlotStates::FillHistory(const SlotInit& init, char* history) const {
  std::memset(history, 0, HistoryBytes());
  auto* output_counts = reinterpret_cast<uint16_t*>(history);
  auto* in_prompt = reinterpret_cast<uint8_t*>(output_counts + vocab_);
  for (TokenId id : init.request->prompt) in_prompt[id] = 1;
  for (TokenId id : init.output_history) {
    if (output_counts[id] < std::numeric_limits<uint16_t>::max()) ++output_counts[id];
  }
}

void SlotStates::UploadHistory(Stream& stream, const SlotInit& init) {
  const Upload& upload = uploads_[turn_++ % uploads_.size()];
  upload.copied->Wait();  // an error sticks: whoever waits for the step learns of it
  FillHistory(init, static_cast<char*>(upload.host.data()));
  Copy(stream, HistoryOf(init.slot), stream.device(), upload.host.data(), Device::kCpu, HistoryBytes());
  upload.copied->Record(stream);
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
  if (sampling.NeedsHistory()) {
    params.counts_out = reinterpret_cast<uint16_t*>(HistoryOf(planned.slot));
    params.output_counts = params.counts_out;
    params.in_prompt = reinterpret_cast<const uint8_t*>(params.counts_out + vocab_);
  }
  return params;
}

}  // namespace altiplano
