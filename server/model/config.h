// ModelConfig: what a checkpoint's config says, checked. Letters as in kernels/ops.h.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/tensor.h"
#include "server/base/status.h"
#include "server/base/types.h"

namespace altiplano {

// Frequencies of rotary embedding. kLlama3: Llama 3.1's scaling by wavelength (llama-models model.py, apply_scaling).
// kFactors: explicit divisors for each frequency, as GGUF stores Llama 3.1's (tensor rope_freqs.weight).
struct RopeScaling {
  enum class Type { kNone, kLinear, kLlama3, kFactors };
  Type type = Type::kNone;
  double factor = 1;
  double low_freq_factor = 1;
  double high_freq_factor = 4;
  int64_t original_max_position = 8192;
  std::vector<float> factors;  // [D/2]
};

struct ModelConfig {
  std::string name;          // folder or general.name, for people
  std::string architecture;  // "LlamaForCausalLM"
  int64_t vocab = 0;         // V
  int64_t hidden = 0;        // H
  int64_t layers = 0;
  int64_t q_heads = 0;   // Hq
  int64_t kv_heads = 0;  // Hkv, divides Hq
  int64_t head_dim = 0;  // D, even
  int64_t ffn = 0;       // F
  int64_t max_position = 0;
  float rms_eps = 1e-5f;
  double rope_theta = 10000;
  RopeScaling rope_scaling;
  bool tied_embeddings = false;
  DType stored_dtype = DType::kBF16;  // the widest that the matrices are stored in (f16 counts as f32)

  int64_t q_size() const { return q_heads * head_dim; }
  int64_t kv_size() const { return kv_heads * head_dim; }
  uint64_t parameters() const;  // a tied head counts once
  uint64_t kv_bytes_per_token(DType dtype) const {
    return 2ull * static_cast<uint64_t>(layers * kv_size()) * SizeOf(dtype);
  }
};

// What the model's authors recommend and how answers end (generation_config.json, or the GGUF's metadata).
struct GenerationDefaults {
  std::vector<TokenId> eos_ids;
  std::optional<TokenId> bos_id;
  std::optional<float> temperature, top_p, min_p, repetition_penalty;
  std::optional<int32_t> top_k;
};

// The checks that do not depend on where a config came from: sizes positive and their products far from overflow, heads
// that divide, an even head_dim, an epsilon and frequencies that cannot make NaN. INVALID_ARGUMENT.
Status CheckModelConfig(const ModelConfig& config);

// INVALID_ARGUMENT naming field, expected and found; UNIMPLEMENTED for other architectures, biases, activations,
// quantisation and kinds of RoPE. What may be absent means what transformers' LlamaConfig says: num_key_value_heads =
// num_attention_heads, head_dim = hidden_size / num_attention_heads, rope_theta 10000, no tying, no biases, silu.
// Both generations: rope_theta + rope_scaling, and rope_parameters (if both are there they must agree).
StatusOr<ModelConfig> ParseModelConfig(std::string_view config_json);
// eos/bos fall back to config.json's where generation_config.json ("" when absent) has none. "do_sample": false is
// temperature 0.
StatusOr<GenerationDefaults> ParseGenerationDefaults(std::string_view generation_config_json,
                                                     std::string_view config_json);

// What the two functions above read back as the same. UNIMPLEMENTED for RoPE factors that only a GGUF can hold.
StatusOr<std::string> ModelConfigJson(const ModelConfig& config, const GenerationDefaults& defaults);
std::string GenerationDefaultsJson(const GenerationDefaults& defaults);

// The shapes of the published Llama 3.1 and 3.2 text models: "1b", "3b", "8b", "70b", "405b" (their config.json files).
// nullopt: any other name.
std::optional<ModelConfig> PublishedModelConfig(std::string_view name);

// [D/2] inverse frequencies, scaling applied, computed in double and rounded once.
std::vector<float> RopeInverseFrequencies(const ModelConfig& config);

}  // namespace altiplano
