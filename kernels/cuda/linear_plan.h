// Launch geometry of Linear. A row of the result has the same bits however many rows there are: which order its sum is
// taken in depends on dtype, N and K alone. All else here may depend on the tokens, because it does not show in a bit.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/cuda/launch_shape.h"

namespace altiplano::cuda {

// The sum's order, on tensor cores: K in chunks of 32, which are dealt to the parts in turn; a part adds up its chunks
// one after the other, then the parts are added one after the other.
inline constexpr int kLinearChunk = 32;
inline constexpr int kLinearUnroll = 4;  // chunks whose weights a warp has in flight together

// Of the few tokens of a decode step each part is a warp, so that parts are what few columns have to keep the memory
// busy: bandwidth times latency is about 3 MB on an H100, and a warp has 4 KB in flight for each group of 16 rows.
// 4096 columns and more get there with 4 warps a block; less with 8 or 16, if K feeds so many.
constexpr int LinearParts(int64_t n, int64_t k) {
  int parts = 4;
  while (parts < 16 && n * parts < 4096 * 4 && k >= 2 * parts * kLinearUnroll * kLinearChunk) parts *= 2;
  return parts;
}
inline constexpr uint32_t kMostLinearThreads = 32 * 16;

// More are cuBLASLt's, where it is installed and a row's bits may depend on how many there are.
inline constexpr int64_t kMostTokensOfOurs = 64;

inline constexpr int64_t kLinearMultiprocessors = 132;  // of an H100

// ---- few tokens: a block makes the columns of one or two groups of 16 rows of the weights for up to 8 tiles of 8
// tokens, a warp for each part.
inline constexpr int kLinearGroupRows = 16;
constexpr int64_t LinearGroups(int64_t rows) {
  return (rows + kLinearGroupRows - 1) / kLinearGroupRows;
}
// Of a block's columns in shared memory: the lanes of a store differ in their banks.
constexpr int MmaLinearPadded(int row_groups) {
  return kLinearGroupRows * row_groups + 4;
}

// Tiles of 8 tokens that one pass over the weights serves: 1 and 2 while decoding, 8 beyond.
constexpr int MmaLinearTokenTiles(int64_t tokens) {
  return tokens <= 8 ? 1 : tokens <= 16 ? 2 : 8;
}

// Groups of rows to a block. A warp loads x once for all of its groups: with one that is for 16 tokens as much as the
// weights, and L2 would have to send 6 TB/s for 3 TB/s of weights; with two it is half as much. A warp has twice the
// bytes in flight then, so that half as many keep the memory as busy. But there are half as many blocks, too, to draw
// them: with up to 132 of one group each has a multiprocessor of its own, and pairs would leave some idle. With more,
// some multiprocessor has two of them anyway: blocks of two are at least 67, and none has more than a 66th of the rows
// to draw, 45 GB/s of weights and 23 of x at 3 TB/s, 40 of the 64 bytes that L2 can send it in a cycle. 17 tokens and
// more have no registers for it, before sm_90 9 have none (a spill, or loads one after the other); up to 4 load little.
inline constexpr int64_t kFewestTokensOfTwoGroups = 5, kMostTokensOfTwoGroups = 16;
constexpr int LinearRowGroups(int64_t tokens, int64_t rows, bool from_sm90 = true) {
  const bool pays = tokens >= kFewestTokensOfTwoGroups && tokens <= (from_sm90 ? kMostTokensOfTwoGroups : 8);
  return pays && LinearGroups(rows) > kLinearMultiprocessors ? 2 : 1;
}

// What a warp loads of x before it multiplies the first of it: each load that waits for products of the one before
// costs a time of flight from L2, in which no weights are under way. As far as registers go: 64 tokens have none left,
// and 8 tokens with one group make do with 64, so that 405B's 1024 blocks are resident at once.
struct LinearLoadsOfX {
  int chunks, tiles;
};
constexpr LinearLoadsOfX LinearXTogether(int token_tiles, int row_groups) {
  if (token_tiles == 8) return {1, 1};
  return {token_tiles * row_groups == 2 ? kLinearUnroll : 2, token_tiles};
}
// Of kMostLinearThreads, that the compiler is to leave registers for. 0: as many as it likes, at least one.
constexpr uint32_t LinearBlocksToFit(int token_tiles, int row_groups) {
  return token_tiles * row_groups == 1 ? 2 : 0;
}

// Chunks whose weights a warp has in flight together. With 64 tokens' sums 4 of them take 144 registers, which blocks
// of 16 warps have not: those make do with 2 (128), and the order of a sum does not know of it.
inline constexpr int kLeastLinearUnroll = 2;
constexpr int LinearUnroll(int token_tiles, int parts) {
  return token_tiles == 8 && parts > 8 ? kLeastLinearUnroll : kLinearUnroll;
}
constexpr uint32_t LinearMostThreads(int token_tiles, int unroll) {
  return token_tiles == 8 && unroll == kLinearUnroll ? 32 * 8 : kMostLinearThreads;
}

// Elements of each row of the weights that warps load before they wait for the kernels before. More token tiles leave
// no registers for that.
inline constexpr int kMostTokenTilesAhead = 2;
constexpr int64_t LinearLoadedAhead(int64_t tokens, int parts) {
  return MmaLinearTokenTiles(tokens) <= kMostTokenTilesAhead ? int64_t{parts} * kLinearUnroll * kLinearChunk : 0;
}

// rows: of the weights.
constexpr LaunchShape MmaLinearPlan(int64_t tokens, int64_t rows, int parts, bool from_sm90 = true) {
  const int64_t block_tokens = 8 * MmaLinearTokenTiles(tokens);
  const int row_groups = LinearRowGroups(tokens, rows, from_sm90);
  return {.grid_x = static_cast<uint32_t>((LinearGroups(rows) + row_groups - 1) / row_groups),
          .grid_y = static_cast<uint32_t>((tokens + block_tokens - 1) / block_tokens),
          .threads = static_cast<uint32_t>(32 * parts),
          .shared_bytes = static_cast<uint32_t>(parts * block_tokens * MmaLinearPadded(row_groups) * 4)};
}

// What a launch that overlaps (launch.h) asks L2 for while it waits for the kernels before it, beyond what its warps
// load then: of each row of the weights `bytes` from `begin` on, by the first `blocks` blocks, those that find room at
// once. All together that is up to kPrefetchedBytes. The memory has as much to send in 4 us, and would be idle: an
// all-reduce of one token takes 8 or 9. A third of L2 (50 MB on Hopper) keeps it, whatever else goes on.
inline constexpr int64_t kPrefetchedBytes = 16 << 20;
// At once on all multiprocessors, by registers: of 64 or 128.
constexpr int64_t ResidentLinearWarps(int token_tiles, int row_groups) {
  return kLinearMultiprocessors * std::max(1u, LinearBlocksToFit(token_tiles, row_groups)) * kMostLinearThreads / 32;
}
struct LinearPrefetch {
  int begin = 0, bytes = 0, blocks = 0;
  friend bool operator==(const LinearPrefetch&, const LinearPrefetch&) = default;
};
// Of bf16. tokens: up to 64.
constexpr LinearPrefetch PlanLinearPrefetch(int64_t tokens, int64_t rows, int64_t k, int parts) {
  const int row_groups = LinearRowGroups(tokens, rows);
  const int64_t blocks = std::min<int64_t>(MmaLinearPlan(tokens, rows, parts).grid_x,
                                           ResidentLinearWarps(MmaLinearTokenTiles(tokens), row_groups) / parts);
  // Whole lines of 128 bytes, and the chunks that warps load early are such, too.
  const int64_t begin = std::min(k, LinearLoadedAhead(tokens, parts)) * 2;
  const int64_t share = kPrefetchedBytes / (blocks * row_groups * kLinearGroupRows) / 128 * 128;
  return {.begin = static_cast<int>(begin),
          .bytes = static_cast<int>(std::min(k * 2 - begin, share)),
          .blocks = static_cast<int>(blocks)};
}

// Bytes of the weights that are on their way before the wait, into registers and L2.
constexpr int64_t LinearEarlyBytes(int64_t tokens, int64_t rows, int64_t k) {
  const LinearPrefetch prefetch = PlanLinearPrefetch(tokens, rows, k, LinearParts(rows, k));
  const int64_t block_rows = int64_t{LinearRowGroups(tokens, rows)} * kLinearGroupRows;
  return std::min(rows, prefetch.blocks * block_rows) * (prefetch.begin + prefetch.bytes);
}

// ---- some tokens on sm_90a (linear_hopper.cu): TMA brings the weights to shared memory, wgmma multiplies them from
// there. A row of the weights is read by one block, or one of a few that have a part of K each, a *split*.
inline constexpr int64_t kFewestHopperTokens = 9;
inline constexpr int kHopperConsumers = 128;  // threads: a warpgroup
inline constexpr uint32_t kHopperThreads = kHopperConsumers + 32;
inline constexpr int kHopperDepth = 64;  // of K in a stage: a swizzled row of TMA
inline constexpr int kMostHopperStages = 16;

// Up to so many tokens one kernel serves: the columns of wgmma.
constexpr int HopperColumns(int64_t tokens) {
  return tokens <= 16 ? 16 : tokens <= 32 ? 32 : 64;
}
// Of the result in shared memory, f32: the lanes of a store differ in their banks.
constexpr int HopperPadded(int block_rows) {
  return block_rows + 4;
}
constexpr int HopperStageBytes(int columns, int block_rows) {
  return (columns + block_rows) * kHopperDepth * 2;
}
// As many as the shared memory of a block holds beside the result and the mbarriers.
constexpr int HopperStages(int columns, int block_rows) {
  const int room = 227 * 1024 - 1024 - columns * HopperPadded(block_rows) * 4;
  return std::min(kMostHopperStages, room / HopperStageBytes(columns, block_rows));
}
constexpr uint32_t HopperSharedBytes(int columns, int block_rows) {
  const int stages = HopperStages(columns, block_rows);
  return static_cast<uint32_t>(stages *
                                   (HopperStageBytes(columns, block_rows) + 2 * static_cast<int>(sizeof(uint64_t))) +
                               columns * HopperPadded(block_rows) * 4 + static_cast<int>(sizeof(uint64_t)));
}

// From so many blocks on they draw what the memory has: 57 GB/s each at 3.6 TB/s, 34 of the 64 bytes that L2 can send a
// multiprocessor in a cycle at 1.7 GHz; with as much x as weights it is twice that, too much.
inline constexpr int64_t kBusyHopperBlocks = 64;

// A split ends with its sums in L2 and one block that adds those of all splits: 2 or 3 us in which it reads no weights.
// So K is split where blocks are too few: those of 128 rows if each has 4096 of K and more left, a megabyte; or those
// of 64 rows. Depends on the matrix alone, as bits do.
constexpr int HopperSplits(int64_t rows, int64_t k) {
  const int64_t tall = (rows + 127) / 128, low = (rows + 63) / 64;
  const int64_t of_tall = (kBusyHopperBlocks + tall - 1) / tall, of_low = (kBusyHopperBlocks + low - 1) / low;
  const int64_t wanted = k >= of_tall * 4096 ? of_tall : std::max<int64_t>(1, std::min(of_low, k / 512));
  const int64_t stages = (k + kHopperDepth - 1) / kHopperDepth, depth = (stages + wanted - 1) / wanted;
  return static_cast<int>((stages + depth - 1) / depth);  // none of them empty
}

struct HopperLinear {
  int columns = 0;     // tokens of the kernel
  int block_rows = 0;  // of the weights, 64 or 128
  int tiles = 0;       // of so many rows
  int splits = 0;
  int depth = 0;   // stages of a split, but for the last one, which may have less
  int stages = 0;  // of all K
  constexpr int units() const { return tiles * splits; }
  friend bool operator==(const HopperLinear&, const HopperLinear&) = default;
};
// 128 rows to a block, for which x is then loaded once, where that leaves enough blocks. Of 33 tokens and more x is
// half as much as the weights of 128 rows and as much as those of 64: then fewer blocks will do.
constexpr HopperLinear PlanHopperLinear(int64_t tokens, int64_t rows, int64_t k) {
  HopperLinear plan = {.columns = HopperColumns(tokens), .splits = HopperSplits(rows, k)};
  const int64_t tall = (rows + 127) / 128 * plan.splits;
  plan.block_rows = tall >= (plan.columns > 32 ? kBusyHopperBlocks * 3 / 4 : kBusyHopperBlocks) ? 128 : 64;
  plan.tiles = static_cast<int>((rows + plan.block_rows - 1) / plan.block_rows);
  plan.stages = static_cast<int>((k + kHopperDepth - 1) / kHopperDepth);
  plan.depth = (plan.stages + plan.splits - 1) / plan.splits;
  return plan;
}
constexpr LaunchShape HopperLinearShape(const HopperLinear& plan, int64_t multiprocessors) {
  return {.grid_x = static_cast<uint32_t>(std::min<int64_t>(plan.units(), multiprocessors)),
          .threads = kHopperThreads,
          .shared_bytes = HopperSharedBytes(plan.columns, plan.block_rows)};
}

// What splits leave: each unit's sums, then for each tile how many of its splits are done.
constexpr int64_t HopperUnitBytes(const HopperLinear& plan) {
  return int64_t{plan.columns} * plan.block_rows * 4;
}
inline constexpr int64_t kMostHopperUnits = 2 * kBusyHopperBlocks - 1;  // of matrices that are split
inline constexpr int64_t kHopperSumsBytes = kMostHopperUnits * 128 * 64 * 4;
inline constexpr int64_t kHopperScratchBytes = kHopperSumsBytes + kMostHopperUnits * 4;

// Of bf16 whose rows are aligned to 16 bytes. With up to 16 tokens linear.cu does well enough where this would split.
constexpr bool UsesHopper(int64_t tokens, int64_t rows, int64_t k) {
  return tokens <= kMostTokensOfOurs && (tokens > 16 || (tokens >= kFewestHopperTokens && HopperSplits(rows, k) == 1));
}

// ---- many tokens: tiles of 64 rows of the weights by 32 tokens for each warp, in a ring of stages.
inline constexpr int kTileStages = 4;
inline constexpr int kTileDepth = 64;  // of K in a stage: two chunks of one part

struct LinearTile {
  int row_warps, token_warps;
  constexpr int rows() const { return 64 * row_warps; }
  constexpr int tokens() const { return 32 * token_warps; }
  constexpr int threads() const { return 32 * row_warps * token_warps; }
};
inline constexpr LinearTile kLargeTile = {2, 4}, kSmallTile = {1, 2};

constexpr LaunchShape TiledLinearPlan(const LinearTile& tile, int64_t tokens, int64_t rows) {
  return {.grid_x = static_cast<uint32_t>((tokens + tile.tokens() - 1) / tile.tokens()),
          .grid_y = static_cast<uint32_t>((rows + tile.rows() - 1) / tile.rows()),
          .threads = static_cast<uint32_t>(tile.threads()),
          .shared_bytes = static_cast<uint32_t>(kTileStages * (tile.rows() + tile.tokens()) * kTileDepth * 2)};
}

// The large tile reads each operand half as often; it needs enough of them for all multiprocessors, and more of a
// block's shared memory than sm_89 has.
constexpr bool IsLargeTile(int64_t tokens, int64_t rows, uint32_t shared_limit) {
  const LaunchShape large = TiledLinearPlan(kLargeTile, tokens, rows);
  return int64_t{large.grid_x} * large.grid_y >= kLinearMultiprocessors && large.shared_bytes <= shared_limit;
}

// Up to 64 tokens one pass over the weights serves all, in narrow blocks where tiles would leave multiprocessors idle.
constexpr bool UsesTiles(int64_t tokens, int64_t rows) {
  return tokens > 64 || (tokens > 16 && (rows + kSmallTile.rows() - 1) / kSmallTile.rows() >= kLinearMultiprocessors);
}

// ---- plain: each warp makes one column of out for up to 8 tokens.
inline constexpr int kPlainLinearWarps = 4;
inline constexpr int kPlainLinearTokens = 8;
constexpr LaunchShape PlainLinearPlan(int64_t tokens, int64_t n) {
  return {.grid_x = static_cast<uint32_t>((n + kPlainLinearWarps - 1) / kPlainLinearWarps),
          .grid_y = static_cast<uint32_t>((tokens + kPlainLinearTokens - 1) / kPlainLinearTokens),
          .threads = 32 * kPlainLinearWarps};
}

}  // namespace altiplano::cuda
