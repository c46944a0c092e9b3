// The work list of attention: every tile is somebody's once, blocks have like shares, and scratch suffices.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <random>
#include <set>
#include <utility>
#include <vector>

#include "kernels/cuda/architectures.h"
#include "kernels/cuda/attention_scratch.h"
#include "tests/kernels/paged_attention_testlib.h"

namespace altiplano {
namespace {

using cuda::AttentionCut;
using cuda::AttentionItem;
using cuda::AttentionSizes;

constexpr size_t kPlenty = size_t{1} << 40;

// A sequence's new tokens, and all of its tokens.
struct Lengths {
  int32_t tokens, context;
};

// A step's list, taken apart and checked.
class Plan {
 public:
  Plan(const AttentionSizes& sizes, const std::vector<Lengths>& step) : sizes_(sizes), step_(step) {
    std::vector<int32_t> q_begin = {0}, lengths;
    for (const Lengths& sequence : step) {
      q_begin.push_back(q_begin.back() + sequence.tokens);
      lengths.push_back(sequence.context);
    }
    const AttentionList list(sizes, q_begin, lengths);
    work = list.work;
    const auto* records = reinterpret_cast<const AttentionItem*>(list.list.data());
    const int32_t* begins = list.list.data() + cuda::kRecordWords;
    cuda::AttentionHeader header;
    std::memcpy(&header, list.list.data(), sizeof(header));
    EXPECT_EQ(header.cuts, work.cuts);
    prefill.assign(records + cuda::kFirstItem, records + cuda::kFirstItem + work.prefill_items);
    EXPECT_EQ(begins[0], cuda::kFirstItem + work.prefill_items);
    // Also where a launch has more blocks than the step has workers.
    for (int64_t worker = 0; worker < cuda::MostAttentionWorkers(sizes); ++worker) {
      EXPECT_LE(begins[worker], begins[worker + 1]);
      workers.emplace_back(records + begins[worker], records + begins[worker + 1]);
      EXPECT_TRUE(worker < work.workers || workers.back().empty());
    }
    EXPECT_EQ(begins[workers.size()], header.first_cut);
    const auto* first_cut = reinterpret_cast<const AttentionCut*>(records + header.first_cut);
    cuts.assign(first_cut, first_cut + work.cuts);
    Check();
  }

  int64_t Keys(const AttentionItem& item, int64_t split) const {
    const int64_t seen = item.before + (item.first_row + item.rows - 1) / group() + 1;
    return std::min(seen, item.end_split * split) - item.first_split * split;
  }
  int64_t Load(size_t worker) const {
    int64_t keys = 0;
    for (const AttentionItem& item : workers[worker]) keys += Keys(item, cuda::kAttentionSplit);
    return keys;
  }
  int64_t LargestLoad() const {
    int64_t most = 0;
    for (size_t i = 0; i < workers.size(); ++i) most = std::max(most, Load(i));
    return most;
  }

  AttentionWork work;
  std::vector<AttentionItem> prefill;
  std::vector<std::vector<AttentionItem>> workers;
  std::vector<AttentionCut> cuts;

 private:
  int64_t group() const { return sizes_.q_heads / sizes_.kv_heads; }

