// Attention of long parts of prompts on sm_90a: TMA, mbarriers and wgmma. bf16 keys and values, heads of 64 or 128.
//
// A block takes tiles of 128 rows and the KV head that they share, one after the other. One warp, the producer, has TMA
// copy one page's keys or values after the other into a ring of slots; two warpgroups of 64 rows each consume them; two
// more warps copy the next tile's queries meanwhile. Scores, weights and the weighted sums stay in registers, and so do
// the queries, so that shared memory is read for keys and values alone. While the tensor cores add the values of one
// run of 64 keys, the scores of the next are already on their way and turn into weights; and the warpgroups take turns,
// so that the tensor cores work for one while the other turns scores into weights.
//
// Each row goes through the keys from the first in runs of 64, and begins anew every 2048, folding what it has into its
// state: so that a long context can be cut there and shared by blocks. No other row changes these operations: a row's
// bits are the same in a whole prefill, in a chunk, in any batch and on any number of blocks, as long as its sequence
// is this kernel's.
#include "kernels/cuda/backend.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/paged_attention.h"
#include "kernels/cuda/ptx_hopper.h"

namespace altiplano::cuda {

namespace {

constexpr int kKeys = kPrefillKeys;
constexpr int kSlots = kPrefillSlots;
constexpr int kSplit = static_cast<int>(kPrefillSplit);
constexpr int kWarpRows = 16;
constexpr int kGroupRows = 64;  // of a warpgroup
constexpr int kGroups = kPrefillRows / kGroupRows;
constexpr int kConsumers = 32 * kPrefillConsumers;
constexpr uint32_t kBoxBytes = kKeys * 128;  // 64 columns of the keys or values of a run
constexpr uint32_t kAtomBytes = 1024;        // eight rows of a box
constexpr uint32_t kLeadingUnused = 16;

template <int kDim>
struct Shared {
  static constexpr int kBoxes = kDim / 64;
  unsigned char ring[kSlots][kBoxes][kBoxBytes];
  uint4 queries[kGroups][kGroupRows * kDim / 8];        // in bf16, of the tile that is next
  uint4 rows[kPrefillConsumers][kWarpRows * kDim / 4];  // each warp's state in f32, in the end its results in bf16
  uint64_t full[kSlots], empty[kSlots];
  uint64_t queries_full[kGroups], queries_empty[kGroups];
  uint64_t tail;  // of the last values, before the producer has worked on them
};

// The ring's turns, for each split: the keys of run 0, then those of run j and the values of run j - 1 for each j, then
// the last values. So they are consumed.
PTX_FUNCTION uint32_t SlotOf(int turn) {
  return static_cast<uint32_t>(turn) % kSlots;
}
PTX_FUNCTION uint32_t ParityOf(int turn) {
  return static_cast<uint32_t>(turn) / kSlots & 1;
}

// A tile, or some splits of one, for a KV head.
struct Task {
  AttentionItem tile;
  int kv_head;
  int end;  // of the keys
};
// The block's tasks. The next one's record is on its way meanwhile.
class Tasks {
 public:
  PTX_FUNCTION Tasks(const AttentionArgs& args, int items)
      : args_(args), items_(items), item_(static_cast<int>(blockIdx.x)), word_(LoadWord()) {}
  // False where there is none.
  PTX_FUNCTION bool Next(Task& task) {
    if (item_ >= items_) return false;
    task.tile = RecordOf<AttentionItem>(word_);
    task.kv_head = item_ - args_.by_kv_heads.Quotient(item_) * args_.kv_heads;
    task.end = SmallerOf(KeysSeen(args_, task.tile, task.tile.rows - 1), task.tile.end_split * kSplit);
    item_ = PrefillItemOf(++round_, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x));
    if (item_ < items_) word_ = LoadWord();
    return true;
  }

