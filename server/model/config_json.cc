// config.json and generation_config.json as transformers writes them, old and new.
#include <cmath>
#include <limits>

#include "server/base/json.h"
#include "server/base/strings.h"
#include "server/model/config.h"

namespace altiplano {

namespace {

std::string Show(const Json& value) {
  std::string text = value.dump(-1, ' ', false, Json::error_handler_t::replace);
  return text.size() <= 80 ? text : text.substr(0, 77) + "...";
}

// A JSON object whose members are read with a check; null counts as absent. Messages say "prefix" + name.
class Object {
 public:
  Object(const Json& json, std::string prefix) : json_(json), prefix_(std::move(prefix)) {}

  const Json* Find(const char* name) const {
    auto it = json_.find(name);
    return it == json_.end() || it->is_null() ? nullptr : &*it;
  }
  Status Wrong(const char* name, std::string_view expected) const {
    const Json* value = Find(name);
    return Status(Code::kInvalidArgument, value == nullptr
                                              ? StrCat(prefix_, name, " is missing, expected ", expected)
                                              : StrCat(prefix_, name, " is ", Show(*value), ", expected ", expected));
  }

  StatusOr<int64_t> Int(const char* name, int64_t min, int64_t max = INT32_MAX) const {
    const Json* value = Find(name);
    if (value == nullptr || !value->is_number_integer() ||
        (value->is_number_unsigned() && value->get<uint64_t>() > static_cast<uint64_t>(INT64_MAX)) ||
        value->get<int64_t>() < min || value->get<int64_t>() > max) {
      return Wrong(name, StrCat("an integer from ", min, " to ", max));
    }
    return value->get<int64_t>();
  }
  StatusOr<int64_t> IntOr(const char* name, int64_t min, int64_t absent) const {
    if (Find(name) == nullptr) return absent;
    return Int(name, min);
  }
  StatusOr<double> Number(const char* name) const {
    const Json* value = Find(name);
    if (value == nullptr || !value->is_number() || !std::isfinite(value->get<double>())) {
      return Wrong(name, "a finite number");
    }
    return value->get<double>();
  }
  StatusOr<bool> BoolOr(const char* name, bool absent) const {
    const Json* value = Find(name);
    if (value == nullptr) return absent;
    if (!value->is_boolean()) return Wrong(name, "true or false");
    return value->get<bool>();
  }
  // Sets *out when the member is there.
  Status Optional(const char* name, double min, double max, std::optional<float>* out) const {
    if (Find(name) == nullptr) return OkStatus();
    ASSIGN_OR_RETURN(double value, Number(name));
    if (value < min || value > max) return Wrong(name, StrCat("a number from ", min, " to ", max));
    *out = static_cast<float>(value);
    return OkStatus();
  }
  const Json& json() const { return json_; }

