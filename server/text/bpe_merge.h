// Byte-pair merging of one piece: again and again the adjacent pair of lowest rank becomes one token, the leftmost of
// equals first. n log n: a list of symbols and a heap of candidates; quadratic but faster where n is small.
#pragma once

#include <cstdint>
#include <functional>
#include <limits>
#include <queue>
#include <string_view>
#include <vector>

#include "server/base/types.h"
#include "server/text/bpe_vocabulary.h"

namespace altiplano {

struct BpeSymbol {
  uint32_t begin;  // in the piece
  uint32_t length;
  TokenId id;
};

inline constexpr uint32_t kNoMerge = std::numeric_limits<uint32_t>::max();  // rank of a pair that does not merge
inline constexpr size_t kMaxShortPiece = 48;                                // symbols; measured, see tokenizer_bench

// The two rules of which pairs merge: operator()(left, right) -> {rank, id}.
class RankByBytes {
 public:
  RankByBytes(const BpeVocabulary& vocabulary, std::string_view piece) : vocabulary_(vocabulary), piece_(piece) {}
  BpeMerges::Merge operator()(const BpeSymbol& left, const BpeSymbol& right) const {
    const size_t length = size_t{left.length} + right.length;
    if (length > vocabulary_.max_text_bytes()) return {kNoMerge, -1};
    const TokenId id = vocabulary_.Find(piece_.substr(left.begin, length));
    return {id < 0 ? kNoMerge : static_cast<uint32_t>(id), id};
  }

 private:
  const BpeVocabulary& vocabulary_;
  std::string_view piece_;
};

class RankByMerges {
 public:
  explicit RankByMerges(const BpeMerges& merges) : merges_(merges) {}
  BpeMerges::Merge operator()(const BpeSymbol& left, const BpeSymbol& right) const {
    const BpeMerges::Merge* merge = merges_.Find(left.id, right.id);
    return merge ? *merge : BpeMerges::Merge{kNoMerge, -1};
  }

 private:
  const BpeMerges& merges_;
};

// symbols[0, n) -> ids. Overwrites the symbols. n <= kMaxShortPiece.
template <typename Rank>
void MergeShort(BpeSymbol* symbols, size_t n, const Rank& rank, std::vector<TokenId>* ids) {
  BpeMerges::Merge next[kMaxShortPiece];  // next[i]: symbols i and i + 1
  for (size_t i = 0; i + 1 < n; ++i) next[i] = rank(symbols[i], symbols[i + 1]);
  while (n > 1) {
    size_t best = 0;
    for (size_t i = 1; i + 1 < n; ++i) {
      if (next[i].rank < next[best].rank) best = i;
    }
    if (next[best].rank == kNoMerge) break;
    symbols[best].id = next[best].id;
    symbols[best].length += symbols[best + 1].length;
    --n;
    for (size_t i = best + 1; i < n; ++i) symbols[i] = symbols[i + 1];
    for (size_t i = best; i + 1 < n; ++i) next[i] = next[i + 1];
    if (best + 1 < n) next[best] = rank(symbols[best], symbols[best + 1]);
    if (best > 0) next[best - 1] = rank(symbols[best - 1], symbols[best]);
  }
  for (size_t i = 0; i < n; ++i) ids->push_back(symbols[i].id);
}

template <typename Rank>
void MergeLong(std::vector<BpeSymbol>* symbols, const Rank& rank, std::vector<TokenId>* ids) {
  constexpr uint32_t kEnd = std::numeric_limits<uint32_t>::max();
  struct Node {
    BpeSymbol symbol;
    uint32_t previous, next;
    BpeMerges::Merge merge;  // with the next one; kNoMerge also for a node that is gone
  };
  const auto n = static_cast<uint32_t>(symbols->size());
  if (n == 0) return;
  std::vector<Node> nodes(n);
  // Entries rank << 32 | position: the lowest rank, then the leftmost. One whose node has changed since is skipped.
  std::vector<uint64_t> entries;
  const auto entry = [](uint32_t merge_rank, uint32_t at) { return uint64_t{merge_rank} << 32 | at; };
  for (uint32_t i = 0; i < n; ++i) {
    const bool last = i + 1 == n;
    nodes[i] = {(*symbols)[i], i == 0 ? kEnd : i - 1, last ? kEnd : i + 1,
                last ? BpeMerges::Merge{kNoMerge, -1} : rank((*symbols)[i], (*symbols)[i + 1])};
    if (nodes[i].merge.rank != kNoMerge) entries.push_back(entry(nodes[i].merge.rank, i));
  }
  std::priority_queue<uint64_t, std::vector<uint64_t>, std::greater<>> heap(std::greater<>(), std::move(entries));
  const auto refresh = [&](uint32_t at) {
    Node& node = nodes[at];
    node.merge = node.next == kEnd ? BpeMerges::Merge{kNoMerge, -1} : rank(node.symbol, nodes[node.next].symbol);
    if (node.merge.rank != kNoMerge) heap.push(entry(node.merge.rank, at));
  };
  while (!heap.empty()) {
    const uint64_t top = heap.top();
    heap.pop();
    const auto at = static_cast<uint32_t>(top);
    Node& node = nodes[at];
    if (node.merge.rank != top >> 32) continue;
    Node& gone = nodes[node.next];
    node.symbol.id = node.merge.id;
    node.symbol.length += gone.symbol.length;
    node.next = gone.next;
    gone.merge.rank = kNoMerge;
    if (node.next != kEnd) nodes[node.next].previous = at;
    refresh(at);
    if (node.previous != kEnd) refresh(node.previous);
  }
  for (uint32_t at = 0; at != kEnd; at = nodes[at].next) ids->push_back(nodes[at].symbol.id);
}

}  // namespace altiplano
