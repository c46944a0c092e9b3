#include "server/engine/rank_worker.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "kernels/cpu/thread_team.h"
#include "kernels/trace.h"
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

// Of a GPU's memory: with less than that left no more graphs are made. What a graph takes of it only its driver knows,
// and what loads later needs some, too.
constexpr uint64_t kFreeForGraphsPart = 256;

// Elements [begin, begin + n) of a vector of i32.
TensorView Slice(const TensorView& x, int64_t begin, int64_t n) {
  return TensorView::Make(x.as<int32_t>() + begin, DType::kI32, {n}, x.device);
}

}  // namespace

RankWorker::RankWorker(std::unique_ptr<Stream> stream, std::unique_ptr<Llama> llama, Peers peers)
    : communicator_(peers.communicator),
      previous_(peers.previous),
      next_(peers.next),
      stream_(std::move(stream)),
      llama_(std::move(llama)) {}

std::unique_ptr<RankWorker> RankWorker::Create(std::unique_ptr<Stream> stream, std::unique_ptr<Llama> llama,
                                               Limits limits, std::vector<TokenId> eos_ids, Peers peers) {
  std::unique_ptr<RankWorker> worker(new RankWorker(std::move(stream), std::move(llama), peers));
  return worker->AllocateBuffers(limits, std::move(eos_ids)) ? std::move(worker) : nullptr;
}

bool RankWorker::AllocateBuffers(const Limits& limits, std::vector<TokenId> eos_ids) {
  const int64_t rows = llama_->limits().max_logit_rows, vocab = llama_->config().vocab;
  Limits of_model = limits;
  if (stream_->device() == Device::kCuda) of_model.attention = llama_->attention_sizes(*stream_, limits.page_size);
  inputs_ = StepInputBuilder::Create(*stream_, of_model);
  sampled_ = Buffer::Allocate(*stream_, static_cast<size_t>(limits.max_sequences()) * sizeof(int32_t));
  if (!inputs_ || !sampled_) return false;
  for (Pending& pending : pending_) {
    pending.done = StreamEvent::Create(*stream_);
    if (pending.done == nullptr) return false;
    if (!samples()) continue;
    const auto most_results = static_cast<size_t>(limits.max_tokens) + static_cast<size_t>(limits.max_sequences());
    pending.results = Buffer::AllocateHost(*stream_, most_results * sizeof(SampleResult));
    if (!pending.results) return false;
  }
  if (!samples()) return true;
  slots_ = SlotStates::Create(*stream_, limits.slots, vocab, std::move(eos_ids));
  const size_t scratch_bytes = SampleScratchBytes(rows, vocab, stream_->device());
  sample_scratch_ = Buffer::Allocate(*stream_, std::max<size_t>(1, scratch_bytes));
  if (slots_ == nullptr || !sample_scratch_) return false;
  if (communicator_ == nullptr) return true;
  const int64_t columns = llama_->shard_vocab() * communicator_->size();
  gathered_ = Buffer::Allocate(*stream_, static_cast<size_t>(rows * columns) * sizeof(float));
  return static_cast<bool>(gathered_);
}

void RankWorker::SetCache(KvCache cache) {
  CHECK(graphs_.empty());  // they know the addresses of the cache
  // The system hands out memory when it is first written to: for the first pages that is now, and not while the first
  // request waits. They are zero already.
  if (stream_->device() == Device::kCpu) {
    const KvCache::Shape& shape = cache.shape();
    const size_t bytes =
        shape.page_bytes() / static_cast<size_t>(2 * shape.layers);  // of a page of K or V in one layer
    for (int64_t layer = 0; layer < shape.layers; ++layer) {
      std::memset(cache.k_pages(layer).data, 0, bytes);
      std::memset(cache.v_pages(layer).data, 0, bytes);
    }
  }
  cache_ = std::move(cache);
}

bool RankWorker::TimeSteps() {
  CHECK(enqueued_ == 0);
  timer_ = StepTimer::Create(*stream_);
  return timer_ != nullptr;
}

