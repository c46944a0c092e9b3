// Weights of one rank, as the model uses them: fused, sharded, in one dtype. Letters as in kernels/ops.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "kernels/device.h"
#include "kernels/tensor.h"
#include "server/base/status.h"
#include "server/model/checkpoint.h"
#include "server/model/config.h"

namespace altiplano {

// One rank's part of a model. Of each of its layers (tensor parallel): QKV and gate/up by output rows, o and down by
// input columns, embedding and head by vocabulary rows; KV heads divide, or are replicated when there are more ranks
// than KV heads. Of the layers (pipeline parallel): its stage's run of them; the first stage has the embedding, the
// last one the final norm and the head.
struct Shard {
  int rank = 0;
  int size = 1;
  int stage = 0;
  int stages = 1;

  // OUT_OF_RANGE saying which dimension cannot be divided.
  static StatusOr<Shard> Make(const ModelConfig& config, int rank, int size, int stage = 0, int stages = 1);

  bool first_stage() const { return stage == 0; }
  bool last_stage() const { return stage == stages - 1; }
  // As even as can be: the first ones have the layer more, the last one has the head.
  int64_t layers(const ModelConfig& c) const { return c.layers / stages + (stage < c.layers % stages ? 1 : 0); }
  int64_t first_layer(const ModelConfig& c) const {
    return stage * (c.layers / stages) + std::min<int64_t>(stage, c.layers % stages);
  }
  int64_t q_heads(const ModelConfig& c) const { return c.q_heads / size; }                             // Hq'
  int64_t kv_heads(const ModelConfig& c) const { return c.kv_heads >= size ? c.kv_heads / size : 1; }  // Hkv'
  int64_t first_kv_head(const ModelConfig& c) const { return rank * c.kv_heads / size; }
  int64_t ffn(const ModelConfig& c) const { return c.ffn / size; }  // F'
  int64_t vocab(const ModelConfig& c) const {
    return (c.vocab + size - 1) / size;
  }  // V': the last rank's may be padded
  int64_t vocab_begin(const ModelConfig& c) const { return rank * vocab(c); }
  // Of this rank's pool: does not shrink once KV heads are replicated.
  uint64_t kv_bytes_per_token(const ModelConfig& c, DType dtype) const {
    return 2 * static_cast<uint64_t>(layers(c) * kv_heads(c) * c.head_dim) * SizeOf(dtype);
  }
};

// What one rank's weights take in memory: matrices in dtype, padding of the last vocabulary shard included, norms in
// f32.
uint64_t RankWeightBytes(const ModelConfig& config, const Shard& shard, DType dtype);

struct LayerWeights {
  TensorView attention_norm;  // [H] f32
  TensorView qkv;             // [(Hq' + 2 Hkv') * D, H] act
  TensorView o;               // [H, Hq' * D] act
  TensorView ffn_norm;        // [H] f32
  TensorView gate_up;         // [2 F', H] act: all gate rows, then all up rows
  TensorView down;            // [H, F'] act
  Buffer memory;
};

struct LlamaWeights {
  TensorView embedding;              // [V', H] act; first stage
  TensorView final_norm;             // [H] f32; last stage
  TensorView lm_head;                // [V', H] act; last stage; the embedding itself when tied and there is one stage
  TensorView inv_freq;               // [D/2] f32
  std::vector<LayerWeights> layers;  // of the stage
  Buffer memory;                     // embedding, norm, head
  uint64_t bytes = 0;                // of this rank
  std::shared_ptr<const LlamaWeights> shared;  // not null: whose memory the views point into; both Buffers are empty
};

// The same tensors for another rank of the same process: views of `weights`, which they keep alive.
LlamaWeights Share(std::shared_ptr<const LlamaWeights> weights);

struct LoadProgress {
  uint64_t bytes_done = 0;   // read from disk
  uint64_t bytes_total = 0;  // that this rank will read
  double seconds = 0;
};

struct LoadOptions {
  Shard shard;
  DType dtype = DType::kBF16;
  Device device = Device::kCpu;
  int gpu = 0;      // CUDA
  int readers = 4;  // threads, each reading one piece of a tensor at a time straight into place, or into pinned memory
                    // from where it is copied to the GPU
  int64_t piece_elements = 8 << 20;  // of a tensor at most: small enough that readers share a large embedding
  std::function<void(const LoadProgress&)> progress;  // calling thread, about ten times a second and once at the end
  std::function<void(size_t, const LoadProgress&)> progress_of_shard =
      {};                           // LoadAllRanks, by index; threads of its own
  std::function<bool()> cancelled;  // polled as often; true: stop with CANCELLED
};

// Reads this rank's slices of every tensor. RESOURCE_EXHAUSTED when the memory cannot be had, UNAVAILABLE without the
// GPU.
StatusOr<LlamaWeights> LoadWeights(const Checkpoint& checkpoint, const LoadOptions& options);

// Of several ranks at once, in the order of `shards`: the readers are shared out, progress is that of all together.
// options.shard and options.gpu are not looked at. gpus: CUDA, of each.
StatusOr<std::vector<LlamaWeights>> LoadAllRanks(const Checkpoint& checkpoint, const LoadOptions& options,
                                                 const std::vector<Shard>& shards, const std::vector<int>& gpus = {});

}  // namespace altiplano
