// Structs are taken apart by structured bindings: one that gets a new member does not compile until it is sent.
#include "server/cluster/plan_proto.h"

#include <utility>

namespace altiplano::cluster {

namespace {

template <typename Values, typename Repeated>
void Append(const Values& values, Repeated* out) {
  out->Add(values.begin(), values.end());
}

void SequenceToProto(const PlannedSequence& planned, v1::PlannedSequence* out) {
  const auto& [request, sequence, slot, first_position, num_tokens, token_begin, block_begin, num_blocks, known_blocks,
               input_from_slot, sample, ban_stops, num_prompt_scores, prompt_score_begin] = planned;
  out->set_request(request);
  out->set_sequence(sequence);
  out->set_slot(slot);
  out->set_first_position(first_position);
  out->set_num_tokens(num_tokens);
  out->set_token_begin(token_begin);
  out->set_block_begin(block_begin);
  out->set_num_blocks(num_blocks);
  out->set_known_blocks(known_blocks);
  out->set_input_from_slot(input_from_slot);
  out->set_sample(sample);
  out->set_ban_stops(ban_stops);
  out->set_num_prompt_scores(num_prompt_scores);
  out->set_prompt_score_begin(prompt_score_begin);
}

PlannedSequence SequenceFromProto(const v1::PlannedSequence& in) {
  return {in.request(),           in.sequence(),          in.slot(),        in.first_position(),
          in.num_tokens(),        in.token_begin(),       in.block_begin(), in.num_blocks(),
          in.known_blocks(),      in.input_from_slot(),   in.sample(),      in.ban_stops(),
          in.num_prompt_scores(), in.prompt_score_begin()};
}

void SamplingToProto(const SamplingParams& params, v1::Sampling* out) {
  const auto& [temperature, top_k, top_p, min_p, presence, frequency, repetition, seed, logit_bias, top_logprobs,
               prompt_top_logprobs] = params;
  out->set_temperature(temperature);
  out->set_top_k(top_k);
  out->set_top_p(top_p);
  out->set_min_p(min_p);
  out->set_presence_penalty(presence);
  out->set_frequency_penalty(frequency);
  out->set_repetition_penalty(repetition);
  out->set_seed(seed);
  for (const auto& [id, value] : logit_bias) {
    out->add_bias_ids(id);
    out->add_bias_values(value);
  }
  out->set_top_logprobs(top_logprobs);
  out->set_prompt_top_logprobs(prompt_top_logprobs);
}

SamplingParams SamplingFromProto(const v1::Sampling& in) {
  SamplingParams params{in.temperature(),
                        in.top_k(),
                        in.top_p(),
                        in.min_p(),
                        in.presence_penalty(),
                        in.frequency_penalty(),
                        in.repetition_penalty(),
                        in.seed(),
                        {},
                        in.top_logprobs(),
                        in.prompt_top_logprobs()};
  for (int i = 0; i < in.bias_ids_size(); ++i) params.logit_bias.emplace_back(in.bias_ids(i), in.bias_values(i));
  return params;
}

void InitToProto(const SlotInit& init, v1::SlotInit* out) {
  const auto& [slot, sequence, request, output_history] = init;
  out->set_slot(slot);
  out->set_sequence(sequence);
  if (request->sampling.NeedsHistory()) Append(request->prompt, out->mutable_prompt());
  Append(request->stop.token_ids, out->mutable_stop_ids());
  out->set_ignore_eos(request->stop.ignore_eos);
  SamplingToProto(request->sampling, out->mutable_sampling());
  Append(output_history, out->mutable_output_history());
}

SlotInit InitFromProto(const v1::SlotInit& in) {
  auto request = std::make_shared<Request>();
  request->prompt.assign(in.prompt().begin(), in.prompt().end());
  request->stop.token_ids.assign(in.stop_ids().begin(), in.stop_ids().end());
  request->stop.ignore_eos = in.ignore_eos();
  request->sampling = SamplingFromProto(in.sampling());
  return {in.slot(), in.sequence(), std::move(request), {in.output_history().begin(), in.output_history().end()}};
}

void ScoreToProto(const TokenScore& score, v1::TokenScore* out) {
  const auto& [token, finite, logprob, rank, top] = score;
  out->set_token(token);
  out->set_finite(finite);
  out->set_logprob(logprob);
  out->set_rank(rank);
  for (const auto& [id, value] : top) {
    out->add_top_tokens(id);
    out->add_top_logprobs(value);
  }
}

// *status: an error where it cannot be.
TokenScore ScoreFromProto(const v1::TokenScore& in, Status* status) {
  TokenScore score{in.token(), in.finite(), in.logprob(), in.rank(), {}};
  if (in.top_tokens_size() != in.top_logprobs_size()) {
    *status = Status(Code::kInternal, "alternatives without log-probabilities");
    return score;
  }
  for (int i = 0; i < in.top_tokens_size(); ++i) score.top.push_back({in.top_tokens(i), in.top_logprobs(i)});
  return score;
}

Code CodeFromProto(int32_t code) {
  const bool known = code > static_cast<int>(Code::kOk) && code <= static_cast<int>(Code::kUnauthenticated);
  return known ? static_cast<Code>(code) : Code::kUnknown;
}

}  // namespace

void PlanToProto(const StepPlan& plan, v1::Plan* out) {
  const auto& [step, sequences, tokens, block_ids, prompt_score_ids, slot_inits, num_prefill_tokens] = plan;
  out->set_step(step);
  for (const PlannedSequence& sequence : sequences) SequenceToProto(sequence, out->add_sequences());
  Append(tokens, out->mutable_tokens());
  Append(block_ids, out->mutable_block_ids());
  Append(prompt_score_ids, out->mutable_prompt_score_ids());
  for (const SlotInit& init : slot_inits) InitToProto(init, out->add_slot_inits());
  out->set_num_prefill_tokens(num_prefill_tokens);
}

std::shared_ptr<const StepPlan> PlanFromProto(const v1::Plan& in) {
  for (const v1::SlotInit& init : in.slot_inits()) {
    if (init.sampling().bias_ids_size() != init.sampling().bias_values_size()) return nullptr;
  }
  auto plan = std::make_shared<StepPlan>();
  plan->step = in.step();
  for (const v1::PlannedSequence& sequence : in.sequences()) plan->sequences.push_back(SequenceFromProto(sequence));
  plan->tokens.assign(in.tokens().begin(), in.tokens().end());
  plan->block_ids.assign(in.block_ids().begin(), in.block_ids().end());
  plan->prompt_score_ids.assign(in.prompt_score_ids().begin(), in.prompt_score_ids().end());
  for (const v1::SlotInit& init : in.slot_inits()) plan->slot_inits.push_back(InitFromProto(init));
  plan->num_prefill_tokens = in.num_prefill_tokens();
  return plan;
}

void ResultToProto(const StepResult& result, v1::StepDone* out) {
  const auto& [step, status, sampled, prompt_scores, device_time] = result;
  out->set_step(step);
  if (!status.ok()) {
    out->set_code(static_cast<int32_t>(status.code()));
    return out->set_error(status.message().empty() ? "failed" : status.message());
  }
  for (const TokenScore& score : sampled) ScoreToProto(score, out->add_sampled());
  for (const auto& scores : prompt_scores) {
    v1::PromptScores* prompt = out->add_prompt_scores();
    for (const TokenScore& score : scores) ScoreToProto(score, prompt->add_scores());
  }
  out->set_device_nanoseconds(std::chrono::nanoseconds(device_time).count());
}

StepResult ResultFromProto(const v1::StepDone& in) {
  StepResult result;
  result.step = in.step();
  if (!in.error().empty()) result.status = Status(CodeFromProto(in.code()), in.error());
  for (const v1::TokenScore& score : in.sampled()) result.sampled.push_back(ScoreFromProto(score, &result.status));
  for (const v1::PromptScores& prompt : in.prompt_scores()) {
    std::vector<TokenScore>& scores = result.prompt_scores.emplace_back();
    for (const v1::TokenScore& score : prompt.scores()) scores.push_back(ScoreFromProto(score, &result.status));
  }
  result.device_time = std::chrono::nanoseconds(in.device_nanoseconds());
  return result;
}

}  // namespace altiplano::cluster