 private:
  PTX_FUNCTION int LoadWord() const {
    return LoadRecordWord(args_, static_cast<int>(kFirstItem) + args_.by_kv_heads.Quotient(item_));
  }
  const AttentionArgs& args_;
  const int items_;
  int item_, word_, round_ = 0;
};

// ---- the producer

// 64 rows of the pool from `row` into the turn's slot, once its last consumers are done; `arrived` learns of the bytes.
template <int kDim>
PTX_FUNCTION void Fill(Shared<kDim>& shared, int turn, const ptx::TensorMap& pool, int row, uint64_t* arrived) {
  if (threadIdx.x % 32 != 0) return;
  if (turn >= kSlots) ptx::MbarrierWait(&shared.empty[SlotOf(turn)], ParityOf(turn) ^ 1);
  ptx::MbarrierArriveExpecting(arrived, sizeof(shared.ring[0]));
  PTX_UNROLL
  for (int box = 0; box < Shared<kDim>::kBoxes; ++box) {
    ptx::CopyBox(shared.ring[SlotOf(turn)][box], pool, 64 * box, row, arrived);
  }
}

// Zeros from the `keys`-th row on: what lies beyond the context may be NaN, and a weight of zero does not make it
// vanish.
template <int kDim>
PTX_FUNCTION void ClearFrom(Shared<kDim>& shared, int slot, int keys) {
  const int chunks = (kKeys - keys) * 8;
  PTX_UNROLL
  for (int box = 0; box < Shared<kDim>::kBoxes; ++box) {
    auto* first = reinterpret_cast<uint4*>(shared.ring[slot][box]) + keys * 8;
    for (int i = static_cast<int>(threadIdx.x % 32); i < chunks; i += 32) ptx::StShared(first + i, uint4{0, 0, 0, 0});
  }
}

PTX_FUNCTION int LargerOf(int a, int b) {
  return a > b ? a : b;
}
// The runs of a split: of the tile's, or of the warpgroup's rows that see keys up to `end`.
PTX_FUNCTION int RunsOf(int split, int end) {
  const int keys = SmallerOf(end - split * kSplit, kSplit);
  return keys > 0 ? (keys + kKeys - 1) / kKeys : 0;
}

template <int kDim>
PTX_FUNCTION void Produce(const AttentionArgs& args, const Task& task, Shared<kDim>& shared, const ptx::TensorMap& keys,
                          const ptx::TensorMap& values, int& turn, int& tails) {
  const AttentionItem& tile = task.tile;
  const int lane = static_cast<int>(threadIdx.x % 32);
  int row = 0, row_of_lane = 0;
  for (int split = tile.first_split; split < tile.end_split; ++split) {
    const int runs = RunsOf(split, task.end);
    for (int run = 0; run < runs; ++run) {
      if (run % 32 == 0 && run + lane < runs) {
        row_of_lane = static_cast<int>(PoolRow(args, tile, task.kv_head, split * kSplit + (run + lane) * kKeys));
      }
      const int before = row;
      row = __shfl_sync(0xFFFFFFFF, row_of_lane, run % 32);
      Fill(shared, turn, keys, row, &shared.full[SlotOf(turn)]);
      ++turn;
      if (run == 0) continue;
      Fill(shared, turn, values, before, &shared.full[SlotOf(turn)]);
      ++turn;
    }
    const int last = task.end - split * kSplit - (runs - 1) * kKeys;  // of its keys are in the context
    if (last >= kKeys) {
      Fill(shared, turn, values, row, &shared.full[SlotOf(turn)]);
    } else {
      Fill(shared, turn, values, row, &shared.tail);
      ptx::MbarrierWait(&shared.tail, static_cast<uint32_t>(tails++) & 1);
      ClearFrom(shared, SlotOf(turn), last);
      ptx::FenceProxyAsync();
      __syncwarp();
      if (lane == 0) ptx::MbarrierArrive(&shared.full[SlotOf(turn)]);
    }
    ++turn;
  }
}

// ---- the queries' copiers, a warp for each warpgroup's

// The warpgroup's queries of the block's nth task, once it has taken those of the one before; zeros where there is no
// row.
template <int kDim>
PTX_FUNCTION void CopyQueries(const AttentionArgs& args, const Task& task, int warpgroup, int nth,
                              Shared<kDim>& shared) {
  const AttentionItem& tile = task.tile;
  constexpr int kChunks = kDim / 8, kStep = 32 / kChunks;
  const int lane = static_cast<int>(threadIdx.x % 32);
  uint4* const to = shared.queries[warpgroup];
  const int first = warpgroup * kGroupRows;
  if (nth > 0) ptx::MbarrierWait(&shared.queries_empty[warpgroup], static_cast<uint32_t>(nth - 1) & 1);
  if (args.q_chunks) {
    const int row = lane / kChunks, chunk = lane % kChunks;
    const BF16* const q = static_cast<const BF16*>(args.q.data) + chunk * 8;
    RowWalk walk(args, tile, task.kv_head, first + row, kStep, args.q.stride, kDim);
    PTX_KEEP_LOOP
    for (int eight = 0; eight < kGroupRows; eight += 8) {
      PTX_UNROLL
      for (int i = 0; i < 8; i += kStep) {
        const int r = eight + i + row;
        ptx::CpAsync16(&to[ChunkAt<kDim>(r, chunk)], q + walk.at(), first + r < tile.rows);
        walk.Next();
      }
    }
    ptx::CpAsyncCommit();
    ptx::CpAsyncWait<0>();
  } else {
    // Counted alike by all lanes: a loop that lanes might leave one by one would keep ptxas, within the loop over
    // tiles, from holding anything in uniform registers.
    for (int begin = 0; begin < kGroupRows * kDim / 4; begin += 32) {
      const int i = begin + lane, r = i / (kDim / 4), pack = i % (kDim / 4);
      StoreQuery<kDim>(args, tile, task.kv_head, first + r, pack, &to[ChunkAt<kDim>(r, pack / 2)]);
    }
  }
  __syncwarp();
  if (lane == 0) ptx::MbarrierArrive(&shared.queries_full[warpgroup]);
}

// ---- the consumers

template <int kDim>
PTX_FUNCTION void Await(Shared<kDim>& shared, int turn) {
  ptx::MbarrierWait(&shared.full[SlotOf(turn)], ParityOf(turn));
}
template <int kDim>
PTX_FUNCTION void Release(Shared<kDim>& shared, int turn) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) ptx::MbarrierArrive(&shared.empty[SlotOf(turn)]);
}

