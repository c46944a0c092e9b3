#include "kernels/cuda/paged_attention_plan.h"

#include <cstring>

#include "kernels/cuda/rows_plan.h"

namespace altiplano::cuda {

namespace {

// What reading keys costs a worker, in keys: whole runs of its four warps, and the merging of their states.
constexpr int64_t kRunOfWarps = 64;
constexpr int64_t kMergeCost = 64;
constexpr int64_t CostOfSplit(int64_t keys) {
  return CeilDivide(keys, kRunOfWarps) * kRunOfWarps + kMergeCost;
}
constexpr int64_t CostOfTile(int64_t keys) {
  const int64_t whole = keys / kAttentionSplit * CostOfSplit(kAttentionSplit), rest = keys % kAttentionSplit;
  return rest > 0 ? whole + CostOfSplit(rest) : whole;
}

class Planner {
 public:
  Planner(const AttentionSizes& sizes, const int32_t* q_begin, const int32_t* lengths, int64_t sequences, int32_t* list,
          int64_t records)
      : sizes_(sizes),
        group_(static_cast<int32_t>(sizes.q_heads / sizes.kv_heads)),
        q_begin_(q_begin),
        lengths_(lengths),
        sequences_(static_cast<int32_t>(sequences)),
        items_(reinterpret_cast<AttentionItem*>(list)),
        list_(list),
        begins_(list + kRecordWords),
        cut_(reinterpret_cast<AttentionCut*>(list) + records),
        end_(cut_),
        states_left_(AttentionStates(sizes.dim, sizes.scratch_bytes) / sizes.kv_heads) {}

  AttentionWork Plan() {
    PlanPrefill();
    work_.prefill_items = static_cast<int32_t>(used_ - kFirstItem);
    work_.prefill_blocks =
        static_cast<int32_t>(std::min(work_.prefill_items * sizes_.kv_heads, sizes_.multiprocessors));
    PlanWorkers();
    // Cuts have been written from the end of the list; now they follow the items.
    work_.cuts = static_cast<int32_t>(end_ - cut_);
    const AttentionHeader header = {.first_cut = static_cast<int32_t>(used_), .cuts = work_.cuts, .unused = {}};
    std::memmove(static_cast<void*>(items_ + used_), cut_, static_cast<size_t>(work_.cuts) * sizeof(AttentionCut));
    std::memcpy(static_cast<void*>(items_), &header, sizeof(header));
    work_.list = TensorView::Make(list_, DType::kI32, {(used_ + work_.cuts) * kRecordWords});
    return work_;
  }

 private:
  // For each tile of one of the two kernels, with the number of keys that its rows see.
  template <typename F>
  void ForEachTile(bool prefill, F f) const {
    const int32_t tile_rows = prefill ? kPrefillRows : kAttentionRows;
    const int64_t split = prefill ? kPrefillSplit : kAttentionSplit;
    for (int32_t b = 0; b < sequences_; ++b) {
      const int32_t tokens = q_begin_[b + 1] - q_begin_[b], rows = tokens * group_;
      if ((sizes_.may_prefill && rows >= kFewestPrefillRows) != prefill) continue;
      for (int32_t first = 0; first < rows; first += tile_rows) {
        AttentionItem tile = {.sequence = b,
                              .first_token = q_begin_[b],
                              .first_row = first,
                              .rows = std::min(tile_rows, rows - first),
                              .before = lengths_[b] - tokens,
                              .first_split = 0,
                              .end_split = 0,
                              .first_state = -1};
        const int64_t keys = KeysOf(tile);
        tile.end_split = static_cast<int32_t>(CeilDivide(keys, split));
        f(tile, keys);
      }
    }
  }
  // That the last row of a tile sees.
  int64_t KeysOf(const AttentionItem& tile) const {
    return tile.before + (tile.first_row + tile.rows - 1) / group_ + 1;
  }
  // That a block goes through for an item of the prefill kernel.
  int64_t KeysToRead(const AttentionItem& item) const {
    return std::min(KeysOf(item), item.end_split * kPrefillSplit) - item.first_split * kPrefillSplit;
  }

  // Takes scratch for a tile whose first piece has `first_piece` splits: one state for that piece and one for each
  // split of the others. -1: there is not enough.
  int32_t TakeStates(const AttentionItem& tile, int32_t first_piece) {
    const int32_t states = 1 + tile.end_split - first_piece;
    if (states_left_ < int64_t{states} * tile.rows) return -1;
    states_left_ -= int64_t{states} * tile.rows;
    const int32_t first = states_taken_;
    states_taken_ += states * tile.rows;
    for (int32_t row = 0; row < tile.rows; row += kAttentionRows) {
      *--cut_ = {.first_token = tile.first_token,
                 .first_row = tile.first_row + row,
                 .rows = std::min(kAttentionRows, tile.rows - row),
                 .first_state = first + row,
                 .stride = tile.rows,
                 .states = states,
                 .unused = {}};
    }
    return first;
  }
  static AttentionItem Piece(const AttentionItem& tile, int32_t first_split, int32_t end_split, int32_t first_piece,
                             int32_t first_state) {
    AttentionItem piece = tile;
    piece.first_split = first_split;
    piece.end_split = end_split;
    piece.first_state = first_state;
    if (first_split > 0) piece.first_state += (1 + first_split - first_piece) * tile.rows;
    return piece;
  }

  // ---- the prefill kernel's

