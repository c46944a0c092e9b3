#include "server/model/weights.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>

#include "server/base/strings.h"

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
