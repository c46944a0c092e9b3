#include "kernels/cuda/attention_scratch.h"

#include <gtest/gtest.h>

namespace altiplano {
namespace {

// Llama 3.1 8B.
cuda::AttentionSizes Sizes(int64_t tokens, int64_t sequences, int64_t context) {
  return {.tokens = tokens, .sequences = sequences, .q_heads = 32, .kv_heads = 8, .dim = 128, .most_context = context};
}

TEST(AttentionScratch, LetsEverySmallStepBeSplit) {
  constexpr int64_t kContext = 4096;  // eight splits: 64 MiB are not reached
  const size_t bytes = cuda::AttentionScratchBytes(Sizes(2048, 2048, kContext));
  EXPECT_LT(bytes, cuda::kMostAttentionScratch);
  for (int64_t sequences : {1, 3, 200}) {
    bool split = true;
    for (int64_t tokens = sequences; tokens <= 2048 && split; ++tokens) {
      split = cuda::PlanPagedAttention(Sizes(tokens, sequences, kContext), 0, size_t{1} << 40).split;
      EXPECT_EQ(cuda::PlanPagedAttention(Sizes(tokens, sequences, kContext), 0, bytes).split, split) << tokens;
    }
    EXPECT_FALSE(split) << "no step of " << sequences << " sequences has blocks enough";
  }
}

TEST(AttentionScratch, IsBoundedAndNothingForShortContexts) {
  EXPECT_EQ(cuda::AttentionScratchBytes(Sizes(2048, 2048, 512)), 0u);
  EXPECT_EQ(cuda::AttentionScratchBytes(Sizes(2048, 2048, 0)), 0u);
  EXPECT_EQ(cuda::AttentionScratchBytes(Sizes(2048, 2048, 131072)), cuda::kMostAttentionScratch);
}

}  // namespace
}  // namespace altiplano