// The warp's 16 queries of the block's nth task as the operand a, 16 elements of the head at a time.
template <int kDim>
PTX_FUNCTION void TakeQueries(Shared<kDim>& shared, int warp, int nth, uint32_t (&q)[kDim / 16][4]) {
  const int lane = static_cast<int>(threadIdx.x % 32), warpgroup = warp / 4;
  const uint4* const rows = &shared.queries[warpgroup][warp % 4 * kWarpRows * kDim / 8];
  ptx::MbarrierWait(&shared.queries_full[warpgroup], static_cast<uint32_t>(nth) & 1);
  PTX_UNROLL
  for (int step = 0; step < kDim / 16; ++step) {
    ptx::LdMatrixX4(q[step], &rows[ChunkAt<kDim>(lane % 16, step * 2 + lane / 16)]);
  }
  __syncwarp();  // all lanes have their queries
  if (lane == 0) ptx::MbarrierArrive(&shared.queries_empty[warpgroup]);
}

// The warpgroups' turns at the tensor cores, a run of keys each, warpgroup 0 first:
//
//   warpgroup 0     issues j | scores j become weights, sums are scaled | issues j + 1 | ...
//   tensor cores      | 0: scores j, sums j - 1 | 1: scores j, sums j - 1 | 0: scores j + 1, sums j | ...
//   warpgroup 1     weights j - 1 ...           | issues j | scores j become weights, sums are scaled | ...
//
// They are passed on when a run's wgmmas are issued, so that the other's queue up behind them. Strict turns keep nobody
// waiting for long: both have the same to do for a run, and neither could run ahead by more than the ring holds. Where
// only one sees keys, in the last runs of a causal tile or in all of one of at most 64 rows, there are no turns. Nor do
// the last sums of a split take one: no scores follow them, and the other may be at its end. Nor does the first run of
// a tile: the other may still be at the tile before, with a turn that it has not taken yet.
struct PingPong {
  int warpgroup;
  int begin, end;  // of the keys that both see
};
constexpr int kPingPong = 1;  // the named barrier at which warpgroup 0 waits; warpgroup 1 does at the next

PTX_FUNCTION void TakeTensorCores(const PingPong& turns, int first_key) {
  if (first_key < turns.end) ptx::NamedBarrierSync(kPingPong + turns.warpgroup, kConsumers);
}
// To the other's next turn, if it has one: warpgroup 1's is at the same keys, warpgroup 0's a run later.
PTX_FUNCTION void PassTensorCores(const PingPong& turns, int first_key) {
  if (first_key + turns.warpgroup * kKeys < turns.end) {
    ptx::NamedBarrierArrive(kPingPong + 1 - turns.warpgroup, kConsumers);
  }
}

