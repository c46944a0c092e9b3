#include "server/model/gguf_checkpoint.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "server/base/strings.h"
#include "server/model/checkpoint_stored.h"
#include "server/model/checkpoint_tensors.h"

namespace altiplano {

namespace {

Status Bad(std::string_view key, std::string why) {
  return Status(Code::kInvalidArgument, StrCat("metadata ", key, ": ", why));
}
Status Unimplemented(std::string why) {
  return Status(Code::kUnimplemented, std::move(why));
}

template <typename T>
const T* Find(const GgufFile& gguf, std::string_view key) {
  auto it = gguf.metadata.find(key);
  return it == gguf.metadata.end() ? nullptr : std::get_if<T>(&it->second);
}
bool Has(const GgufFile& gguf, std::string_view key) {
  return gguf.metadata.find(key) != gguf.metadata.end();
}

StatusOr<int64_t> Int(const GgufFile& gguf, std::string_view key, int64_t min, int64_t max = INT32_MAX) {
  if (!Has(gguf, key)) return Bad(key, StrCat("is missing, expected an integer from ", min, " to ", max));
  const int64_t* value = Find<int64_t>(gguf, key);
  if (value == nullptr) return Bad(key, StrCat("is not an integer, expected one from ", min, " to ", max));
  if (*value < min || *value > max)
    return Bad(key, StrCat("is ", *value, ", expected an integer from ", min, " to ", max));
  return *value;
}
StatusOr<int64_t> IntOr(const GgufFile& gguf, std::string_view key, int64_t min, int64_t absent) {
  if (!Has(gguf, key)) return absent;
  return Int(gguf, key, min);
}
StatusOr<double> Number(const GgufFile& gguf, std::string_view key) {
  if (!Has(gguf, key)) return Bad(key, "is missing, expected a number");
  const double* value = Find<double>(gguf, key);
  if (value == nullptr || !std::isfinite(*value)) return Bad(key, "is not a finite floating-point number");
  return *value;
}
StatusOr<std::string> String(const GgufFile& gguf, std::string_view key) {
  if (!Has(gguf, key)) return Bad(key, "is missing, expected a string");
  const std::string* value = Find<std::string>(gguf, key);
  if (value == nullptr) return Bad(key, "is not a string");
  if (!IsValidUtf8(*value)) return Bad(key, "is not valid UTF-8");
  return *value;
}
StatusOr<std::string> StringOr(const GgufFile& gguf, std::string_view key, std::string_view absent) {
  if (!Has(gguf, key)) return std::string(absent);
  return String(gguf, key);
}

const GgufTensor* FindTensor(const GgufFile& gguf, std::string_view name) {
  for (const GgufTensor& tensor : gguf.tensors) {
    if (tensor.name == name) return &tensor;
  }
  return nullptr;
}

Status ReadHeads(const GgufFile& gguf, ModelConfig* c) {
  for (std::string_view key :
       {"llama.attention.head_count", "llama.attention.head_count_kv", "llama.feed_forward_length"}) {
    if (Has(gguf, key) && Find<std::vector<int64_t>>(gguf, key) != nullptr) {
      return Unimplemented(StrCat("metadata ", key, ": sizes that differ from layer to layer are not supported"));
    }
  }
  ASSIGN_OR_RETURN(c->q_heads, Int(gguf, "llama.attention.head_count", 1));
  ASSIGN_OR_RETURN(c->kv_heads, IntOr(gguf, "llama.attention.head_count_kv", 1, c->q_heads));
  ASSIGN_OR_RETURN(c->ffn, Int(gguf, "llama.feed_forward_length", 1));
  if (Has(gguf, "llama.attention.key_length")) {
    ASSIGN_OR_RETURN(c->head_dim, Int(gguf, "llama.attention.key_length", 1));
  } else if (c->hidden % c->q_heads == 0) {
    c->head_dim = c->hidden / c->q_heads;
  } else {
    return Bad("llama.attention.head_count",
               StrCat("is ", c->q_heads, ", expected a divisor of the embedding length ", c->hidden));
  }
  for (std::string_view key : {"llama.attention.value_length", "llama.rope.dimension_count"}) {
    ASSIGN_OR_RETURN(const int64_t n, IntOr(gguf, key, 1, c->head_dim));
    if (n != c->head_dim) {
      return Unimplemented(
          StrCat("metadata ", key, ": is ", n, ", only the length of a key, ", c->head_dim, ", is supported"));
    }
  }
  return OkStatus();
}

// Scaling by type; Llama 3.1's comes as the tensor rope_freqs.weight instead, which OpenGguf reads.
Status ReadRope(const GgufFile& gguf, ModelConfig* c) {
  c->rope_theta = 10000;
  if (Has(gguf, "llama.rope.freq_base")) {
    ASSIGN_OR_RETURN(c->rope_theta, Number(gguf, "llama.rope.freq_base"));
  }
  ASSIGN_OR_RETURN(std::string type, StringOr(gguf, "llama.rope.scaling.type", "none"));
  if (type == "none") return OkStatus();
  if (type != "linear") {
    return Unimplemented(StrCat("metadata llama.rope.scaling.type: \"", type,
                                "\" is not supported, only \"none\", \"linear\" and a tensor rope_freqs.weight"));
  }
  c->rope_scaling.type = RopeScaling::Type::kLinear;
  ASSIGN_OR_RETURN(c->rope_scaling.factor, Number(gguf, "llama.rope.scaling.factor"));
  return OkStatus();
}

Status CheckTokenId(const GgufFile& gguf, std::string_view key, int64_t vocab, std::vector<TokenId>* ids) {
  if (!Has(gguf, key)) return OkStatus();
  ASSIGN_OR_RETURN(const int64_t id, Int(gguf, key, 0, vocab - 1));
  if (std::find(ids->begin(), ids->end(), id) == ids->end()) ids->push_back(static_cast<TokenId>(id));
  return OkStatus();
}

// Divisors of the frequencies from rope_freqs.weight, which is then no longer among the tensors.
Status TakeRopeFactors(const ByteSource& file, GgufFile* gguf, ModelConfig* config) {
  const GgufTensor* tensor = FindTensor(*gguf, "rope_freqs.weight");
  if (tensor == nullptr) return OkStatus();
  const std::string what = StrCat(file.name(), ": tensor ", tensor->name, ": ");
  if (config->rope_scaling.type != RopeScaling::Type::kNone) {
    return Unimplemented(StrCat(what, "is not supported together with llama.rope.scaling.type \"linear\""));
  }
  if (tensor->type != StorageType::kF32 || tensor->shape != std::vector<int64_t>{config->head_dim / 2}) {
    return Status(Code::kInvalidArgument, StrCat(what, "is ", Traits(tensor->type).name, " ", ShowShape(tensor->shape),
                                                 ", expected F32 [", config->head_dim / 2, "] (head_dim / 2)"));
  }
  RopeScaling& scaling = config->rope_scaling;
  scaling.type = RopeScaling::Type::kFactors;
  scaling.factors.resize(static_cast<size_t>(config->head_dim / 2));
  RETURN_IF_ERROR(file.ReadAt(tensor->offset, scaling.factors.data(), scaling.factors.size() * sizeof(float)));
  gguf->tensors.erase(gguf->tensors.begin() + (tensor - gguf->tensors.data()));
  Status status = CheckModelConfig(*config);
  if (!status.ok()) return Status(status.code(), what + status.message());
  return OkStatus();
}

std::string NameOfFile(const std::string& path) {
  std::string name = path.substr(path.rfind('/') + 1);
  return name.ends_with(".gguf") ? name.substr(0, name.size() - 5) : name;
}

}  // namespace

std::string GgufTensorName(const std::string& name) {
  constexpr std::pair<std::string_view, std::string_view> kOuter[] = {
      {"model.embed_tokens.weight", "token_embd.weight"},
      {"model.norm.weight", "output_norm.weight"},
      {"lm_head.weight", "output.weight"},
  };
  constexpr std::pair<std::string_view, std::string_view> kInner[] = {
      {"input_layernorm", "attn_norm"}, {"self_attn.q_proj", "attn_q"},      {"self_attn.k_proj", "attn_k"},
      {"self_attn.v_proj", "attn_v"},   {"self_attn.o_proj", "attn_output"}, {"post_attention_layernorm", "ffn_norm"},
      {"mlp.gate_proj", "ffn_gate"},    {"mlp.up_proj", "ffn_up"},           {"mlp.down_proj", "ffn_down"},
  };
  for (const auto& [ours, theirs] : kOuter) {
    if (name == ours) return std::string(theirs);
  }
  constexpr std::string_view kPrefix = "model.layers.", kSuffix = ".weight";
  if (name.starts_with(kPrefix) && name.ends_with(kSuffix)) {
    const size_t dot = name.find('.', kPrefix.size());
    const std::string layer = name.substr(kPrefix.size(), dot - kPrefix.size());
    const std::string part = name.substr(dot + 1, name.size() - kSuffix.size() - dot - 1);
    for (const auto& [ours, theirs] : kInner) {
      if (part == ours) return StrCat("blk.", layer, ".", theirs, kSuffix);
    }
  }
  return name;
}

StatusOr<ModelConfig> GgufModelConfig(const GgufFile& gguf) {
  ASSIGN_OR_RETURN(std::string architecture, String(gguf, "general.architecture"));
  if (architecture != "llama") {
    return Unimplemented(StrCat("architecture \"", architecture, "\" is not supported, only \"llama\""));
  }
  ASSIGN_OR_RETURN(const int64_t splits, IntOr(gguf, "split.count", 0, 1));
  if (splits > 1) return Unimplemented(StrCat("this is one of ", splits, " pieces of a split GGUF: join them first"));
  ASSIGN_OR_RETURN(const int64_t experts, IntOr(gguf, "llama.expert_count", 0, 0));
  if (experts > 0) return Unimplemented(StrCat("a mixture of ", experts, " experts is not supported"));

  ModelConfig c;
  c.architecture = "LlamaForCausalLM";
  ASSIGN_OR_RETURN(c.name, StringOr(gguf, "general.name", ""));
  ASSIGN_OR_RETURN(c.layers, Int(gguf, "llama.block_count", 1));
  ASSIGN_OR_RETURN(c.hidden, Int(gguf, "llama.embedding_length", 1));
  ASSIGN_OR_RETURN(c.max_position, Int(gguf, "llama.context_length", 1));
  ASSIGN_OR_RETURN(const double eps, Number(gguf, "llama.attention.layer_norm_rms_epsilon"));
  c.rms_eps = static_cast<float>(eps);
  RETURN_IF_ERROR(ReadHeads(gguf, &c));
  RETURN_IF_ERROR(ReadRope(gguf, &c));

  const GgufTensor* embedding = FindTensor(gguf, "token_embd.weight");
  if (embedding == nullptr) return Status(Code::kInvalidArgument, "tensor token_embd.weight: is missing");
  c.vocab = embedding->shape[0];
  ASSIGN_OR_RETURN(const int64_t vocab, IntOr(gguf, "llama.vocab_size", 1, c.vocab));
  if (vocab != c.vocab) {
    return Bad("llama.vocab_size", StrCat("is ", vocab, ", but token_embd.weight has ", c.vocab, " rows"));
  }
  c.tied_embeddings = FindTensor(gguf, "output.weight") == nullptr;
  RETURN_IF_ERROR(CheckModelConfig(c));
  return c;
}

StatusOr<TextAssets> GgufTextAssets(const GgufFile& gguf, int64_t vocab) {
  TextAssets text;
  ASSIGN_OR_RETURN(text.chat_template, StringOr(gguf, "tokenizer.chat_template", ""));
  if (!Has(gguf, "tokenizer.ggml.model")) return text;  // a file of weights alone
  GgufTokenizer& out = text.gguf.emplace();
  ASSIGN_OR_RETURN(out.model, String(gguf, "tokenizer.ggml.model"));
  ASSIGN_OR_RETURN(out.pre, StringOr(gguf, "tokenizer.ggml.pre", ""));
  const auto* tokens = Find<std::vector<std::string>>(gguf, "tokenizer.ggml.tokens");
  if (tokens == nullptr) return Bad("tokenizer.ggml.tokens", "is missing or not a list of strings");
  if (static_cast<int64_t>(tokens->size()) != vocab) {
    return Bad("tokenizer.ggml.tokens",
               StrCat("has ", tokens->size(), " entries, but token_embd.weight has ", vocab, " rows"));
  }
  out.tokens = *tokens;
  // Without merges text would become a token for each byte. Other models than gpt2 have none; the text layer names
  // them.
  if (out.model == "gpt2" || Has(gguf, "tokenizer.ggml.merges")) {
    const auto* merges = Find<std::vector<std::string>>(gguf, "tokenizer.ggml.merges");
    if (merges == nullptr) return Bad("tokenizer.ggml.merges", "is missing or not a list of strings");
    out.merges = *merges;
  }
  if (Has(gguf, "tokenizer.ggml.token_type")) {
    const auto* types = Find<std::vector<int64_t>>(gguf, "tokenizer.ggml.token_type");
    if (types == nullptr || types->size() != tokens->size()) {
      return Bad("tokenizer.ggml.token_type", StrCat("is not a list of ", tokens->size(), " integers"));
    }
    for (int64_t type : *types) {
      if (type < 0 || type > INT32_MAX) return Bad("tokenizer.ggml.token_type", StrCat("holds ", type));
      out.types.push_back(static_cast<int32_t>(type));
    }
  }
  std::vector<TokenId> bos;
  RETURN_IF_ERROR(CheckTokenId(gguf, "tokenizer.ggml.bos_token_id", vocab, &bos));
  if (!bos.empty()) out.bos = bos[0];
  if (Has(gguf, "tokenizer.ggml.add_bos_token")) {
    const bool* add = Find<bool>(gguf, "tokenizer.ggml.add_bos_token");
    if (add == nullptr) return Bad("tokenizer.ggml.add_bos_token", "is not a bool");
    out.add_bos = *add;
  } else {  // Llama 3 files leave it out: the split implies it
    out.add_bos = out.bos >= 0 && (out.pre == "llama-bpe" || out.pre == "llama3" || out.pre == "llama-v3");
  }
  return text;
}

StatusOr<GenerationDefaults> GgufGenerationDefaults(const GgufFile& gguf, const TextAssets& text, int64_t vocab) {
  GenerationDefaults defaults;
  for (std::string_view key :
       {"tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"}) {
    RETURN_IF_ERROR(CheckTokenId(gguf, key, vocab, &defaults.eos_ids));
  }
  if (text.gguf) {
    // One eos id cannot hold Llama 3's three ends of a turn, which generation_config.json lists; they are known by
    // name.
    constexpr int32_t kControl = 3;
    for (size_t i = 0; i < text.gguf->tokens.size() && i < text.gguf->types.size(); ++i) {
      const std::string& token = text.gguf->tokens[i];
      const auto id = static_cast<TokenId>(i);
      if (text.gguf->types[i] == kControl &&
          (token == "<|end_of_text|>" || token == "<|eot_id|>" || token == "<|eom_id|>") &&
          std::find(defaults.eos_ids.begin(), defaults.eos_ids.end(), id) == defaults.eos_ids.end()) {
        defaults.eos_ids.push_back(id);
      }
    }
    if (text.gguf->bos >= 0) defaults.bos_id = text.gguf->bos;
  }
  constexpr double kMost = std::numeric_limits<float>::max();
  const std::tuple<std::string_view, double, double, std::optional<float>*> numbers[] = {
      {"general.sampling.temp", 0, kMost, &defaults.temperature},
      {"general.sampling.top_p", 1e-30, 1, &defaults.top_p},
      {"general.sampling.min_p", 0, 1, &defaults.min_p},
      {"general.sampling.penalty_repeat", 1e-30, kMost, &defaults.repetition_penalty},
  };
  for (const auto& [key, min, max, out] : numbers) {
    if (!Has(gguf, key)) continue;
    ASSIGN_OR_RETURN(const double value, Number(gguf, key));
    if (value < min || value > max)
      return Bad(key, StrCat("is ", value, ", expected a number from ", min, " to ", max));
    *out = static_cast<float>(value);
  }
  if (Has(gguf, "general.sampling.top_k")) {
    ASSIGN_OR_RETURN(const int64_t top_k, Int(gguf, "general.sampling.top_k", 0));
    defaults.top_k = static_cast<int32_t>(top_k);
  }
  return defaults;
}

StatusOr<std::unique_ptr<Checkpoint>> OpenGguf(std::shared_ptr<const ByteSource> file) {
  const std::string path = file->name();
  auto in_file = [&](const Status& status) { return Status(status.code(), StrCat(path, ": ", status.message())); };
  ASSIGN_OR_RETURN(GgufFile gguf, ReadGguf(*file));
  CheckpointParts parts;
  parts.path = path;
  parts.format = "gguf";
  auto config = GgufModelConfig(gguf);
  if (!config.ok()) return in_file(config.status());
  parts.config = std::move(*config);
  if (parts.config.name.empty()) parts.config.name = NameOfFile(path);
  RETURN_IF_ERROR(TakeRopeFactors(*file, &gguf, &parts.config));
  auto text = GgufTextAssets(gguf, parts.config.vocab);
  if (!text.ok()) return in_file(text.status());
  auto generation = GgufGenerationDefaults(gguf, *text, parts.config.vocab);
  if (!generation.ok()) return in_file(generation.status());
  parts.text = std::move(*text);
  parts.generation = std::move(*generation);

  std::vector<StoredTensor> found;
  for (GgufTensor& tensor : gguf.tensors) {
    StoredTensor stored;
    stored.info = {std::move(tensor.name), std::string(Traits(tensor.type).name), std::move(tensor.shape), tensor.bytes,
                   path};
    stored.offset = tensor.offset;
    found.push_back(std::move(stored));
  }
  ASSIGN_OR_RETURN(Matched matched, MatchTensors(path, parts.config, GgufTensorName, std::move(found)));
  parts.tensors = std::move(matched.tensors);
  for (StoredTensor& tensor : parts.tensors) {
    const std::string& name = tensor.info.name;
    if (name.ends_with("q_proj.weight") || name.ends_with("k_proj.weight"))
      tensor.interleaved_head_dim = parts.config.head_dim;
  }
  parts.files.push_back(std::move(file));
  return std::unique_ptr<Checkpoint>(std::make_unique<StoredCheckpoint>(std::move(parts)));
}

}  // namespace altiplano
