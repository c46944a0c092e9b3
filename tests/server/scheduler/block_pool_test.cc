#include "server/scheduler/block_pool.h"

#include <gtest/gtest.h>

#include <set>
#include <vector>

namespace altiplano {
namespace {

BlockId MustTake(BlockPool& pool) {
  auto taken = pool.Take();
  EXPECT_TRUE(taken.has_value());
  return taken ? taken->block : -1;
}

TEST(BlockPool, HandsOutEachBlockOnceThenRefuses) {
  BlockPool pool(3);
  std::set<BlockId> blocks = {MustTake(pool), MustTake(pool), MustTake(pool)};
  EXPECT_EQ(blocks, (std::set<BlockId>{0, 1, 2}));
  EXPECT_FALSE(pool.Take().has_value());
  EXPECT_EQ(pool.num_held(), 3);
  pool.Unref(1);
  EXPECT_EQ(MustTake(pool), 1);
  pool.CheckInvariants();
}

TEST(BlockPool, ABlockIsHeldUntilItsLastReferenceGoes) {
  BlockPool pool(1);
  const BlockId block = MustTake(pool);
  pool.Ref(block);
  pool.Unref(block);
  EXPECT_FALSE(pool.Take().has_value());
  pool.Unref(block);
  EXPECT_EQ(pool.available(), 1);
  pool.CheckInvariants();
}

TEST(BlockPool, ValuedBlocksAreTakenLastButForHalfOfThePool) {
  BlockPool pool(6);
  std::vector<BlockId> blocks;
  for (int i = 0; i < 6; ++i) {
    blocks.push_back(MustTake(pool));
    pool.SetKept(blocks.back(), true);
    if (i < 4) pool.SetValued(blocks.back());
  }
  for (BlockId block : blocks) pool.Unref(block);
  pool.CheckInvariants();
  EXPECT_EQ(pool.num_cached(), 6);
  // Three of the four may stay so; the first of them waits behind whoever was there, and 4 and 5 came after it.
  std::vector<BlockId> taken;
  for (int i = 0; i < 6; ++i) {
    taken.push_back(MustTake(pool));
    pool.CheckInvariants();
  }
  EXPECT_EQ(taken, (std::vector<BlockId>{blocks[0], blocks[4], blocks[5], blocks[1], blocks[2], blocks[3]}));
  for (BlockId block : taken) EXPECT_FALSE(pool.valued(block)) << "with other contents";
}

TEST(BlockPool, TakesFreeBlocksFirstThenTheKeptOneUnusedForLongest) {
  BlockPool pool(4);
  std::vector<BlockId> blocks;
  for (int i = 0; i < 4; ++i) blocks.push_back(MustTake(pool));
  for (int i = 0; i < 3; ++i) pool.SetKept(blocks[static_cast<size_t>(i)], true);
  for (BlockId block : blocks) pool.Unref(block);
  EXPECT_EQ(pool.available(), 4);
  EXPECT_EQ(pool.num_cached(), 3);
  pool.Ref(blocks[0]);  // used again: now the youngest
  pool.Unref(blocks[0]);
  pool.CheckInvariants();

  auto taken = pool.Take();
  EXPECT_EQ(taken->block, blocks[3]);
  EXPECT_FALSE(taken->was_kept);
  for (BlockId expected : {blocks[1], blocks[2], blocks[0]}) {
    taken = pool.Take();
    EXPECT_EQ(taken->block, expected);
    EXPECT_TRUE(taken->was_kept);
  }
  pool.CheckInvariants();
}

TEST(BlockPool, ForgottenBlocksAreFree) {
  BlockPool pool(2);
  const BlockId block = MustTake(pool);
  pool.SetKept(block, true);
  pool.Unref(block);
  EXPECT_EQ(pool.next_to_take(), block);
  pool.Forget(block);
  EXPECT_EQ(pool.num_cached(), 0);
  EXPECT_EQ(pool.available(), 2);
  pool.CheckInvariants();
}

TEST(BlockPool, RetiredReferencesHoldTheBlockAndCountAsComingBack) {
  BlockPool pool(2);
  const BlockId block = MustTake(pool);
  pool.Ref(block);
  pool.Retire(block);
  EXPECT_EQ(pool.num_retiring(), 0);  // somebody else stays
  pool.Retire(block);
  EXPECT_EQ(pool.num_retiring(), 1);
  pool.Ref(block);  // found again meanwhile
  EXPECT_EQ(pool.num_retiring(), 0);
  pool.Unref(block);
  EXPECT_EQ(pool.num_retiring(), 1);
  pool.CheckInvariants();
  pool.Unretire(block);
  EXPECT_EQ(pool.num_held(), 1);
  EXPECT_EQ(pool.num_retiring(), 1);
  pool.Unretire(block);
  EXPECT_EQ(pool.num_held(), 0);
  EXPECT_EQ(pool.num_retiring(), 0);
  pool.CheckInvariants();
}

TEST(BlockPoolDeathTest, MisuseDies) {
  BlockPool pool(2);
  EXPECT_DEATH(pool.Ref(0), "broken invariant");
  EXPECT_DEATH(pool.Unref(0), "broken invariant");
  const BlockId block = MustTake(pool);
  pool.Retire(block);
  EXPECT_DEATH(pool.Unref(block), "broken invariant");  // the reference is the step's
  EXPECT_DEATH(pool.Retire(block), "broken invariant");
}

}  // namespace
}  // namespace altiplano
