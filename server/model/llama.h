// Llama: one forward pass of one rank, top to bottom through kernels/ops.h.
//
// (of several stages: the first one)
//   ids -> embedding -> residual [T, H] f32
// (each stage, its layers; the residual comes from the stage before)
//   layer: RmsNorm -> qkv -> RoPE, store K and V -> attention -> o -> (all-reduce) -> + residual
//          RmsNorm -> gate, up -> silu(gate) * up -> down -> (all-reduce) -> + residual
// (the last stage)
//   rows whose logits are wanted: RmsNorm -> lm_head -> logits [R, V'] f32
//
// The residual stream is f32 whatever the activation dtype. One rank adds to it where the products end; several add
// their sum in one pass with the norm that follows. The bits are the same.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/comm/communicator.h"
#include "kernels/cuda/paged_attention_plan.h"
#include "kernels/device.h"
#include "kernels/ops.h"
#include "kernels/tensor.h"
#include "server/model/config.h"
#include "server/model/kv_cache.h"
#include "server/model/weights.h"

namespace altiplano {

// One step's index data, on the stream's device. Shapes as in kernels/ops.h.
struct StepInputs {
  TensorView ids;                     // [T] i32, those below 0 being places in `sampled`
  TensorView sampled = {};            // [B] i32: what the step before sampled; may be empty
  TensorView positions;               // [T] i32
  TensorView slots;                   // [T] i32: where each token's K and V go
  TensorView q_begin;                 // [B+1] i32
  TensorView context_lengths;         // [B] i32
  TensorView block_tables;            // [B, max_pages] i32
  AttentionWork attention_work = {};  // CUDA: of these lengths and Llama::attention_sizes
};

class Llama {
 public:
  struct Limits {
    int64_t max_tokens = 2048;     // T of one step
    int64_t max_logit_rows = 256;  // R of one Logits call
    bool batch_invariant = false;  // as in kernels/ops.h; attention then leaves its prefill kernel alone
    int64_t max_context = 0;       // for the ops' scratch, which only CUDA has a use for; 0: none
  };

  // Computes on the device of `stream`, where the weights lie. communicator: null for one rank. Null when the
  // workspace's memory cannot be had.
  static std::unique_ptr<Llama> Create(Stream& stream, const ModelConfig& config, Shard shard, LlamaWeights weights,
                                       Limits limits, Communicator* communicator);

  // Of the workspace that Create allocates on the shard's rank.
  static uint64_t WorkspaceBytes(const ModelConfig& config, const Shard& shard, const Limits& limits, DType act);
  // Of [tokens, H] f32: the residual stream as stages hand it on, and each message that ranks sum.
  static uint64_t ResidualBytes(const ModelConfig& config, int64_t tokens);
  // What a link between stages keeps of them on one of its GPUs.
  static uint64_t LinkBytes(const ModelConfig& config, const Limits& limits);
  // Messages that ranks of a stage sum in one step: two a layer, and where it embeds one more.
  static int64_t AllReduces(const ModelConfig& config, const Shard& shard);
  // Bytes of bf16 weights that are on their way to a GPU while it waits for an all-reduce of one token, of each product
  // that comes behind one (kernels/cuda/linear_plan.h): qkv of each layer, gate and up of each, the head.
  struct EarlyWeights {
    int64_t qkv = 0, gate_up = 0, head = 0;
  };
  static EarlyWeights EarlyWeightBytes(const ModelConfig& config, const Shard& shard);

  // Computes the stage's layers for the step's tokens and stores their K and V. Before, on all stages but the first,
  // residual() must hold what it held on the stage before, afterwards. False: the group was aborted.
  bool Forward(Stream& stream, const StepInputs& inputs, KvCache& cache);
  // What stages hand on: [T, H] f32.
  TensorView residual(int64_t tokens) const { return residual_.first(tokens); }
  // Last stage only. Logits of rows (token indices of the last Forward) [R] i32: [R, V'], this rank's part, valid until
  // the next call. R <= max_logit_rows.
  TensorView Logits(Stream& stream, const TensorView& rows);
  // What the last call of Logits left of its first rows, a replay of it in a StepGraph included.
  TensorView logits(int64_t rows) const { return logits_.first(rows); }

  const ModelConfig& config() const { return config_; }
  const Shard& shard() const { return shard_; }
  const Limits& limits() const { return limits_; }
  // What StepInputs::attention_work must be made for, with pages of this size.
  cuda::AttentionSizes attention_sizes(const Stream& stream, int64_t page_size) const;
  int64_t shard_vocab() const { return shard_.vocab(config_); }  // V'
  uint64_t weight_bytes() const { return weights_.bytes; }

 private:
  Llama(const ModelConfig& config, Shard shard, LlamaWeights weights, Limits limits, Communicator* communicator)
      : config_(config), shard_(shard), weights_(std::move(weights)), limits_(limits), communicator_(communicator) {}
  struct WorkspacePart;
  static std::vector<WorkspacePart> WorkspaceParts(const ModelConfig& config, const Shard& shard, const Limits& limits,
                                                   DType act);
  bool AllocateWorkspace(const Stream& stream);
  bool alone() const { return shard_.size == 1; }  // no other rank has a part of these layers
  bool AllReduce(Stream& stream, const TensorView& x);
  void* linear_scratch() const { return linear_scratch_.elements() > 0 ? linear_scratch_.data : nullptr; }
  size_t scratch_bytes() const { return static_cast<size_t>(scratch_.elements()) * sizeof(float); }
  // residual += x weight^T: when alone at once, otherwise this rank's part is left in delta for NormAfterAdd.
  void AddLinear(Stream& stream, const TensorView& x, const TensorView& weight);
  // Ends what AddLinear began, then normed = RmsNorm(residual).
  bool NormAfterAdd(Stream& stream, const TensorView& weight);

  const ModelConfig config_;
  const Shard shard_;
  const LlamaWeights weights_;
  const Limits limits_;
  Communicator* const communicator_;

  Buffer workspace_;           // all of the following; rows for the largest step. What ranks sum may lie elsewhere:
  TensorView residual_;        // [T, H] f32, summed
  TensorView delta_;           // [T, H] f32, summed: this rank's part of what the residual gains; empty when alone
  TensorView normed_;          // [T, H] act
  TensorView qkv_;             // [T, (Hq' + 2 Hkv') * D] act
  TensorView attention_;       // [T, Hq' * D] act
  TensorView gate_up_;         // [T, 2 F'] act
  TensorView ffn_;             // [T, F'] act
  TensorView rows_residual_;   // [R, H] f32
  TensorView rows_delta_;      // [R, H] f32; empty when alone
  TensorView rows_normed_;     // [R, H] act
  TensorView logits_;          // [R, V'] f32
  TensorView scratch_;         // [1, n] f32: attention's
  TensorView linear_scratch_;  // [1, n] f32: of products, or empty
  int64_t tokens_ = 0;         // T of the last Forward
};

}  // namespace altiplano
