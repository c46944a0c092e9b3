#include "server/model/inspect.h"

#include <algorithm>
#include <set>

#include "server/base/json.h"
#include "server/base/strings.h"
#include "server/model/weights.h"

namespace altiplano {

namespace {

std::vector<SplitOption> Splits(const ModelConfig& c) {
  std::vector<SplitOption> splits;
  for (int ranks : {1, 2, 3, 4, 5, 6, 7, 8, 16}) {
    SplitOption option;
    option.ranks = ranks;
    if (auto shard = Shard::Make(c, 0, ranks); shard.ok()) {
      option.weight_bytes_per_rank = RankWeightBytes(c, *shard, DType::kBF16);
      option.kv_bytes_per_token_rank = shard->kv_bytes_per_token(c, DType::kBF16);
    } else {
      option.why_not = shard.status().message();
      if (auto at = option.why_not.find(": "); at != option.why_not.npos) option.why_not.erase(0, at + 2);
    }
    splits.push_back(std::move(option));
  }
  return splits;
}

std::vector<StageOption> Stages(const ModelConfig& c) {
  std::vector<StageOption> options;
  for (int stages : {2, 4, 8}) {
    StageOption option{.stages = stages};
    if (stages > c.layers) break;
    for (int stage = 0; stage < stages; ++stage) {
      const Shard shard = Shard::Make(c, 0, 1, stage, stages).value();
      option.weight_bytes = std::max(option.weight_bytes, RankWeightBytes(c, shard, DType::kBF16));
      option.kv_bytes_per_token = std::max(option.kv_bytes_per_token, shard.kv_bytes_per_token(c, DType::kBF16));
    }
    options.push_back(option);
  }
  return options;
}

std::string TokenizerOf(const TextAssets& text) {
  if (!text.tokenizer_json.empty()) return "tokenizer.json";
  if (!text.tiktoken_model.empty()) return "tokenizer.model";
  if (!text.gguf) return "none";
  return StrCat("gguf (", text.gguf->model, text.gguf->pre.empty() ? "" : ", ", text.gguf->pre, ")");
}

const char* ScalingName(RopeScaling::Type type) {
  switch (type) {
    case RopeScaling::Type::kNone:
      return "none";
    case RopeScaling::Type::kLinear:
      return "linear";
    case RopeScaling::Type::kLlama3:
      return "llama3";
    case RopeScaling::Type::kFactors:
      return "factors";
  }
  return "?";
}

std::string RopeText(const ModelConfig& c) {
  const RopeScaling& r = c.rope_scaling;
  std::string text = StrFormat("theta %.10g, scaling %s", c.rope_theta, ScalingName(r.type));
  if (r.type == RopeScaling::Type::kLinear) text += StrCat(" (factor ", r.factor, ")");
  if (r.type == RopeScaling::Type::kFactors) text += StrCat(" (", r.factors.size(), " divisors in the file)");
  if (r.type == RopeScaling::Type::kLlama3) {
    text += StrCat(" (factor ", r.factor, ", low ", r.low_freq_factor, ", high ", r.high_freq_factor,
                   ", original context ", r.original_max_position, ")");
  }
  return text;
}

std::string GenerationText(const GenerationDefaults& g) {
  std::string text;
  auto add = [&](const char* name, const auto& value) {
    if (value) text += StrCat(text.empty() ? "" : ", ", name, " ", *value);
  };
  add("temperature", g.temperature);
  add("top_p", g.top_p);
  add("top_k", g.top_k);
  add("min_p", g.min_p);
  add("repetition_penalty", g.repetition_penalty);
  return text.empty() ? "none recommended" : text;
}

std::string Exact(uint64_t bytes) {
  return StrCat(HumanBytes(bytes), " (", bytes, " bytes)");
}

std::string Shape(const std::vector<int64_t>& shape) {
  std::string text;
  for (size_t i = 0; i < shape.size(); ++i) text += StrCat(i ? " x " : "", shape[i]);
  return text;
}

}  // namespace

Inspection Inspect(const Checkpoint& checkpoint) {
  const ModelConfig& c = checkpoint.config();
  Inspection in;
  in.path = checkpoint.path();
  in.format = checkpoint.format();
  in.config = c;
  in.generation = checkpoint.generation_defaults();
  in.parameters = c.parameters();
  in.stored_bytes = checkpoint.total_bytes();
  in.tensors = checkpoint.tensors();
  std::set<std::string_view> files;
  for (const TensorInfo& tensor : in.tensors) {
    files.insert(tensor.file);
    StoredBytes& type = in.types[tensor.dtype];
    ++type.tensors;
    type.bytes += tensor.bytes;
  }
  in.files = files.size();
  in.tokenizer = TokenizerOf(checkpoint.text_assets());
  in.has_chat_template = !checkpoint.text_assets().chat_template.empty();
  in.weight_bytes_bf16 = RankWeightBytes(c, Shard{}, DType::kBF16);
  in.weight_bytes_f32 = RankWeightBytes(c, Shard{}, DType::kF32);
  in.kv_bytes_per_token_bf16 = c.kv_bytes_per_token(DType::kBF16);
  in.kv_bytes_per_token_f32 = c.kv_bytes_per_token(DType::kF32);
  in.kv_bytes_full_context_bf16 = in.kv_bytes_per_token_bf16 * static_cast<uint64_t>(c.max_position);
  in.splits = Splits(c);
  in.stages = Stages(c);
  return in;
}

std::string InspectText(const Inspection& in, bool with_tensors) {
  const ModelConfig& c = in.config;
  std::string text;
  auto line = [&](const char* name, const std::string& value) { text += StrFormat("%-16s ", name) + value + "\n"; };
  line("name", c.name);
  line("path", in.path);
  line("format",
       StrCat(in.format, ", ", in.tensors.size(), " tensors in ", in.files, in.files == 1 ? " file" : " files"));
  line("architecture", c.architecture);
  const bool billions = in.parameters >= 1'000'000'000;
  line("parameters", StrFormat("%.2f %s (%llu)", static_cast<double>(in.parameters) / (billions ? 1e9 : 1e6),
                               billions ? "billion" : "million", static_cast<unsigned long long>(in.parameters)));
  std::string types;
  for (const auto& [name, stored] : in.types) {
    types += StrCat(types.empty() ? "" : ", ", name, " ", HumanBytes(stored.bytes), " in ", stored.tensors,
                    stored.tensors == 1 ? " tensor" : " tensors");
  }
  line("stored", StrCat(Exact(in.stored_bytes), ": ", types));
  line("layers", StrCat(c.layers));
  line("hidden", StrCat(c.hidden));
  line("heads", StrCat(c.q_heads, " query, ", c.kv_heads, " key/value, of ", c.head_dim));
  line("ffn", StrCat(c.ffn));
  line("vocabulary", StrCat(c.vocab, c.tied_embeddings ? ", head tied to the embedding" : ", head of its own"));
  line("norm epsilon", StrCat(c.rms_eps));
  line("rope", RopeText(c));
  line("context", StrCat(c.max_position, " tokens"));
  std::string eos;
  for (TokenId id : in.generation.eos_ids) eos += StrCat(eos.empty() ? "" : ", ", id);
  line("ends at ids", eos.empty() ? "none" : eos);
  line("sampling", GenerationText(in.generation));
  line("tokenizer", in.tokenizer);
  line("weights", StrCat("bf16 ", Exact(in.weight_bytes_bf16), ", f32 ", HumanBytes(in.weight_bytes_f32)));
  line("KV per token",
       StrCat("bf16 ", Exact(in.kv_bytes_per_token_bf16), ", f32 ", HumanBytes(in.kv_bytes_per_token_f32)));
  line("KV full context",
       StrCat("bf16 ", Exact(in.kv_bytes_full_context_bf16), " for one sequence of ", c.max_position, " tokens"));
  for (const SplitOption& split : in.splits) {
    const std::string ranks = StrCat(split.ranks, split.ranks == 1 ? " rank" : " ranks");
    line("split", split.possible()
                      ? StrCat(ranks, ": each ", HumanBytes(split.weight_bytes_per_rank), " of weights and ",
                               HumanBytes(split.kv_bytes_per_token_rank), " of KV per token in bf16")
                      : StrCat(ranks, ": no, ", split.why_not));
  }
  for (const StageOption& option : in.stages) {
    line("stages", StrCat(option.stages, " stages: the largest ", HumanBytes(option.weight_bytes), " of weights and ",
                          HumanBytes(option.kv_bytes_per_token), " of KV per token in bf16, over its ranks"));
  }
  if (with_tensors) {
    for (const TensorInfo& t : in.tensors) line("tensor", StrCat(t.name, "  ", t.dtype, "  ", Shape(t.shape)));
  }
  return text;
}

OrderedJson InspectJson(const Inspection& in) {
  const ModelConfig& c = in.config;
  OrderedJson json;
  json["name"] = c.name;
  json["path"] = in.path;
  json["format"] = in.format;
  json["architecture"] = c.architecture;
  json["parameters"] = in.parameters;
  json["stored_bytes"] = in.stored_bytes;
  json["files"] = in.files;
  for (const auto& [name, stored] : in.types) {
    json["stored_types"][name] = {{"tensors", stored.tensors}, {"bytes", stored.bytes}};
  }
  json["layers"] = c.layers;
  json["hidden"] = c.hidden;
  json["q_heads"] = c.q_heads;
  json["kv_heads"] = c.kv_heads;
  json["head_dim"] = c.head_dim;
  json["ffn"] = c.ffn;
  json["vocab"] = c.vocab;
  json["tied_embeddings"] = c.tied_embeddings;
  json["rms_eps"] = c.rms_eps;
  json["max_position"] = c.max_position;
  json["rope"] = {{"theta", c.rope_theta}, {"scaling", ScalingName(c.rope_scaling.type)}};
  if (c.rope_scaling.type == RopeScaling::Type::kLinear || c.rope_scaling.type == RopeScaling::Type::kLlama3) {
    json["rope"]["factor"] = c.rope_scaling.factor;
  }
  if (c.rope_scaling.type == RopeScaling::Type::kLlama3) {
    json["rope"]["low_freq_factor"] = c.rope_scaling.low_freq_factor;
    json["rope"]["high_freq_factor"] = c.rope_scaling.high_freq_factor;
    json["rope"]["original_max_position"] = c.rope_scaling.original_max_position;
  }
  json["eos_ids"] = in.generation.eos_ids;
  auto optional = [&](const char* name, const auto& value) {
    if (value) json["sampling"][name] = *value;
  };
  json["sampling"] = OrderedJson::object();
  optional("temperature", in.generation.temperature);
  optional("top_p", in.generation.top_p);
  optional("top_k", in.generation.top_k);
  optional("min_p", in.generation.min_p);
  optional("repetition_penalty", in.generation.repetition_penalty);
  json["tokenizer"] = in.tokenizer;
  json["has_chat_template"] = in.has_chat_template;
  json["weight_bytes"] = {{"bf16", in.weight_bytes_bf16}, {"f32", in.weight_bytes_f32}};
  json["kv_bytes_per_token"] = {{"bf16", in.kv_bytes_per_token_bf16}, {"f32", in.kv_bytes_per_token_f32}};
  json["kv_bytes_full_context"] = {{"bf16", in.kv_bytes_full_context_bf16}};
  for (const SplitOption& split : in.splits) {
    OrderedJson entry = {{"ranks", split.ranks}, {"possible", split.possible()}};
    if (split.possible()) {
      entry["weight_bytes_per_rank"] = split.weight_bytes_per_rank;
      entry["kv_bytes_per_token_per_rank"] = split.kv_bytes_per_token_rank;
    } else {
      entry["why_not"] = split.why_not;
    }
    json["splits"].push_back(std::move(entry));
  }
  for (const StageOption& option : in.stages) {
    json["stages"].push_back({{"stages", option.stages},
                              {"largest_weight_bytes", option.weight_bytes},
                              {"largest_kv_bytes_per_token", option.kv_bytes_per_token}});
  }
  for (const TensorInfo& t : in.tensors) {
    json["tensors"].push_back(
        {{"name", t.name}, {"dtype", t.dtype}, {"shape", t.shape}, {"bytes", t.bytes}, {"file", t.file}});
  }
  return json;
}

}  // namespace altiplano