 private:
  const Json& json_;
  const std::string prefix_;
};

Status Unimplemented(std::string why) {
  return Status(Code::kUnimplemented, std::move(why));
}

StatusOr<Json> ParseObject(std::string_view text) {
  ASSIGN_OR_RETURN(Json json, ParseJson(text));
  if (!json.is_object()) return Status(Code::kInvalidArgument, StrCat("is ", Show(json), ", expected a JSON object"));
  return json;
}

// RoPE over a part of each head, which later configs can ask for, is not what the kernels compute.
Status CheckWholeRotary(const Object& o) {
  if (o.Find("partial_rotary_factor") == nullptr) return OkStatus();
  ASSIGN_OR_RETURN(double factor, o.Number("partial_rotary_factor"));
  if (factor != 1) return Unimplemented(StrCat("partial_rotary_factor ", factor, " is not supported, only 1"));
  return OkStatus();
}

// Is this a model that the forward pass computes? Everything that would change the arithmetic is asked here.
Status CheckArchitecture(const Object& o, ModelConfig* config) {
  const Json* type = o.Find("model_type");
  if (type == nullptr || !type->is_string()) return o.Wrong("model_type", "\"llama\"");
  const Json* architectures = o.Find("architectures");
  if (architectures == nullptr || !architectures->is_array() || architectures->size() != 1 ||
      !(*architectures)[0].is_string()) {
    return o.Wrong("architectures", "[\"LlamaForCausalLM\"]");
  }
  config->architecture = (*architectures)[0].get<std::string>();
  if (config->architecture != "LlamaForCausalLM" || *type != "llama") {
    return Unimplemented(StrCat("architecture ", Show((*architectures)[0]), " (model_type ", Show(*type),
                                ") is not supported, only \"LlamaForCausalLM\" (model_type \"llama\")"));
  }
  if (const Json* q = o.Find("quantization_config")) {
    auto method = q->is_object() && q->contains("quant_method") ? Show((*q)["quant_method"]) : Show(*q);
    return Unimplemented(StrCat("quantization_config (quant_method ", method,
                                ") is not supported: use a checkpoint in bf16, f16 or f32, or a GGUF file"));
  }
  for (const char* bias : {"attention_bias", "mlp_bias"}) {
    ASSIGN_OR_RETURN(bool present, o.BoolOr(bias, false));
    if (present) return Unimplemented(StrCat(bias, " is true: biases are not supported"));
  }
  if (const Json* activation = o.Find("hidden_act"); activation != nullptr && *activation != "silu") {
    return Unimplemented(StrCat("hidden_act ", Show(*activation), " is not supported, only \"silu\""));
  }
  return CheckWholeRotary(o);
}

Status ReadSizes(const Object& o, ModelConfig* c) {
  ASSIGN_OR_RETURN(c->vocab, o.Int("vocab_size", 1));
  ASSIGN_OR_RETURN(c->hidden, o.Int("hidden_size", 1));
  ASSIGN_OR_RETURN(c->layers, o.Int("num_hidden_layers", 1));
  ASSIGN_OR_RETURN(c->q_heads, o.Int("num_attention_heads", 1));
  ASSIGN_OR_RETURN(c->kv_heads, o.IntOr("num_key_value_heads", 1, c->q_heads));
  ASSIGN_OR_RETURN(c->ffn, o.Int("intermediate_size", 1));
  ASSIGN_OR_RETURN(c->max_position, o.Int("max_position_embeddings", 1));
  if (o.Find("head_dim") == nullptr) {
    if (c->hidden % c->q_heads != 0) {
      return Status(Code::kInvalidArgument,
                    StrCat("hidden_size ", c->hidden, " is not a multiple of num_attention_heads ", c->q_heads,
                           ", and head_dim is not given"));
    }
    c->head_dim = c->hidden / c->q_heads;
  } else {
    ASSIGN_OR_RETURN(c->head_dim, o.Int("head_dim", 1));
  }
  ASSIGN_OR_RETURN(double eps, o.Number("rms_norm_eps"));
  c->rms_eps = static_cast<float>(eps);
  ASSIGN_OR_RETURN(c->tied_embeddings, o.BoolOr("tie_word_embeddings", false));
  const Json* dtype = o.Find("dtype") != nullptr ? o.Find("dtype") : o.Find("torch_dtype");
  c->stored_dtype = dtype != nullptr && *dtype == "bfloat16" ? DType::kBF16 : DType::kF32;
  return OkStatus();
}

// "rope_scaling", or the same members in "rope_parameters".
StatusOr<RopeScaling> ReadScaling(const Object& o) {
  RopeScaling scaling;
  const char* key = o.Find("rope_type") != nullptr ? "rope_type" : "type";
  const Json* type = o.Find(key);
  if (type == nullptr) {
    for (const auto& [name, value] : o.json().items()) {
      if (name != "rope_theta") return o.Wrong("rope_type", "\"default\", \"linear\" or \"llama3\"");
    }
    return scaling;
  }
  if (!type->is_string()) return o.Wrong(key, "a string");
  if (o.Find("type") != nullptr && *o.Find("type") != *type)
    return o.Wrong("type", StrCat("the same as rope_type ", Show(*type)));
  RETURN_IF_ERROR(CheckWholeRotary(o));
  if (*type == "default" || *type == "none") return scaling;
  if (*type == "linear") {
    scaling.type = RopeScaling::Type::kLinear;
    ASSIGN_OR_RETURN(scaling.factor, o.Number("factor"));
    return scaling;
  }
  if (*type != "llama3") {
    return Unimplemented(
        StrCat("RoPE type ", Show(*type), " is not supported, only \"default\", \"linear\" and \"llama3\""));
  }
  scaling.type = RopeScaling::Type::kLlama3;
  ASSIGN_OR_RETURN(scaling.factor, o.Number("factor"));
  ASSIGN_OR_RETURN(scaling.low_freq_factor, o.Number("low_freq_factor"));
  ASSIGN_OR_RETURN(scaling.high_freq_factor, o.Number("high_freq_factor"));
  ASSIGN_OR_RETURN(scaling.original_max_position, o.Int("original_max_position_embeddings", 1));
  return scaling;
}

bool Same(const RopeScaling& a, const RopeScaling& b) {
  return a.type == b.type && a.factor == b.factor && a.low_freq_factor == b.low_freq_factor &&
         a.high_freq_factor == b.high_freq_factor && a.original_max_position == b.original_max_position;
}

Status ReadRope(const Object& o, ModelConfig* c) {
  const Json *parameters = o.Find("rope_parameters"), *old = o.Find("rope_scaling");
  for (const char* name : {"rope_parameters", "rope_scaling"}) {
    if (o.Find(name) != nullptr && !o.Find(name)->is_object()) return o.Wrong(name, "an object or null");
  }
  std::optional<double> theta;
  if (o.Find("rope_theta") != nullptr) {
    ASSIGN_OR_RETURN(theta, o.Number("rope_theta"));
  }
  if (old != nullptr) {
    ASSIGN_OR_RETURN(c->rope_scaling, ReadScaling(Object(*old, "rope_scaling.")));
  }
  if (parameters != nullptr) {
    Object p(*parameters, "rope_parameters.");
    ASSIGN_OR_RETURN(RopeScaling scaling, ReadScaling(p));
    if (old != nullptr && !Same(scaling, c->rope_scaling)) {
      return Status(Code::kInvalidArgument,
                    "rope_parameters and rope_scaling are both given and contradict each other");
    }
    c->rope_scaling = scaling;
    if (p.Find("rope_theta") != nullptr) {
      ASSIGN_OR_RETURN(double inner, p.Number("rope_theta"));
      if (theta && *theta != inner) {
        return Status(Code::kInvalidArgument,
                      StrCat("rope_theta is ", *theta, ", but rope_parameters.rope_theta is ", inner));
      }
      theta = inner;
    }
  }
  c->rope_theta = theta.value_or(10000);
  return OkStatus();
}

// One id or a list of them.
Status ReadIds(const Object& o, const char* name, int64_t vocab, std::vector<TokenId>* ids) {
  const Json* value = o.Find(name);
  if (value == nullptr) return OkStatus();
  const Json list = value->is_array() ? *value : Json::array({*value});
  for (const Json& id : list) {
    if (!id.is_number_integer() || id.get<int64_t>() < 0 || id.get<int64_t>() >= vocab) {
      return o.Wrong(name, StrCat("token ids from 0 to ", vocab - 1));
    }
    ids->push_back(id.get<TokenId>());
  }
  return OkStatus();
}

}  // namespace

StatusOr<ModelConfig> ParseModelConfig(std::string_view config_json) {
  ASSIGN_OR_RETURN(Json json, ParseObject(config_json));
  Object o(json, "");
  ModelConfig config;
  RETURN_IF_ERROR(CheckArchitecture(o, &config));
  RETURN_IF_ERROR(ReadSizes(o, &config));
  RETURN_IF_ERROR(ReadRope(o, &config));
  RETURN_IF_ERROR(CheckModelConfig(config));
  return config;
}

StatusOr<GenerationDefaults> ParseGenerationDefaults(std::string_view generation_config_json,
                                                     std::string_view config_json) {
  ASSIGN_OR_RETURN(Json config, ParseObject(config_json));
  ASSIGN_OR_RETURN(const int64_t vocab, Object(config, "").Int("vocab_size", 1));
  Json generation = Json::object();
  if (!generation_config_json.empty()) {
    ASSIGN_OR_RETURN(generation, ParseObject(generation_config_json));
  }
  GenerationDefaults defaults;
  const Object first(generation, "generation config: "), second(config, "config: ");
  RETURN_IF_ERROR(ReadIds(first, "eos_token_id", vocab, &defaults.eos_ids));
  if (defaults.eos_ids.empty()) RETURN_IF_ERROR(ReadIds(second, "eos_token_id", vocab, &defaults.eos_ids));
  std::vector<TokenId> bos;
  RETURN_IF_ERROR(ReadIds(first, "bos_token_id", vocab, &bos));
  if (bos.empty()) RETURN_IF_ERROR(ReadIds(second, "bos_token_id", vocab, &bos));
  if (!bos.empty()) defaults.bos_id = bos[0];

  ASSIGN_OR_RETURN(const bool sample, first.BoolOr("do_sample", true));
  if (!sample) {
    defaults.temperature = 0.0f;
    return defaults;
  }
  constexpr double kMost = std::numeric_limits<float>::max();
  RETURN_IF_ERROR(first.Optional("temperature", 0, kMost, &defaults.temperature));
  RETURN_IF_ERROR(first.Optional("top_p", 1e-30, 1, &defaults.top_p));
  RETURN_IF_ERROR(first.Optional("min_p", 0, 1, &defaults.min_p));
  RETURN_IF_ERROR(first.Optional("repetition_penalty", 1e-30, kMost, &defaults.repetition_penalty));
  if (first.Find("top_k") != nullptr) {
    ASSIGN_OR_RETURN(int64_t top_k, first.Int("top_k", 0));
    defaults.top_k = static_cast<int32_t>(top_k);
  }
  return defaults;
}

namespace {

void PutIds(const GenerationDefaults& defaults, OrderedJson* json) {
  if (defaults.bos_id) (*json)["bos_token_id"] = *defaults.bos_id;
  if (!defaults.eos_ids.empty()) (*json)["eos_token_id"] = defaults.eos_ids;
}

}  // namespace

StatusOr<std::string> ModelConfigJson(const ModelConfig& config, const GenerationDefaults& defaults) {
  OrderedJson rope = {{"rope_theta", config.rope_theta}, {"rope_type", "default"}};
  const RopeScaling& scaling = config.rope_scaling;
  switch (scaling.type) {
    case RopeScaling::Type::kNone:
      break;
    case RopeScaling::Type::kLinear:
      rope["rope_type"] = "linear";
      rope["factor"] = scaling.factor;
      break;
    case RopeScaling::Type::kLlama3:
      rope["rope_type"] = "llama3";
      rope["factor"] = scaling.factor;
      rope["low_freq_factor"] = scaling.low_freq_factor;
      rope["high_freq_factor"] = scaling.high_freq_factor;
      rope["original_max_position_embeddings"] = scaling.original_max_position;
      break;
    case RopeScaling::Type::kFactors:
      return Unimplemented(
          "RoPE with a divisor for each frequency, as GGUF files have it, has no place in config.json");
  }
  OrderedJson json = {{"architectures", OrderedJson::array({config.architecture})},
                      {"attention_bias", false},
                      {"dtype", config.stored_dtype == DType::kBF16 ? "bfloat16" : "float32"},
                      {"head_dim", config.head_dim},
                      {"hidden_act", "silu"},
                      {"hidden_size", config.hidden},
                      {"intermediate_size", config.ffn},
                      {"max_position_embeddings", config.max_position},
                      {"mlp_bias", false},
                      {"model_type", "llama"},
                      {"num_attention_heads", config.q_heads},
                      {"num_hidden_layers", config.layers},
                      {"num_key_value_heads", config.kv_heads},
                      {"rms_norm_eps", config.rms_eps},
                      {"rope_parameters", std::move(rope)},
                      {"tie_word_embeddings", config.tied_embeddings},
                      {"vocab_size", config.vocab}};
  PutIds(defaults, &json);
  return json.dump(2) + "\n";
}

std::string GenerationDefaultsJson(const GenerationDefaults& defaults) {
  OrderedJson json = OrderedJson::object();
  PutIds(defaults, &json);
  const auto put = [&json](const char* name, const auto& value) {
    if (value) json[name] = *value;
  };
  if (defaults.temperature == 0.0f) {
    json["do_sample"] = false;
  } else {
    put("temperature", defaults.temperature);
    put("top_p", defaults.top_p);
    put("min_p", defaults.min_p);
    put("top_k", defaults.top_k);
    put("repetition_penalty", defaults.repetition_penalty);
  }
  return json.dump(2) + "\n";
}

}  // namespace altiplano
