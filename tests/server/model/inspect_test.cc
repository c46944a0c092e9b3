#include "server/model/inspect.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "server/base/json.h"
#include "server/base/strings.h"
#include "server/model/gguf_checkpoint.h"
#include "server/model/weights.h"
#include "tests/server/model/checkpoint_testlib.h"

namespace altiplano {
namespace {

using ::testing::HasSubstr;

Inspection OfFolder(const ModelFiles& model) {
  TempFolder folder;
  model.WriteTo(folder);
  auto checkpoint = Checkpoint::Open(folder.path());
  EXPECT_TRUE(checkpoint.ok()) << checkpoint.status().ToString();
  return Inspect(**checkpoint);
}

TEST(Inspect, SaysWhatAModelIsAndNeeds) {
  const Inspection in = OfFolder(SmallModel());
  EXPECT_EQ(in.parameters, in.config.parameters());
  EXPECT_EQ(in.stored_bytes, 2 * in.parameters);
  EXPECT_EQ(in.files, 1u);
  EXPECT_EQ(in.types.at("BF16").tensors, 21u);
  EXPECT_EQ(in.tokenizer, "none");
  EXPECT_FALSE(in.has_chat_template);
  // Five norms of 16 in f32, the rest in bf16.
  EXPECT_EQ(in.weight_bytes_bf16, 2 * in.parameters + 5 * 16 * 2);
  EXPECT_EQ(in.weight_bytes_f32, 4 * in.parameters);
  EXPECT_EQ(in.kv_bytes_per_token_bf16, 2u * 2 * 8 * 2);
  EXPECT_EQ(in.kv_bytes_full_context_bf16, 64u * 128);

  const std::string text = InspectText(in);
  for (const char* part : {"LlamaForCausalLM", "4 query, 2 key/value, of 4", "theta 500000, scaling none", "128 tokens",
                           "head of its own", "3 ranks: no, 4 query heads do not divide by 3"}) {
    EXPECT_THAT(text, HasSubstr(part));
  }
  EXPECT_EQ(text.find("tensor  "), std::string::npos);
  EXPECT_THAT(InspectText(in, true), HasSubstr("model.layers.1.mlp.down_proj.weight  BF16  16 x 24"));
  const OrderedJson json = InspectJson(in);
  EXPECT_EQ(json["parameters"], in.parameters);
  EXPECT_EQ(json["splits"][2]["possible"], false);
  // The last of the two stages has the final norm too.
  ASSERT_EQ(json["stages"].size(), 1u);
  EXPECT_EQ(json["stages"][0]["largest_weight_bytes"],
            RankWeightBytes(in.config, *Shard::Make(in.config, 0, 1, 1, 2), DType::kBF16));
  EXPECT_EQ(in.stages[0].kv_bytes_per_token, in.kv_bytes_per_token_bf16 / 2);
  EXPECT_EQ(json["tensors"].size(), 21u);
  EXPECT_EQ(json["eos_ids"], Json::array({2}));
}

// What inspect promises for a rank is what loading takes, but for padding to cache lines and the table of frequencies.
TEST(Inspect, SplitsAreThoseThatLoad) {
  TempFolder folder;
  SmallModel().WriteTo(folder);
  auto checkpoint = Checkpoint::Open(folder.path());
  ASSERT_TRUE(checkpoint.ok());
  const Inspection in = Inspect(**checkpoint);
  int possible = 0;
  for (const SplitOption& split : in.splits) {
    auto shard = Shard::Make(in.config, 0, split.ranks);
    ASSERT_EQ(split.possible(), shard.ok()) << split.ranks;
    if (!split.possible()) continue;
    ++possible;
    auto weights = LoadWeights(**checkpoint, {.shard = *shard, .progress = {}, .cancelled = {}});
    ASSERT_TRUE(weights.ok()) << weights.status().ToString();
    const uint64_t tensors = 6 * 2 + 4;  // each is padded to at most 63 bytes more
    EXPECT_LE(split.weight_bytes_per_rank, weights->bytes);
    EXPECT_GE(split.weight_bytes_per_rank + 64 * tensors, weights->bytes);
  }
  EXPECT_EQ(possible, 3);  // 1, 2 and 4, the last with each KV head on two ranks
  EXPECT_EQ(in.splits[1].kv_bytes_per_token_rank, in.kv_bytes_per_token_bf16 / 2);
  EXPECT_EQ(in.splits[3].kv_bytes_per_token_rank, in.kv_bytes_per_token_bf16 / 2);
}

TEST(Inspect, OfAGguf) {
  const std::string bytes = SmallGguf("Q4_K").Bytes();
  auto checkpoint = OpenGguf(std::make_shared<MemoryReader>("/models/small.gguf", bytes));
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status().ToString();
  const std::string text = InspectText(Inspect(**checkpoint));
  for (const char* part : {"small", "gguf (gpt2, smollm)", "Q4_K", "head tied to the embedding"}) {
    EXPECT_THAT(text, HasSubstr(part));
  }
}

}  // namespace
}  // namespace altiplano
