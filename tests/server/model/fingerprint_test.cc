#include "server/model/fingerprint.h"

#include <gtest/gtest.h>

#include "tests/server/model/checkpoint_testlib.h"

namespace altiplano {
namespace {

std::string Of(const ModelFiles& model, size_t shards = 1) {
  TempFolder folder;
  shards == 1 ? model.WriteTo(folder) : model.WriteShards(folder, shards);
  auto checkpoint = Checkpoint::Open(folder.path());
  EXPECT_TRUE(checkpoint.ok()) << checkpoint.status().ToString();
  auto fingerprint = Fingerprint(**checkpoint);
  EXPECT_TRUE(fingerprint.ok()) << fingerprint.status().ToString();
  return *fingerprint;
}

TEST(Fingerprint, IsOfTheWeightsAndNotOfTheirFiles) {
  const ModelFiles model = SmallModel();
  const std::string original = Of(model);
  EXPECT_EQ(original.size(), 16u);
  EXPECT_EQ(Of(model), original) << "in another folder";
  EXPECT_EQ(Of(model, 3), original) << "in several files";
  EXPECT_NE(Of(SmallModel("F32")), original);
  for (const char* tensor : {"model.norm.weight", "model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"}) {
    ModelFiles tuned = model;
    tuned.Tensor(tensor).data[0] = static_cast<char>(tuned.Tensor(tensor).data[0] ^ 1);
    EXPECT_NE(Of(tuned), original) << tensor;
  }
  ModelFiles smaller = model;  // without the last rows of two matrices
  smaller.config["vocab_size"] = 16;
  for (const char* tensor : {"model.embed_tokens.weight", "lm_head.weight"}) {
    RawTensor& table = smaller.Tensor(tensor);
    table.shape[0] = 16;
    table.data.resize(table.data.size() / 2);
  }
  EXPECT_NE(Of(smaller), original);
}

}  // namespace
}  // namespace altiplano
