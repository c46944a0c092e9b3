#include "server/scheduler/prefix_cache.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "server/base/check.h"

namespace altiplano {

BlockHash RootHash(std::string_view tenant, std::string_view salt) {
  Sha256 sha;
  for (std::string_view part : {std::string_view("altiplano.prefix.v1"), tenant, salt}) {
    const uint64_t size = part.size();
    sha.Update(&size, sizeof size);
    sha.Update(part.data(), part.size());
  }
  return sha.Finish();
}

BlockHash ChainHash(const BlockHash& parent, std::span<const TokenId> tokens) {
  Sha256 sha;
  sha.Update(parent.data(), parent.size());
  sha.Update(tokens.data(), tokens.size_bytes());
  return sha.Finish();
}

PrefixCache::PrefixCache(BlockPool* pool, int32_t block_size)
    : pool_(*pool),
      block_size_(static_cast<size_t>(block_size)),
      table_(std::bit_ceil(2 * static_cast<size_t>(pool->size()) + 1), -1),
      entries_(static_cast<size_t>(pool->size())),
      tokens_(static_cast<size_t>(pool->size()) * block_size_) {}

std::optional<BlockId> PrefixCache::Allocate() {
  const std::optional<BlockPool::Taken> taken = pool_.Take();
  if (!taken) return std::nullopt;
  if (taken->was_kept) Erase(taken->block);
  return taken->block;
}

std::optional<BlockId> PrefixCache::Find(const BlockHash& hash, const BlockHash& parent,
                                         std::span<const TokenId> tokens) const {
  const BlockId block = table_[SlotOf(hash)];
  if (block < 0 || entries_[static_cast<size_t>(block)].parent != parent) return std::nullopt;
  if (!std::ranges::equal(this->tokens(block), tokens)) return std::nullopt;
  return block;
}

bool PrefixCache::Publish(BlockId block, const BlockHash& hash, const BlockHash& parent,
                          std::span<const TokenId> tokens) {
  CHECK(!published(block) && tokens.size() == block_size_);
  const size_t slot = SlotOf(hash);
  if (table_[slot] >= 0) return false;
  table_[slot] = block;
  entries_[static_cast<size_t>(block)] = {hash, parent};
  std::ranges::copy(tokens, tokens_.begin() + static_cast<ptrdiff_t>(static_cast<size_t>(block) * block_size_));
  pool_.SetKept(block, true);
  ++num_published_;
  return true;
}

void PrefixCache::Withdraw(BlockId block) {
  if (!published(block)) return;
  Erase(block);
  pool_.SetKept(block, false);
}

int32_t PrefixCache::Reset() {
  int32_t forgotten = 0;
  for (BlockId block; (block = pool_.next_to_take()) >= 0; ++forgotten) {
    Erase(block);
    pool_.Forget(block);
  }
  return forgotten;
}

std::span<const TokenId> PrefixCache::tokens(BlockId block) const {
  return {tokens_.data() + static_cast<size_t>(block) * block_size_, block_size_};
}

size_t PrefixCache::Home(const BlockHash& hash) const {
  uint64_t bits;
  std::memcpy(&bits, hash.data(), sizeof bits);
  return bits & (table_.size() - 1);
}

size_t PrefixCache::SlotOf(const BlockHash& hash) const {
  size_t at = Home(hash);
  while (table_[at] >= 0 && entries_[static_cast<size_t>(table_[at])].hash != hash) at = Next(at);
  return at;
}

// Closes the gap by moving back every entry that a search would no longer reach (Knuth, TAOCP 6.4, algorithm R).
void PrefixCache::Erase(BlockId block) {
  size_t gap = SlotOf(hash(block));
  CHECK(table_[gap] == block);
  for (size_t at = Next(gap); table_[at] >= 0; at = Next(at)) {
    const size_t home = Home(hash(table_[at]));
    const bool reachable = gap < at ? gap < home && home <= at : gap < home || home <= at;
    if (reachable) continue;
    table_[gap] = table_[at];
    gap = at;
  }
  table_[gap] = -1;
  --num_published_;
}

void PrefixCache::CheckInvariants() const {
  size_t named = 0, kept = 0;
  for (BlockId block : table_) {
    if (block < 0) continue;
    ++named;
    CHECK(published(block) && table_[SlotOf(hash(block))] == block);
  }
  // A name costs a hash and never changes: one block's at each call, in turn.
  checked_ = (checked_ + 1) % pool_.size();
  if (published(checked_)) {
    CHECK(ChainHash(entries_[static_cast<size_t>(checked_)].parent, tokens(checked_)) == hash(checked_));
  }
  for (BlockId block = 0; block < pool_.size(); ++block) kept += published(block);
  CHECK(named == num_published_ && kept == num_published_);
}

}  // namespace altiplano
