#include "server/scheduler/block_pool.h"

#include "server/base/check.h"

namespace altiplano {

BlockPool::BlockPool(int32_t num_blocks) : blocks_(static_cast<size_t>(num_blocks)) {
  free_.reserve(blocks_.size());
  for (BlockId block = num_blocks - 1; block >= 0; --block) free_.push_back(block);
}

std::optional<BlockPool::Taken> BlockPool::Take() {
  Taken taken{};
  if (!free_.empty()) {
    taken = {free_.back(), false};
    free_.pop_back();
  } else if (oldest_ >= 0) {
    taken = {oldest_, true};
    Unlink(oldest_);
    At(taken.block).kept = false;
  } else {
    return std::nullopt;
  }
  At(taken.block).refs = 1;
  return taken;
}

void BlockPool::Ref(BlockId id) {
  Block& block = At(id);
  CHECK(block.refs > 0 || block.kept);
  if (block.refs == 0) Unlink(id);
  if (block.refs > 0 && block.refs == block.retired) --num_retiring_;
  ++block.refs;
}

void BlockPool::Unref(BlockId id) {
  Block& block = At(id);
  CHECK(block.refs > block.retired);
  --block.refs;
  if (block.refs > 0) {
    if (block.refs == block.retired) ++num_retiring_;
  } else if (block.kept) {
    LinkYoungest(id);
  } else {
    free_.push_back(id);
  }
}

void BlockPool::SetKept(BlockId id, bool kept) {
  CHECK(At(id).refs > 0);
  At(id).kept = kept;
}

void BlockPool::Forget(BlockId id) {
  Block& block = At(id);
  CHECK(block.refs == 0 && block.kept);
  Unlink(id);
  block.kept = false;
  free_.push_back(id);
}

void BlockPool::Retire(BlockId id) {
  Block& block = At(id);
  CHECK(block.refs > block.retired);
  if (++block.retired == block.refs) ++num_retiring_;
}

void BlockPool::Unretire(BlockId id) {
  Block& block = At(id);
  CHECK(block.retired > 0);
  if (block.refs == block.retired) --num_retiring_;
  --block.retired;
  Unref(id);
}

void BlockPool::LinkYoungest(BlockId id) {
  Block& block = At(id);
  block.older = youngest_;
  block.younger = -1;
  (youngest_ >= 0 ? At(youngest_).younger : oldest_) = id;
  youngest_ = id;
  ++num_cached_;
}

void BlockPool::Unlink(BlockId id) {
  Block& block = At(id);
  (block.older >= 0 ? At(block.older).younger : oldest_) = block.younger;
  (block.younger >= 0 ? At(block.younger).older : youngest_) = block.older;
  block.older = block.younger = -1;
  --num_cached_;
}

void BlockPool::CheckInvariants() const {
  enum : uint8_t { kUnseen, kFree, kCached };
  std::vector<uint8_t> seen(blocks_.size(), kUnseen);
  for (BlockId id : free_) {
    CHECK(id >= 0 && id < size() && seen[static_cast<size_t>(id)] == kUnseen);
    CHECK(At(id).refs == 0 && !At(id).kept);
    seen[static_cast<size_t>(id)] = kFree;
  }
  int32_t cached = 0;
  for (BlockId id = oldest_, before = -1; id >= 0; before = id, id = At(id).younger, ++cached) {
    CHECK(seen[static_cast<size_t>(id)] == kUnseen && At(id).older == before);
    CHECK(At(id).refs == 0 && At(id).kept);
    CHECK(At(id).younger >= 0 || youngest_ == id);
    seen[static_cast<size_t>(id)] = kCached;
  }
  CHECK(cached == num_cached_);
  int32_t retiring = 0;
  for (size_t i = 0; i < blocks_.size(); ++i) {
    const Block& block = blocks_[i];
    CHECK(block.refs >= block.retired && block.retired >= 0);
    CHECK((block.refs == 0) == (seen[i] != kUnseen));  // free + held + cached == total, each block in one place
    retiring += block.refs > 0 && block.refs == block.retired;
  }
  CHECK(retiring == num_retiring_);
}

}  // namespace altiplano