// scores = q k of a run, whose keys are the columns: 16 elements of the head are 32 bytes of a box's rows.
template <int kDim>
PTX_FUNCTION void IssueScores(float (&scores)[kKeys / 2], const uint32_t (&q)[kDim / 16][4],
                              const unsigned char (&keys)[kDim / 64][kBoxBytes]) {
  const uint64_t first = ptx::MatrixDescriptor(keys, kLeadingUnused, kAtomBytes);
  PTX_UNROLL
  for (int step = 0; step < kDim / 16; ++step) {
    ptx::Wgmma<false>(scores, q[step], ptx::FurtherOn(first, step / 4 * kBoxBytes + step % 4 * 32), step > 0);
  }
  ptx::WgmmaCommit();
}

// sums += weights v of a run: 16 keys are two atoms, and a box is 64 columns.
template <int kDim>
PTX_FUNCTION void IssueSums(float (&sums)[kDim / 2], const uint32_t (&weights)[kKeys / 16][4],
                            const unsigned char (&values)[kDim / 64][kBoxBytes]) {
  const uint64_t first = ptx::MatrixDescriptor(values, kBoxBytes, kAtomBytes);
  PTX_UNROLL
  for (int step = 0; step < kKeys / 16; ++step) {
    ptx::Wgmma<true>(sums, weights[step], ptx::FurtherOn(first, step * 2 * kAtomBytes), true);
  }
  ptx::WgmmaCommit();
}

// Rows g and g + 8 of the warp in the lanes of a quad, g being lane / 4.
struct Rows {
  float largest[2] = {kNoScore, kNoScore};  // scaled
  float total[2] = {};                      // of this lane's keys
  int seen[2];
};

// Scores become weights 2^(score - largest). kept: what the weights of earlier runs are now to be multiplied with.
PTX_FUNCTION void Weigh(float (&scores)[kKeys / 2], Rows& rows, float (&kept)[2], int first_key, bool masked,
                        float scale) {
  if (masked) {
    const int column = static_cast<int>(threadIdx.x % 4) * 2;
    PTX_UNROLL
    for (int i = 0; i < kKeys / 2; ++i) {
      if (first_key + column + i / 4 * 8 + i % 2 >= rows.seen[i / 2 % 2]) scores[i] = kNoScore;
    }
  }
  PTX_UNROLL
  for (int row = 0; row < 2; ++row) {
    float most = scores[2 * row];
    PTX_UNROLL
    for (int i = 0; i < kKeys / 4; ++i) most = fmaxf(most, scores[i / 2 * 4 + 2 * row + i % 2]);
    most = fmaxf(most, __shfl_xor_sync(0xFFFFFFFF, most, 1));
    most = fmaxf(most, __shfl_xor_sync(0xFFFFFFFF, most, 2));
    const float largest = fmaxf(rows.largest[row], most * scale);
    const float base = largest == kNoScore ? 0.0f : largest;  // a row that sees none of the split's keys yet
    kept[row] = ptx::Exp2(rows.largest[row] - base);
    rows.largest[row] = largest;
    PTX_UNROLL
    for (int i = 0; i < kKeys / 4; ++i) {
      float& score = scores[i / 2 * 4 + 2 * row + i % 2];
      score = ptx::Exp2(fmaf(score, scale, -base));
    }
  }
}

// The weights as the operand a: that is how the accumulator holds them.
PTX_FUNCTION void PackWeights(const float (&scores)[kKeys / 2], Rows& rows, const float (&kept)[2],
                              uint32_t (&weights)[kKeys / 16][4]) {
  float total[2] = {};
  PTX_UNROLL
  for (int i = 0; i < kKeys / 4; ++i) {
    const uint32_t pair = ptx::PackBF16(scores[2 * i], scores[2 * i + 1]);
    weights[i / 4][i % 4] = pair;
    // The sum is of the rounded weights: then they still add up to one.
    total[i % 2] += ptx::FloatOfBits(pair << 16) + ptx::FloatOfBits(pair & 0xFFFF0000);
  }
  PTX_UNROLL
  for (int row = 0; row < 2; ++row) rows.total[row] = fmaf(rows.total[row], kept[row], total[row]);
}