Status RankWorker::CaptureDecodeGraphs() {
  CHECK(cache_.has_value() && graphs_.empty());
  DecodeGraphLimits limits;
  int64_t most = std::min<int64_t>(inputs_->limits().max_sequences(), llama_->limits().max_logit_rows);
  if (communicator_ != nullptr) {
    const size_t token_bytes = Llama::ResidualBytes(llama_->config(), 1);
    most = static_cast<int64_t>(std::min<size_t>(most, communicator_->most_captured_bytes() / token_bytes));
  }
  limits.max_sequences = static_cast<int32_t>(most);
  limits.max_pages = inputs_->limits().max_blocks();
  limits.page_size = inputs_->limits().page_size;
  std::vector<DecodeShape> shapes = PlanDecodeGraphs(limits);
  const auto compute = [this](const StepInputBuilder::Step& step) {
    if (!llama_->Forward(*stream_, step.inputs, *cache_)) return false;
    if (llama_->shard().last_stage()) llama_->Logits(*stream_, step.padded_sample_rows);
    return true;
  };
  // All runs come before the first capture: to make a graph, the driver may wait for the whole GPU, and so for kernels
  // of another rank on it that wait for this one's next run. The largest run first: what they make a driver take, all
  // have.
  int32_t ran = 0;  // with how many sequences
  for (auto shape = shapes.rbegin(); shape != shapes.rend(); ++shape) {
    if (std::exchange(ran, shape->sequences) == shape->sequences) continue;
    if (!compute(BuildInputs(StepPlan(), &*shape))) return Aborted();
    if (const std::string error = stream_->Synchronize(); !error.empty()) return Status(Code::kInternal, error);
    ++prepared_;
  }
  std::vector<std::unique_ptr<StepGraph>> graphs;
  size_t free_bytes = 0, most_bytes = 0;  // before the last one was made; that one has taken
  for (const DecodeShape& shape : shapes) {
    const StepInputBuilder::Step step = BuildInputs(StepPlan(), &shape);
    std::string error = stream_->Synchronize();  // the step's arrays are not part of the graph
    if (!error.empty()) return Status(Code::kInternal, error);
    const MemoryInfo memory = QueryMemory(stream_->device(), stream_->ordinal());
    if (!graphs.empty()) most_bytes = std::max(most_bytes, free_bytes - std::min(free_bytes, memory.free_bytes));
    free_bytes = memory.free_bytes;
    if (free_bytes < memory.total_bytes / kFreeForGraphsPart + most_bytes) break;
    graphs.push_back(StepGraph::Capture(
        *stream_, [&] { return compute(step); }, &error));
    if (graphs.back() != nullptr) {
      ++prepared_;
      continue;
    }
    if (error.empty()) return Aborted();
    return Status(Code::kInternal, StrCat("capturing the graph of a step that decodes ", shape.sequences,
                                          " sequences: ", error, "; --cuda-graphs off does without"));
  }
  graph_shapes_ = std::move(shapes);
  graphs_ = std::move(graphs);
  return OkStatus();
}

void RankWorker::KeepDecodeGraphs(size_t n) {
  CHECK(n <= graphs_.size());
  graphs_.resize(n);
}

uint64_t RankWorker::progress() const {
  return stream_->device() == Device::kCpu ? stream_->team().runs() : prepared_.load();
}

StepInputBuilder::Step RankWorker::BuildInputs(const StepPlan& plan, const DecodeShape* padded) {
  StepInputBuilder::Step step = inputs_->Build(*stream_, plan, padded);
  step.inputs.sampled = TensorView::Make(sampled_.data(), DType::kI32,
                                         {static_cast<int64_t>(sampled_.bytes() / sizeof(int32_t))}, stream_->device());
  return step;
}

Status RankWorker::Enqueue(const StepPlan& plan) {
  CHECK(cache_.has_value());
  Pending& pending = pending_[enqueued_++ % 2];
  pending.begin = std::chrono::steady_clock::now();
  pending.step = plan.step;
  pending.num_scores.clear();
  pending.num_sampled = 0;
  int32_t num_scores = 0;
  for (const PlannedSequence& sequence : plan.sequences) {
    if (sequence.num_prompt_scores > 0) pending.num_scores.push_back(sequence.num_prompt_scores);
    num_scores += sequence.num_prompt_scores;
    pending.num_sampled += sequence.sample;
  }
  if (samples()) {
    for (const SlotInit& init : plan.slot_inits) slots_->Init(*stream_, init);
  }
  if (!ReceiveSampled(plan)) return Aborted();
  const size_t shape = FindDecodeShape(graph_shapes_, plan);
  const bool replays = shape < graphs_.size();
  const TraceRange range(replays                       ? "step from a graph"
                         : plan.num_prefill_tokens > 0 ? "step with prompts"
                                                       : "step",
                         plan.step);
  const StepInputBuilder::Step step = BuildInputs(plan, replays ? &graph_shapes_[shape] : nullptr);
  const auto tokens = static_cast<int64_t>(plan.tokens.size());
  if (timer_ != nullptr) timer_->Begin(*stream_);
  if (!ForwardStage(step.inputs, tokens, replays ? graphs_[shape].get() : nullptr)) return Aborted();
  if (llama_->shard().last_stage()) {
    auto* results = static_cast<SampleResult*>(pending.results.data());
    if (!ScorePrompts(plan, step.score_rows, results) ||
        !SampleTokens(plan, step.sample_rows, replays, samples() ? results + num_scores : nullptr)) {
      return Aborted();
    }
  }
  if (timer_ != nullptr) {
    timer_->End(*stream_,
                {.sequences = static_cast<int32_t>(plan.sequences.size()),
                 .decodes = plan.num_prefill_tokens == 0,
                 .from_graph = replays},
                pending.begin);
  }
  pending.done->Record(*stream_);
  const std::string error = stream_->Error();
  pending.end = pending.done->Passed() ? std::chrono::steady_clock::now() : std::chrono::steady_clock::time_point();
  return error.empty() ? OkStatus() : Status(Code::kInternal, error);
}

