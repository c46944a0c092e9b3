// PrefixCache: finds full KV blocks by what they hold. A block's name is a SHA-256 chain over its tokens and everything
// before them, rooted in tenant and salt, so that equal names mean equal contents and nobody can guess another's.
// Sits on a BlockPool: hands out its blocks so that a block taken for new contents is forgotten here first.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "server/base/sha256.h"
#include "server/base/types.h"
#include "server/scheduler/block_pool.h"

namespace altiplano {

using BlockHash = Sha256Digest;

// The parent of a first block. Lengths are hashed too: ("ab", "c") differs from ("a", "bc").
BlockHash RootHash(std::string_view tenant, std::string_view salt);
BlockHash ChainHash(const BlockHash& parent, std::span<const TokenId> tokens);

// Gives full blocks their names in place of ChainHash: a replay has the names of the tokens, not the tokens.
class BlockNamer {
 public:
  virtual ~BlockNamer() = default;
  // sequence: kPrompt for blocks within the prompt, whose names all sequences share.
  static constexpr uint32_t kPrompt = UINT32_MAX;
  virtual BlockHash Name(RequestKey request, uint32_t sequence, int32_t block) const = 0;
};

class PrefixCache {
 public:
  PrefixCache(BlockPool* pool, int32_t block_size);

  // A block for new contents, with one reference; may evict the block unreferenced for longest. nullopt: none left.
  std::optional<BlockId> Allocate();

  // The block published under `hash`, if it also holds these tokens after this parent. Takes no reference.
  std::optional<BlockId> Find(const BlockHash& hash, const BlockHash& parent, std::span<const TokenId> tokens) const;
  // Names a held, fully computed block. False, and nothing changes, when another block has the name already.
  bool Publish(BlockId block, const BlockHash& hash, const BlockHash& parent, std::span<const TokenId> tokens);
  // Takes back a held block's name, if it has one: its contents are not to be trusted.
  void Withdraw(BlockId block);
  // Forgets all unreferenced blocks; returns how many.
  int32_t Reset();

  bool published(BlockId block) const { return pool_.kept(block); }
  // Of a published block.
  const BlockHash& hash(BlockId block) const { return entries_[static_cast<size_t>(block)].hash; }
  std::span<const TokenId> tokens(BlockId block) const;

  void CheckInvariants() const;

 private:
  struct Entry {
    BlockHash hash;
    BlockHash parent;
  };
  // Open addressing with linear probing, at most half full: the names are uniform by construction.
  size_t Home(const BlockHash& hash) const;
  size_t Next(size_t at) const { return (at + 1) & (table_.size() - 1); }
  size_t SlotOf(const BlockHash& hash) const;  // where it is, or the empty place where it would go
  void Erase(BlockId block);

  BlockPool& pool_;
  const size_t block_size_;
  std::vector<BlockId> table_;   // -1: empty
  std::vector<Entry> entries_;   // by block
  std::vector<TokenId> tokens_;  // by block, block_size each: a hit is compared, not believed
  size_t num_published_ = 0;
  mutable BlockId checked_ = 0;  // whose name CheckInvariants looked at last
};

}  // namespace altiplano