// ---- the end of a split

// What the lanes of a quad have summed of their keys.
PTX_FUNCTION void SumTotals(Rows& rows) {
  PTX_UNROLL
  for (int row = 0; row < 2; ++row) {
    rows.total[row] += __shfl_xor_sync(0xFFFFFFFF, rows.total[row], 1);
    rows.total[row] += __shfl_xor_sync(0xFFFFFFFF, rows.total[row], 2);
  }
}

// The state of the rows after earlier splits and this one, as CombineSplits computes it. Each thread keeps its sums in
// shared memory for itself.
template <int kDim>
PTX_FUNCTION void FoldSplit(const uint4* kept_sums, float (&sums)[kDim / 2], Rows& rows, const Rows& before) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  float old_weight[2], new_weight[2];
  PTX_UNROLL
  for (int row = 0; row < 2; ++row) {
    const float now = Larger(before.largest[row], rows.largest[row]);
    old_weight[row] = Weight(before.largest[row], now);
    new_weight[row] = Weight(rows.largest[row], now);
    rows.total[row] = Fold(before.total[row], old_weight[row], rows.total[row], new_weight[row]);
    rows.largest[row] = now;
  }
  PTX_UNROLL
  for (int i = 0; i < kDim / 8; ++i) {
    const uint4 old = ptx::LdShared(&kept_sums[i * 32 + lane]);
    const uint32_t parts[4] = {old.x, old.y, old.z, old.w};
    PTX_UNROLL
    for (int j = 0; j < 4; ++j) {
      float& sum = sums[4 * i + j];
      sum = Fold(ptx::FloatOfBits(parts[j]), old_weight[j / 2], sum, new_weight[j / 2]);
    }
  }
}
template <int kDim>
PTX_FUNCTION void KeepSums(uint4* kept_sums, const float (&sums)[kDim / 2]) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  PTX_UNROLL
  for (int i = 0; i < kDim / 8; ++i) {
    ptx::StShared(&kept_sums[i * 32 + lane],
                  uint4{ptx::BitsOfFloat(sums[4 * i]), ptx::BitsOfFloat(sums[4 * i + 1]),
                        ptx::BitsOfFloat(sums[4 * i + 2]), ptx::BitsOfFloat(sums[4 * i + 3])});
  }
}

// The nth state of an item of a tile that was cut. A quad's stores fill a sector.
template <int kDim>
PTX_FUNCTION void StoreStates(const AttentionArgs& args, const AttentionItem& tile, int kv_head, int warp, int n,
                              const float (&sums)[kDim / 2], const Rows& rows) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  PTX_UNROLL
  for (int row = 0; row < 2; ++row) {
    const int r = warp * kWarpRows + lane / 4 + 8 * row;
    if (r >= tile.rows) continue;
    const int64_t at = StateAt(args, kv_head, tile.first_state + n * tile.rows + r);
    float* to = args.scratch + at * kDim + lane % 4 * 2;
    PTX_UNROLL
    for (int i = 0; i < kDim / 8; ++i) {
      ptx::StGlobal(reinterpret_cast<uint2*>(to + 8 * i),
                    uint2{ptx::BitsOfFloat(sums[4 * i + 2 * row]), ptx::BitsOfFloat(sums[4 * i + 2 * row + 1])});
    }
    if (lane % 4 == 0) ptx::StGlobal(ScaleAt(args, at), ScaleOfState{rows.largest[row], rows.total[row]});
  }
}

