#include "server/model/weights.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <random>

#include "server/base/strings.h"
#include "server/model/checkpoint_tensors.h"
#include "tests/server/model/checkpoint_testlib.h"

namespace altiplano {
namespace {

using ::testing::HasSubstr;

std::unique_ptr<Checkpoint> Tiny() {
  auto checkpoint = Checkpoint::Open(StrCat(ALTIPLANO_SOURCE_DIR, "/tests/data/tiny"));
  EXPECT_TRUE(checkpoint.ok()) << checkpoint.status().ToString();
  return std::move(*checkpoint);
}

LlamaWeights MustLoad(const Checkpoint& checkpoint, int rank, int size, DType dtype = DType::kBF16) {
  LoadOptions options;
  options.shard = *Shard::Make(checkpoint.config(), rank, size);
  options.dtype = dtype;
  auto weights = LoadWeights(checkpoint, options);
  EXPECT_TRUE(weights.ok()) << weights.status().ToString();
  return std::move(*weights);
}

// Rows [a_row, +rows) x columns [a_col, +cols) of `a` against rows [b_row, ...) of `b` from column b_col.
void ExpectSame(const TensorView& a, int64_t a_row, int64_t a_col, const TensorView& b, int64_t b_row, int64_t b_col,
                int64_t rows, int64_t cols) {
  for (int64_t r = 0; r < rows; ++r) {
    ASSERT_EQ(std::memcmp(a.row<BF16>(a_row + r) + a_col, b.row<BF16>(b_row + r) + b_col,
                          static_cast<size_t>(cols) * sizeof(BF16)),
              0)
        << "row " << r;
  }
}

TEST(Weights, ShardsAreTheWholeCutUp) {
  auto checkpoint = Tiny();
  const ModelConfig& c = checkpoint->config();
  LlamaWeights whole = MustLoad(*checkpoint, 0, 1);
  for (int size : {2, 4, 8}) {  // 4 KV heads: at 8 each is held twice
    for (int rank = 0; rank < size; ++rank) {
      SCOPED_TRACE(StrCat("rank ", rank, " of ", size));
      LlamaWeights part = MustLoad(*checkpoint, rank, size);
      Shard shard = *Shard::Make(c, rank, size);
      const int64_t q = shard.q_heads(c) * c.head_dim, kv = shard.kv_heads(c) * c.head_dim, f = shard.ffn(c);
      const int64_t kv_begin = shard.first_kv_head(c) * c.head_dim;
      EXPECT_EQ(shard.first_kv_head(c), rank * 4 / size);
      for (size_t i = 0; i < part.layers.size(); ++i) {
        const LayerWeights &p = part.layers[i], &w = whole.layers[i];
        ExpectSame(p.qkv, 0, 0, w.qkv, rank * q, 0, q, c.hidden);
        ExpectSame(p.qkv, q, 0, w.qkv, c.q_size() + kv_begin, 0, kv, c.hidden);
        ExpectSame(p.qkv, q + kv, 0, w.qkv, c.q_size() + c.kv_size() + kv_begin, 0, kv, c.hidden);
        ExpectSame(p.o, 0, 0, w.o, 0, rank * q, c.hidden, q);
        ExpectSame(p.gate_up, 0, 0, w.gate_up, rank * f, 0, f, c.hidden);
        ExpectSame(p.gate_up, f, 0, w.gate_up, c.ffn + rank * f, 0, f, c.hidden);
        ExpectSame(p.down, 0, 0, w.down, 0, rank * f, c.hidden, f);
      }
      ExpectSame(part.lm_head, 0, 0, whole.lm_head, shard.vocab_begin(c), 0, shard.vocab(c), c.hidden);
    }
  }
}

TEST(Weights, StagesAreTheLayersInTheirOrder) {
  auto checkpoint = Tiny();
  const ModelConfig& c = checkpoint->config();
  const LlamaWeights whole = MustLoad(*checkpoint, 0, 2);
  for (int stages : {2, 3, 4}) {
    size_t layer = 0;
    uint64_t read = 0;
    for (int stage = 0; stage < stages; ++stage) {
      SCOPED_TRACE(StrCat("stage ", stage, " of ", stages));
      LoadOptions options;
      options.shard = *Shard::Make(c, 0, 2, stage, stages);
      LoadProgress last;
      options.progress = [&](const LoadProgress& progress) { last = progress; };
      auto part = LoadWeights(*checkpoint, options);
      ASSERT_TRUE(part.ok()) << part.status().ToString();
      EXPECT_EQ(options.shard.first_layer(c), static_cast<int64_t>(layer));
      for (const LayerWeights& p : part->layers) {
        const LayerWeights& w = whole.layers[layer++];
        ExpectSame(p.qkv, 0, 0, w.qkv, 0, 0, w.qkv.dim(0), c.hidden);
        ExpectSame(p.down, 0, 0, w.down, 0, 0, c.hidden, w.down.dim(1));
      }
      EXPECT_EQ(part->embedding.empty(), stage > 0);
      EXPECT_EQ(part->lm_head.empty(), stage < stages - 1);
      EXPECT_EQ(part->final_norm.empty(), stage < stages - 1);
      // Each tensor is padded to whole cache lines; the table of frequencies is not counted.
      EXPECT_NEAR(static_cast<double>(part->bytes),
                  static_cast<double>(RankWeightBytes(c, options.shard, DType::kBF16)), 64.0 * 40);
      read += last.bytes_done;
    }
    EXPECT_EQ(layer, whole.layers.size());
    LoadOptions all;
    all.shard = *Shard::Make(c, 0, 2);
    LoadProgress last;
    all.progress = [&](const LoadProgress& progress) { last = progress; };
    ASSERT_TRUE(LoadWeights(*checkpoint, all).ok());
    EXPECT_EQ(read, last.bytes_done) << "each byte is read by one stage";
  }
  EXPECT_THAT(Shard::Make(c, 0, 1, 0, 5).status().message(), HasSubstr("5 stages: it has 4 layers"));
  EXPECT_FALSE(Shard::Make(c, 0, 1, 2, 2).ok());
}

// A model of any shape, whose tensors lie in any of several files in any order, and are read in pieces of any size.
struct RandomFiles {
  explicit RandomFiles(uint32_t seed) : random(seed) {
    files = SmallModel();
    const int kv_heads = 1 << Below(3), q_heads = kv_heads * (1 + Below(3)), dim = 2 * (1 + Below(6));
    files.config["vocab_size"] = 3 + Below(60);
    files.config["hidden_size"] = 1 + Below(40);
    files.config["num_hidden_layers"] = 1 + Below(5);
    files.config["num_attention_heads"] = q_heads;
    files.config["num_key_value_heads"] = kv_heads;
    files.config["head_dim"] = dim;
    files.config["intermediate_size"] = 12 * (1 + Below(4));
    files.config["tie_word_embeddings"] = Below(2) == 0;
    files.tensors.clear();
    for (const WantedTensor& wanted : WantedTensors(*ParseModelConfig(files.config.dump()))) {
      size_t elements = 1;
      for (const int64_t n : wanted.shape) elements *= static_cast<size_t>(n);
      std::string data(elements * sizeof(BF16), '\0');
      for (char& byte : data) byte = static_cast<char>(Below(120));  // no bits of an exponent that make a NaN
      files.tensors.push_back({wanted.name, "BF16", wanted.shape, data});
    }
    std::vector<RawTensor> tensors = files.tensors;
    std::shuffle(tensors.begin(), tensors.end(), random);
    std::vector<std::vector<RawTensor>> parts(static_cast<size_t>(1 + Below(6)));
    Json index = {{"metadata", {{"total_size", 1}}}, {"weight_map", Json::object()}};
    for (const RawTensor& tensor : tensors) {
      const auto part = static_cast<size_t>(Below(static_cast<int>(parts.size())));
      parts[part].push_back(tensor);
      index["weight_map"][tensor.name] = StrCat("part-", part, ".safetensors");
    }
    for (size_t part = 0; part < parts.size(); ++part) {
      folder.Write(StrCat("part-", part, ".safetensors"), SafetensorsFile(parts[part]));
    }
    folder.Write("config.json", files.config.dump());
    folder.Write("model.safetensors.index.json", index.dump());
  }
  int Below(int n) { return static_cast<int>(random() % static_cast<uint32_t>(n)); }

