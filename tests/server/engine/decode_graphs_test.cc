#include "server/engine/decode_graphs.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <vector>

namespace altiplano {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

StepPlan Decodes(int sequences, int32_t blocks_of_last) {
  StepPlan plan;
  for (int i = 0; i < sequences; ++i) {
    plan.sequences.push_back({.num_tokens = 1, .num_blocks = i + 1 < sequences ? 1 : blocks_of_last, .sample = true});
  }
  return plan;
}

TEST(DecodeGraphs, LadderEndsWithWhatAStepMayHave) {
  EXPECT_THAT(PlanDecodeGraphs({.max_sequences = 5, .max_pages = 40, .page_size = 64}),
              ElementsAre(DecodeShape{1, 32}, DecodeShape{1, 40}, DecodeShape{2, 32}, DecodeShape{2, 40},
                          DecodeShape{4, 32}, DecodeShape{4, 40}, DecodeShape{5, 32}, DecodeShape{5, 40}));
  EXPECT_THAT(PlanDecodeGraphs({.max_sequences = 1, .max_pages = 3, .page_size = 16}), ElementsAre(DecodeShape{1, 3}));
  EXPECT_THAT(PlanDecodeGraphs({.max_sequences = 0, .max_pages = 3, .page_size = 16}), IsEmpty());
}

// What the largest server captures, and that larger steps than the ladder's run without.
TEST(DecodeGraphs, LadderIsSmall) {
  const auto shapes = PlanDecodeGraphs({.max_sequences = 1024, .max_pages = 2049, .page_size = 64});
  EXPECT_EQ(shapes.size(), 14u * 4u);
  EXPECT_EQ(shapes.back(), (DecodeShape{256, 2048}));
  EXPECT_EQ(FindDecodeShape(shapes, Decodes(257, 1)), shapes.size());
  EXPECT_EQ(FindDecodeShape(shapes, Decodes(256, 2049)), shapes.size());
}

TEST(DecodeGraphs, StepsTakeTheSmallestShapeThatTheyFit) {
  const auto shapes = PlanDecodeGraphs({.max_sequences = 256, .max_pages = 2049, .page_size = 64});
  const auto shape_of = [&](const StepPlan& plan) { return shapes.at(FindDecodeShape(shapes, plan)); };
  int32_t before = 0;
  for (const int32_t rung : kGraphSequences) {
    EXPECT_EQ(shape_of(Decodes(before + 1, 1)), (DecodeShape{rung, 32}));
    EXPECT_EQ(shape_of(Decodes(rung, 1)), (DecodeShape{rung, 32}));
    EXPECT_LT(rung, 2 * (before + 1)) << "more than half would be padding";
    before = rung;
  }
  EXPECT_EQ(shape_of(Decodes(3, 32)), (DecodeShape{4, 32}));
  EXPECT_EQ(shape_of(Decodes(3, 33)), (DecodeShape{4, 128}));
  EXPECT_EQ(shape_of(Decodes(3, 513)), (DecodeShape{4, 2048}));
}

TEST(DecodeGraphs, OtherStepsHaveNone) {
  const auto shapes = PlanDecodeGraphs({.max_sequences = 8, .max_pages = 4, .page_size = 4});
  StepPlan plan = Decodes(3, 1);
  ASSERT_LT(FindDecodeShape(shapes, plan), shapes.size());
  plan.sequences[1].sample = false;  // a chunk of one token
  EXPECT_LT(FindDecodeShape(shapes, plan), shapes.size());
  plan.sequences[1].num_tokens = 2;
  EXPECT_EQ(FindDecodeShape(shapes, plan), shapes.size());
  plan = Decodes(3, 1);
  plan.sequences[2].num_prompt_scores = 1;
  EXPECT_EQ(FindDecodeShape(shapes, plan), shapes.size());
  EXPECT_EQ(FindDecodeShape({}, Decodes(1, 1)), 0u);
}

}  // namespace
}  // namespace altiplano