// Through shared memory, so that rows leave in whole sectors.
template <int kDim>
PTX_FUNCTION void StoreResults(const AttentionArgs& args, const AttentionItem& tile, int kv_head, int warp,
                               uint4* staged, const float (&sums)[kDim / 2], const Rows& rows) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  __syncwarp();  // all lanes have read their sums
  const float shares[2] = {ptx::Divide(1.0f, rows.total[0]), ptx::Divide(1.0f, rows.total[1])};
  PTX_UNROLL
  for (int n = 0; n < 8; ++n) {
    // One address for all rows and chunks that lie eight further on.
    uint4* const chunk = &staged[ChunkAt<kDim>(lane / 4, n)];
    PTX_UNROLL
    for (int i = n; i < kDim / 8; i += 8) {
      PTX_UNROLL
      for (int row = 0; row < 2; ++row) {
        ptx::StShared(reinterpret_cast<uint32_t*>(chunk + row * kDim + i - n) + lane % 4,
                      ptx::PackBF16(sums[4 * i + 2 * row] * shares[row], sums[4 * i + 2 * row + 1] * shares[row]));
      }
    }
  }
  __syncwarp();
  constexpr int kChunks = kDim / 8, kStep = 32 / kChunks;
  const int first = lane / kChunks, chunk = lane % kChunks;
  uint4 results[kWarpRows / kStep];
  PTX_UNROLL
  for (int i = 0; i < kWarpRows / kStep; ++i) {
    results[i] = ptx::LdShared(&staged[ChunkAt<kDim>(first + i * kStep, chunk)]);
  }
  __syncwarp();  // all lanes have read them; and ptxas would put each load behind the store before
  RowWalk walk(args, tile, kv_head, warp * kWarpRows + first, kStep, args.out.stride, kDim);
  BF16* const out = static_cast<BF16*>(args.out.data) + chunk * 8;
  PTX_UNROLL
  for (int i = 0; i < kWarpRows / kStep; ++i) {
    if (warp * kWarpRows + first + i * kStep < tile.rows) {
      ptx::StGlobal(reinterpret_cast<uint4*>(out + walk.at()), results[i]);
    }
    walk.Next();
  }
}

// What of a task is the warpgroup's. Its first row sees least. Its last one may see less than the tile's: then the
// warpgroup does without the last runs, but the slots must be released.
struct Part {
  int seen_by_all, end;  // keys
  PingPong turns;
  PTX_FUNCTION Part(const AttentionArgs& args, const Task& task, int warpgroup) {
    const AttentionItem& tile = task.tile;
    const int first_row = warpgroup * kGroupRows, last_row = SmallerOf(first_row + kGroupRows, tile.rows) - 1;
    seen_by_all = KeysSeen(args, tile, first_row);
    end = first_row < tile.rows ? SmallerOf(KeysSeen(args, tile, last_row), task.end) : 0;
    turns = {.warpgroup = warpgroup,
             .begin = tile.first_split * kSplit,
             .end = tile.rows > kGroupRows ? SmallerOf(KeysSeen(args, tile, kGroupRows - 1), task.end) : 0};
  }
};

// The scores of the first run from `first_key`, the begin of a split.
template <int kDim>
PTX_FUNCTION void BeginSplit(Shared<kDim>& shared, uint32_t (&q)[kDim / 16][4], float (&scores)[kKeys / 2],
                             const PingPong& turns, int first_key, int turn) {
  const bool has_turn = first_key > turns.begin;
  Await(shared, turn);
  if (has_turn) TakeTensorCores(turns, first_key);
  ptx::WgmmaFence(scores, q);
  IssueScores<kDim>(scores, q, shared.ring[SlotOf(turn)]);
  if (has_turn || turns.warpgroup == 1) PassTensorCores(turns, first_key);
}