  // Each split of each tile once, in the right list, and of tiles that were cut a state for CombineSplits from each
  // piece.
  void Check() {
    std::map<std::pair<int32_t, int32_t>, std::map<int32_t, AttentionItem>> tiles;
    const auto add = [&](const AttentionItem& item, int32_t tile_rows) {
      ASSERT_EQ(item.first_row % tile_rows, 0);
      ASSERT_LT(item.first_split, item.end_split);
      auto& pieces = tiles[{item.sequence, item.first_row}];
      ASSERT_TRUE(pieces.emplace(item.first_split, item).second);
      const auto sequence = static_cast<size_t>(item.sequence);
      const int64_t rows = step_[sequence].tokens * group();
      ASSERT_EQ(sizes_.may_prefill && rows >= 128, tile_rows == 128);
      ASSERT_EQ(item.rows, std::min<int64_t>(tile_rows, rows - item.first_row));
      ASSERT_EQ(item.before, step_[sequence].context - step_[sequence].tokens);
    };
    for (const AttentionItem& item : prefill) add(item, cuda::kPrefillRows);
    for (const auto& items : workers) {
      for (const AttentionItem& item : items) add(item, cuda::kAttentionRows);
    }
    for (size_t i = 1; i < prefill.size(); ++i) {
      EXPECT_GE(Keys(prefill[i - 1], cuda::kPrefillSplit), Keys(prefill[i], cuda::kPrefillSplit));
    }

    int64_t rows = 0, expected_rows = 0;
    for (const Lengths& sequence : step_) expected_rows += sequence.tokens * group();
    std::map<int32_t, AttentionCut> cut_at;  // by their first row's first state
    for (const AttentionCut& cut : cuts) ASSERT_TRUE(cut_at.emplace(cut.first_state, cut).second);
    std::set<int32_t> taken;
    for (const auto& [at, pieces] : tiles) {
      const AttentionItem& first = pieces.begin()->second;
      const int64_t all_rows = step_[static_cast<size_t>(at.first)].tokens * group();
      const int64_t split = sizes_.may_prefill && all_rows >= 128 ? cuda::kPrefillSplit : cuda::kAttentionSplit;
      rows += first.rows;
      int32_t done = 0, state = first.first_state;
      for (const auto& [first_split, piece] : pieces) {
        ASSERT_EQ(first_split, done);
        done = piece.end_split;
        ASSERT_EQ(piece.first_state, state);
        if (pieces.size() > 1) state += (first_split == 0 ? 1 : piece.end_split - first_split) * piece.rows;
      }
      const int64_t seen = first.before + (first.first_row + first.rows - 1) / group() + 1;
      ASSERT_EQ(done, (seen + split - 1) / split);
      if (pieces.size() == 1) {
        ASSERT_EQ(first.first_state, -1);
        continue;
      }
      for (int32_t i = first.first_state; i < state; ++i) ASSERT_TRUE(taken.insert(i).second);
      for (int32_t row = 0; row < first.rows; row += 16) {
        const auto found = cut_at.find(first.first_state + row);
        ASSERT_NE(found, cut_at.end());
        const AttentionCut& cut = found->second;
        EXPECT_EQ(cut.first_row, first.first_row + row);
        EXPECT_EQ(cut.rows, std::min(16, first.rows - row));
        EXPECT_EQ(cut.stride, first.rows);
        EXPECT_EQ(cut.states * cut.stride, state - first.first_state);
        cut_at.erase(found);
      }
    }
    EXPECT_EQ(rows, expected_rows);
    EXPECT_TRUE(cut_at.empty());
    if (!taken.empty()) {
      EXPECT_LE((*taken.rbegin() + 1) * sizes_.kv_heads, cuda::AttentionStates(sizes_.dim, sizes_.scratch_bytes));
    }
  }

