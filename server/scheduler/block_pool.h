// BlockPool: which KV blocks are free, held or kept, and by how many. Ids by value; it refuses, it never throws.
//
//            Take                  last Unref, not kept
//   free ------------> held ------------------------------> free
//                      ^  |  last Unref, kept
//                 Ref  |  v
//                      kept (no reference; contents still of use; the oldest is taken when nothing is free,
//                            those that have proved to be of use, SetValued, only when no other is left)
//
// A reference that passes to a step in flight (Retire) still counts: the block comes back when the step has ended.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

namespace altiplano {

using BlockId = int32_t;

// A bit for each block, 64 to a word.
class BlockBits {
 public:
  explicit BlockBits(int32_t num_blocks) : words_((static_cast<size_t>(num_blocks) + 63) / 64) {}

  bool operator[](BlockId block) const { return (words_[WordOf(block)] >> (block & 63) & 1) != 0; }
  void Set(BlockId block, bool value) {
    uint64_t& word = words_[WordOf(block)];
    const uint64_t bit = uint64_t{1} << (block & 63);
    word = value ? word | bit : word & ~bit;
  }
  std::span<const uint64_t> words() const { return words_; }

 private:
  static size_t WordOf(BlockId block) { return static_cast<size_t>(block) >> 6; }

  std::vector<uint64_t> words_;
};

class BlockPool {
 public:
  explicit BlockPool(int32_t num_blocks);

  struct Taken {
    BlockId block;
    bool was_kept;  // its contents were kept until now: whoever remembers them must forget
  };
  // A block with one reference, the caller's; a free one, else the kept one unreferenced for longest. nullopt: none.
  std::optional<Taken> Take();
  void Ref(BlockId block);  // held or kept
  void Unref(BlockId block);

  // Whether the contents outlive the last reference. Only of a held block.
  void SetKept(BlockId block, bool kept);
  // From now on until its contents go, the held block is taken after those that are not valued. At most half of the
  // pool is kept so: then the one unreferenced for longest is like any other.
  void SetValued(BlockId block);
  // Kept and unreferenced -> free.
  void Forget(BlockId block);

  // One of the block's references is from now on that of a step in flight; Unretire ends it.
  void Retire(BlockId block);
  void Unretire(BlockId block);

  int32_t size() const { return static_cast<int32_t>(blocks_.size()); }
  int32_t available() const { return static_cast<int32_t>(free_.size()) + num_cached(); }
  int32_t num_cached() const { return plain_.size + valued_.size; }  // kept and unreferenced
  int32_t num_held() const { return size() - available(); }
  // Held blocks that become available when the steps in flight have ended, with nobody giving up anything more.
  int32_t num_retiring() const { return num_retiring_; }
  int32_t refs(BlockId block) const { return At(block).refs; }
  int32_t retired(BlockId block) const { return At(block).retired; }
  bool kept(BlockId block) const { return is_kept_[block]; }
  bool valued(BlockId block) const { return is_valued_[block]; }
  // For checkpoints, which have no time to follow the lists.
  const BlockBits& all_kept() const { return is_kept_; }
  const BlockBits& all_valued() const { return is_valued_; }
  const BlockBits& all_cached() const { return is_cached_; }
  // Of a cached block: the larger, the later it came into its list.
  uint64_t cached_at(BlockId block) const { return cached_at_[static_cast<size_t>(block)]; }
  BlockId next_to_take() const { return plain_.oldest >= 0 ? plain_.oldest : valued_.oldest; }  // kept; -1: none

  void CheckInvariants() const;

 private:
  struct Block {
    int32_t refs = 0;
    int32_t retired = 0;               // of refs
    BlockId older = -1, younger = -1;  // neighbours in the list of cached blocks
  };
  Block& At(BlockId block) { return blocks_[static_cast<size_t>(block)]; }
  const Block& At(BlockId block) const { return blocks_[static_cast<size_t>(block)]; }
  // Of kept and unreferenced blocks, by time of their last Unref.
  struct List {
    BlockId oldest = -1, youngest = -1;
    int32_t size = 0;
  };
  List& ListOf(BlockId block) { return is_valued_[block] ? valued_ : plain_; }
  void CheckList(const List& list, bool valued, std::vector<uint8_t>* seen) const;
  void LinkYoungest(BlockId block);
  void Unlink(BlockId block);

  std::vector<Block> blocks_;
  BlockBits is_kept_, is_valued_, is_cached_;
  std::vector<uint64_t> cached_at_;  // by block
  uint64_t times_cached_ = 0;
  std::vector<BlockId> free_;  // a stack: the block used last is the warmest
  List plain_, valued_;
  int32_t num_retiring_ = 0;
};

}  // namespace altiplano