// A split of a task of keys up to `end`: sums and rows of it alone. Its first run's scores are there. A warpgroup that
// sees none of it gives these keys no weight. `meanwhile` is done while the last sums are computed.
template <int kDim, typename Meanwhile>
PTX_FUNCTION void ConsumeSplit(const AttentionArgs& args, Shared<kDim>& shared, uint32_t (&q)[kDim / 16][4],
                               float (&scores)[kKeys / 2], float (&sums)[kDim / 2], Rows& rows, const Part& part,
                               int split, int end, int& turn, const Meanwhile& meanwhile) {
  const PingPong& turns = part.turns;
  const int first_key = split * kSplit, runs = LargerOf(1, RunsOf(split, part.end));
  const int all_runs = RunsOf(split, end);
  const int end_turn = turn + 2 * all_runs;
  PTX_UNROLL
  for (int i = 0; i < kDim / 2; ++i) sums[i] = 0;
  PTX_UNROLL
  for (int row = 0; row < 2; ++row) {
    rows.largest[row] = kNoScore;
    rows.total[row] = 0;
  }
  uint32_t weights[kKeys / 16][4];
  float kept[2];
  Release(shared, turn++);
  Weigh(scores, rows, kept, first_key, first_key + kKeys > part.seen_by_all, args.scale);
  PackWeights(scores, rows, kept, weights);
  Await(shared, turn);
  for (int run = 1; run < runs; ++run) {
    // Not between the wgmmas: with a loop between them ptxas would make them wait for each other (C7520).
    Await(shared, turn + 1);
    const int key = first_key + run * kKeys;
    TakeTensorCores(turns, key);
    ptx::WgmmaFence(scores, sums, weights);
    IssueScores<kDim>(scores, q, shared.ring[SlotOf(turn)]);
    IssueSums<kDim>(sums, weights, shared.ring[SlotOf(turn + 1)]);
    PassTensorCores(turns, key);
    ptx::WgmmaWait<1>(scores);
    Release(shared, turn);
    Weigh(scores, rows, kept, key, key + kKeys > part.seen_by_all, args.scale);
    // Here, since ptxas moves the wait for wgmma up over arithmetic, but not over a loop; the weights would then be
    // computed when the sums are done, and not beside them.
    Await(shared, turn + 2);
    ptx::WgmmaWait<0>(sums, weights);
    Release(shared, turn + 1);
    if (kept[0] != 1 || kept[1] != 1) {  // late runs seldom hold a row's largest score
      PTX_UNROLL
      for (int i = 0; i < kDim / 2; ++i) sums[i] *= kept[i / 2 % 2];
    }
    PackWeights(scores, rows, kept, weights);
    turn += 2;
  }
  if (runs < all_runs) {
    Release(shared, turn++);
    Await(shared, turn);
  }
  ptx::WgmmaFence(sums, weights);
  IssueSums<kDim>(sums, weights, shared.ring[SlotOf(turn)]);
  meanwhile();
  ptx::WgmmaWait<0>(sums, weights);
  Release(shared, turn++);
  SumTotals(rows);
  for (; turn < end_turn; ++turn) {
    Await(shared, turn);
    Release(shared, turn);
  }
}

// What becomes of a split's sums. before: the rows' state after earlier splits.
template <int kDim>
PTX_FUNCTION void LeaveSplit(const AttentionArgs& args, const Task& task, int split, int warp, uint4* own,
                             float (&sums)[kDim / 2], Rows& rows, Rows& before) {
  const AttentionItem& tile = task.tile;
  if (tile.first_split > 0) {
    StoreStates<kDim>(args, tile, task.kv_head, warp, split - tile.first_split, sums, rows);
    return;
  }
  if (split > 0) FoldSplit<kDim>(own, sums, rows, before);
  if (split + 1 < tile.end_split) {
    KeepSums<kDim>(own, sums);
    before = rows;
  } else if (tile.first_state < 0) {
    StoreResults<kDim>(args, tile, task.kv_head, warp, own, sums, rows);
  } else {
    StoreStates<kDim>(args, tile, task.kv_head, warp, 0, sums, rows);
  }
}

// All of the block's tasks. The first scores of what comes next, a split or a task, are under way while the sums of the
// split before are folded or stored. (Also where the warpgroup sees none of these keys; then nobody reads them.)
template <int kDim>
PTX_FUNCTION void Consume(const AttentionArgs& args, Tasks& tasks, Shared<kDim>& shared, int warp) {
  const int lane = static_cast<int>(threadIdx.x % 32), warpgroup = warp / 4;
  uint4* const own = shared.rows[warp];
  uint32_t q[kDim / 16][4];
  float scores[kKeys / 2] = {}, sums[kDim / 2];
  Rows rows, before;
  int turn = 0, nth = 0;
  Task next;
  if (!tasks.Next(next)) return;
  TakeQueries<kDim>(shared, warp, nth, q);
  Part part_of_next(args, next, warpgroup);
  BeginSplit<kDim>(shared, q, scores, part_of_next.turns, next.tile.first_split * kSplit, turn);
  ptx::WgmmaWait<0>(scores);
  for (bool some = true; some;) {
    const Task task = next;
    const Part part = part_of_next;
    const AttentionItem& tile = task.tile;
    // Rows that the tile does not have, behind its last one, are worked on too, and nobody reads them.
    PTX_UNROLL
    for (int i = 0; i < 2; ++i) {
      rows.seen[i] = tile.before + args.by_group.Quotient(tile.first_row + warp * kWarpRows + lane / 4 + 8 * i) + 1;
    }
    for (int split = tile.first_split; split < tile.end_split; ++split) {
      int next_key = (split + 1) * kSplit;
      ConsumeSplit<kDim>(args, shared, q, scores, sums, rows, part, split, task.end, turn, [&] {
        if (split + 1 < tile.end_split) return;
        some = tasks.Next(next);
        if (!some) return;
        TakeQueries<kDim>(shared, warp, ++nth, q);
        part_of_next = Part(args, next, warpgroup);
        next_key = next.tile.first_split * kSplit;
      });
      if (some) {
        BeginSplit<kDim>(shared, q, scores, part_of_next.turns, next_key, turn);
        LeaveSplit<kDim>(args, task, split, warp, own, sums, rows, before);
        // Not where the paths meet: wgmmas that are under way on one of them only would wait for each other (C7515).
        ptx::WgmmaWait<0>(scores);
      } else {
        LeaveSplit<kDim>(args, task, split, warp, own, sums, rows, before);
      }
    }
  }
}

