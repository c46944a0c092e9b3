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
                       std::vector<TokenId> eos_ids, Peers peers)
    : communicator_(peers.communicator),
      previous_(peers.previous),
      next_(peers.next),
      stream_(std::move(stream)),
      llama_(std::move(llama)),
      cache_(std::move(cache)),
      slots_(limits.max_running, llama_->config().vocab, std::move(eos_ids)),
      inputs_(static_cast<int32_t>(llama_->limits().max_tokens), limits.max_running,
              static_cast<int32_t>(limits.max_context / cache_.shape().page_size) + 1,
              static_cast<int32_t>(cache_.shape().page_size)) {
  const auto rows = static_cast<size_t>(llama_->limits().max_logit_rows);
  rows_.reserve(rows);
  sampled_.reserve(rows);
  params_.reserve(rows);
  results_.resize(rows);
  num_top_.reserve(rows);
}

std::unique_ptr<RankWorker> RankWorker::Create(std::unique_ptr<Stream> stream, std::unique_ptr<Llama> llama,
                                               KvCache cache, Limits limits, std::vector<TokenId> eos_ids,
                                               Peers peers) {
  std::unique_ptr<RankWorker> worker(
      new RankWorker(std::move(stream), std::move(llama), std::move(cache), limits, std::move(eos_ids), peers));
  if (!worker->samples()) return worker;
  const int64_t rows = worker->llama_->limits().max_logit_rows, vocab = worker->llama_->config().vocab;
  worker->sample_scratch_ = Buffer::Allocate(Device::kCpu, std::max<size_t>(1, SampleScratchBytes(rows, vocab)));
  if (!worker->sample_scratch_) return nullptr;
  if (peers.communicator == nullptr) return worker;
  const int64_t columns = worker->llama_->shard_vocab() * peers.communicator->size();
  worker->gathered_ = Buffer::Allocate(Device::kCpu, static_cast<size_t>(rows * columns) * sizeof(float));
  return worker->gathered_ ? std::move(worker) : nullptr;
}

StepResult RankWorker::Execute(const StepPlan& plan) {
  const auto start = std::chrono::steady_clock::now();
  StepResult result;
  result.step = plan.step;
  for (const SlotInit& init : plan.slot_inits) slots_.Init(init);
  const bool samples = llama_->shard().last_stage();
  if (!ReceiveSampled(plan) || !ForwardStage(inputs_.Build(plan, slots_.last_sampled())) ||
      (samples && (!ScorePrompts(plan, &result) || !SampleTokens(plan, &result)))) {
    result.status = Aborted();
    return result;
  }
  if (std::string error = stream_->Synchronize(); !error.empty()) result.status = Status(Code::kInternal, error);
  result.device_time = std::chrono::steady_clock::now() - start;
  return result;
}

Status RankWorker::Aborted() const {
  std::string why = communicator_ != nullptr ? communicator_->error() : "";
  if (why.empty() && previous_ != nullptr) why = previous_->error();
  if (why.empty() && next_ != nullptr) why = next_->error();
  const Shard& shard = llama_->shard();
  const std::string where = shard.stages > 1 ? StrCat("stage ", shard.stage, ": ") : "";
  return Status(Code::kUnavailable, StrCat("the group of ranks ended: ", where, why));
}

bool RankWorker::ForwardStage(const StepInputs& inputs) {
  const Shard& shard = llama_->shard();
  const TensorView handed = llama_->residual(inputs.ids.dim(0));
  if (!shard.first_stage() && !previous_->Receive(*stream_, handed)) return false;
  if (!llama_->Forward(*stream_, inputs, cache_)) return false;
  return shard.last_stage() || next_->Send(*stream_, handed);
}

bool RankWorker::ReceiveSampled(const StepPlan& plan) {
  if (previous_ == nullptr || !llama_->shard().first_stage()) return true;
  bool needs_last = false;
  for (const PlannedSequence& sequence : plan.sequences) needs_last |= sequence.input_from_slot;
  // The step before may still be on its way through the stages: it is waited for only if this one needs its tokens.
  while (waiting_slots_.size() > (needs_last ? 0 : 1)) {
    const std::vector<int32_t>& slots = waiting_slots_.front();
    sampled_.resize(slots.size());
    const auto n = static_cast<int64_t>(slots.size());
    if (!previous_->Receive(*stream_, TensorView::Make(sampled_.data(), DType::kI32, {n}))) return false;
    for (size_t i = 0; i < slots.size(); ++i) slots_.Record(slots[i], sampled_[i]);
    waiting_slots_.pop_front();
  }
  std::vector<int32_t> slots;
  for (const PlannedSequence& sequence : plan.sequences) {
    if (sequence.sample) slots.push_back(sequence.slot);
  }
  if (!slots.empty()) waiting_slots_.push_back(std::move(slots));
  return true;
}

