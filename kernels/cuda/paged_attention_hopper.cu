// Attention of long parts of prompts on sm_90a: TMA, mbarriers and wgmma. bf16 keys and values, heads of 64 or 128.
//
// A block takes a tile of 128 rows and the KV head that they share. One warp, the producer, has TMA copy one
// page's keys or values after the other into a ring of slots; two warpgroups of 64 rows each consume them. Scores,
// weights and the weighted sums stay in registers, and so do the queries, so that shared memory is read for keys and
// values alone. While the tensor cores add the values of one run of 64 keys, the scores of the next are already on
// their way and turn into weights.
//
// Each row goes through the keys from the first in runs of 64, by operations that no other row changes: its bits are
// the same in a whole prefill, in a chunk and in any batch, as long as its sequence is this kernel's.
#include "kernels/cuda/launch.h"
#include "kernels/cuda/paged_attention.h"
#include "kernels/cuda/ptx_hopper.h"

namespace altiplano::cuda {

namespace {

constexpr int kKeys = kPrefillKeys;
constexpr int kSlots = kPrefillSlots;
constexpr int kWarpRows = 16;
constexpr int kGroupRows = 64;               // of a warpgroup
constexpr uint32_t kBoxBytes = kKeys * 128;  // 64 columns of the keys or values of a run
constexpr uint32_t kAtomBytes = 1024;        // eight rows of a box
constexpr uint32_t kLeadingUnused = 16;

template <int kDim>
struct Shared {
  static constexpr int kBoxes = kDim / 64;
  unsigned char ring[kSlots][kBoxes][kBoxBytes];
  uint4 rows[kPrefillConsumers][kWarpRows * kDim / 8];  // each warp's queries, and in the end its results
  uint64_t full[kSlots], empty[kSlots];
  uint64_t tail;  // of the last values, before the producer has worked on them
};

// The ring's turns: the keys of run 0, then those of run j and the values of run j - 1 for each j, then the last
// values. So they are consumed.
PTX_FUNCTION int SlotOf(int turn) {
  return turn % kSlots;
}
PTX_FUNCTION uint32_t ParityOf(int turn) {
  return static_cast<uint32_t>(turn / kSlots & 1);
}

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

template <int kDim>
PTX_FUNCTION void Produce(const AttentionArgs& args, const AttentionTile& tile, int kv_head, int end,
                          Shared<kDim>& shared, const ptx::TensorMap& keys, const ptx::TensorMap& values) {
  const int lane = static_cast<int>(threadIdx.x % 32), runs = (end + kKeys - 1) / kKeys;
  int turn = 0, row = 0, row_of_lane = 0;
  for (int run = 0; run < runs; ++run) {
    if (run % 32 == 0 && run + lane < runs) {
      row_of_lane = static_cast<int>(PoolRow(args, tile, kv_head, (run + lane) * kKeys));
    }
    const int before = row;
    row = __shfl_sync(0xFFFFFFFF, row_of_lane, run % 32);
    Fill(shared, turn, keys, row, &shared.full[SlotOf(turn)]);
    ++turn;
    if (run == 0) continue;
    Fill(shared, turn, values, before, &shared.full[SlotOf(turn)]);
    ++turn;
  }
  if (end % kKeys == 0) return Fill(shared, turn, values, row, &shared.full[SlotOf(turn)]);
  Fill(shared, turn, values, row, &shared.tail);
  ptx::MbarrierWait(&shared.tail, 0);
  ClearFrom(shared, SlotOf(turn), end % kKeys);
  ptx::FenceProxyAsync();
  __syncwarp();
  if (lane == 0) ptx::MbarrierArrive(&shared.full[SlotOf(turn)]);
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

// The warp's 16 queries as the operand a, 16 elements of the head at a time.
template <int kDim>
PTX_FUNCTION void LoadQueries(const AttentionArgs& args, const AttentionTile& tile, int kv_head, int warp, uint4* rows,
                              uint32_t (&q)[kDim / 16][4]) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int i = lane; i < kWarpRows * kDim / 4; i += 32) {
    const int r = i / (kDim / 4), pack = i % (kDim / 4);
    StoreQuery<kDim>(args, tile, kv_head, warp * kWarpRows + r, pack, &rows[ChunkAt<kDim>(r, pack / 2)]);
  }
  __syncwarp();
  PTX_UNROLL
  for (int step = 0; step < kDim / 16; ++step) {
    ptx::LdMatrixX4(q[step], &rows[ChunkAt<kDim>(lane % 16, step * 2 + lane / 16)]);
  }
}

// scores = q k of a run, whose keys are the columns: 16 elements of the head are 32 bytes of a box's rows.
template <int kDim>
PTX_FUNCTION void IssueScores(float (&scores)[kKeys / 2], const uint32_t (&q)[kDim / 16][4],
                              const unsigned char (&keys)[kDim / 64][kBoxBytes]) {
  PTX_UNROLL
  for (int step = 0; step < kDim / 16; ++step) {
    ptx::Wgmma<false>(scores, q[step],
                      ptx::MatrixDescriptor(keys[step / 4] + step % 4 * 32, kLeadingUnused, kAtomBytes), step > 0);
  }
  ptx::WgmmaCommit();
}

// sums += weights v of a run: 16 keys are two atoms, and a box is 64 columns.
template <int kDim>
PTX_FUNCTION void IssueSums(float (&sums)[kDim / 2], const uint32_t (&weights)[kKeys / 16][4],
                            const unsigned char (&values)[kDim / 64][kBoxBytes]) {
  PTX_UNROLL
  for (int step = 0; step < kKeys / 16; ++step) {
    ptx::Wgmma<true>(sums, weights[step],
                     ptx::MatrixDescriptor(values[0] + step * 2 * kAtomBytes, kBoxBytes, kAtomBytes), true);
  }
  ptx::WgmmaCommit();
}

// Rows g and g + 8 of the warp in the lanes of a quad, g being lane / 4.
struct Rows {
  float largest[2] = {kNoScore, kNoScore};  // scaled
  float total[2] = {};                      // of this lane's keys
  int seen[2];
};

// Scores become weights 2^(score - largest). kept: what the weights of earlier runs are now to be multiplied with. A
// run holds at least one key that each row sees, or follows one that does.
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
    kept[row] = ptx::Exp2(rows.largest[row] - largest);
    rows.largest[row] = largest;
    PTX_UNROLL
    for (int i = 0; i < kKeys / 4; ++i) {
      float& score = scores[i / 2 * 4 + 2 * row + i % 2];
      score = ptx::Exp2(fmaf(score, scale, -largest));
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

// Through shared memory, so that rows leave in whole sectors.
template <int kDim>
PTX_FUNCTION void StoreResults(const AttentionArgs& args, const AttentionTile& tile, int kv_head, int warp,
                               uint4* staged, const float (&sums)[kDim / 2], const Rows& rows) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  PTX_UNROLL
  for (int row = 0; row < 2; ++row) {
    float total = rows.total[row];
    total += __shfl_xor_sync(0xFFFFFFFF, total, 1);
    total += __shfl_xor_sync(0xFFFFFFFF, total, 2);
    const float share = ptx::Divide(1.0f, total);
    PTX_UNROLL
    for (int n = 0; n < kDim / 8; ++n) {
      auto* chunk = reinterpret_cast<uint32_t*>(&staged[ChunkAt<kDim>(lane / 4 + 8 * row, n)]);
      ptx::StShared(chunk + lane % 4, ptx::PackBF16(sums[4 * n + 2 * row] * share, sums[4 * n + 2 * row + 1] * share));
    }
  }
  __syncwarp();
  for (int i = lane; i < kWarpRows * kDim / 8; i += 32) {
    const int r = warp * kWarpRows + i / (kDim / 8), chunk = i % (kDim / 8);
    if (r >= tile.rows) continue;
    const RowPlace place = PlaceOf(args, tile, kv_head, r);
    BF16* to =
        static_cast<BF16*>(args.out.data) + place.token * args.out.stride + int64_t{place.head} * kDim + chunk * 8;
    ptx::StGlobal(reinterpret_cast<uint4*>(to), ptx::LdShared(&staged[ChunkAt<kDim>(i / (kDim / 8), chunk)]));
  }
}

template <int kDim>
PTX_FUNCTION void Consume(const AttentionArgs& args, const AttentionTile& tile, int kv_head, int end,
                          Shared<kDim>& shared, int warp) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int all_runs = (end + kKeys - 1) / kKeys;
  // The warpgroup's rows, of which the first sees least. They do without the last runs where they do not see them, but
  // the slots must be released.
  const int first_row = warp / 4 * kGroupRows;
  const int last_row = (first_row + kGroupRows < tile.rows ? first_row + kGroupRows : tile.rows) - 1;
  const int runs = first_row < tile.rows ? (KeysSeen(args, tile, last_row) + kKeys - 1) / kKeys : 0;
  int turn = 0;
  if (runs > 0) {
    uint32_t q[kDim / 16][4], weights[kKeys / 16][4];
    float scores[kKeys / 2] = {}, sums[kDim / 2] = {}, kept[2];
    Rows rows;
    // Rows that the tile does not have, behind its last one, are worked on too, and nobody reads them.
    PTX_UNROLL
    for (int i = 0; i < 2; ++i) {
      rows.seen[i] = tile.before + (tile.first_row + warp * kWarpRows + lane / 4 + 8 * i) / args.group + 1;
    }
    const int seen_by_all = KeysSeen(args, tile, first_row);
    LoadQueries<kDim>(args, tile, kv_head, warp, shared.rows[warp], q);

    Await(shared, turn);
    ptx::WgmmaFence(scores, q);
    IssueScores<kDim>(scores, q, shared.ring[SlotOf(turn)]);
    ptx::WgmmaWait<0>(scores);
    Release(shared, turn++);
    Weigh(scores, rows, kept, 0, kKeys > seen_by_all, args.scale);
    PackWeights(scores, rows, kept, weights);
    Await(shared, turn);
    for (int run = 1; run < runs; ++run) {
      // Not between the wgmmas: with a loop between them ptxas would make them wait for each other (C7520).
      Await(shared, turn + 1);
      ptx::WgmmaFence(scores, sums, weights);
      IssueScores<kDim>(scores, q, shared.ring[SlotOf(turn)]);
      IssueSums<kDim>(sums, weights, shared.ring[SlotOf(turn + 1)]);
      ptx::WgmmaWait<1>(scores);
      Release(shared, turn);
      Weigh(scores, rows, kept, run * kKeys, (run + 1) * kKeys > seen_by_all, args.scale);
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
    ptx::WgmmaWait<0>(sums, weights);
    Release(shared, turn++);
    StoreResults<kDim>(args, tile, kv_head, warp, shared.rows[warp], sums, rows);
  }
  for (; turn < 2 * all_runs; ++turn) {
    Await(shared, turn);
    Release(shared, turn);
  }
}

template <int kDim>
__global__ void __launch_bounds__(kPrefillThreads, 1)
    PrefillAttentionKernel(AttentionArgs args, const PTX_GRID_CONSTANT ptx::TensorMap keys,
                           const PTX_GRID_CONSTANT ptx::TensorMap values) {
  auto& shared = *static_cast<Shared<kDim>*>(ptx::DynamicShared());
  const int kv_head = static_cast<int>(blockIdx.x);
  const AttentionTile tile = FindTile(args, static_cast<int>(blockIdx.y), kPrefillRows, kFewestPrefillRows, kAnyRows);
  if (tile.sequence < 0) return;
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < kSlots; ++slot) {
      ptx::MbarrierInit(&shared.full[slot], 1);
      ptx::MbarrierInit(&shared.empty[slot], kPrefillConsumers);
    }
    ptx::MbarrierInit(&shared.tail, 1);
    ptx::FenceProxyAsync();
  }
  __syncthreads();
  const int end = KeysSeen(args, tile, tile.rows - 1);
  const int warp = static_cast<int>(threadIdx.x / 32);
  if (warp >= kPrefillConsumers) {
    ptx::GiveRegistersBack<24>();
    if (warp == kPrefillConsumers) Produce(args, tile, kv_head, end, shared, keys, values);
  } else {
    ptx::TakeRegisters<240>();
    Consume(args, tile, kv_head, end, shared, warp);
  }
}

template <int kDim>
void LaunchFor(Stream& stream, const LaunchShape& shape, const AttentionArgs& args, int64_t pool_rows) {
  static_assert(sizeof(Shared<kDim>) == PrefillSharedBytes(kDim));
  const auto map = [&](const Elements& pages) {
    return ptx::MakeTensorMap(static_cast<const BF16*>(pages.data), pool_rows, kDim, kDim, kKeys);
  };
  Launch(stream, "PrefillAttention", shape, PrefillAttentionKernel<kDim>, args, map(args.k_pages), map(args.v_pages));
}

}  // namespace

bool MayPrefill() {
  return ptx::IsHopper();
}

void LaunchPrefillAttention(Stream& stream, const LaunchShape& shape, const AttentionArgs& args, int64_t pool_rows) {
  args.dim == 64 ? LaunchFor<64>(stream, shape, args, pool_rows) : LaunchFor<128>(stream, shape, args, pool_rows);
}

}  // namespace altiplano::cuda
