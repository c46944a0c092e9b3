#include "server/model/config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <numbers>
#include <sstream>

#include "server/base/json.h"
#include "server/base/strings.h"

namespace altiplano {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

Json Llama31() {
  return Json::parse(R"({
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": false, "mlp_bias": false,
    "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu", "hidden_size": 4096,
    "intermediate_size": 14336, "max_position_embeddings": 131072, "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "rope_theta": 500000.0, "tie_word_embeddings": false, "torch_dtype": "bfloat16", "use_cache": true,
    "vocab_size": 128256})");
}

ModelConfig MustParse(const Json& json) {
  auto config = ParseModelConfig(json.dump());
  EXPECT_TRUE(config.ok()) << config.status().ToString();
  return config.ok() ? *config : ModelConfig();
}

TEST(ModelConfig, Llama31AsPublished) {
  const ModelConfig c = MustParse(Llama31());
  EXPECT_EQ(c.architecture, "LlamaForCausalLM");
  EXPECT_EQ(c.vocab, 128256);
  EXPECT_EQ(c.hidden, 4096);
  EXPECT_EQ(c.layers, 32);
  EXPECT_EQ(c.q_heads, 32);
  EXPECT_EQ(c.kv_heads, 8);
  EXPECT_EQ(c.head_dim, 128);  // derived
  EXPECT_EQ(c.ffn, 14336);
  EXPECT_EQ(c.max_position, 131072);
  EXPECT_FLOAT_EQ(c.rms_eps, 1e-5f);
  EXPECT_EQ(c.rope_theta, 500000);
  EXPECT_EQ(c.rope_scaling.type, RopeScaling::Type::kLlama3);
  EXPECT_EQ(c.rope_scaling.factor, 8);
  EXPECT_EQ(c.rope_scaling.original_max_position, 8192);
  EXPECT_FALSE(c.tied_embeddings);
  EXPECT_EQ(c.stored_dtype, DType::kBF16);
  EXPECT_EQ(c.parameters(), 8'030'261'248u);
  EXPECT_EQ(c.kv_bytes_per_token(DType::kBF16), 131'072u);
}

TEST(ModelConfig, ParametersOfThePublishedSizes) {
  Json json = Llama31();
  json["hidden_size"] = 8192, json["num_hidden_layers"] = 80, json["num_attention_heads"] = 64,
  json["intermediate_size"] = 28672;
  EXPECT_EQ(MustParse(json).parameters(), 70'553'706'496u);
  json["hidden_size"] = 16384, json["num_hidden_layers"] = 126, json["num_attention_heads"] = 128,
  json["intermediate_size"] = 53248;
  EXPECT_EQ(MustParse(json).parameters(), 405'853'388'800u);
  // Llama 3.2 1B: tied, heads of 64.
  json["hidden_size"] = 2048, json["num_hidden_layers"] = 16, json["num_attention_heads"] = 32,
  json["intermediate_size"] = 8192;
  json["head_dim"] = 64, json["tie_word_embeddings"] = true;
  EXPECT_EQ(MustParse(json).parameters(), 1'235'814'400u);
}

TEST(ModelConfig, BothGenerationsOfRopeSayTheSame) {
  Json fresh = Llama31();
  fresh["rope_parameters"] = fresh["rope_scaling"];
  fresh["rope_parameters"]["rope_theta"] = fresh["rope_theta"];
  fresh.erase("rope_scaling");
  fresh.erase("rope_theta");
  const ModelConfig a = MustParse(Llama31()), b = MustParse(fresh);
  EXPECT_EQ(a.rope_theta, b.rope_theta);
  EXPECT_EQ(RopeInverseFrequencies(a), RopeInverseFrequencies(b));
  // Both at once, in agreement.
  fresh["rope_scaling"] = Llama31()["rope_scaling"];
  fresh["rope_theta"] = 500000;
  EXPECT_EQ(RopeInverseFrequencies(MustParse(fresh)), RopeInverseFrequencies(a));
}

TEST(ModelConfig, KindsOfRope) {
  Json json = Llama31();
  json["rope_scaling"] = nullptr;
  EXPECT_EQ(MustParse(json).rope_scaling.type, RopeScaling::Type::kNone);
  json["rope_scaling"] = {{"rope_type", "default"}};
  EXPECT_EQ(MustParse(json).rope_scaling.type, RopeScaling::Type::kNone);
  json["rope_scaling"] = {{"type", "linear"}, {"factor", 4}};
  EXPECT_EQ(MustParse(json).rope_scaling.type, RopeScaling::Type::kLinear);
  EXPECT_EQ(MustParse(json).rope_scaling.factor, 4);
  json.erase("rope_scaling");
  json.erase("rope_theta");
  EXPECT_EQ(MustParse(json).rope_theta, 10000);
  json["rope_parameters"] = {{"rope_theta", 250000.0}};
  EXPECT_EQ(MustParse(json).rope_theta, 250000);
}

TEST(ModelConfig, HeadsMayBeAllOrOneAndOfAnyEvenSize) {
  Json json = Llama31();
  json.erase("num_key_value_heads");
  EXPECT_EQ(MustParse(json).kv_heads, 32);
  json["num_key_value_heads"] = nullptr;
  EXPECT_EQ(MustParse(json).kv_heads, 32);
  json["num_key_value_heads"] = 1;
  EXPECT_EQ(MustParse(json).kv_heads, 1);
  json["head_dim"] = 96;
  EXPECT_EQ(MustParse(json).q_size(), 32 * 96);
  json["head_dim"] = nullptr;
  EXPECT_EQ(MustParse(json).head_dim, 128);
}

struct Refusal {
  const char* name;
  const char* patch;  // RFC 7386 merge patch of Llama31(); null deletes
  Code code;
  std::vector<const char*> says;
};

class ModelConfigRefuses : public ::testing::TestWithParam<Refusal> {};

TEST_P(ModelConfigRefuses, InOnePreciseSentence) {
  Json json = Llama31();
  json.merge_patch(Json::parse(GetParam().patch));
  Status status = ParseModelConfig(json.dump()).status();
  EXPECT_EQ(status.code(), GetParam().code) << status.ToString();
  for (const char* part : GetParam().says) EXPECT_THAT(status.message(), HasSubstr(part));
  EXPECT_EQ(status.message().find('\n'), std::string::npos);
}

constexpr Code kBad = Code::kInvalidArgument, kNot = Code::kUnimplemented;
INSTANTIATE_TEST_SUITE_P(
    Table, ModelConfigRefuses,
    ::testing::Values(
        Refusal{"architecture",
                R"({"architectures": ["MistralForCausalLM"], "model_type": "mistral"})",
                kNot,
                {"MistralForCausalLM", "LlamaForCausalLM"}},
        Refusal{"base_model", R"({"architectures": ["LlamaModel"]})", kNot, {"LlamaModel"}},
        Refusal{
            "no_architecture", R"({"architectures": null})", kBad, {"architectures is missing", "LlamaForCausalLM"}},
        Refusal{"no_model_type", R"({"model_type": null})", kBad, {"model_type is missing"}},
        Refusal{"model_type", R"({"model_type": "mllama"})", kNot, {"mllama"}},
        Refusal{"attention_bias", R"({"attention_bias": true})", kNot, {"attention_bias is true"}},
        Refusal{"mlp_bias", R"({"mlp_bias": true})", kNot, {"mlp_bias is true"}},
        Refusal{"bias_type", R"({"mlp_bias": 1})", kBad, {"mlp_bias is 1", "true or false"}},
        Refusal{"activation", R"({"hidden_act": "gelu"})", kNot, {"hidden_act \"gelu\"", "silu"}},
        Refusal{"quantised",
                R"({"quantization_config": {"quant_method": "fbgemm_fp8"}})",
                kNot,
                {"quantization_config", "fbgemm_fp8"}},
        Refusal{"partial_rotary", R"({"partial_rotary_factor": 0.5})", kNot, {"partial_rotary_factor 0.5"}},
        Refusal{
            "rope_dynamic", R"({"rope_scaling": {"rope_type": "dynamic"}})", kNot, {"RoPE type \"dynamic\"", "llama3"}},
        Refusal{"rope_yarn",
                R"({"rope_scaling": null, "rope_parameters": {"rope_type": "yarn", "factor": 4}})",
                kNot,
                {"\"yarn\""}},
        Refusal{
            "rope_untyped", R"({"rope_scaling": {"rope_type": null}})", kBad, {"rope_scaling.rope_type is missing"}},
        Refusal{"rope_string", R"({"rope_scaling": "llama3"})", kBad, {"rope_scaling is \"llama3\"", "object"}},
        Refusal{"rope_two_types",
                R"({"rope_scaling": {"type": "linear"}})",
                kBad,
                {"rope_scaling.type is \"linear\"", "llama3"}},
        Refusal{"rope_no_factor", R"({"rope_scaling": {"factor": null}})", kBad, {"rope_scaling.factor is missing"}},
        Refusal{"rope_factor", R"({"rope_scaling": {"factor": 0}})", kBad, {"factor is 0", "at least 1"}},
        Refusal{"rope_low", R"({"rope_scaling": {"low_freq_factor": -1}})", kBad, {"low_freq_factor is -1"}},
        Refusal{"rope_high",
                R"({"rope_scaling": {"high_freq_factor": 1}})",
                kBad,
                {"high_freq_factor is 1", "more than low_freq_factor"}},
        Refusal{"rope_original",
                R"({"rope_scaling": {"original_max_position_embeddings": 0}})",
                kBad,
                {"original_max_position_embeddings is 0"}},
        Refusal{"rope_contradiction",
                R"({"rope_parameters": {"rope_type": "default"}})",
                kBad,
                {"rope_parameters and rope_scaling", "contradict"}},
        Refusal{"theta_contradiction",
                R"({"rope_scaling": null, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}})",
                kBad,
                {"rope_theta is 5", "10000"}},
        Refusal{"theta_zero", R"({"rope_theta": 0})", kBad, {"rope_theta is 0"}},
        Refusal{"theta_string", R"({"rope_theta": "5e5"})", kBad, {"rope_theta is \"5e5\"", "finite number"}},
        Refusal{"eps_zero", R"({"rms_norm_eps": 0})", kBad, {"epsilon is 0"}},
        Refusal{"eps_negative", R"({"rms_norm_eps": -1e-5})", kBad, {"epsilon is -"}},
        Refusal{"eps_underflow", R"({"rms_norm_eps": 1e-60})", kBad, {"epsilon is 0"}},
        Refusal{"eps_overflow", R"({"rms_norm_eps": 1e300})", kBad, {"epsilon is inf"}},
        Refusal{"eps_missing", R"({"rms_norm_eps": null})", kBad, {"rms_norm_eps is missing"}},
        Refusal{"vocab_zero", R"({"vocab_size": 0})", kBad, {"vocab_size is 0", "1 to 2147483647"}},
        Refusal{"vocab_negative", R"({"vocab_size": -5})", kBad, {"vocab_size is -5"}},
        Refusal{"vocab_huge", R"({"vocab_size": 18446744073709551615})", kBad, {"vocab_size is 18446744073709551615"}},
        Refusal{"hidden_fraction", R"({"hidden_size": 4096.5})", kBad, {"hidden_size is 4096.5", "integer"}},
        Refusal{"hidden_string", R"({"hidden_size": "4096"})", kBad, {"hidden_size is \"4096\""}},
        Refusal{"hidden_missing", R"({"hidden_size": null})", kBad, {"hidden_size is missing"}},
        Refusal{"layers_zero", R"({"num_hidden_layers": 0})", kBad, {"num_hidden_layers is 0"}},
        Refusal{"layers_huge", R"({"num_hidden_layers": 20000})", kBad, {"layers is 20000"}},
        Refusal{"ffn_zero", R"({"intermediate_size": 0})", kBad, {"intermediate_size is 0"}},
        Refusal{
            "context_missing", R"({"max_position_embeddings": null})", kBad, {"max_position_embeddings is missing"}},
        Refusal{"kv_not_dividing", R"({"num_key_value_heads": 5})", kBad, {"32 query heads", "5 KV heads"}},
        Refusal{"kv_more", R"({"num_key_value_heads": 64})", kBad, {"32 query heads", "64 KV heads"}},
        Refusal{"kv_zero", R"({"num_key_value_heads": 0})", kBad, {"num_key_value_heads is 0"}},
        Refusal{"head_dim_odd", R"({"head_dim": 63})", kBad, {"head_dim is 63", "even"}},
        Refusal{"head_dim_zero", R"({"head_dim": 0})", kBad, {"head_dim is 0"}},
        Refusal{"heads_not_dividing",
                R"({"num_attention_heads": 24})",
                kBad,
                {"hidden_size 4096", "num_attention_heads 24"}},
        Refusal{"vocabulary_huge", R"({"vocab_size": 4194305})", kBad, {"vocabulary size is 4194305", "4194304"}},
        Refusal{"embedding_overflow",
                R"({"vocab_size": 2147483647, "hidden_size": 2147483647, "head_dim": 128})",
                kBad,
                {"vocabulary 2147483647", "2^56"}},
        Refusal{"head_overflow",
                R"({"num_attention_heads": 2147483647, "num_key_value_heads": 1, "head_dim": 2147483646})",
                kBad,
                {"2^56"}},
        Refusal{
            "kv_overflow",
            R"({"hidden_size": 2, "vocab_size": 1, "intermediate_size": 1, "head_dim": 1048576, "max_position_embeddings": 2147483647})",
            kBad,
            {"KV cache", "2^56"}},
        Refusal{"tied_string", R"({"tie_word_embeddings": "yes"})", kBad, {"tie_word_embeddings is \"yes\""}}),
    [](const auto& param) { return param.param.name; });

TEST(ModelConfig, RefusesWhatIsNotAnObject) {
  for (const char* text : {"", "[]", "3", "{", "{\"a\":1,\"a\":2}", "null", "{\"vocab_size\": NaN}"}) {
    EXPECT_EQ(ParseModelConfig(text).status().code(), Code::kInvalidArgument) << text;
  }
}

TEST(GenerationDefaults, AsPublishedForInstruct) {
  auto defaults = ParseGenerationDefaults(
      R"({"bos_token_id": 128000, "do_sample": true, "eos_token_id": [128001, 128008, 128009], "temperature": 0.6, "top_p": 0.9})",
      R"({"vocab_size": 128256, "eos_token_id": 128001})");
  ASSERT_TRUE(defaults.ok()) << defaults.status().ToString();
  EXPECT_THAT(defaults->eos_ids, ElementsAre(128001, 128008, 128009));
  EXPECT_EQ(defaults->bos_id, 128000);
  EXPECT_FLOAT_EQ(defaults->temperature.value(), 0.6f);
  EXPECT_FLOAT_EQ(defaults->top_p.value(), 0.9f);
  EXPECT_FALSE(defaults->top_k || defaults->min_p || defaults->repetition_penalty);
}

TEST(GenerationDefaults, FallBackToTheConfig) {
  auto defaults = ParseGenerationDefaults("", R"({"vocab_size": 100, "eos_token_id": 7, "bos_token_id": 1})");
  ASSERT_TRUE(defaults.ok()) << defaults.status().ToString();
  EXPECT_THAT(defaults->eos_ids, ElementsAre(7));
  EXPECT_EQ(defaults->bos_id, 1);
  EXPECT_FALSE(defaults->temperature.has_value());
  defaults = ParseGenerationDefaults(R"({"do_sample": false, "temperature": 0.7})", R"({"vocab_size": 100})");
  ASSERT_TRUE(defaults.ok()) << defaults.status().ToString();
  EXPECT_EQ(defaults->temperature, 0.0f);
  EXPECT_TRUE(defaults->eos_ids.empty());
}

TEST(GenerationDefaults, RefuseWhatCannotBe) {
  const std::pair<const char*, const char*> kCases[] = {
      {R"({"eos_token_id": [1, 100]})", "eos_token_id is [1,100], expected token ids from 0 to 99"},
      {R"({"eos_token_id": -1})", "eos_token_id is -1"},
      {R"({"eos_token_id": "</s>"})", "eos_token_id is \"</s>\""},
      {R"({"bos_token_id": 18446744073709551615})", "bos_token_id is 18446744073709551615"},
      {R"({"temperature": -0.5})", "temperature is -0.5"},
      {R"({"temperature": 1e300})", "temperature is 1e+300"},
      {R"({"top_p": 0})", "top_p is 0"},
      {R"({"top_p": 1.5})", "top_p is 1.5"},
      {R"({"top_k": -1})", "top_k is -1"},
      {R"({"min_p": 2})", "min_p is 2"},
      {R"({"repetition_penalty": 0})", "repetition_penalty is 0"},
      {R"({"do_sample": 1})", "do_sample is 1"},
  };
  for (const auto& [generation, says] : kCases) {
    Status status = ParseGenerationDefaults(generation, R"({"vocab_size": 100})").status();
    EXPECT_EQ(status.code(), Code::kInvalidArgument) << generation;
    EXPECT_THAT(status.message(), HasSubstr(says));
  }
}

// Llama 3.1: theta 500000, heads of 128; from the published formula in 50 digits.
TEST(RopeInverseFrequencies, OfLlama31) {
  const std::vector<float> f = RopeInverseFrequencies(MustParse(Llama31()));
  ASSERT_EQ(f.size(), 64u);
  EXPECT_EQ(f[0], 1.0f);
  EXPECT_FLOAT_EQ(f[1], 0.8146172338565447f);
  // The three bands: kept up to pair 28, blended to 34, divided by 8 from 35.
  for (size_t i = 0; i < 64; ++i) {
    const double plain = std::pow(500000.0, -static_cast<double>(i) / 64);
    const double ratio = static_cast<double>(f[i]) / plain;
    if (i <= 28) {
      EXPECT_NEAR(ratio, 1, 1e-6) << i;
    } else if (i < 35) {
      EXPECT_TRUE(ratio > 0.126 && ratio < 0.999) << i << ": " << ratio;
    } else {
      EXPECT_NEAR(ratio, 0.125, 1e-7) << i;
    }
  }
  const double wavelength = 2 * std::numbers::pi * std::pow(500000.0, 31.0 / 64);
  const double smooth = (8192 / wavelength - 1) / 3;
  EXPECT_NEAR(static_cast<double>(f[31]) * wavelength / 2 / std::numbers::pi, (1 - smooth) / 8 + smooth, 1e-6);
}

TEST(RopeInverseFrequencies, EqualTheGeneratedTable) {
  std::ifstream file(StrCat(ALTIPLANO_DATA_DIR, "/quant_rope/rope_llama3_inv_freq.tsv"));
  if (!file) GTEST_SKIP() << "no quant_rope/rope_llama3_inv_freq.tsv in " << ALTIPLANO_DATA_DIR;
  Json json = Llama31();
  const std::vector<float> scaled = RopeInverseFrequencies(MustParse(json));
  json["rope_scaling"] = nullptr;
  const std::vector<float> plain = RopeInverseFrequencies(MustParse(json));
  std::string line;
  std::getline(file, line);
  size_t rows = 0;
  for (; std::getline(file, line); ++rows) {
    std::istringstream fields(line);
    size_t i;
    double expected_plain, expected_scaled;
    ASSERT_TRUE(fields >> i >> expected_plain >> expected_scaled) << line;
    ASSERT_LT(i, 64u);
    EXPECT_EQ(plain[i], static_cast<float>(expected_plain)) << i;
    EXPECT_EQ(scaled[i], static_cast<float>(expected_scaled)) << i;
  }
  EXPECT_EQ(rows, 64u);
}

TEST(RopeInverseFrequencies, LinearAndFactorsDivide) {
  Json json = Llama31();
  json["rope_scaling"] = nullptr;
  ModelConfig c = MustParse(json);
  const std::vector<float> plain = RopeInverseFrequencies(c);
  c.rope_scaling.type = RopeScaling::Type::kLinear;
  c.rope_scaling.factor = 4;
  const std::vector<float> linear = RopeInverseFrequencies(c);
  c.rope_scaling.type = RopeScaling::Type::kFactors;
  for (int i = 0; i < 64; ++i) c.rope_scaling.factors.push_back(i < 32 ? 1.0f : 8.0f);
  const std::vector<float> factors = RopeInverseFrequencies(c);
  for (size_t i = 0; i < 64; ++i) {
    EXPECT_EQ(linear[i], plain[i] / 4);
    EXPECT_EQ(factors[i], plain[i] / (i < 32 ? 1 : 8));
  }
}

}  // namespace
}  // namespace altiplano
