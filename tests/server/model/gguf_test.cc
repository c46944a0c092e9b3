#include "server/model/gguf.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <functional>

#include "server/base/strings.h"
#include "server/model/gguf_checkpoint.h"
#include "tests/server/model/checkpoint_testlib.h"

namespace altiplano {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

// The bytes must outlive the checkpoint.
StatusOr<std::unique_ptr<Checkpoint>> Open(const std::string& bytes) {
  return OpenGguf(std::make_shared<MemoryReader>("x.gguf", bytes));
}

std::string U64(uint64_t value) {
  return std::string(reinterpret_cast<const char*>(&value), sizeof value);
}
std::string U32(uint32_t value) {
  return std::string(reinterpret_cast<const char*>(&value), sizeof value);
}

TEST(Gguf, MetadataBecomesTheConfig) {
  for (uint32_t version : {2u, 3u}) {
    std::string bytes = SmallGguf().Bytes();
    bytes[4] = static_cast<char>(version);
    auto checkpoint = Open(bytes);
    ASSERT_TRUE(checkpoint.ok()) << checkpoint.status().ToString();
    const ModelConfig& c = (*checkpoint)->config();
    EXPECT_EQ((*checkpoint)->format(), "gguf");
    EXPECT_EQ(c.name, "small");
    EXPECT_EQ(c.architecture, "LlamaForCausalLM");
    EXPECT_EQ(c.vocab, 64);
    EXPECT_EQ(c.hidden, 256);
    EXPECT_EQ(c.layers, 2);
    EXPECT_EQ(c.q_heads, 4);
    EXPECT_EQ(c.kv_heads, 2);
    EXPECT_EQ(c.head_dim, 64);
    EXPECT_EQ(c.ffn, 512);
    EXPECT_EQ(c.max_position, 128);
    EXPECT_TRUE(c.tied_embeddings);
    EXPECT_FLOAT_EQ(c.rms_eps, 1e-5f);
    EXPECT_EQ((*checkpoint)->tensors().size(), 20u);
    EXPECT_EQ((*checkpoint)->tensors()[0].name, "model.embed_tokens.weight");
    EXPECT_THAT((*checkpoint)->tensors()[9].shape, ElementsAre(256, 512));  // down_proj
    EXPECT_THAT((*checkpoint)->generation_defaults().eos_ids, ElementsAre(2));
    EXPECT_EQ((*checkpoint)->generation_defaults().bos_id, 1);
    const TextAssets& text = (*checkpoint)->text_assets();
    ASSERT_TRUE(text.gguf.has_value());
    EXPECT_EQ(text.gguf->pre, "smollm");
    EXPECT_EQ(text.gguf->tokens.size(), 64u);
    EXPECT_EQ(text.gguf->tokens[63], "t63");
    EXPECT_THAT(text.gguf->merges, ElementsAre("t 1"));
    EXPECT_FALSE(text.gguf->add_bos);
  }
}

TEST(Gguf, AnOutputTensorUntiesTheHead) {
  GgufWriter gguf = SmallGguf();
  gguf.Tensor({"output.weight", "BF16", {64, 256}, std::string(64 * 256 * 2, '\x3F')});
  const std::string bytes = gguf.Bytes();
  auto checkpoint = Open(bytes);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status().ToString();
  EXPECT_FALSE((*checkpoint)->config().tied_embeddings);
  EXPECT_EQ((*checkpoint)->tensors().back().name, "lm_head.weight");
}

TEST(Gguf, RopeFactorsComeFromTheirTensor) {
  GgufWriter gguf = SmallGguf();
  std::vector<float> factors(32, 1.0f);
  for (size_t i = 16; i < 32; ++i) factors[i] = 8.0f;
  std::string data(reinterpret_cast<const char*>(factors.data()), 128);
  gguf.Tensor({"rope_freqs.weight", "F32", {32}, data});
  const std::string bytes = gguf.Bytes();
  auto checkpoint = Open(bytes);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status().ToString();
  EXPECT_EQ((*checkpoint)->config().rope_scaling.type, RopeScaling::Type::kFactors);
  EXPECT_EQ((*checkpoint)->config().rope_scaling.factors, factors);
  EXPECT_EQ((*checkpoint)->tensors().size(), 20u);

  gguf.tensor("rope_freqs.weight").data = std::string(128, '\0');
  const std::string zeros = gguf.Bytes();
  EXPECT_THAT(Open(zeros).status().message(), HasSubstr("tensor rope_freqs.weight: RoPE factor 0 is 0"));
  gguf.tensor("rope_freqs.weight").shape = {16};
  gguf.tensor("rope_freqs.weight").data.resize(64);
  const std::string few = gguf.Bytes();
  EXPECT_THAT(Open(few).status().message(), HasSubstr("tensor rope_freqs.weight: is F32 [16], expected F32 [32]"));
}

TEST(Gguf, Llama3EndsOfTurnAreKnownByName) {
  GgufWriter gguf = SmallGguf();
  std::vector<std::string> tokens;
  std::vector<int32_t> types(64, 1);
  for (int i = 0; i < 64; ++i) tokens.push_back(StrCat("t", i));
  tokens[60] = "<|end_of_text|>", tokens[61] = "<|eom_id|>", tokens[62] = "<|eot_id|>", tokens[63] = "<|eot_id|>";
  types[60] = types[61] = types[62] = 3;  // 63 only looks like one
  gguf.Strings("tokenizer.ggml.tokens", tokens).I32s("tokenizer.ggml.token_type", types);
  gguf.String("tokenizer.ggml.pre", "llama-bpe").U32("tokenizer.ggml.eos_token_id", 62);
  gguf.F32("general.sampling.temp", 0.5f).Raw("general.sampling.top_k", 5, U32(20));
  gguf.String("tokenizer.chat_template", "{{ x }}");
  const std::string bytes = gguf.Bytes();
  auto checkpoint = Open(bytes);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status().ToString();
  EXPECT_THAT((*checkpoint)->generation_defaults().eos_ids, ElementsAre(62, 60, 61));
  EXPECT_EQ((*checkpoint)->generation_defaults().temperature, 0.5f);
  EXPECT_EQ((*checkpoint)->generation_defaults().top_k, 20);
  EXPECT_TRUE((*checkpoint)->text_assets().gguf->add_bos);
  EXPECT_EQ((*checkpoint)->text_assets().chat_template, "{{ x }}");
}

TEST(Gguf, UnknownMetadataOfEveryTypeIsPassedOver) {
  GgufWriter gguf = SmallGguf();
  gguf.Raw("u8", 0, "\1").Raw("i8", 1, "\xFF").Raw("u16", 2, "ab").Raw("i16", 3, "ab").Raw("i32", 5, "abcd");
  gguf.Raw("u64", 10, U64(1)).Raw("i64", 11, U64(~uint64_t{0})).Raw("f64", 12, U64(0));
  gguf.Raw("floats", 9, U32(6) + U64(2) + "aaaabbbb");
  gguf.Raw("bools", 9, U32(7) + U64(3) + std::string("\0\1\0", 3));
  gguf.Raw("nested", 9, U32(9) + U64(2) + U32(0) + U64(1) + "x" + U32(8) + U64(1) + U64(2) + "ab");
  const std::string bytes = gguf.Bytes();
  EXPECT_TRUE(Open(bytes).ok()) << Open(bytes).status().ToString();
  auto parsed = ReadGguf(MemoryReader("x", bytes));
  ASSERT_TRUE(parsed.ok());
  EXPECT_EQ(std::get<int64_t>(parsed->metadata.at("i8")), -1);
  EXPECT_EQ(std::get<GgufSkippedArray>(parsed->metadata.at("floats")).count, 2u);
  EXPECT_EQ(std::get<GgufSkippedArray>(parsed->metadata.at("nested")).count, 2u);
}

struct Refusal {
  const char* name;
  std::function<std::string(GgufWriter&)> spoil;
  Code code;
  std::vector<const char*> says;
};
// Most spoil the writer and write it out.
std::function<std::string(GgufWriter&)> By(std::function<void(GgufWriter&)> change) {
  return [change](GgufWriter& gguf) {
    change(gguf);
    return gguf.Bytes();
  };
}

class GgufRefuses : public ::testing::TestWithParam<Refusal> {};

TEST_P(GgufRefuses, InOnePreciseSentence) {
  GgufWriter gguf = SmallGguf();
  const std::string bytes = GetParam().spoil(gguf);
  Status status = Open(bytes).status();
  EXPECT_EQ(status.code(), GetParam().code) << status.ToString();
  EXPECT_THAT(status.message(), ::testing::StartsWith("x.gguf: "));
  for (const char* part : GetParam().says) EXPECT_THAT(status.message(), HasSubstr(part));
}

constexpr Code kBad = Code::kInvalidArgument, kShort = Code::kDataLoss, kNot = Code::kUnimplemented;
using W = GgufWriter;
INSTANTIATE_TEST_SUITE_P(
    Container, GgufRefuses,
    ::testing::Values(
        Refusal{"magic", [](W& w) { return w.Bytes({.magic = "GGML"}); }, kBad, {"does not begin with \"GGUF\""}},
        Refusal{"version_1", [](W& w) { auto b = w.Bytes(); b[4] = 1; return b; }, kNot, {"GGUF version 1"}},
        Refusal{"version_4", [](W& w) { auto b = w.Bytes(); b[4] = 4; return b; }, kNot, {"GGUF version 4"}},
        Refusal{"big_endian", [](W& w) { auto b = w.Bytes(); b[4] = 0; b[7] = 3; return b; }, kNot, {"big-endian"}},
        Refusal{"tensor_count", [](W& w) { return w.Bytes({.tensor_count = 1 << 30}); }, kBad, {"claims 1073741824 tensors"}},
        Refusal{"metadata_count", [](W& w) { return w.Bytes({.metadata_count = 1 << 30}); }, kBad, {"1073741824 metadata entries"}},
        Refusal{"value_type", By([](W& w) { w.Raw("odd", 13, "x"); }), kBad, {"metadata odd has value type 13"}},
        Refusal{"bool_2", By([](W& w) { w.Raw("odd", 7, "\2"); }), kBad, {"metadata odd is 2, expected a bool"}},
        Refusal{"u64_high", By([](W& w) { w.Raw("odd", 10, U64(~uint64_t{0})); }), kBad, {"metadata odd is 18446744073709551615"}},
        Refusal{"string_past_end", By([](W& w) { w.Raw("odd", 8, U64(1 << 28)); }), kShort, {"metadata odd", "needs 268435456 bytes", "truncated"}},
        Refusal{"string_past_everything", By([](W& w) { w.Raw("odd", 8, U64(~uint64_t{0})); }), kBad, {"metadata odd", "18446744073709551615 bytes"}},
        Refusal{"array_past_end", By([](W& w) { w.Raw("odd", 9, U32(4) + U64(1 << 28)); }), kShort, {"metadata odd", "needs 1073741824 bytes"}},
        Refusal{"array_overflow", By([](W& w) { w.Raw("odd", 9, U32(10) + U64(uint64_t{1} << 61)); }), kShort, {"metadata odd"}},
        Refusal{"array_type", By([](W& w) { w.Raw("odd", 9, U32(77) + U64(1)); }), kBad, {"metadata odd has value type 77"}},
        Refusal{"array_nested_deep", By([](W& w) { std::string nest; for (int i = 0; i < 40; ++i) nest += U32(9) + U64(1); w.Raw("odd", 9, nest + U32(0) + U64(0)); }), kBad, {"metadata odd nests arrays deeper"}},
        Refusal{"key_long", By([](W& w) { w.Raw(std::string(300, 'k'), 0, "x"); }), kBad, {"key", "300 bytes, at most 256"}},
        Refusal{"alignment_zero", By([](W& w) { w.U32("general.alignment", 0); }), kBad, {"general.alignment is 0", "power of two"}},
        Refusal{"alignment_odd", By([](W& w) { w.U32("general.alignment", 24); }), kBad, {"general.alignment is 24"}},
        Refusal{"alignment_text", By([](W& w) { w.String("general.alignment", "32"); }), kBad, {"general.alignment is not an integer"}},
        Refusal{"tensor_unread_type", [](W& w) { return w.Bytes({.type = 13}); }, kNot, {"tensor output_norm.weight: type Q5_K is not supported"}},
        Refusal{"tensor_unknown_type", [](W& w) { return w.Bytes({.type = 99}); }, kNot, {"tensor output_norm.weight: type number 99"}},
        Refusal{"tensor_dims", By([](W& w) { w.tensor("output_norm.weight").shape = {1, 1, 1, 1, 256}; }), kBad, {"tensor output_norm.weight: has 5 dimensions"}},
        Refusal{"tensor_no_dims", By([](W& w) { w.tensor("output_norm.weight").shape = {}; }), kBad, {"tensor output_norm.weight: has 0 dimensions"}},
        Refusal{"tensor_negative_dim", By([](W& w) { w.tensor("output_norm.weight").shape = {-256}; }), kBad, {"tensor output_norm.weight: dimension 0 is 18446744073709551360"}},
        Refusal{"tensor_overflow", By([](W& w) { w.tensor("output_norm.weight").shape = {1ll << 40, 1ll << 40}; }), kBad, {"tensor output_norm.weight", "overflows 64 bits"}},
        Refusal{"tensor_block", By([](W& w) { w.tensor("output_norm.weight") = {"output_norm.weight", "Q8_0", {40}, std::string(68, 'x')}; }), kBad, {"rows of 40 elements, expected a multiple of 32 for Q8_0"}},
        Refusal{"tensor_twice", By([](W& w) { w.Tensor(w.tensor("output_norm.weight")); }), kBad, {"tensor output_norm.weight: the name appears twice"}},
        Refusal{"tensor_gap", [](W& w) { return w.Bytes({.shift_offset = 32}) + std::string(64, 'x'); }, kBad, {"tensor output_norm.weight: does not follow blk.1.ffn_down.weight"}},
        Refusal{"tensor_overlap", [](W& w) { return w.Bytes({.shift_offset = -32}); }, kBad, {"tensor output_norm.weight: overlaps blk.1.ffn_down.weight"}},
        Refusal{"tensor_out_of_range", [](W& w) { return w.Bytes({.shift_offset = 1 << 30}); }, kShort, {"tensor output_norm.weight: has 1024 bytes at offset", "truncated"}},
        Refusal{"bytes_after", [](W& w) { return w.Bytes() + std::string(64, 'x'); }, kBad, {"64 bytes after the last tensor"}},
        Refusal{"cut_by_a_byte", [](W& w) { auto b = w.Bytes(); b.pop_back(); return b; }, kShort, {"tensor output_norm.weight", "truncated"}}),
    [](const auto& param) { return param.param.name; });

INSTANTIATE_TEST_SUITE_P(
    Meaning, GgufRefuses,
    ::testing::Values(
        Refusal{"key_twice",
                [](W& w) {
                  w.Raw("twicf", 0, "x").Raw("twice", 0, "x");
                  auto b = w.Bytes();
                  b[b.find("twicf") + 4] = 'e';
                  return b;
                },
                kBad,
                {"metadata twice appears twice"}},
        Refusal{"architecture",
                By([](W& w) { w.String("general.architecture", "qwen2"); }),
                kNot,
                {"architecture \"qwen2\""}},
        Refusal{"no_architecture",
                By([](W& w) { w.Erase("general.architecture"); }),
                kBad,
                {"general.architecture: is missing"}},
        Refusal{"split", By([](W& w) { w.Raw("split.count", 2, std::string("\2\0", 2)); }), kNot, {"one of 2 pieces"}},
        Refusal{"experts", By([](W& w) { w.U32("llama.expert_count", 8); }), kNot, {"mixture of 8 experts"}},
        Refusal{"no_layers", By([](W& w) { w.Erase("llama.block_count"); }), kBad, {"llama.block_count: is missing"}},
        Refusal{"layers_zero", By([](W& w) { w.U32("llama.block_count", 0); }), kBad, {"llama.block_count: is 0"}},
        Refusal{"layers_many",
                By([](W& w) { w.U32("llama.block_count", 4000000000u); }),
                kBad,
                {"llama.block_count: is 4000000000"}},
        Refusal{"layers_text",
                By([](W& w) { w.String("llama.block_count", "2"); }),
                kBad,
                {"llama.block_count: is not an integer"}},
        Refusal{"heads_by_layer",
                By([](W& w) {
                  w.I32s("llama.attention.head_count", {4, 4});
                }),
                kNot,
                {"differ from layer to layer"}},
        Refusal{"heads_not_dividing",
                By([](W& w) { w.U32("llama.attention.head_count", 3); }),
                kBad,
                {"head_count: is 3, expected a divisor of the embedding length 256"}},
        Refusal{"kv_not_dividing",
                By([](W& w) { w.U32("llama.attention.head_count_kv", 3); }),
                kBad,
                {"4 query heads", "3 KV heads"}},
        Refusal{"partial_rotary",
                By([](W& w) { w.U32("llama.rope.dimension_count", 32); }),
                kNot,
                {"rope.dimension_count: is 32", "64"}},
        Refusal{
            "value_length", By([](W& w) { w.U32("llama.attention.value_length", 32); }), kNot, {"value_length: is 32"}},
        Refusal{"yarn",
                By([](W& w) { w.String("llama.rope.scaling.type", "yarn"); }),
                kNot,
                {"rope.scaling.type: \"yarn\""}},
        Refusal{"linear_no_factor",
                By([](W& w) { w.String("llama.rope.scaling.type", "linear"); }),
                kBad,
                {"rope.scaling.factor: is missing"}},
        Refusal{"theta_nan",
                By([](W& w) { w.F32("llama.rope.freq_base", __builtin_nanf("")); }),
                kBad,
                {"rope.freq_base: is not a finite"}},
        Refusal{"theta_zero", By([](W& w) { w.F32("llama.rope.freq_base", 0); }), kBad, {"rope_theta is 0"}},
        Refusal{"eps_inf",
                By([](W& w) { w.F32("llama.attention.layer_norm_rms_epsilon", __builtin_inff()); }),
                kBad,
                {"layer_norm_rms_epsilon: is not a finite"}},
        Refusal{
            "eps_zero", By([](W& w) { w.F32("llama.attention.layer_norm_rms_epsilon", 0); }), kBad, {"epsilon is 0"}},
        Refusal{"vocab",
                By([](W& w) { w.U32("llama.vocab_size", 65); }),
                kBad,
                {"llama.vocab_size: is 65, but token_embd.weight has 64 rows"}},
        Refusal{"tokens_few",
                By([](W& w) { w.Strings("tokenizer.ggml.tokens", {"a"}); }),
                kBad,
                {"tokenizer.ggml.tokens: has 1 entries", "64 rows"}},
        Refusal{"types_few",
                By([](W& w) { w.I32s("tokenizer.ggml.token_type", {1}); }),
                kBad,
                {"token_type: is not a list of 64"}},
        Refusal{"type_negative",
                By([](W& w) { w.I32s("tokenizer.ggml.token_type", std::vector<int32_t>(64, -1)); }),
                kBad,
                {"token_type: holds -1"}},
        Refusal{"merges_text",
                By([](W& w) { w.String("tokenizer.ggml.merges", "a b"); }),
                kBad,
                {"merges: is missing or not a list of strings"}},
        Refusal{"no_merges",
                By([](W& w) { w.Erase("tokenizer.ggml.merges"); }),
                kBad,
                {"tokenizer.ggml.merges: is missing or not a list of strings"}},
        Refusal{"eos_outside",
                By([](W& w) { w.U32("tokenizer.ggml.eos_token_id", 64); }),
                kBad,
                {"eos_token_id: is 64, expected an integer from 0 to 63"}},
        Refusal{
            "bos_outside", By([](W& w) { w.U32("tokenizer.ggml.bos_token_id", 99); }), kBad, {"bos_token_id: is 99"}},
        Refusal{"top_p", By([](W& w) { w.F32("general.sampling.top_p", 2); }), kBad, {"general.sampling.top_p: is 2"}},
        Refusal{"name_not_utf8",
                By([](W& w) { w.String("general.name", "\xFF"); }),
                kBad,
                {"general.name: is not valid UTF-8"}},
        Refusal{"no_embedding",
                By([](W& w) { w.DropTensor("token_embd.weight"); }),
                kBad,
                {"tensor token_embd.weight: is missing"}},
        Refusal{"missing",
                By([](W& w) { w.DropTensor("blk.1.attn_k.weight"); }),
                kBad,
                {"tensor blk.1.attn_k.weight: is missing, expected [128, 256]"}},
        Refusal{"extra",
                By(
                    [](W& w) {
                      w.Tensor({"blk.2.attn_norm.weight", "F32", {256}, std::string(1024, '\0')});
                    }),
                kBad,
                {"tensor blk.2.attn_norm.weight: is not expected", "2 layers"}},
        Refusal{"bias",
                By(
                    [](W& w) {
                      w.Tensor({"blk.0.attn_q.bias", "F32", {256}, std::string(1024, '\0')});
                    }),
                kBad,
                {"tensor blk.0.attn_q.bias: is not expected: biases"}},
        Refusal{"shape",
                By(
                    [](W& w) {
                      w.tensor("blk.0.attn_q.weight").shape = {128, 512};
                    }),
                kBad,
                {"tensor blk.0.attn_q.weight: shape is [128, 512], expected [256, 256] (query heads * head_dim x "
                 "hidden)"}}),
    [](const auto& param) { return param.param.name; });

// Cut anywhere in the header and at many places in the data, a file is an error.
TEST(Gguf, EveryTruncationIsAnError) {
  const std::string whole = SmallGguf("Q4_0").Bytes();
  ASSERT_TRUE(Open(whole).ok());
  for (size_t n = 0; n < whole.size(); n += n < 4000 ? 1 : 997) {
    const std::string cut = whole.substr(0, n);
    EXPECT_FALSE(Open(cut).ok()) << n;
  }
}

}  // namespace
}  // namespace altiplano
