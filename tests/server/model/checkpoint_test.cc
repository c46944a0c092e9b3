#include "server/model/checkpoint.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <filesystem>
#include <functional>

#include "server/base/strings.h"
#include "tests/server/model/checkpoint_testlib.h"

namespace altiplano {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::unique_ptr<Checkpoint> MustOpen(const std::string& path) {
  auto checkpoint = Checkpoint::Open(path);
  EXPECT_TRUE(checkpoint.ok()) << checkpoint.status().ToString();
  return checkpoint.ok() ? std::move(*checkpoint) : nullptr;
}

// --- Folders that are right.

TEST(HuggingFaceFolder, OneFile) {
  TempFolder folder;
  ModelFiles model = SmallModel();
  model.generation = {{"eos_token_id", {2, 3}}, {"temperature", 0.6}};
  model.WriteTo(folder);
  folder.Write("tokenizer.json", "{\"t\":1}");
  folder.Write("tokenizer.model", "IQ== 0\n");
  folder.Write("tokenizer_config.json", R"({"chat_template": "from config"})");
  auto checkpoint = MustOpen(folder.path());
  ASSERT_NE(checkpoint, nullptr);
  EXPECT_EQ(checkpoint->format(), "safetensors");
  EXPECT_EQ(checkpoint->path(), folder.path());
  EXPECT_EQ(checkpoint->config().name, std::filesystem::path(folder.path()).filename().string());
  EXPECT_EQ(checkpoint->tensors().size(), 21u);
  EXPECT_EQ(checkpoint->tensors().front().name, "model.embed_tokens.weight");
  EXPECT_EQ(checkpoint->tensors().back().name, "lm_head.weight");
  EXPECT_EQ(checkpoint->total_bytes(), checkpoint->config().parameters() * 2);
  EXPECT_EQ(checkpoint->config().stored_dtype, DType::kBF16);
  EXPECT_THAT(checkpoint->generation_defaults().eos_ids, ElementsAre(2, 3));
  EXPECT_EQ(checkpoint->text_assets().tokenizer_json, "{\"t\":1}");
  EXPECT_EQ(checkpoint->text_assets().tiktoken_model, "IQ== 0\n");
  EXPECT_EQ(checkpoint->text_assets().chat_template, "from config");
  EXPECT_FALSE(checkpoint->text_assets().gguf.has_value());
}

TEST(HuggingFaceFolder, ChatTemplatesInOrderOfPrecedence) {
  TempFolder folder;
  SmallModel().WriteTo(folder);
  folder.Write("tokenizer_config.json",
               R"({"chat_template": [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}]})");
  EXPECT_EQ(MustOpen(folder.path())->text_assets().chat_template, "y");
  folder.Write("chat_template.jinja", "z");
  EXPECT_EQ(MustOpen(folder.path())->text_assets().chat_template, "z");
}

TEST(HuggingFaceFolder, ShardsAreOneModel) {
  TempFolder one, many;
  ModelFiles model = SmallModel();
  model.WriteTo(one);
  model.WriteShards(many, 3);
  auto a = MustOpen(one.path()), b = MustOpen(many.path());
  ASSERT_EQ(a->tensors().size(), b->tensors().size());
  for (size_t i = 0; i < a->tensors().size(); ++i) {
    const TensorInfo& info = a->tensors()[i];
    EXPECT_EQ(info.name, b->tensors()[i].name);
    const int64_t rows = info.shape.size() == 2 ? info.shape[0] : 1, cols = info.shape.back();
    std::vector<float> x(static_cast<size_t>(rows * cols)), y(x.size());
    ASSERT_TRUE(a->Read(info.name, 0, rows, 0, cols, DType::kF32, x.data(), cols).ok());
    ASSERT_TRUE(b->Read(info.name, 0, rows, 0, cols, DType::kF32, y.data(), cols).ok());
    EXPECT_EQ(x, y);
  }
}

// As huggingface_hub lays it out: links into blobs, and a folder named by a commit.
TEST(HuggingFaceFolder, TheHubsCacheOfLinks) {
  TempFolder cache;
  namespace fs = std::filesystem;
  const fs::path repository = fs::path(cache.path()) / "models--org--Small-Llama", blobs = repository / "blobs";
  const fs::path snapshot = repository / "snapshots" / "0123abcd";
  fs::create_directories(blobs);
  fs::create_directories(snapshot);
  TempFolder plain;
  SmallModel().WriteTo(plain);
  for (const char* name : {"config.json", "model.safetensors"}) {
    fs::copy(plain.At(name), blobs / (std::string("hash-of-") + name));
    fs::create_symlink(fs::path("../../blobs") / (std::string("hash-of-") + name), snapshot / name);
  }
  EXPECT_EQ(MustOpen(snapshot.string())->config().name, "Small-Llama");
}

TEST(HuggingFaceFolder, TiedHeadReadsTheEmbedding) {
  TempFolder folder;
  ModelFiles model = SmallModel();
  model.config["tie_word_embeddings"] = true;
  const RawTensor head = model.Tensor("lm_head.weight");
  model.Drop("lm_head.weight");
  model.WriteTo(folder);
  auto checkpoint = MustOpen(folder.path());
  EXPECT_EQ(checkpoint->tensors().size(), 20u);
  std::vector<float> embedding(32 * 16), tied(32 * 16);
  ASSERT_TRUE(checkpoint->Read("model.embed_tokens.weight", 0, 32, 0, 16, DType::kF32, embedding.data(), 16).ok());
  ASSERT_TRUE(checkpoint->Read("lm_head.weight", 0, 32, 0, 16, DType::kF32, tied.data(), 16).ok());
  EXPECT_EQ(embedding, tied);

  // A copy beside it changes nothing; a head of its own is a contradiction.
  model.tensors.push_back(head);
  model.Tensor("lm_head.weight").data = model.Tensor("model.embed_tokens.weight").data;
  model.WriteTo(folder);
  EXPECT_EQ(MustOpen(folder.path())->tensors().size(), 20u);
  model.Tensor("lm_head.weight").data[16 * 2 * 31] ^= 1;
  model.WriteTo(folder);
  EXPECT_THAT(Checkpoint::Open(folder.path()).status().message(),
              HasSubstr("model.safetensors: tensor lm_head.weight: differs in row 31 from model.embed_tokens.weight"));
}

TEST(HuggingFaceFolder, OldExportsCarryRotaryBuffers) {
  TempFolder folder;
  ModelFiles model = SmallModel("F16");
  model.tensors.push_back({"model.layers.0.self_attn.rotary_emb.inv_freq", "F32", {2}, std::string(8, '\0')});
  model.WriteTo(folder);
  auto checkpoint = MustOpen(folder.path());
  EXPECT_EQ(checkpoint->tensors().size(), 21u);
  EXPECT_EQ(checkpoint->config().stored_dtype, DType::kF32);
}

// --- Folders that are wrong.

struct Refusal {
  const char* name;
  std::function<void(const TempFolder&, ModelFiles)> write;
  Code code;
  std::vector<const char*> says;
};
std::function<void(const TempFolder&, ModelFiles)> One(std::function<void(ModelFiles&)> spoil) {
  return [spoil](const TempFolder& folder, ModelFiles model) {
    spoil(model);
    model.WriteTo(folder);
  };
}
std::function<void(const TempFolder&, ModelFiles)> Shards(std::function<void(const TempFolder&)> spoil) {
  return [spoil](const TempFolder& folder, ModelFiles model) {
    model.WriteShards(folder, 3);
    spoil(folder);
  };
}
std::function<void(const TempFolder&, ModelFiles)> Files(std::function<void(const TempFolder&)> write) {
  return [write](const TempFolder& folder, ModelFiles) { write(folder); };
}

class FolderRefuses : public ::testing::TestWithParam<Refusal> {};

TEST_P(FolderRefuses, InOnePreciseSentence) {
  TempFolder folder;
  GetParam().write(folder, SmallModel());
  Status status = Checkpoint::Open(folder.path()).status();
  EXPECT_EQ(status.code(), GetParam().code) << status.ToString();
  EXPECT_THAT(status.message(), ::testing::StartsWith(folder.path()));
  for (const char* part : GetParam().says) EXPECT_THAT(status.message(), HasSubstr(part));
  EXPECT_EQ(status.message().find('\n'), std::string::npos);
}

constexpr Code kBad = Code::kInvalidArgument, kShort = Code::kDataLoss, kNot = Code::kUnimplemented;
constexpr Code kGone = Code::kNotFound, kOther = Code::kFailedPrecondition;
using M = ModelFiles;
using F = TempFolder;
constexpr const char* kShard2 = "model-00002-of-00003.safetensors";

INSTANTIATE_TEST_SUITE_P(
    OfOneFile, FolderRefuses,
    ::testing::Values(Refusal{"missing",
                              One([](M& m) { m.Drop("model.norm.weight"); }),
                              kBad,
                              {"model.safetensors: tensor model.norm.weight: is missing, expected [16] (hidden)"}},
                      Refusal{"missing_head",
                              One([](M& m) { m.Drop("lm_head.weight"); }),
                              kBad,
                              {"tensor lm_head.weight: is missing, expected [32, 16]"}},
                      Refusal{"extra",
                              One([](M& m) {
                                m.tensors.push_back({"model.extra", "F32", {1}, "abcd"});
                              }),
                              kBad,
                              {"model.safetensors: tensor model.extra: is not expected", "2 layers"}},
                      Refusal{"extra_layer",
                              One([](M& m) { m.config["num_hidden_layers"] = 1; }),
                              kBad,
                              {"tensor model.layers.1.", "is not expected", "1 layers"}},
                      Refusal{"layer_short",
                              One([](M& m) { m.config["num_hidden_layers"] = 3; }),
                              kBad,
                              {"tensor model.layers.2.input_layernorm.weight: is missing"}},
                      Refusal{"bias",
                              One([](M& m) {
                                m.tensors.push_back({"model.layers.0.self_attn.q_proj.bias", "F32", {1}, "abcd"});
                              }),
                              kBad,
                              {"q_proj.bias: is not expected: biases"}},
                      Refusal{"quantised",
                              One([](M& m) {
                                m.tensors.push_back({"model.layers.0.mlp.up_proj.weight_scale", "F32", {1}, "abcd"});
                              }),
                              kBad,
                              {"up_proj.weight_scale: is not expected: quantised"}},
                      Refusal{"shape",
                              One([](M& m) {
                                m.Tensor("model.layers.1.self_attn.k_proj.weight").shape = {16, 8};
                              }),
                              kBad,
                              {"model.safetensors: tensor model.layers.1.self_attn.k_proj.weight: shape is [16, 8], "
                               "expected [8, 16] (KV heads * head_dim x hidden)"}},
                      Refusal{"shape_flat",
                              One([](M& m) { m.Tensor("model.layers.1.mlp.up_proj.weight").shape = {384}; }),
                              kBad,
                              {"shape is [384], expected [24, 16] (ffn x hidden)"}},
                      Refusal{"vocab",
                              One([](M& m) { m.config["vocab_size"] = 33; }),
                              kBad,
                              {"model.embed_tokens.weight: shape is [32, 16], expected [33, 16]"}},
                      Refusal{"dtype_integer",
                              One([](M& m) {
                                auto& norm = m.Tensor("model.norm.weight");
                                norm.dtype = "I64";
                                norm.data = std::string(128, '\0');
                              }),
                              kNot,
                              {"tensor model.norm.weight: dtype is I64, expected F32, F16 or BF16"}},
                      Refusal{"dtype_fp8",
                              One([](M& m) {
                                auto& norm = m.Tensor("model.norm.weight");
                                norm.dtype = "F8_E4M3";
                                norm.data = std::string(16, '\0');
                              }),
                              kNot,
                              {"tensor model.norm.weight: dtype is F8_E4M3"}},
                      Refusal{
                          "config", One([](M& m) { m.config["head_dim"] = 3; }), kBad, {"config.json: head_dim is 3"}},
                      Refusal{"config_architecture",
                              One([](M& m) { m.config["model_type"] = "gemma"; }),
                              kNot,
                              {"config.json: architecture", "gemma"}},
                      Refusal{"generation",
                              One([](M& m) {
                                m.generation = {{"eos_token_id", 32}};
                              }),
                              kBad,
                              {"generation_config.json", "eos_token_id is 32", "0 to 31"}},
                      Refusal{"truncated",
                              [](const F& f, M m) {
                                m.WriteTo(f);
                                std::filesystem::resize_file(f.At("model.safetensors"),
                                                             std::filesystem::file_size(f.At("model.safetensors")) - 1);
                              },
                              kShort,
                              {"model.safetensors: tensor lm_head.weight: data_offsets end at", "truncated"}},
                      Refusal{"emptied",
                              [](const F& f, M m) {
                                m.WriteTo(f);
                                f.Write("model.safetensors", "");
                              },
                              kShort,
                              {"model.safetensors: has 0 bytes"}},
                      Refusal{"template_type",
                              [](const F& f, M m) {
                                m.WriteTo(f);
                                f.Write("tokenizer_config.json", R"({"chat_template": 3})");
                              },
                              kBad,
                              {"tokenizer_config.json: chat_template"}},
                      Refusal{"dangling_link",
                              [](const F& f, M m) {
                                m.WriteTo(f);
                                f.Remove("model.safetensors");
                                std::filesystem::create_symlink("../../blobs/gone", f.At("model.safetensors"));
                              },
                              kGone,
                              {"model.safetensors: No such file"}},
                      Refusal{"fifo",
                              [](const F& f, M m) {
                                m.WriteTo(f);
                                f.Remove("config.json");
                                ASSERT_EQ(::mkfifo(f.At("config.json").c_str(), 0600), 0);
                              },
                              kBad,
                              {"config.json: is not a regular file"}},
                      Refusal{"folder_for_a_file",
                              [](const F& f, M m) {
                                m.WriteTo(f);
                                f.Remove("model.safetensors");
                                std::filesystem::create_directory(f.At("model.safetensors"));
                              },
                              kBad,
                              {"model.safetensors: is not a regular file"}}),
    [](const auto& param) { return param.param.name; });

INSTANTIATE_TEST_SUITE_P(
    OfShards, FolderRefuses,
    ::testing::Values(
        Refusal{"shard_missing",
                Shards([](const F& f) { f.Remove(kShard2); }),
                kGone,
                {kShard2, "is missing, but model.safetensors.index.json puts 7 tensors there"}},
        Refusal{"shard_swapped",
                Shards([](const F& f) {
                  std::filesystem::copy(f.At("model-00001-of-00003.safetensors"), f.At(kShard2),
                                        std::filesystem::copy_options::overwrite_existing);
                }),
                kBad,
                {kShard2, "is missing, but model.safetensors.index.json puts it here"}},
        Refusal{"shard_truncated",
                Shards([](const F& f) { std::filesystem::resize_file(f.At(kShard2), 1500); }),
                kShort,
                {kShard2, "truncated"}},
        Refusal{"shard_with_more",
                Shards([](const F& f) {
                  f.Write(kShard2, SafetensorsFile({{"x", "U8", {1}, "x"}}));
                }),
                kBad,
                {kShard2}},
        Refusal{"index_not_json",
                Shards([](const F& f) { f.Write("model.safetensors.index.json", "{"); }),
                kBad,
                {"model.safetensors.index.json: not valid JSON"}},
        Refusal{"index_without_map",
                Shards([](const F& f) { f.Write("model.safetensors.index.json", "{}"); }),
                kBad,
                {"index.json: weight_map is missing"}},
        Refusal{"index_twice",
                Shards([](const F& f) {
                  f.Write("model.safetensors.index.json",
                          R"({"weight_map":{"a":"b.safetensors","a":"b.safetensors"}})");
                }),
                kBad,
                {"duplicate key \"a\""}},
        Refusal{"index_escapes",
                Shards([](const F& f) {
                  f.Write("model.safetensors.index.json", R"({"weight_map":{"a":"../b.safetensors"}})");
                }),
                kBad,
                {"puts a into \"../b.safetensors\""}},
        Refusal{"index_number",
                Shards([](const F& f) { f.Write("model.safetensors.index.json", R"({"weight_map":{"a":1}})"); }),
                kBad,
                {"weight_map of a is not a string"}},
        Refusal{"index_pickle",
                Shards([](const F& f) { f.Write("model.safetensors.index.json", R"({"weight_map":{"a":"b.bin"}})"); }),
                kBad,
                {"\"b.bin\"", ".safetensors"}},
        Refusal{"empty_generation_config",
                Shards([](const F& f) { f.Write("generation_config.json", ""); }),
                kBad,
                {"generation_config.json: is empty"}},
        Refusal{"empty_tokenizer_config",
                Shards([](const F& f) { f.Write("tokenizer_config.json", ""); }),
                kBad,
                {"tokenizer_config.json: is empty"}},
        Refusal{"index_short",
                [](const F& f, M m) {
                  m.index = {{"weight_map", {{"model.norm.weight", kShard2}}}};
                  m.WriteShards(f, 3);
                },
                kBad,
                {kShard2, "tensor model.norm.weight: is missing"}},
        Refusal{"tensor_in_no_shard",
                [](const F& f, M m) {
                  m.Drop("model.norm.weight");
                  m.WriteShards(f, 3);
                },
                kBad,
                {"model.safetensors.index.json: tensor model.norm.weight: is missing"}},
        Refusal{"index_missing",
                Shards([](const F& f) { f.Remove("model.safetensors.index.json"); }),
                kGone,
                {"has neither model.safetensors nor model.safetensors.index.json, only "
                 "model-00001-of-00003.safetensors and 2 more"}},
        Refusal{"single_and_index",
                [](const F& f, M m) {
                  m.WriteTo(f);
                  m.WriteShards(f, 3);
                },
                kBad,
                {"has both model.safetensors and model.safetensors.index.json"}}),
    [](const auto& param) { return param.param.name; });

INSTANTIATE_TEST_SUITE_P(
    ThatHoldNoModel, FolderRefuses,
    ::testing::Values(Refusal{"empty", Files([](const F&) {}), kGone, {"has no config.json", "(it is empty)"}},
                      Refusal{"something_else",
                              Files([](const F& f) { f.Write("a.txt", "x"); }),
                              kGone,
                              {"has no config.json: not a Hugging Face model folder"}},
                      Refusal{"meta_original",
                              Files([](const F& f) {
                                f.Write("consolidated.00.pth", "PK");
                                f.Write("consolidated.01.pth", "PK");
                                f.Write("params.json", "{}");
                              }),
                              kOther,
                              {"PyTorch pickle files only (consolidated.00.pth and 1 more)", "hf download"}},
                      Refusal{"pytorch_bin",
                              [](const F& f, M m) {
                                m.WriteTo(f);
                                f.Remove("model.safetensors");
                                f.Write("pytorch_model.bin", "PK");
                              },
                              kOther,
                              {"(pytorch_model.bin)", "safetensors", "hf download"}},
                      Refusal{"gguf_inside",
                              Files([](const F& f) { f.Write("m.gguf", "GGUF"); }),
                              kOther,
                              {"holds GGUF files (m.gguf); name the file itself", "/m.gguf"}},
                      Refusal{"config_only",
                              [](const F& f, M m) {
                                m.WriteTo(f);
                                f.Remove("model.safetensors");
                              },
                              kGone,
                              {"has neither model.safetensors nor model.safetensors.index.json", "hf download"}}),
    [](const auto& param) { return param.param.name; });

TEST(CheckpointOpen, PathsThatAreNoCheckpoint) {
  TempFolder folder;
  SmallModel().WriteTo(folder);
  folder.Write("notes.txt", "hello");
  folder.Write("empty", "");
  EXPECT_EQ(Checkpoint::Open(folder.At("nothing")).status().code(), Code::kNotFound);
  EXPECT_EQ(Checkpoint::Open("").status().code(), Code::kNotFound);
  // What was meant by a path that is none.
  EXPECT_THAT(Checkpoint::Open("meta-llama/Llama-3.1-8B").status().message(),
              HasSubstr("No such file or directory; nothing is downloaded here: hf download meta-llama/Llama-3.1-8B "));
  EXPECT_THAT(Checkpoint::Open("~/models/x").status().message(), HasSubstr("a shell replaces ~"));
  for (const char* path : {"/nowhere/x", "./nowhere", "nowhere", "a/b/c", "../x"}) {
    EXPECT_THAT(Checkpoint::Open(path).status().message(), ::testing::EndsWith(": No such file or directory"));
  }
  EXPECT_THAT(Checkpoint::Open(folder.At("notes.txt")).status().message(),
              HasSubstr("notes.txt: is neither a folder nor a GGUF"));
  EXPECT_THAT(Checkpoint::Open(folder.At("empty")).status().message(),
              HasSubstr("empty: is neither a folder nor a GGUF"));
  EXPECT_THAT(Checkpoint::Open(folder.At("model.safetensors")).status().message(), HasSubstr("name the folder"));
  EXPECT_THAT(Checkpoint::Open("/dev/null").status().message(), HasSubstr("not a regular file"));
}

TEST(CheckpointOpen, GgufByItsContent) {
  TempFolder folder;
  folder.Write("blob", SmallGguf("Q4_1").String("general.name", "").Bytes());
  auto checkpoint = MustOpen(folder.At("blob"));
  ASSERT_NE(checkpoint, nullptr);
  EXPECT_EQ(checkpoint->format(), "gguf");
  EXPECT_EQ(checkpoint->config().name, "blob");
}

}  // namespace
}  // namespace altiplano