  // How many splits a block takes at most.
  int64_t LongestPiece() const {
    int64_t longest = 0, total = 0;
    ForEachTile(true, [&](const AttentionItem& tile, int64_t) {
      longest = std::max<int64_t>(longest, tile.end_split);
      total += tile.end_split;
    });
    const int64_t share = CeilDivide(total * sizes_.kv_heads, sizes_.multiprocessors);
    if (longest <= 1 || share >= 4 * longest) return longest;  // the longest blocks come first: their end hardly shows
    // Until the last block has ended: whole waves of the longest, or a share of all work and then the longest. Pieces
    // must save a sixteenth, since their states are written and read.
    int64_t best = longest, best_time = INT64_MAX;
    for (int64_t pieces = 1; pieces <= std::min(longest, kMostPrefillPieces); ++pieces) {
      const int64_t length = CeilDivide(longest, pieces);
      int64_t blocks = 0;
      ForEachTile(true, [&](const AttentionItem& tile, int64_t) { blocks += CeilDivide(tile.end_split, length); });
      const int64_t waves = CeilDivide(blocks * sizes_.kv_heads, sizes_.multiprocessors);
      const int64_t time = std::min(waves * length, share + length) * (pieces == 1 ? 16 : 17);
      if (time < best_time) {
        best = length;
        best_time = time;
      }
    }
    return best;
  }

  void PlanPrefill() {
    if (!sizes_.may_prefill) return;
    const auto longest = static_cast<int32_t>(LongestPiece());
    ForEachTile(true, [&](const AttentionItem& tile, int64_t) {
      const int32_t pieces = static_cast<int32_t>(CeilDivide(tile.end_split, longest));
      const int32_t length = static_cast<int32_t>(CeilDivide(tile.end_split, pieces));
      const int32_t first_state = pieces > 1 ? TakeStates(tile, length) : -1;
      if (first_state < 0) {
        items_[used_++] = tile;
        return;
      }
      for (int32_t split = 0; split < tile.end_split; split += length) {
        items_[used_++] = Piece(tile, split, std::min(split + length, tile.end_split), length, first_state);
      }
    });
    std::sort(items_ + kFirstItem, items_ + used_, [&](const AttentionItem& a, const AttentionItem& b) {
      const int64_t keys_a = KeysToRead(a), keys_b = KeysToRead(b);
      if (keys_a != keys_b) return keys_a > keys_b;
      if (a.first_token != b.first_token) return a.first_token < b.first_token;
      return a.first_row != b.first_row ? a.first_row < b.first_row : a.first_split < b.first_split;
    });
  }

  // ---- the workers'

  // Whose the work is that begins at `done` of `total`, dealt out in order.
  int64_t WorkerAt(int64_t done, int64_t cost, int64_t total) const {
    return (2 * done + cost) * work_.workers / (2 * total);
  }

  void PlanWorkers() {
    int64_t total = 0, splits = 0, most = 0;
    ForEachTile(false, [&](const AttentionItem& tile, int64_t keys) {
      total += CostOfTile(keys);
      splits += tile.end_split;
      most = std::max(most, std::min(CostOfTile(keys), CostOfSplit(kAttentionSplit)));
    });
    const int64_t most_workers = MostAttentionWorkers(sizes_);
    work_.workers = static_cast<int32_t>(std::min(splits, most_workers));

    int64_t done = 0, loaded = -1, load = 0, longest = 0;
    ForEachTile(false, [&](const AttentionItem&, int64_t keys) {
      const int64_t cost = CostOfTile(keys), worker = WorkerAt(done, cost, total);
      load = worker == loaded ? load + cost : cost;
      loaded = worker;
      longest = std::max(longest, load);
      done += cost;
    });
    // Whole tiles need no second kernel.
    const bool cut = splits > 0 && 10 * longest > 11 * std::max(total / work_.workers, most);

    int64_t next = 0;  // the first worker whose items have not begun
    const auto begin = [&](int64_t worker) {
      for (; next <= worker; ++next) begins_[next] = static_cast<int32_t>(used_);
    };
    done = 0;
    ForEachTile(false, [&](const AttentionItem& tile, int64_t keys) {
      const int64_t cost = CostOfTile(keys);
      const auto worker_of = [&](int32_t split) {
        const int64_t before = split * CostOfSplit(kAttentionSplit);
        return WorkerAt(done + before, std::min(CostOfSplit(kAttentionSplit), cost - before), total);
      };
      int32_t length = 1;  // of the first piece
      while (cut && length < tile.end_split && worker_of(length) == worker_of(0)) ++length;
      const int32_t first_state = cut && length < tile.end_split ? TakeStates(tile, length) : -1;
      if (first_state < 0) {
        begin(WorkerAt(done, cost, total));
        items_[used_++] = tile;
      } else {
        for (int32_t split = 0, end = length; split < tile.end_split; split = end++) {
          const int64_t worker = worker_of(split);
          while (end < tile.end_split && worker_of(end) == worker) ++end;
          begin(worker);
          items_[used_++] = Piece(tile, split, end, length, first_state);
        }
      }
      done += cost;
    });
    begin(most_workers);
  }

  const AttentionSizes sizes_;
  const int32_t group_;
  const int32_t* const q_begin_;
  const int32_t* const lengths_;
  const int32_t sequences_;
  AttentionItem* const items_;  // as records of the list
  int32_t* const list_;
  int32_t* const begins_;
  AttentionCut* cut_;
  AttentionCut* const end_;
  int64_t states_left_;  // for each KV head
  int32_t states_taken_ = 0;
  int64_t used_ = kFirstItem;
  AttentionWork work_;
};

}  // namespace

AttentionWork PlanAttention(const AttentionSizes& sizes, const int32_t* q_begin, const int32_t* lengths,
                            int64_t sequences, int64_t tokens, int32_t* list) {
  return Planner(sizes, q_begin, lengths, sequences, list, AttentionListWords(sizes, tokens, sequences) / kRecordWords)
      .Plan();
}

}  // namespace altiplano::cuda