// Blocks stay for all of their tiles, so that the next one's queries are there, its keys on their way and its first
// scores computed while this one's results leave.
template <int kDim>
__global__ void __launch_bounds__(kPrefillThreads, 1)
    PrefillAttentionKernel(AttentionArgs args, int items, const PTX_GRID_CONSTANT ptx::TensorMap keys,
                           const PTX_GRID_CONSTANT ptx::TensorMap values) {
  auto& shared = *static_cast<Shared<kDim>*>(ptx::DynamicShared());
  Tasks tasks(args, items);
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < kSlots; ++slot) {
      ptx::MbarrierInit(&shared.full[slot], 1);
      ptx::MbarrierInit(&shared.empty[slot], kPrefillConsumers);
    }
    for (int warpgroup = 0; warpgroup < kGroups; ++warpgroup) {
      ptx::MbarrierInit(&shared.queries_full[warpgroup], 1);
      ptx::MbarrierInit(&shared.queries_empty[warpgroup], kPrefillConsumers / kGroups);
    }
    ptx::MbarrierInit(&shared.tail, 1);
    ptx::FenceProxyAsync();
  }
  __syncthreads();
  // The same in all lanes, which ptxas knows of a shuffle: slots, descriptors and turns are then computed once for the
  // warp and not in each lane, and stand in the registers that wgmma takes them from.
  const int warp = __shfl_sync(0xFFFFFFFF, static_cast<int>(threadIdx.x / 32), 0);
  if (warp < kPrefillConsumers) {
    ptx::TakeRegisters<224>();
    Consume<kDim>(args, tasks, shared, warp);
    return;
  }
  ptx::GiveRegistersBack<56>();
  const int copier = warp - kPrefillConsumers - 1;
  if (copier >= kGroups) return;
  Task task;
  if (copier >= 0) {
    for (int nth = 0; tasks.Next(task); ++nth) CopyQueries(args, task, copier, nth, shared);
  } else {
    int turn = 0, tails = 0;
    while (tasks.Next(task)) Produce(args, task, shared, keys, values, turn, tails);
  }
}

template <int kDim>
void LaunchFor(Stream& stream, const LaunchShape& shape, const AttentionArgs& args, int items, int64_t pool_rows) {
  static_assert(sizeof(Shared<kDim>) == PrefillSharedBytes(kDim));
  const auto map = [&](const Elements& pages) {
    return ptx::MakeTensorMap(static_cast<const BF16*>(pages.data), pool_rows, kDim, kDim, kKeys);
  };
  Launch(stream, "PrefillAttention", shape, PrefillAttentionKernel<kDim>, args, items, map(args.k_pages),
         map(args.v_pages));
}

}  // namespace

void LaunchPrefillAttention(Stream& stream, const LaunchShape& shape, const AttentionArgs& args, int items,
                            int64_t pool_rows) {
  args.dim == 64 ? LaunchFor<64>(stream, shape, args, items, pool_rows)
                 : LaunchFor<128>(stream, shape, args, items, pool_rows);
}

}  // namespace altiplano::cuda
