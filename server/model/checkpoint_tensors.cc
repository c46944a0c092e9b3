#include "server/model/checkpoint_tensors.h"

#include <map>

#include "server/base/strings.h"

namespace altiplano {

namespace {

constexpr std::string_view kHead = "lm_head.weight";

bool IsHarmlessExtra(std::string_view name) {
  return name.ends_with("rotary_emb.inv_freq");
}

Status Bad(Code code, const StoredTensor& tensor, std::string why) {
  return Status(code, StrCat(tensor.info.file, ": tensor ", tensor.info.name, ": ", why));
}

Status CheckTensor(const WantedTensor& wanted, StoredTensor* tensor) {
  if (tensor->info.shape != wanted.shape) {
    return Bad(Code::kInvalidArgument, *tensor,
               StrCat("shape is ", ShowShape(tensor->info.shape), ", expected ", ShowShape(wanted.shape), " (",
                      wanted.meaning, ")"));
  }
  std::optional<StorageType> type = StorageTypeNamed(tensor->info.dtype);
  if (!type) {
    return Bad(Code::kUnimplemented, *tensor, StrCat("dtype is ", tensor->info.dtype, ", expected F32, F16 or BF16"));
  }
  tensor->type = *type;
  return OkStatus();
}

// Why a tensor that nobody asked for may be there.
std::string ExtraReason(const std::string& name, const ModelConfig& config) {
  std::string_view view = name;
  if (view.ends_with(".bias")) return "is not expected: biases are not supported";
  for (std::string_view mark : {"qweight", "qzeros", "scale", "g_idx", "weight_packed", "zero_point"}) {
    if (view.find(mark) != view.npos) return "is not expected: quantised checkpoints are read only as GGUF";
  }
  return StrCat("is not expected: a ", config.architecture, " with ", config.layers, " layers",
                config.tied_embeddings ? " and a tied head" : "", " has no such tensor");
}

}  // namespace

std::string ShowShape(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += StrCat(i ? ", " : "", shape[i]);
  return text + "]";
}

std::optional<StorageType> StorageTypeNamed(std::string_view name) {
  for (StorageType type : {StorageType::kF32, StorageType::kF16, StorageType::kBF16, StorageType::kQ8_0,
                           StorageType::kQ4_0, StorageType::kQ4_1, StorageType::kQ4_K, StorageType::kQ6_K}) {
    if (Traits(type).name == name) return type;
  }
  return std::nullopt;
}

std::vector<WantedTensor> WantedTensors(const ModelConfig& c) {
  std::vector<WantedTensor> wanted;
  wanted.push_back({"model.embed_tokens.weight", {c.vocab, c.hidden}, "vocabulary x hidden"});
  for (int64_t i = 0; i < c.layers; ++i) {
    auto add = [&](const char* name, std::vector<int64_t> shape, const char* meaning) {
      wanted.push_back({StrCat("model.layers.", i, ".", name, ".weight"), std::move(shape), meaning});
    };
    add("input_layernorm", {c.hidden}, "hidden");
    add("self_attn.q_proj", {c.q_size(), c.hidden}, "query heads * head_dim x hidden");
    add("self_attn.k_proj", {c.kv_size(), c.hidden}, "KV heads * head_dim x hidden");
    add("self_attn.v_proj", {c.kv_size(), c.hidden}, "KV heads * head_dim x hidden");
    add("self_attn.o_proj", {c.hidden, c.q_size()}, "hidden x query heads * head_dim");
    add("post_attention_layernorm", {c.hidden}, "hidden");
    add("mlp.gate_proj", {c.ffn, c.hidden}, "ffn x hidden");
    add("mlp.up_proj", {c.ffn, c.hidden}, "ffn x hidden");
    add("mlp.down_proj", {c.hidden, c.ffn}, "hidden x ffn");
  }
  wanted.push_back({"model.norm.weight", {c.hidden}, "hidden"});
  if (!c.tied_embeddings) wanted.push_back({std::string(kHead), {c.vocab, c.hidden}, "vocabulary x hidden"});
  return wanted;
}

StatusOr<Matched> MatchTensors(const std::string& where, const ModelConfig& config,
                               const std::function<std::string(const std::string&)>& stored_name,
                               std::vector<StoredTensor> found) {
  std::map<std::string, StoredTensor> by_name;
  for (StoredTensor& tensor : found) {
    if (IsHarmlessExtra(tensor.info.name)) continue;
    std::string name = tensor.info.name;
    by_name.emplace(std::move(name), std::move(tensor));
  }
  Matched matched;
  for (WantedTensor& wanted : WantedTensors(config)) {
    auto node = by_name.extract(stored_name(wanted.name));
    if (node.empty()) {
      return Status(Code::kInvalidArgument,
                    StrCat(where, ": tensor ", stored_name(wanted.name), ": is missing, expected ",
                           ShowShape(wanted.shape), " (", wanted.meaning, ")"));
    }
    RETURN_IF_ERROR(CheckTensor(wanted, &node.mapped()));
    node.mapped().info.name = std::move(wanted.name);
    matched.tensors.push_back(std::move(node.mapped()));
  }
  if (config.tied_embeddings) {
    if (auto node = by_name.extract(stored_name(std::string(kHead))); !node.empty()) {
      RETURN_IF_ERROR(
          CheckTensor({std::string(kHead), {config.vocab, config.hidden}, "vocabulary x hidden"}, &node.mapped()));
      matched.redundant_head = std::move(node.mapped());
    }
  }
  if (!by_name.empty()) {
    const auto& [name, tensor] = *by_name.begin();
    return Bad(Code::kInvalidArgument, tensor, ExtraReason(name, config));
  }
  return matched;
}

}  // namespace altiplano
