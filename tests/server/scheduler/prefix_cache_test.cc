#include "server/scheduler/prefix_cache.h"

#include <gtest/gtest.h>

#include <map>
#include <random>
#include <vector>

namespace altiplano {
namespace {

using Tokens = std::vector<TokenId>;

class PrefixCacheTest : public testing::Test {
 protected:
  // Publishes under the true name; returns the block, still held.
  BlockId MustPublish(const BlockHash& parent, const Tokens& tokens) {
    const BlockId block = *cache_.Allocate();
    EXPECT_TRUE(cache_.Publish(block, ChainHash(parent, tokens), parent, tokens));
    return block;
  }
  std::optional<BlockId> Find(const BlockHash& parent, const Tokens& tokens) {
    return cache_.Find(ChainHash(parent, tokens), parent, tokens);
  }

  BlockPool pool_{4};
  PrefixCache cache_{&pool_, 2};
  const BlockHash root_ = RootHash("tenant", "salt");
};

TEST(BlockNames, DependOnEverythingBefore) {
  EXPECT_NE(RootHash("ab", "c"), RootHash("a", "bc"));
  EXPECT_NE(RootHash("a", ""), RootHash("", "a"));
  const BlockHash a = RootHash("a", ""), b = RootHash("b", "");
  EXPECT_NE(ChainHash(a, Tokens{1, 2}), ChainHash(b, Tokens{1, 2}));
  EXPECT_NE(ChainHash(a, Tokens{1, 2}), ChainHash(a, Tokens{2, 1}));
  EXPECT_EQ(ChainHash(a, Tokens{1, 2}), ChainHash(a, Tokens{1, 2}));
}

TEST_F(PrefixCacheTest, FindsWhatWasPublishedWhileHeldAndAfter) {
  const BlockId block = MustPublish(root_, {1, 2});
  EXPECT_EQ(Find(root_, {1, 2}), block);
  EXPECT_EQ(Find(root_, {1, 3}), std::nullopt);
  EXPECT_EQ(Find(RootHash("other", "salt"), {1, 2}), std::nullopt);
  pool_.Unref(block);
  EXPECT_EQ(Find(root_, {1, 2}), block);
  cache_.CheckInvariants();
}

TEST_F(PrefixCacheTest, ATwinStaysUnpublished) {
  const BlockId first = MustPublish(root_, {1, 2});
  const BlockId twin = *cache_.Allocate();
  EXPECT_FALSE(cache_.Publish(twin, ChainHash(root_, Tokens{1, 2}), root_, Tokens{1, 2}));
  EXPECT_EQ(Find(root_, {1, 2}), first);
  EXPECT_FALSE(cache_.published(twin));
  pool_.Unref(twin);
  EXPECT_EQ(pool_.num_cached(), 0);
  cache_.CheckInvariants();
}

// Should two contents ever get the same name, it is a miss and not somebody else's answer.
TEST_F(PrefixCacheTest, ACollisionIsAMiss) {
  const BlockHash name = ChainHash(root_, Tokens{1, 2});
  MustPublish(root_, {1, 2});
  EXPECT_TRUE(cache_.Find(name, root_, Tokens{1, 2}).has_value());
  EXPECT_FALSE(cache_.Find(name, root_, Tokens{3, 4}).has_value());
  EXPECT_FALSE(cache_.Find(name, RootHash("other", ""), Tokens{1, 2}).has_value());
}

TEST_F(PrefixCacheTest, EvictsTheOldestUnreferencedBlockAndForgetsItsName) {
  std::vector<BlockId> blocks;
  for (TokenId t = 0; t < 4; ++t) blocks.push_back(MustPublish(root_, {t, t}));
  EXPECT_FALSE(cache_.Allocate().has_value());  // held blocks are never evicted
  pool_.Unref(blocks[2]);
  pool_.Unref(blocks[0]);
  EXPECT_EQ(cache_.Allocate(), blocks[2]);
  EXPECT_EQ(Find(root_, {2, 2}), std::nullopt);
  EXPECT_EQ(Find(root_, {0, 0}), blocks[0]);
  cache_.CheckInvariants();
}

TEST_F(PrefixCacheTest, WithdrawnBlocksAreNotFoundAndNotKept) {
  const BlockId block = MustPublish(root_, {1, 2});
  cache_.Withdraw(block);
  cache_.Withdraw(block);  // nothing to take back
  EXPECT_EQ(Find(root_, {1, 2}), std::nullopt);
  pool_.Unref(block);
  EXPECT_EQ(pool_.num_cached(), 0);
  cache_.CheckInvariants();
}

TEST_F(PrefixCacheTest, ResetForgetsUnreferencedBlocksOnly) {
  const BlockId held = MustPublish(root_, {1, 2});
  pool_.Unref(MustPublish(root_, {3, 4}));
  EXPECT_EQ(cache_.Reset(), 1);
  EXPECT_EQ(Find(root_, {1, 2}), held);
  EXPECT_EQ(Find(root_, {3, 4}), std::nullopt);
  EXPECT_EQ(pool_.available(), 3);
  cache_.CheckInvariants();
}

// The table against a map, with enough entries that probes collide and wrap around.
TEST(PrefixCache, AgreesWithAMapUnderRandomUse) {
  constexpr int kBlocks = 100;
  BlockPool pool(kBlocks);
  PrefixCache cache(&pool, 1);
  const BlockHash root = RootHash("", "");
  std::map<TokenId, BlockId> expected;
  std::mt19937 random(3);
  for (int i = 0; i < 20000; ++i) {
    const auto token = static_cast<TokenId>(random() % 200);
    const Tokens tokens = {token};
    const BlockHash name = ChainHash(root, tokens);
    auto known = expected.find(token);
    EXPECT_EQ(cache.Find(name, root, tokens),
              known == expected.end() ? std::nullopt : std::optional<BlockId>(known->second));
    if (known != expected.end()) {
      if (random() % 4 != 0) continue;
      pool.Ref(known->second);
      cache.Withdraw(known->second);
      pool.Unref(known->second);
      expected.erase(known);
    } else {
      const BlockId oldest = pool.next_to_take();
      const bool evicts = pool.available() == pool.num_cached();
      if (evicts) std::erase_if(expected, [&](const auto& entry) { return entry.second == oldest; });
      const BlockId block = *cache.Allocate();
      EXPECT_TRUE(cache.Publish(block, name, root, tokens));
      expected[token] = block;
      pool.Unref(block);
    }
    if (i % 500 == 0) cache.CheckInvariants();
  }
  cache.CheckInvariants();
  EXPECT_GT(expected.size(), kBlocks / 2u);
}

}  // namespace
}  // namespace altiplano