std::optional<TensorView> RankWorker::Logits() {
  const auto rows = static_cast<int64_t>(rows_.size());
  const TensorView part = llama_->Logits(*stream_, TensorView::Make(rows_.data(), DType::kI32, {rows}));
  if (communicator_ == nullptr) return part;
  TensorView whole;
  if (is_first()) {
    whole = TensorView::Make(gathered_.data(), DType::kF32, {rows, part.dim(1) * communicator_->size()});
  }
  if (!communicator_->AllGather(*stream_, whole, part)) return std::nullopt;
  // The last rank's part may reach past the vocabulary.
  return is_first() ? whole.columns(0, llama_->config().vocab) : whole;
}

// Prompt log-probabilities, in pieces that fit the logits' workspace.
bool RankWorker::ScorePrompts(const StepPlan& plan, StepResult* result) {
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
      const std::optional<TensorView> logits = Logits();
      if (!logits) return false;
      if (!is_first()) continue;
      Score(*stream_, {.results = results_.data(), .num_top = num_top_.data(), .logits = *logits});
      for (int32_t i = 0; i < n; ++i) scores.push_back(ToScore(results_[static_cast<size_t>(i)]));
    }
  }
  return true;
}

bool RankWorker::SampleTokens(const StepPlan& plan, StepResult* result) {
  const auto most = static_cast<size_t>(llama_->limits().max_logit_rows);
  std::vector<const PlannedSequence*> wanted;
  for (const PlannedSequence& sequence : plan.sequences) {
    if (sequence.sample) wanted.push_back(&sequence);
  }
  result->sampled.reserve(wanted.size());
  step_ids_.clear();
  for (size_t begin = 0; begin < wanted.size(); begin += most) {
    const size_t n = std::min(most, wanted.size() - begin);
    rows_.clear();
    for (size_t i = 0; i < n; ++i) {
      const PlannedSequence& sequence = *wanted[begin + i];
      rows_.push_back(sequence.token_begin + sequence.num_tokens - 1);
    }
    const std::optional<TensorView> logits = Logits();
    if (!logits) return false;
    sampled_.assign(n, 0);
    if (is_first()) {
      params_.clear();
      for (size_t i = 0; i < n; ++i) params_.push_back(slots_.Params(*wanted[begin + i]));
      Sample(
          *stream_,
          {.results = results_.data(), .params = params_.data(), .logits = *logits, .scratch = sample_scratch_.data()});
      for (size_t i = 0; i < n; ++i) {
        // A row that is not finite has no token; 0 keeps the step already planned well-formed until the sequence is
        // ended.
        sampled_[i] = results_[i].finite ? results_[i].token : 0;
        result->sampled.push_back(ToScore(results_[i]));
      }
    }
    if (!ShareSampled()) return false;
    for (size_t i = 0; i < n; ++i) slots_.Record(wanted[begin + i]->slot, sampled_[i]);
    step_ids_.insert(step_ids_.end(), sampled_.begin(), sampled_.end());
  }
  if (next_ == nullptr || step_ids_.empty()) return true;
  const auto n = static_cast<int64_t>(step_ids_.size());
  return next_->Send(*stream_, TensorView::Make(step_ids_.data(), DType::kI32, {n}));
}

bool RankWorker::ShareSampled() {
  if (communicator_ == nullptr) return true;
  return communicator_->Broadcast(
      *stream_, TensorView::Make(sampled_.data(), DType::kI32, {static_cast<int64_t>(sampled_.size())}));
}

Status RankWorker::WarmUp() {
  int32_t id = 0, position = 0, slot = 0, table = 0, length = 1;
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
  if (!ForwardStage(inputs)) return Aborted();
  if (!llama_->shard().last_stage()) return OkStatus();
  rows_.assign(1, 0);
  const std::optional<TensorView> logits = Logits();
  if (!logits) return Aborted();
  SampleParams params;
  params.temperature = 0;
  SampleResult result;
  if (is_first()) {
    Sample(*stream_, {.results = &result, .params = &params, .logits = *logits, .scratch = sample_scratch_.data()});
  }
  if (std::string error = stream_->Synchronize(); !error.empty()) return Status(Code::kInternal, error);
  if (!result.finite) {
    return Status(Code::kDataLoss,
                  "the first forward pass gave NaN or infinity: the checkpoint's weights are damaged or overflow in "
                  "this dtype");
  }
  return OkStatus();
}

}  // namespace altiplano