StepResult RankWorker::Collect(StepTimes* times) {
  const Pending& pending = pending_[collected_++ % 2];
  StepResult result;
  result.step = pending.step;
  if (const std::string error = pending.done->Wait(); !error.empty()) {
    result.status = Status(Code::kInternal, error);
    return result;
  }
  if (timer_ != nullptr) {
    const StepTimes taken = timer_->Take();
    if (times != nullptr) *times = taken;
  }
  const auto unset = std::chrono::steady_clock::time_point();
  const auto end = pending.end == unset ? std::chrono::steady_clock::now() : pending.end;
  result.device_time = end - std::max(pending.begin, last_end_);
  last_end_ = end;
  if (!samples()) return result;
  const auto* next = static_cast<const SampleResult*>(pending.results.data());
  for (const int32_t n : pending.num_scores) {
    std::vector<TokenScore>& scores = result.prompt_scores.emplace_back();
    for (int32_t i = 0; i < n; ++i) scores.push_back(ToScore(*next++));
  }
  result.sampled.reserve(static_cast<size_t>(pending.num_sampled));
  for (int32_t i = 0; i < pending.num_sampled; ++i) result.sampled.push_back(ToScore(*next++));
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

bool RankWorker::ReceiveSampled(const StepPlan& plan) {
  if (previous_ == nullptr || !llama_->shard().first_stage()) return true;
  int64_t samples = 0;
  bool needs_last = false;
  for (const PlannedSequence& sequence : plan.sequences) {
    samples += sequence.sample;
    needs_last |= sequence.input_from_slot;
  }
  // The step before may still be on its way through the stages: it is waited for only if this one needs its tokens.
  while (waiting_ids_.size() > (needs_last ? 0 : 1)) {
    const TensorView ids = TensorView::Make(sampled_.data(), DType::kI32, {waiting_ids_.front()}, stream_->device());
    if (!previous_->Receive(*stream_, ids)) return false;
    waiting_ids_.pop_front();
  }
  if (samples > 0) waiting_ids_.push_back(samples);
  return true;
}

bool RankWorker::ForwardStage(const StepInputs& inputs, int64_t tokens, const StepGraph* graph) {
  const Shard& shard = llama_->shard();
  const TensorView handed = llama_->residual(tokens);  // not what a step was padded with
  if (!shard.first_stage() && !previous_->Receive(*stream_, handed)) return false;
  if (graph != nullptr) {
    graph->Launch(*stream_);
    if (communicator_ != nullptr && !communicator_->error().empty()) return false;
  } else if (!llama_->Forward(*stream_, inputs, *cache_)) {
    return false;
  }
  return shard.last_stage() || next_->Send(*stream_, handed);
}

std::optional<TensorView> RankWorker::WholeLogits(const TensorView& part) {
  if (communicator_ == nullptr) return part;
  TensorView whole;
  if (is_first()) {
    whole = TensorView::Make(gathered_.data(), DType::kF32, {part.dim(0), part.dim(1) * communicator_->size()},
                             stream_->device());
  }
  if (!communicator_->AllGather(*stream_, whole, part)) return std::nullopt;
  // The last rank's part may reach past the vocabulary.
  return is_first() ? whole.columns(0, llama_->config().vocab) : whole;
}

// Prompt log-probabilities, in pieces that fit the logits' workspace.
bool RankWorker::ScorePrompts(const StepPlan& plan, const TensorView& rows, SampleResult* results) {
  if (is_first()) {
    num_top_.clear();
    for (const PlannedSequence& sequence : plan.sequences) {
      for (int32_t i = 0; i < sequence.num_prompt_scores; ++i) {
        results[num_top_.size()].token = plan.prompt_score_ids[static_cast<size_t>(sequence.prompt_score_begin + i)];
        num_top_.push_back(slots_->prompt_top(sequence.slot));
      }
    }
  }
  const int64_t most = llama_->limits().max_logit_rows;
  for (int64_t begin = 0; begin < rows.dim(0); begin += most) {
    const TensorView part = llama_->Logits(*stream_, Slice(rows, begin, std::min(most, rows.dim(0) - begin)));
    const std::optional<TensorView> logits = WholeLogits(part);
    if (!logits) return false;
    if (!is_first()) continue;
    Score(*stream_, {.results = results + begin,
                     .num_top = num_top_.data() + begin,
                     .logits = *logits,
                     .scratch = sample_scratch_.data()});
  }
  return true;
}

bool RankWorker::SampleTokens(const StepPlan& plan, const TensorView& rows, bool have_logits, SampleResult* results) {
  if (rows.dim(0) == 0) return true;
  const TensorView tokens = TensorView::Make(sampled_.data(), DType::kI32, {rows.dim(0)}, stream_->device());
  if (is_first()) {
    params_.clear();
    for (const PlannedSequence& sequence : plan.sequences) {
      if (sequence.sample) params_.push_back(slots_->Params(sequence));
    }
  }
  const int64_t most = llama_->limits().max_logit_rows;
  for (int64_t begin = 0; begin < rows.dim(0); begin += most) {
    const int64_t n = std::min(most, rows.dim(0) - begin);
    const TensorView part = have_logits ? llama_->logits(n) : llama_->Logits(*stream_, Slice(rows, begin, n));
    const std::optional<TensorView> logits = WholeLogits(part);
    if (!logits) return false;
    if (!is_first()) continue;
    Sample(*stream_, {.results = results + begin,
                      .tokens = Slice(tokens, begin, n),
                      .params = params_.data() + begin,
                      .logits = *logits,
                      .scratch = sample_scratch_.data()});
  }
  if (communicator_ != nullptr && !communicator_->Broadcast(*stream_, tokens)) return false;
  return next_ == nullptr || next_->Send(*stream_, tokens);
}

// A prompt of all tokens, in sequences that are no longer than may be, with log-probabilities of as many as one call
// for logits takes.
Status RankWorker::BeginWarmUp(int32_t tokens, KvCache::Shape shape) {
  auto request = std::make_shared<Request>();
  request->sampling.temperature = 0;
  request->sampling.prompt_top_logprobs = 0;
  StepPlan plan;
  plan.tokens.assign(static_cast<size_t>(tokens), 0);
  const auto page_size = static_cast<int32_t>(shape.page_size);
  shape.pages = 0;
  for (int32_t begin = 0; begin < tokens;) {
    PlannedSequence sequence;
    sequence.slot = static_cast<int32_t>(plan.sequences.size());
    sequence.token_begin = begin;
    sequence.num_tokens = std::min(tokens - begin, inputs_->limits().max_context);
    sequence.block_begin = static_cast<int32_t>(shape.pages);
    sequence.num_blocks = (sequence.num_tokens + page_size - 1) / page_size;
    sequence.sample = true;
    if (begin == 0) {
      const auto most_rows = static_cast<int32_t>(llama_->limits().max_logit_rows);
      sequence.num_prompt_scores = std::min(sequence.num_tokens - 1, most_rows);
    }
    begin += sequence.num_tokens;
    shape.pages += sequence.num_blocks;
    plan.sequences.push_back(sequence);
    plan.slot_inits.push_back({.slot = sequence.slot, .sequence = 0, .request = request, .output_history = {}});
  }
  for (int32_t page = 0; page < shape.pages; ++page) plan.block_ids.push_back(page);
  plan.prompt_score_ids.assign(static_cast<size_t>(plan.sequences[0].num_prompt_scores), 0);

  cache_ = KvCache::Create(shape, *stream_);
  if (!cache_) {
    return Status(Code::kResourceExhausted,
                  StrCat("no memory for the KV blocks of one step of ", tokens,
                         " tokens: ", HumanBytes(shape.page_bytes() * static_cast<uint64_t>(shape.pages))));
  }
  warm_up_ = std::move(plan);
  return OkStatus();
}

Status RankWorker::WarmUp() {
  RETURN_IF_ERROR(Enqueue(warm_up_));
  const StepResult result = Collect();
  RETURN_IF_ERROR(result.status);
  for (const TokenScore& score : result.sampled) {
    if (score.finite) continue;
    return Status(Code::kDataLoss,
                  "the first forward pass gave NaN or infinity: the checkpoint's weights are damaged or overflow in "
                  "this dtype");
  }
  return OkStatus();
}

void RankWorker::EndWarmUp() {
  cache_.reset();
  warm_up_ = {};
}

}  // namespace altiplano