  const AttentionSizes sizes_;
  const std::vector<Lengths> step_;
};

AttentionSizes Of(int64_t q_heads, int64_t kv_heads, size_t scratch_bytes = kPlenty) {
  return {.q_heads = q_heads, .kv_heads = kv_heads, .dim = 128, .may_prefill = true, .scratch_bytes = scratch_bytes};
}

TEST(AttentionPlan, HasEverySplitOnceWhateverTheLengths) {
  std::mt19937 random(1);
  const auto below = [&](uint32_t n) { return static_cast<int32_t>(random() % n); };
  for (int turn = 0; turn < 100; ++turn) {
    const int64_t kv_heads = int64_t{1} << below(4);
    AttentionSizes sizes = Of(kv_heads * (1 + below(16)), kv_heads, turn % 3 == 0 ? size_t{8} << 20 : kPlenty);
    sizes.may_prefill = turn % 4 != 0;
    std::vector<Lengths> step;
    const int n = 1 + below(turn % 2 == 0 ? 6 : 80);
    for (int i = 0; i < n; ++i) {
      const int32_t tokens = below(8) == 0 ? below(600) : below(3), before = below(below(5) == 0 ? 70000 : 900);
      step.push_back({tokens, before + tokens});
    }
    const Plan plan(sizes, step);
    ASSERT_FALSE(HasFailure()) << "turn " << turn;
    if (sizes.scratch_bytes != kPlenty) continue;
    // Nobody has much more than a share, or than a split where a share is less.
    int64_t total = 0, tiles = 0;
    for (size_t i = 0; i < plan.workers.size(); ++i) {
      total += plan.Load(i);
      tiles += static_cast<int64_t>(plan.workers[i].size());
    }
    if (tiles == 0) continue;
    EXPECT_LE(plan.LargestLoad(), 12 * total / plan.work.workers / 10 + 2 * cuda::kAttentionSplit) << "turn " << turn;
  }
}

// Llama 3.1 8B: 33 workers for each of 8 KV heads.
TEST(AttentionPlan, DealsOutDecodes) {
  // A tile for each worker but one, and nothing to fold.
  const Plan even(Of(32, 8), std::vector<Lengths>(32, {1, 4096}));
  EXPECT_EQ(even.work.workers, 33);
  EXPECT_EQ(even.work.cuts, 0);
  EXPECT_EQ(even.LargestLoad(), 4096);
  // One long context: 256 splits for 33 workers.
  const Plan one(Of(32, 8), {{1, 131072}});
  EXPECT_EQ(one.work.workers, 33);
  EXPECT_EQ(one.work.cuts, 1);
  EXPECT_EQ(one.LargestLoad(), 8 * 512);
  EXPECT_EQ(one.cuts[0].states, 1 + 256 - static_cast<int>(one.workers[0][0].end_split));
  // A long context among short ones is shared by all, with any number of sequences.
  std::vector<Lengths> mixed(100, {1, 700});
  mixed[50] = {1, 100000};
  const Plan among(Of(32, 8), mixed);
  EXPECT_LT(among.LargestLoad(), (100 * 700 + 100000) / 33 + 1024);
  // Without scratch it is one worker's, and without a context worth cutting there is no more than a block each.
  EXPECT_EQ(Plan(Of(32, 8, 0), mixed).work.cuts, 0);
  const Plan brief(Of(32, 8), {{1, 300}, {1, 500}, {1, 1}});
  EXPECT_EQ(brief.work.workers, 3);
  EXPECT_EQ(brief.work.cuts, 0);
  EXPECT_EQ(Plan(Of(32, 8), {{0, 0}}).work.workers, 0);
}

// An H20, an A100, an H100 SXM and a larger one: two blocks for each multiprocessor, whatever their number, and a long
// context shared by all of them.
TEST(AttentionPlan, HasWorkForEveryMultiprocessor) {
  for (int64_t multiprocessors : {78, 108, 132, 148}) {
    SCOPED_TRACE(multiprocessors);
    AttentionSizes sizes = Of(32, 8);
    sizes.multiprocessors = multiprocessors;
    const Plan one(sizes, {{1, 131072}});
    EXPECT_EQ(one.work.workers, 2 * multiprocessors / 8);
    EXPECT_EQ(one.LargestLoad(), (256 + one.work.workers - 1) / one.work.workers * 512);
    sizes = Of(8, 1);
    sizes.multiprocessors = multiprocessors;
    const Plan prefill(sizes, {{512, 32768 + 512}});
    EXPECT_GE(prefill.work.prefill_items, std::min<int64_t>(multiprocessors, 3 * 32));
  }
}

TEST(AttentionPlan, CutsPrefillWhereTilesAreFewerThanMultiprocessors) {
  // Llama 3.1 70B on one of eight ranks, 512 tokens behind 32k: 32 tiles of 17 splits at most, of which each becomes
  // four.
  const Plan few(Of(8, 1), {{512, 32768 + 512}});
  EXPECT_EQ(few.work.prefill_items, 4 * 32);
  EXPECT_EQ(few.work.cuts, 32 * 128 / 16);
  EXPECT_EQ(few.work.workers, 0);
  // Whole prompts, and chunks with tiles enough, are left whole.
  for (int32_t tokens : {2048, 8192, 32768}) {
    EXPECT_EQ(Plan(Of(32, 8), {{tokens, tokens}}).work.cuts, 0) << tokens;
    EXPECT_EQ(Plan(Of(32, 8), {{tokens, 65536 + tokens}}).work.cuts, 0) << tokens;
  }
  // A context of one split cannot be cut; without scratch none is.
  EXPECT_EQ(Plan(Of(8, 1), {{512, 2048}}).work.cuts, 0);
  EXPECT_EQ(Plan(Of(8, 1, 0), {{512, 33280}}).work.cuts, 0);
}

// The tiles of all sequences in one order.
TEST(AttentionPlan, BeginsWithTheHeaviestTiles) {
  const Plan plan(Of(32, 8), {{64, 64}, {512, 2000}, {40, 40}, {64, 1700}});
  ASSERT_EQ(plan.prefill.size(), 2u + 16 + 2 + 2);
  EXPECT_EQ(plan.prefill.front().sequence, 1);
  std::vector<int32_t> order;
  for (const AttentionItem& item : plan.prefill) {
    if (order.empty() || order.back() != item.sequence) order.push_back(item.sequence);
  }
  EXPECT_EQ(order, (std::vector<int32_t>{1, 3, 1, 3, 1, 0, 2, 0, 2}));
}

// Each item of each KV head is one block's, and no block has much more than the others.
TEST(AttentionPlan, DealsPrefillItemsBackAndForth) {
  for (int32_t tokens : {512, 2048, 8192}) {
    for (int64_t kv_heads : {1, 2, 8}) {
      const Plan plan(Of(kv_heads * 4, kv_heads), {{tokens, tokens}});
      const int items = static_cast<int>(plan.prefill.size()) * static_cast<int>(kv_heads);
      const int blocks = plan.work.prefill_blocks;
      EXPECT_EQ(blocks, std::min(items, 132));
      std::vector<int> owners(static_cast<size_t>(items));
      std::vector<int64_t> keys(static_cast<size_t>(blocks));
      int64_t all = 0, most = 0;
      for (int block = 0; block < blocks; ++block) {
        for (int round = 0; cuda::PrefillItemOf(round, block, blocks) < items; ++round) {
          const int at = cuda::PrefillItemOf(round, block, blocks);
          ++owners[static_cast<size_t>(at)];
          const AttentionItem& item = plan.prefill[static_cast<size_t>(at / kv_heads)];
          const int64_t seen = std::min<int64_t>(item.before + (item.first_row + item.rows - 1) / 4 + 1,
                                                 item.end_split * cuda::kPrefillSplit) -
                               item.first_split * cuda::kPrefillSplit;
          keys[static_cast<size_t>(block)] += seen;
          most = std::max(most, seen);
          all += seen;
        }
      }
      EXPECT_THAT(owners, testing::Each(1));
      // The best that may be: the heaviest item, or a fair share.
      const double best = std::max(static_cast<double>(most), static_cast<double>(all) / blocks);
      EXPECT_LE(static_cast<double>(*std::max_element(keys.begin(), keys.end())), 1.07 * best)
          << tokens << ", " << kv_heads;
    }
  }
}

TEST(AttentionPlan, LaunchesWhatWorkSays) {
  EXPECT_EQ(cuda::PrefillAttentionShape(128, 34),
            (cuda::LaunchShape{.grid_x = 34, .threads = 384, .shared_bytes = cuda::PrefillSharedBytes(128)}));
  EXPECT_LE(cuda::PrefillSharedBytes(128), cuda::kHopper.shared_bytes);
  EXPECT_EQ(cuda::AttentionShape(8, 33, 1000),
            (cuda::LaunchShape{.grid_x = 33, .grid_y = 8, .threads = 128, .shared_bytes = 1000}));
  EXPECT_EQ(cuda::CombineSplitsShape(8, 3), (cuda::LaunchShape{.grid_x = 3, .grid_y = 8, .threads = 512}));
}

// What a model takes as scratch is enough for every step that it may be given.
TEST(AttentionScratch, LetsEveryStepBeCut) {
  constexpr int32_t kContext = 4096;  // 64 MiB are not reached
  const size_t bytes = cuda::AttentionScratchBytes(Of(32, 8), 2048, kContext);
  EXPECT_LT(bytes, cuda::kMostAttentionScratch);
  for (size_t sequences : {1, 3, 40, 200}) {
    for (int32_t tokens : {1, 3, 33, 600}) {
      if (static_cast<int64_t>(sequences) * tokens > 2048) continue;
      std::vector<Lengths> step(sequences, {tokens, 600});
      step[sequences / 2].context = kContext;
      EXPECT_EQ(Plan(Of(32, 8, bytes), step).work.cuts, Plan(Of(32, 8), step).work.cuts) << sequences << ", " << tokens;
    }
  }
}

TEST(AttentionScratch, IsBoundedAndNothingForShortContexts) {
  EXPECT_EQ(cuda::AttentionScratchBytes(Of(32, 8), 2048, 512), 0u);
  EXPECT_EQ(cuda::AttentionScratchBytes(Of(32, 8), 2048, 0), 0u);
  EXPECT_EQ(cuda::AttentionScratchBytes(Of(32, 8), 2048, 131072), cuda::kMostAttentionScratch);
}

}  // namespace
}  // namespace altiplano
