#include "server/engine/rank_worker.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "server/base/check.h"
#include "server/base/strings.h"

namespace altiplano {

namespace {

TokenScore ToScore(const SampleResult& result) {
  TokenScore score;
  score.token = result.token;
  score.finite = result.finite;
  score.logprob = result.logprob;
  score.rank = result.rank;
  for (int32_t i = 0; i < result.num_top; ++i) score.top.push_back({result.top_ids[i], result.top_logprobs[i]});
  return score;
}

}  // namespace

RankWorker::RankWorker(std::unique_ptr<Stream> stream, std::unique_ptr<Llama> llama, KvCache cache, Limits limits,
                       std::vector<TokenId> eos_ids)
    : stream_(std::move(stream)),
      llama_(std::move(llama)),
      cache_(std::move(cache)),
      slots_(limits.max_running, llama_->config().vocab, std::move(eos_ids)),
      inputs_(static_cast<int32_t>(llama_->limits().max_tokens), limits.max_running,
              static_cast<int32_t>(limits.max_context / cache_.shape().page_size) + 1,
              static_cast<int32_t>(cache_.shape().page_size)) {
  const auto rows = static_cast<size_t>(llama_->limits().max_logit_rows);
  sample_scratch_ = Buffer::Allocate(
      Device::kCpu, std::max<size_t>(1, SampleScratchBytes(static_cast<int64_t>(rows), llama_->config().vocab)));
  CHECK(sample_scratch_);
  rows_.reserve(rows);
  params_.reserve(rows);
  results_.resize(rows);
  num_top_.reserve(rows);
}

StepResult RankWorker::Execute(const StepPlan& plan) {
  const auto start = std::chrono::steady_clock::now();
  StepResult result;
  result.step = plan.step;
  for (const SlotInit& init : plan.slot_inits) slots_.Init(init);
  if (!llama_->Forward(*stream_, inputs_.Build(plan, slots_.last_sampled()), cache_)) {
    result.status = Status(Code::kUnavailable, "the group of ranks was aborted");
    return result;
  }
  ScorePrompts(plan, &result);
  SampleTokens(plan, &result);
  if (std::string error = stream_->Synchronize(); !error.empty()) result.status = Status(Code::kInternal, error);
  result.device_time = std::chrono::steady_clock::now() - start;
  return result;
}

// Prompt log-probabilities, in pieces that fit the logits' workspace.
void RankWorker::ScorePrompts(const StepPlan& plan, StepResult* result) {
  for (const PlannedSequence& sequence : plan.sequences) {
    if (sequence.num_prompt_scores == 0) continue;
    const int32_t top = slots_.prompt_top(sequence.slot);
    std::vector<TokenScore>& scores = result->prompt_scores.emplace_back();
    const auto most = static_cast<int32_t>(llama_->limits().max_logit_rows);
    for (int32_t begin = 0; begin < sequence.num_prompt_scores; begin += most) {
      const int32_t n = std::min(most, sequence.num_prompt_scores - begin);
      rows_.clear();
      num_top_.assign(static_cast<size_t>(n), top);
      for (int32_t i = 0; i < n; ++i) {
        rows_.push_back(sequence.token_begin + begin + i);
        results_[static_cast<size_t>(i)].token =
            plan.prompt_score_ids[static_cast<size_t>(sequence.prompt_score_begin + begin + i)];
      }
      TensorView logits = llama_->Logits(*stream_, TensorView::Make(rows_.data(), DType::kI32, {n}));
      Score(*stream_, {.results = results_.data(), .num_top = num_top_.data(), .logits = logits});
      for (int32_t i = 0; i < n; ++i) scores.push_back(ToScore(results_[static_cast<size_t>(i)]));
    }
  }
}

void RankWorker::SampleTokens(const StepPlan& plan, StepResult* result) {
  const auto most = static_cast<size_t>(llama_->limits().max_logit_rows);
  std::vector<const PlannedSequence*> wanted;
  for (const PlannedSequence& sequence : plan.sequences) {
    if (sequence.sample) wanted.push_back(&sequence);
  }
  result->sampled.reserve(wanted.size());
  for (size_t begin = 0; begin < wanted.size(); begin += most) {
    const size_t n = std::min(most, wanted.size() - begin);
    rows_.clear();
    params_.clear();
    for (size_t i = 0; i < n; ++i) {
      const PlannedSequence& sequence = *wanted[begin + i];
      rows_.push_back(sequence.token_begin + sequence.num_tokens - 1);
      params_.push_back(slots_.Params(sequence));
    }
    const auto count = static_cast<int64_t>(n);
    TensorView logits = llama_->Logits(*stream_, TensorView::Make(rows_.data(), DType::kI32, {count}));
    Sample(*stream_,
           {.results = results_.data(), .params = params_.data(), .logits = logits, .scratch = sample_scratch_.data()});
    for (size_t i = 0; i < n; ++i) {
      // A row that is not finite has no token; 0 keeps the step already planned well-formed until the sequence is
      // ended.
      slots_.Record(wanted[begin + i]->slot, results_[i].finite ? results_[i].token : 0);
      result->sampled.push_back(ToScore(results_[i]));
    }
  }
}

Status RankWorker::WarmUp() {
  int32_t id = 0, position = 0, slot = 0, table = 0, length = 1, row = 0;
  int32_t q_begin[2] = {0, 1};
  auto view = [](int32_t* data, std::initializer_list<int64_t> shape) {
    return TensorView::Make(data, DType::kI32, shape);
  };
  StepInputs inputs;
  inputs.ids = view(&id, {1});
  inputs.positions = view(&position, {1});
  inputs.slots = view(&slot, {1});
  inputs.q_begin = view(q_begin, {2});
  inputs.context_lengths = view(&length, {1});
  inputs.block_tables = view(&table, {1, 1});
  if (!llama_->Forward(*stream_, inputs, cache_)) {
    return Status(Code::kUnavailable, "the group of ranks was aborted");
  }
  SampleParams params;
  params.temperature = 0;
  SampleResult result;
  TensorView logits = llama_->Logits(*stream_, view(&row, {1}));
  Sample(*stream_, {.results = &result, .params = &params, .logits = logits, .scratch = sample_scratch_.data()});
  if (std::string error = stream_->Synchronize(); !error.empty()) return Status(Code::kInternal, error);
  if (!result.finite) {
    return Status(Code::kDataLoss,
                  "the first forward pass gave NaN or infinity: the checkpoint's weights are damaged or overflow in "
                  "this dtype");
  }
  return OkStatus();
}

}  // namespace altiplano