  // Rows [out_row, +rows) of `out` against rows from `row` and columns from `column` of the stored tensor.
  void Expect(const TensorView& out, int64_t out_row, int64_t rows, const std::string& name, int64_t row,
              int64_t column) {
    const RawTensor& stored = files.Tensor(name);
    const int64_t columns = stored.shape.back(), n = out.dim(1);
    for (int64_t r = 0; r < rows; ++r) {
      const char* from = stored.data.data() + ((row + r) * columns + column) * static_cast<int64_t>(sizeof(BF16));
      ASSERT_EQ(std::memcmp(out.row<BF16>(out_row + r), from, static_cast<size_t>(n) * sizeof(BF16)), 0)
          << name << " row " << row + r;
    }
  }

  std::mt19937 random;
  ModelFiles files;
  const TempFolder folder;
};

TEST(Weights, EveryRanksAreThoseOfTheFilesHoweverTheyAreCut) {
  int refused = 0;
  for (uint32_t seed = 0; seed < 60; ++seed) {
    RandomFiles files(seed);
    const auto checkpoint = std::move(*Checkpoint::Open(files.folder.path()));
    const ModelConfig& c = checkpoint->config();
    const int size = 1 << files.Below(4), stages = 1 + files.Below(static_cast<int>(std::min<int64_t>(c.layers, 3)));
    SCOPED_TRACE(StrCat("seed ", seed, ", ", stages, " stages of ", size));
    if (!Shard::Make(c, 0, size, 0, stages).ok()) {
      ++refused;
      continue;
    }
    std::vector<Shard> shards;
    for (int stage = 0; stage < stages; ++stage) {
      for (int rank = 0; rank < size; ++rank) shards.push_back(*Shard::Make(c, rank, size, stage, stages));
    }
    LoadOptions options;
    options.readers = 1 + files.Below(5);
    options.piece_elements = 1 + files.Below(200);
    const auto ranks = LoadAllRanks(*checkpoint, options, shards);
    ASSERT_TRUE(ranks.ok()) << ranks.status().ToString();
    for (size_t i = 0; i < shards.size(); ++i) {
      const Shard& shard = shards[i];
      const LlamaWeights& part = (*ranks)[i];
      const int64_t q = shard.q_heads(c) * c.head_dim, kv = shard.kv_heads(c) * c.head_dim, f = shard.ffn(c);
      const int64_t kv_begin = shard.first_kv_head(c) * c.head_dim;
      ASSERT_EQ(static_cast<int64_t>(part.layers.size()), shard.layers(c));
      for (int64_t layer = 0; layer < shard.layers(c); ++layer) {
        const LayerWeights& p = part.layers[static_cast<size_t>(layer)];
        const std::string prefix = StrCat("model.layers.", shard.first_layer(c) + layer, ".");
        files.Expect(p.qkv, 0, q, prefix + "self_attn.q_proj.weight", shard.rank * q, 0);
        files.Expect(p.qkv, q, kv, prefix + "self_attn.k_proj.weight", kv_begin, 0);
        files.Expect(p.qkv, q + kv, kv, prefix + "self_attn.v_proj.weight", kv_begin, 0);
        files.Expect(p.o, 0, c.hidden, prefix + "self_attn.o_proj.weight", 0, shard.rank * q);
        files.Expect(p.gate_up, 0, f, prefix + "mlp.gate_proj.weight", shard.rank * f, 0);
        files.Expect(p.gate_up, f, f, prefix + "mlp.up_proj.weight", shard.rank * f, 0);
        files.Expect(p.down, 0, c.hidden, prefix + "mlp.down_proj.weight", 0, shard.rank * f);
      }
      const std::string embedding = "model.embed_tokens.weight";
      for (const auto& [table, name] :
           {std::pair{part.embedding, embedding},
            {part.lm_head, c.tied_embeddings ? embedding : std::string("lm_head.weight")}}) {
        if (table.empty()) continue;
        const int64_t rows = std::clamp<int64_t>(c.vocab - shard.vocab_begin(c), 0, shard.vocab(c));
        files.Expect(table, 0, rows, name, shard.vocab_begin(c), 0);
        for (int64_t r = rows; r < shard.vocab(c); ++r) {
          for (int64_t h = 0; h < c.hidden; ++h) ASSERT_EQ(table.row<BF16>(r)[h].bits, 0) << "padding";
        }
      }
      EXPECT_EQ(part.embedding.empty(), shard.stage > 0);
      EXPECT_EQ(part.lm_head.empty(), shard.stage < stages - 1);
    }
  }
  EXPECT_LT(refused, 40);
}

TEST(Weights, ReportsProgressToTheLastByte) {
  auto checkpoint = Tiny();
  LoadOptions options;
  LoadProgress last;
  options.progress = [&](const LoadProgress& progress) { last = progress; };
  ASSERT_TRUE(LoadWeights(*checkpoint, options).ok());
  EXPECT_EQ(last.bytes_done, last.bytes_total);
  EXPECT_EQ(last.bytes_done, checkpoint->total_bytes());
}

TEST(Shard, RefusesWhatDoesNotDivide) {
  auto checkpoint = Tiny();
  EXPECT_THAT(Shard::Make(checkpoint->config(), 0, 3).status().message(),
              HasSubstr("8 query heads do not divide by 3"));
  EXPECT_FALSE(Shard::Make(checkpoint->config(), 2, 2).ok());
  EXPECT_FALSE(Shard::Make(checkpoint->config(), 0, 0).ok());
}

}  // namespace
}  // namespace altiplano
