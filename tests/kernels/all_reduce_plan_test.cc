#include "kernels/comm/all_reduce_plan.h"

#include <gtest/gtest.h>

#include <vector>

namespace altiplano {
namespace {

TEST(AllReducePlan, WaysCrossWhereTheTableSays) {
  constexpr size_t kKiB = 1024, kMiB = kKiB * kKiB;
  struct Case {
    int ranks;
    size_t bytes;
    AllReduceWay with_nccl, without;
  };
  using enum AllReduceWay;
  for (const Case& c : {Case{2, 8 * kMiB, kOneShot, kOneShot}, Case{2, 8 * kMiB + 1, kNccl, kTwoShots},
                        Case{3, 512 * kKiB, kOneShot, kOneShot}, Case{4, 512 * kKiB + 4, kTwoShots, kTwoShots},
                        Case{4, 9 * kMiB, kNccl, kTwoShots}, Case{5, 256 * kKiB, kOneShot, kOneShot},
                        Case{8, 256 * kKiB + 4, kTwoShots, kTwoShots}, Case{8, 8 * kMiB, kTwoShots, kTwoShots},
                        Case{8, 64 * kMiB, kNccl, kTwoShots}}) {
    EXPECT_EQ(ChooseAllReduce(c.ranks, c.bytes, true), c.with_nccl) << c.ranks << " ranks, " << c.bytes;
    EXPECT_EQ(ChooseAllReduce(c.ranks, c.bytes, false), c.without) << c.ranks << " ranks, " << c.bytes;
  }
}

// No way is chosen whose message does not fit the mailbox, and rows of the table are in order.
TEST(AllReducePlan, TheTableIsSound) {
  int ranks = 1;
  for (const AllReduceRow& row : kAllReduceTable) {
    EXPECT_GT(row.most_ranks, ranks);
    ranks = row.most_ranks;
    EXPECT_LE(row.one_shot_bytes, row.two_shots_bytes);
    EXPECT_LE(row.two_shots_bytes, kPeerMessageBytes);
  }
  EXPECT_EQ(ranks, kMostPeers);
}

// Blocks wait for those of all other ranks. Where all ranks share a GPU, a multiprocessor stays free for one that still
// computes.
TEST(AllReducePlan, WaitingBlocksLeaveRoomOnOneGpu) {
  constexpr uint32_t kMultiprocessors = 132;  // H100, H200
  EXPECT_LT(kMostPeers * kMostPeerBlocks, kMultiprocessors);
  for (int64_t packs = 1; packs <= static_cast<int64_t>(kPeerMessageBytes / sizeof(float)); packs = packs * 3 / 2 + 1) {
    EXPECT_LE(PlanPeerLaunch(packs).blocks, kMostPeerBlocks) << packs;
  }
}

TEST(AllReducePlan, HalvesOfTheMailboxTakeTurnsAndDoNotOverlap) {
  for (uint32_t call : {1u, 7u, 0xFFFFFFFFu}) {
    EXPECT_NE(HalfOfCall(call), HalfOfCall(call + 1));
    std::vector<size_t> begins;
    for (uint32_t next : {call, call + 1}) {
      for (Mail mail : {Mail::kMessage, Mail::kSums}) begins.push_back(MailOffset(next, mail));
    }
    std::sort(begins.begin(), begins.end());
    for (size_t i = 0; i < begins.size(); ++i) {
      EXPECT_LE(begins[i] + kPeerMessageBytes, i + 1 < begins.size() ? begins[i + 1] : kMailboxBytes);
    }
  }
}

// Every pack has one block and one rank, and a launch has as many blocks as it needs and no more than are resident.
TEST(AllReducePlan, PacksAreShared) {
  for (int64_t packs : {1, 31, 32, 33, 512, 513, 5000, 8192, 100000}) {
    const PeerLaunchShape plan = PlanPeerLaunch(packs);
    EXPECT_LE(plan.blocks, kMostPeerBlocks);
    EXPECT_LE(plan.threads, kMostPeerThreads);
    EXPECT_EQ(plan.threads % 32, 0u);
    if (packs <= int64_t{kMostPeerBlocks} * kMostPeerThreads) {
      EXPECT_GE(int64_t{plan.blocks} * plan.threads, packs);  // one pack to a thread
    }
    for (int ranks : {1, 2, 3, 8}) {
      std::vector<int> owners(static_cast<size_t>(packs));
      for (uint32_t block = 0; block < plan.blocks; ++block) {
        const PackRange own = BlockPacks(packs, plan.blocks, block);
        for (int rank = 0; rank < ranks; ++rank) {
          const PackRange share = RankPacks(own, ranks, rank);
          EXPECT_GE(share.begin, own.begin);
          EXPECT_LE(share.end, own.end);
          for (int64_t pack = share.begin; pack < share.end; ++pack) ++owners[static_cast<size_t>(pack)];
        }
      }
      for (int owned : owners) ASSERT_EQ(owned, 1) << packs << " packs, " << ranks << " ranks";
    }
  }
}

}  // namespace
}  // namespace altiplano
