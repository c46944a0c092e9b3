// All that the model may call. One Args struct per op, outputs first; scratch comes from the caller; nothing allocates.
//
// Letters in shapes, the same everywhere: T tokens in the step, B sequences in the step, R rows whose logits are
// wanted, H hidden, Hq query heads, Hkv KV heads, D head dim, F ffn, V vocabulary, P pages, S page size; ' = this
// rank's shard. "act" is the activation dtype, f32 or bf16, equal to the weights' dtype. Accumulation, softmax and
// norms are f32.
//
// The door (ops.cc) checks named dimensions once and dies on a mismatch (a bug, never a caller's doing), then calls
// cpu::X or cuda::X by the stream's device. Index data (ids, positions, tables) lives on the stream's device.
#pragma once

#include <cstdint>

#include "kernels/device.h"
#include "kernels/tensor.h"

namespace altiplano {

// out[t] = table[id - vocab_begin], zeros for ids outside of this rank's part of the vocabulary. id is ids[t], or where
// that is below 0 and there is `sampled`, sampled[-1 - ids[t]].
struct EmbedArgs {
  TensorView out;           // [T, H] f32 or act
  TensorView table;         // [V', H] act
  TensorView ids;           // [T] i32
  TensorView sampled = {};  // [R] i32 or empty: the step before's SampleArgs::tokens
  int64_t vocab_begin = 0;
};
void Embed(Stream& stream, const EmbedArgs& args);

// out = x / rms(x) * weight, rms over the last dimension: sqrt(mean(x^2) + eps). Computed in f32, rounded once.
struct RmsNormArgs {
  TensorView out;     // [T, H] f32 or act
  TensorView x;       // [T, H] f32 or act
  TensorView weight;  // [H] f32 or act
  float eps = 0;
};
void RmsNorm(Stream& stream, const RmsNormArgs& args);

// residual += x, then out = RmsNorm(residual).
struct AddRmsNormArgs {
  TensorView out;       // [T, H] f32 or act
  TensorView residual;  // [T, H] f32 or act, in and out
  TensorView x;         // [T, H] f32 or act
  TensorView weight;    // [H]
  float eps = 0;
};
void AddRmsNorm(Stream& stream, const AddRmsNormArgs& args);

// out = x * weight^T (+ out when accumulate). Weights are row-major [N, K] as in the checkpoint.
// The result of a row does not depend on the other rows of x, but on a GPU it may depend on how many there are.
struct LinearArgs {
  TensorView out;     // [T, N] f32 or act
  TensorView x;       // [T, K] act
  TensorView weight;  // [N, K] act
  bool accumulate = false;
  // CUDA only: the same bits however many rows there are, which keeps many rows from the vendor's library and some from
  // our kernel for Hopper.
  bool batch_invariant = false;
  void* scratch = nullptr;  // CUDA only: see PrepareLinear
};
void Linear(Stream& stream, const LinearArgs& args);

// Takes what the vendor's library needs for products on this stream, a handle and 32 MiB of the GPU, since no op
// allocates: without it, or where the library or the memory cannot be had, many rows are our own kernels' too. And
// makes `scratch` ready for the products of this stream that are given it: kLinearScratchBytes of the GPU, in which
// sums of some rows wait; null: these are made by other kernels, slower. Any thread, before the stream's first product.
// Nothing on the CPU.
inline constexpr size_t kLinearScratchBytes = 5 << 20;
void PrepareLinear(Stream& stream, void* scratch = nullptr);

// out = silu(gate) * up, where gate_up = [gate | up].
struct SiluMulArgs {
  TensorView out;      // [T, F'] act
  TensorView gate_up;  // [T, 2F'] f32 or act
};
void SiluMul(Stream& stream, const SiluMulArgs& args);

// gate_up = x * weight^T, then out = silu(gate) * up, to the same bits as by Linear and SiluMul. Where the two are one
// kernel, gate_up is left as it was.
struct LinearSiluMulArgs {
  TensorView out;                // [T, F'] act
  TensorView x;                  // [T, K] act
  TensorView weight;             // [2F', K] act: all gate rows, then all up rows
  TensorView gate_up;            // [T, 2F'] act: scratch
  bool batch_invariant = false;  // as Linear's
  void* scratch = nullptr;       // as Linear's
};
void LinearSiluMul(Stream& stream, const LinearSiluMulArgs& args);

// Rotates q and k (pairs (j, j + D/2), angle position * inv_freq[j]) and writes k and v of each token into its page.
// q is rotated in place.
struct RopeStoreKvArgs {
  TensorView q;          // [T, Hq'*D] act or f32, in and out
  TensorView k;          // [T, Hkv'*D] act or f32
  TensorView v;          // [T, Hkv'*D] act or f32
  TensorView k_pages;    // [P, Hkv', S, D] act: one layer's pool, written
  TensorView v_pages;    // [P, Hkv', S, D] act, written
  TensorView positions;  // [T] i32
  TensorView slots;      // [T] i32: page * S + offset; -1: do not store
  TensorView inv_freq;   // [D/2] f32, scaling applied
};
void RopeStoreKv(Stream& stream, const RopeStoreKvArgs& args);

// Which blocks of a GPU do what for a step's attention: cuda::PlanAttention makes it on the host, from the step's
// lengths (kernels/cuda/paged_attention_plan.h). The numbers may be larger than the list's own: blocks then return.
struct AttentionWork {
  TensorView list;             // [n] i32
  int32_t prefill_items = 0;   // of the prefill kernel, for each KV head
  int32_t prefill_blocks = 0;  // that share the items of all KV heads
  int32_t workers = 0;         // blocks that attend to all else, for each KV head
  int32_t cuts = 0;            // blocks that fold the states of tiles that were cut, for each KV head
};

// Causal attention of each sequence's new tokens over its whole context in the pages; prefill, chunk and decode alike.
// Sequence b has queries [q_begin[b], q_begin[b+1]) and context_lengths[b] tokens in the cache, the new ones included;
// its i-th query of n sees the first context_lengths[b] - n + i + 1 of them.
struct PagedAttentionArgs {
  TensorView out;              // [T, Hq'*D] act
  TensorView q;                // [T, Hq'*D] act or f32, rotated
  TensorView k_pages;          // [P, Hkv', S, D] act
  TensorView v_pages;          // [P, Hkv', S, D] act
  TensorView q_begin;          // [B+1] i32
  TensorView context_lengths;  // [B] i32
  TensorView block_tables;     // [B, max_pages] i32: page ids in order
  float scale = 0;             // 1 / sqrt(D)
  // CUDA only. Scratch is as large as `work` was told; without any no tile is cut, to the same bits.
  AttentionWork work = {};
  void* scratch = nullptr;
  size_t scratch_bytes = 0;
};
void PagedAttention(Stream& stream, const PagedAttentionArgs& args);

// out[r] = x[rows[r]].
struct GatherRowsArgs {
  TensorView out;   // [R, H]
  TensorView x;     // [T, H], same dtype
  TensorView rows;  // [R] i32
};
void GatherRows(Stream& stream, const GatherRowsArgs& args);

// How one row is sampled. Penalties and bias first, then greedy or: temperature, top_k, top_p, min_p, then the draw.
struct SampleParams {
  float temperature = 1;         // 0: greedy, lowest id wins ties
  int32_t top_k = 0;             // 0: off
  float top_p = 1;               // smallest set whose mass reaches top_p (the crossing token is kept); 1: off
  float min_p = 0;               // keep p >= min_p * p_max; 0: off
  float presence_penalty = 0;    // subtracted once from tokens in the output
  float frequency_penalty = 0;   // subtracted per occurrence in the output
  float repetition_penalty = 1;  // of tokens in prompt or output: logit > 0 ? logit / r : logit * r
  uint64_t seed = 0;             // Philox4x32-10 with key = seed and counter = (position, sequence)
  uint32_t sequence = 0;         // index among the request's sequences
  int64_t position = 0;          // of the token to be sampled, in the sequence
  // Log-probabilities wanted besides the sampled token's: -1 none at all, 0 the token's own, n the n most probable.
  int32_t top_logprobs = -1;
  const int32_t* bias_ids = nullptr;  // [num_bias], added to the logits
  const float* bias_values = nullptr;
  int32_t num_bias = 0;
  const int32_t* banned_ids = nullptr;  // [num_banned], may not be sampled (EOS before min_new_tokens)
  int32_t num_banned = 0;
  // The sequence's token statistics, in the memory of the stream's device: counts of output tokens, and whether a token
  // was in the prompt. Null when no penalty needs them.
  const uint16_t* output_counts = nullptr;  // [V]
  const uint8_t* in_prompt = nullptr;       // [V]
  uint16_t* counts_out = nullptr;           // null, or output_counts itself: the sampled token is counted in it
};

inline constexpr int kMaxTopLogprobs = 20;

struct SampleResult {
  int32_t token = -1;
  bool finite = true;   // false: the row held NaN or +inf; token is then -1
  float logprob = 0;    // of `token` in softmax(raw logits): before penalties, bias, temperature and filters
  int32_t rank = 0;     // 1 + number of tokens with a larger raw logit
  int32_t num_top = 0;  // most probable first
  int32_t top_ids[kMaxTopLogprobs];
  float top_logprobs[kMaxTopLogprobs];
};

struct SampleArgs {
  SampleResult* results = nullptr;       // [R], host memory, valid once the stream has been waited for
  TensorView tokens = {};                // [R] i32 or empty: the sampled tokens once more, 0 where a row is not finite
  const SampleParams* params = nullptr;  // [R], host memory
  TensorView logits;                     // [R, V] f32, left unchanged
  void* scratch = nullptr;               // SampleScratchBytes(R, V, device)
};
inline constexpr int64_t kMostVocabulary = int64_t{1} << 22;  // of Sample
size_t SampleScratchBytes(int64_t rows, int64_t vocab, Device device = Device::kCpu);
void Sample(Stream& stream, const SampleArgs& args);

// Log-probabilities of given tokens, for prompt log-probabilities: results[r].token must hold the token asked for.
struct ScoreArgs {
  SampleResult* results = nullptr;   // [R], token in; logprob, rank, top out, once the stream has been waited for
  const int32_t* num_top = nullptr;  // [R]
  TensorView logits;                 // [R, V] f32
  void* scratch = nullptr;           // SampleScratchBytes(R, V, device)
};
void Score(Stream& stream, const ScoreArgs& args);

}  // namespace altiplano
