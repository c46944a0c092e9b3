#include "server/model/llama.h"

#include <cmath>
#include <utility>

#include "kernels/comm/link.h"
#include "kernels/cuda/attention_scratch.h"
#include "kernels/cuda/backend.h"
#include "kernels/cuda/linear_plan.h"
#include "kernels/ops.h"
#include "kernels/trace.h"
#include "server/base/check.h"

namespace altiplano {

// A tensor of the workspace; each begins at a multiple of 64 bytes.
struct Llama::WorkspacePart {
  TensorView Llama::*view;
  int64_t rows, columns;
  DType dtype;
  size_t bytes() const { return (static_cast<size_t>(rows * columns) * SizeOf(dtype) + 63) / 64 * 64; }
};

std::vector<Llama::WorkspacePart> Llama::WorkspaceParts(const ModelConfig& config, const Shard& shard,
                                                        const Limits& limits, DType act) {
  const int64_t hidden = config.hidden, dim = config.head_dim, ffn = shard.ffn(config);
  const int64_t q_size = shard.q_heads(config) * dim, kv_size = shard.kv_heads(config) * dim;
  const int64_t tokens = limits.max_tokens, rows = shard.last_stage() ? limits.max_logit_rows : 0;
  const bool sums = shard.size > 1, splits = limits.max_context > 0 && !limits.batch_invariant && act == DType::kBF16;
  const size_t scratch_bytes = cuda::AttentionScratchBytes({.q_heads = shard.q_heads(config),
                                                            .kv_heads = shard.kv_heads(config),
                                                            .dim = dim,
                                                            .multiprocessors = cuda::kMostMultiprocessors},
                                                           tokens, limits.max_context);
  return {
      {&Llama::residual_, tokens, hidden, DType::kF32},
      {&Llama::delta_, sums ? tokens : 0, hidden, DType::kF32},
      {&Llama::normed_, tokens, hidden, act},
      {&Llama::qkv_, tokens, q_size + 2 * kv_size, act},
      {&Llama::attention_, tokens, q_size, act},
      {&Llama::gate_up_, tokens, 2 * ffn, act},
      {&Llama::ffn_, tokens, ffn, act},
      {&Llama::rows_residual_, rows, hidden, DType::kF32},
      {&Llama::rows_delta_, sums ? rows : 0, hidden, DType::kF32},
      {&Llama::rows_normed_, rows, hidden, act},
      {&Llama::logits_, rows, shard.vocab(config), DType::kF32},
      {&Llama::scratch_, 1, static_cast<int64_t>(scratch_bytes / sizeof(float)), DType::kF32},
      {&Llama::linear_scratch_, 1, splits ? static_cast<int64_t>(kLinearScratchBytes / sizeof(float)) : 0, DType::kF32},
  };
}

std::unique_ptr<Llama> Llama::Create(Stream& stream, const ModelConfig& config, Shard shard, LlamaWeights weights,
                                     Limits limits, Communicator* communicator) {
  CHECK(shard.size == 1 || communicator != nullptr);
  std::unique_ptr<Llama> llama(new Llama(config, shard, std::move(weights), limits, communicator));
  if (!llama->AllocateWorkspace(stream)) return nullptr;
  if (!limits.batch_invariant) PrepareLinear(stream, llama->linear_scratch());
  return llama;
}

uint64_t Llama::ResidualBytes(const ModelConfig& config, int64_t tokens) {
  return static_cast<uint64_t>(tokens * config.hidden) * SizeOf(DType::kF32);
}

uint64_t Llama::LinkBytes(const ModelConfig& config, const Limits& limits) {
  return kCudaLinkSlots * ResidualBytes(config, limits.max_tokens);
}

int64_t Llama::AllReduces(const ModelConfig& config, const Shard& shard) {
  return shard.size == 1 ? 0 : 2 * shard.layers(config) + (shard.first_stage() ? 1 : 0);
}

Llama::EarlyWeights Llama::EarlyWeightBytes(const ModelConfig& config, const Shard& shard) {
  const auto early = [&](int64_t rows) { return cuda::LinearEarlyBytes(1, rows, config.hidden); };
  return {.qkv = early((shard.q_heads(config) + 2 * shard.kv_heads(config)) * config.head_dim),
          .gate_up = early(2 * shard.ffn(config)),
          .head = early(shard.vocab(config))};
}

uint64_t Llama::WorkspaceBytes(const ModelConfig& config, const Shard& shard, const Limits& limits, DType act) {
  uint64_t total = 0;
  for (const WorkspacePart& part : WorkspaceParts(config, shard, limits, act)) total += part.bytes();
  return total;
}

bool Llama::AllocateWorkspace(const Stream& stream) {
  constexpr size_t kSummed = 2;  // the first parts
  const DType act = weights_.layers.front().qkv.dtype;
  const std::vector<WorkspacePart> parts = WorkspaceParts(config_, shard_, limits_, act);
  size_t bytes = WorkspaceBytes(config_, shard_, limits_, act);
  const size_t summed_bytes = parts[0].bytes() + parts[1].bytes();
  void* summed = nullptr;
  if (!alone() && !communicator_->AllocateSummed(stream, summed_bytes, &summed)) return false;
  if (summed != nullptr) bytes -= summed_bytes;
  workspace_ = Buffer::Allocate(stream, bytes);
  if (!workspace_) return false;
  char* next = static_cast<char*>(summed != nullptr ? summed : workspace_.data());
  for (size_t i = 0; i < parts.size(); ++i) {
    const WorkspacePart& part = parts[i];
    if (i == kSummed && summed != nullptr) next = static_cast<char*>(workspace_.data());
    this->*part.view = TensorView::Make(next, part.dtype, {part.rows, part.columns}, stream.device());
    next += part.bytes();
  }
  return true;
}

cuda::AttentionSizes Llama::attention_sizes(const Stream& stream, int64_t page_size) const {
  const DType act = weights_.layers.front().qkv.dtype;
  const cuda::GpuProperties& gpu = cuda::PropertiesOf(stream);
  return {.q_heads = shard_.q_heads(config_),
          .kv_heads = shard_.kv_heads(config_),
          .dim = config_.head_dim,
          .may_prefill =
              !limits_.batch_invariant && cuda::TakesPrefill(*gpu.architecture, act, config_.head_dim, page_size),
          .scratch_bytes = scratch_bytes(),
          .multiprocessors = gpu.multiprocessors};
}

bool Llama::AllReduce(Stream& stream, const TensorView& x) {
  return alone() || communicator_->AllReduceSum(stream, x);
}

void Llama::AddLinear(Stream& stream, const TensorView& x, const TensorView& weight) {
  Linear(stream, {.out = (alone() ? residual_ : delta_).first(tokens_),
                  .x = x,
                  .weight = weight,
                  .accumulate = alone(),
                  .batch_invariant = limits_.batch_invariant,
                  .scratch = linear_scratch()});
}

bool Llama::NormAfterAdd(Stream& stream, const TensorView& weight) {
  const TensorView normed = normed_.first(tokens_), residual = residual_.first(tokens_);
  if (alone()) {
    RmsNorm(stream, {.out = normed, .x = residual, .weight = weight, .eps = config_.rms_eps});
    return true;
  }
  return communicator_->AllReduceAddRmsNorm(
      stream,
      {.out = normed, .residual = residual, .x = delta_.first(tokens_), .weight = weight, .eps = config_.rms_eps});
}

bool Llama::Forward(Stream& stream, const StepInputs& inputs, KvCache& cache) {
  const int64_t tokens = inputs.ids.dim(0), dim = config_.head_dim;
  const int64_t q_size = shard_.q_heads(config_) * dim, kv_size = shard_.kv_heads(config_) * dim;
  CHECK(tokens > 0 && tokens <= limits_.max_tokens);
  tokens_ = tokens;
  const TensorView residual = residual_.first(tokens), normed = normed_.first(tokens);
  const TensorView qkv = qkv_.first(tokens), attention = attention_.first(tokens);
  const TensorView gate_up = gate_up_.first(tokens), ffn = ffn_.first(tokens);
  const TensorView q = qkv.columns(0, q_size);
  const TensorView k = qkv.columns(q_size, kv_size), v = qkv.columns(q_size + kv_size, kv_size);
  const float scale = 1.0f / std::sqrt(static_cast<float>(dim));

  if (shard_.first_stage()) {
    Embed(stream, {.out = residual,
                   .table = weights_.embedding,
                   .ids = inputs.ids,
                   .sampled = inputs.sampled,
                   .vocab_begin = shard_.vocab_begin(config_)});
    if (!AllReduce(stream, residual)) return false;
  }

  for (int64_t i = 0; i < shard_.layers(config_); ++i) {
    const TraceRange range("layer", static_cast<uint64_t>(i));
    const LayerWeights& layer = weights_.layers[static_cast<size_t>(i)];
    const TensorView k_pages = cache.k_pages(i), v_pages = cache.v_pages(i);

    if (i == 0) {
      RmsNorm(stream, {.out = normed, .x = residual, .weight = layer.attention_norm, .eps = config_.rms_eps});
    } else if (!NormAfterAdd(stream, layer.attention_norm)) {
      return false;
    }
    Linear(stream, {.out = qkv,
                    .x = normed,
                    .weight = layer.qkv,
                    .batch_invariant = limits_.batch_invariant,
                    .scratch = linear_scratch()});
    RopeStoreKv(stream, {.q = q,
                         .k = k,
                         .v = v,
                         .k_pages = k_pages,
                         .v_pages = v_pages,
                         .positions = inputs.positions,
                         .slots = inputs.slots,
                         .inv_freq = weights_.inv_freq});
    PagedAttention(stream, {.out = attention,
                            .q = q,
                            .k_pages = k_pages,
                            .v_pages = v_pages,
                            .q_begin = inputs.q_begin,
                            .context_lengths = inputs.context_lengths,
                            .block_tables = inputs.block_tables,
                            .scale = scale,
                            .work = inputs.attention_work,
                            .scratch = scratch_.data,
                            .scratch_bytes = scratch_bytes()});
    AddLinear(stream, attention, layer.o);
    if (!NormAfterAdd(stream, layer.ffn_norm)) return false;
    LinearSiluMul(stream, {.out = ffn,
                           .x = normed,
                           .weight = layer.gate_up,
                           .gate_up = gate_up,
                           .batch_invariant = limits_.batch_invariant,
                           .scratch = linear_scratch()});
    AddLinear(stream, ffn, layer.down);
  }
  if (alone()) return true;
  if (shard_.last_stage()) return AllReduce(stream, delta_.first(tokens));
  // For its addition: the norm of the next layer is computed where that layer's weights are.
  return NormAfterAdd(stream, weights_.layers.back().ffn_norm);
}

TensorView Llama::Logits(Stream& stream, const TensorView& rows) {
  const int64_t n = rows.dim(0);
  CHECK(n > 0 && n <= limits_.max_logit_rows);
  const TensorView residual = rows_residual_.first(n), normed = rows_normed_.first(n), logits = logits_.first(n);
  GatherRows(stream, {.out = residual, .x = residual_.first(tokens_), .rows = rows});
  if (alone()) {
    RmsNorm(stream, {.out = normed, .x = residual, .weight = weights_.final_norm, .eps = config_.rms_eps});
  } else {  // the last block's sum is added here, for the wanted rows alone
    const TensorView delta = rows_delta_.first(n);
    GatherRows(stream, {.out = delta, .x = delta_.first(tokens_), .rows = rows});
    AddRmsNorm(
        stream,
        {.out = normed, .residual = residual, .x = delta, .weight = weights_.final_norm, .eps = config_.rms_eps});
  }
  Linear(stream, {.out = logits,
                  .x = normed,
                  .weight = weights_.lm_head,
                  .batch_invariant = limits_.batch_invariant,
                  .scratch = linear_scratch()});
  return logits;
}

}  // namespace altiplano
