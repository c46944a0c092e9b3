// Random checkpoints: in memory, written as a folder and read back.
#include "server/model/random_checkpoint.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <tuple>

#include "server/base/json.h"
#include "server/base/strings.h"
#include "server/model/file_reader.h"
#include "server/model/weights.h"
#include "server/model/write_folder.h"
#include "server/text/tokenizer.h"
#include "tests/server/model/checkpoint_testlib.h"

namespace altiplano {
namespace {

using ::testing::HasSubstr;

RandomModel SmallRandom(bool tied) {
  RandomModel model = ParseRandomModel("random:1b,layers=2,seed=3").value();
  model.config.vocab = 600;
  model.config.hidden = 64;
  model.config.q_heads = 4;
  model.config.kv_heads = 2;
  model.config.head_dim = 16;
  model.config.ffn = 96;
  model.config.tied_embeddings = tied;
  return model;
}

std::vector<float> Values(const Checkpoint& checkpoint, const TensorInfo& tensor) {
  const bool is_vector = tensor.shape.size() == 1;
  const int64_t rows = is_vector ? 1 : tensor.shape[0], columns = tensor.shape[is_vector ? 0 : 1];
  std::vector<float> values(static_cast<size_t>(rows * columns));
  EXPECT_TRUE(checkpoint.Read(tensor.name, 0, rows, 0, columns, DType::kF32, values.data(), columns).ok());
  return values;
}

void ExpectSame(const Checkpoint& a, const Checkpoint& b) {
  ASSERT_EQ(a.tensors().size(), b.tensors().size());
  for (size_t i = 0; i < a.tensors().size(); ++i) {
    EXPECT_EQ(a.tensors()[i].name, b.tensors()[i].name);
    EXPECT_EQ(Values(a, a.tensors()[i]), Values(b, b.tensors()[i])) << a.tensors()[i].name;
  }
  EXPECT_EQ(a.text_assets().tokenizer_json, b.text_assets().tokenizer_json);
  EXPECT_EQ(ModelConfigJson(a.config(), a.generation_defaults()).value(),
            ModelConfigJson(b.config(), b.generation_defaults()).value());
  EXPECT_EQ(a.generation_defaults().eos_ids, b.generation_defaults().eos_ids);
  EXPECT_EQ(a.generation_defaults().bos_id, b.generation_defaults().bos_id);
}

TEST(RandomCheckpoint, NamesSayShapeLayersAndSeed) {
  auto model = ParseRandomModel("random:70b,seed=9,layers=3");
  ASSERT_TRUE(model.ok());
  EXPECT_EQ(model->config.hidden, 8192);
  EXPECT_EQ(model->config.layers, 3);
  EXPECT_EQ(model->seed, 9u);
  EXPECT_EQ(ParseRandomModel("random:8b")->config.layers, 32);
  for (const auto& [name, message] :
       {std::pair{"random:9b", "\"9b\" is no published model; these are: 1b, 3b, 8b, 70b, 405b"},
        {"random:", "\"\" is no published model"},
        {"random:8b,", "\"\" is none of layers=N, seed=N and rank-of=N"},
        {"random:8b,layers=33", "layers is 33, must be from 1 to 32"},
        {"random:8b,layers=0", "layers is 0, must be from 1 to 32"},
        {"random:8b,layers=x", "layers must be a whole number"},
        {"random:8b,rank-of=3", "there is no model of one rank of 3"},
        {"random:8b,rank-of=0", "there is no model of one rank of 0"},
        {"random:8b,ranks=2", "\"ranks=2\" is none of layers=N, seed=N and rank-of=N"}}) {
    auto refused = ParseRandomModel(name);
    EXPECT_EQ(refused.status().code(), Code::kInvalidArgument) << name;
    EXPECT_THAT(refused.status().message(), HasSubstr(message));
    EXPECT_THAT(Checkpoint::Open(name).status().message(), HasSubstr(message));
  }
}

TEST(RandomCheckpoint, OneRankOfAModelHasWhatThatRankHas) {
  for (const auto& [name, model, ranks] : {std::tuple{"random:70b,rank-of=4", "70b", 4},
                                           {"random:405b,rank-of=8", "405b", 8},
                                           {"random:8b,rank-of=16", "8b", 16}}) {  // each KV head is held twice
    const ModelConfig rank = ParseRandomModel(name)->config, whole = PublishedModelConfig(model).value();
    const Shard alone = Shard::Make(rank, 0, 1).value(), shard = Shard::Make(whole, 0, ranks).value();
    EXPECT_EQ(RankWeightBytes(rank, alone, DType::kBF16), RankWeightBytes(whole, shard, DType::kBF16)) << name;
    EXPECT_EQ(alone.kv_bytes_per_token(rank, DType::kBF16), shard.kv_bytes_per_token(whole, DType::kBF16)) << name;
  }
}

TEST(RandomCheckpoint, NumbersDependOnSeedAndPlaceAloneAndHaveTheSaidScale) {
  const auto checkpoint = MakeRandomCheckpoint(SmallRandom(false));
  ExpectSame(*checkpoint, *MakeRandomCheckpoint(SmallRandom(false)));
  for (const TensorInfo& tensor : checkpoint->tensors()) {
    const std::vector<float> values = Values(*checkpoint, tensor);
    double sum = 0, squares = 0;
    for (float value : values) sum += static_cast<double>(value), squares += static_cast<double>(value * value);
    const auto count = static_cast<double>(values.size());
    const bool is_norm = tensor.shape.size() == 1;
    const double variance = is_norm ? 1 + 1.0 / 48 : 1.0 / static_cast<double>(tensor.shape[1]);
    EXPECT_NEAR(sum / count, is_norm, 6 * std::sqrt(variance / count)) << tensor.name;
    EXPECT_NEAR(squares / count, variance, variance * 6 / std::sqrt(count)) << tensor.name;
  }
  // A part is what the whole has there, whatever the alignment.
  const TensorInfo& gate = checkpoint->tensors()[7];
  const std::vector<float> whole = Values(*checkpoint, gate);
  std::vector<float> part(5 * 7);
  ASSERT_TRUE(checkpoint->Read(gate.name, 3, 5, 11, 7, DType::kF32, part.data(), 7).ok());
  for (size_t i = 0; i < part.size(); ++i) {
    EXPECT_EQ(part[i], whole[(3 + i / 7) * static_cast<size_t>(gate.shape[1]) + 11 + i % 7]);
  }
  RandomModel other = SmallRandom(false);
  other.seed = 4;
  EXPECT_NE(Values(*MakeRandomCheckpoint(other), gate), whole);
  EXPECT_NE(Values(*checkpoint, checkpoint->tensors()[8]), whole);  // up, of the same shape
}

TEST(RandomCheckpoint, ItsTokenizerTakesAnyTextAndDecodesEveryId) {
  auto tokenizer = Tokenizer::FromHuggingFace(RandomTokenizerJson(128256));
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status().message();
  EXPECT_EQ((*tokenizer)->vocab_size(), 128256);
  std::string text = "né \"\\ 漢字\n\t{}";
  for (int byte = 1; byte < 128; ++byte) text += static_cast<char>(byte);
  std::vector<TokenId> ids;
  (*tokenizer)->Encode(text, &ids);
  std::string decoded;
  for (TokenId id : ids) decoded += (*tokenizer)->TokenBytes(id);
  EXPECT_EQ(decoded, text);
  EXPECT_EQ((*tokenizer)->bos(), 128000);
  EXPECT_EQ((*tokenizer)->Special("<|eot_id|>"), 128009);
  EXPECT_EQ((*tokenizer)->Special("<|reserved_special_token_247|>"), 128255);
  for (TokenId id = 0; id < 128256; ++id) {
    ASSERT_EQ((*tokenizer)->IsSpecial(id), id >= 128000) << id;
    if (id < 128000) {
      ASSERT_NE((*tokenizer)->TokenBytes(id), "") << id;
    }
  }
}

TEST(WriteFolder, ReadsBackAsTheSameInOneFileOrMany) {
  for (bool tied : {false, true}) {
    for (uint64_t max_file_bytes : {uint64_t{1} << 40, uint64_t{60000}}) {
      const auto checkpoint = MakeRandomCheckpoint(SmallRandom(tied));
      TempFolder folder;
      WriteOptions options{.max_file_bytes = max_file_bytes, .progress = {}, .cancelled = {}};
      uint64_t done = 0;
      options.progress = [&](const LoadProgress& progress) {
        EXPECT_GT(progress.bytes_done, done);
        EXPECT_EQ(progress.bytes_total, checkpoint->total_bytes());
        done = progress.bytes_done;
      };
      const Status status = WriteFolder(*checkpoint, folder.path(), options);
      ASSERT_TRUE(status.ok()) << status.message();
      EXPECT_EQ(done, checkpoint->total_bytes());
      EXPECT_EQ(std::filesystem::exists(folder.At("model.safetensors.index.json")), max_file_bytes == 60000);
      auto read = Checkpoint::Open(folder.path());
      ASSERT_TRUE(read.ok()) << read.status().message();
      ExpectSame(*checkpoint, **read);
    }
  }
}

TEST(WriteFolder, WritesWhatAnotherFolderHolds) {
  TempFolder from, to;
  ModelFiles files = SmallModel("F32");
  files.WriteTo(from);
  auto checkpoint = Checkpoint::Open(from.path());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status().message();
  ASSERT_TRUE(WriteFolder(**checkpoint, to.At("new/folder"), {}).ok());
  auto read = Checkpoint::Open(to.At("new/folder"));
  ASSERT_TRUE(read.ok()) << read.status().message();
  EXPECT_EQ((*read)->tensors()[0].dtype, "F32");
  ExpectSame(**checkpoint, **read);
}

TEST(WriteFolder, RefusesAFolderInUseAndLeavesNothingWhenItFails) {
  const auto checkpoint = MakeRandomCheckpoint(SmallRandom(true));
  TempFolder folder;
  folder.Write("notes.txt", "mine");
  Status status = WriteFolder(*checkpoint, folder.path(), {});
  EXPECT_EQ(status.code(), Code::kFailedPrecondition);
  EXPECT_THAT(status.message(), HasSubstr("is not an empty folder"));
  folder.Remove("notes.txt");

  int pieces = 0;
  status = WriteFolder(*checkpoint, folder.At("new"), {.progress = {}, .cancelled = [&] { return ++pieces == 5; }});
  EXPECT_EQ(status.code(), Code::kCancelled);
  EXPECT_FALSE(std::filesystem::exists(folder.At("new")));

  // 405b does not fit on any disk that tests run on.
  const auto large = Checkpoint::Open("random:405b");
  const uint64_t available = std::filesystem::space(folder.path()).available;
  if (available < (*large)->total_bytes()) {
    status = WriteFolder(**large, folder.At("large"), {});
    EXPECT_EQ(status.code(), Code::kResourceExhausted);
    EXPECT_THAT(status.message(), HasSubstr("needs 756"));
    EXPECT_FALSE(std::filesystem::exists(folder.At("large")));
  }
}

}  // namespace
}  // namespace altiplano
