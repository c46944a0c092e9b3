#include "server/scheduler/block_pool.h"

#include "server/base/check.h"

namespace altiplano {

BlockPool::BlockPool(int32_t num_blocks)
    : blocks_(static_cast<size_t>(num_blocks)),
      is_kept_(num_blocks),
      is_valued_(num_blocks),
      is_cached_(num_blocks),
      cached_at_(static_cast<size_t>(num_blocks)) {
  free_.reserve(blocks_.size());
  for (BlockId block = num_blocks - 1; block >= 0; --block) free_.push_back(block);
}

std::optional<BlockPool::Taken> BlockPool::Take() {
  Taken taken{};
  if (!free_.empty()) {
    taken = {free_.back(), false};
    free_.pop_back();
  } else if (next_to_take() >= 0) {
    taken = {next_to_take(), true};
    Unlink(taken.block);
    is_kept_.Set(taken.block, false);
    is_valued_.Set(taken.block, false);
  } else {
    return std::nullopt;
  }
  At(taken.block).refs = 1;
  return taken;
}

void BlockPool::Ref(BlockId id) {
  Block& block = At(id);
  CHECK(block.refs > 0 || kept(id));
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
  } else if (kept(id)) {
    LinkYoungest(id);
    if (valued_.size <= size() / 2) return;
    const BlockId one_too_many = valued_.oldest;
    Unlink(one_too_many);
    is_valued_.Set(one_too_many, false);
    LinkYoungest(one_too_many);
  } else {
    is_valued_.Set(id, false);
    free_.push_back(id);
  }
}

void BlockPool::SetValued(BlockId id) {
  CHECK(At(id).refs > 0 && kept(id));
  is_valued_.Set(id, true);
}

void BlockPool::SetKept(BlockId id, bool kept) {
  CHECK(At(id).refs > 0);
  is_kept_.Set(id, kept);
}

void BlockPool::Forget(BlockId id) {
  CHECK(At(id).refs == 0 && kept(id));
  Unlink(id);
  is_kept_.Set(id, false);
  is_valued_.Set(id, false);
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
  List& list = ListOf(id);
  is_cached_.Set(id, true);
  cached_at_[static_cast<size_t>(id)] = ++times_cached_;
  block.older = list.youngest;
  block.younger = -1;
  (list.youngest >= 0 ? At(list.youngest).younger : list.oldest) = id;
  list.youngest = id;
  ++list.size;
}

void BlockPool::Unlink(BlockId id) {
  Block& block = At(id);
  List& list = ListOf(id);
  is_cached_.Set(id, false);
  (block.older >= 0 ? At(block.older).younger : list.oldest) = block.younger;
  (block.younger >= 0 ? At(block.younger).older : list.youngest) = block.older;
  block.older = block.younger = -1;
  --list.size;
}

namespace {
enum : uint8_t { kUnseen, kFree, kCached };
}

void BlockPool::CheckList(const List& list, bool valued, std::vector<uint8_t>* seen) const {
  int32_t count = 0;
  for (BlockId id = list.oldest, before = -1; id >= 0; before = id, id = At(id).younger, ++count) {
    CHECK((*seen)[static_cast<size_t>(id)] == kUnseen && At(id).older == before);
    CHECK(At(id).refs == 0 && kept(id) && this->valued(id) == valued && is_cached_[id]);
    CHECK(before < 0 || cached_at(before) < cached_at(id));
    CHECK(At(id).younger >= 0 || list.youngest == id);
    (*seen)[static_cast<size_t>(id)] = kCached;
  }
  CHECK(count == list.size);
}

void BlockPool::CheckInvariants() const {
  std::vector<uint8_t> seen(blocks_.size(), kUnseen);
  for (BlockId id : free_) {
    CHECK(id >= 0 && id < size() && seen[static_cast<size_t>(id)] == kUnseen);
    CHECK(At(id).refs == 0 && !kept(id) && !valued(id) && !is_cached_[id]);
    seen[static_cast<size_t>(id)] = kFree;
  }
  CheckList(plain_, false, &seen);
  CheckList(valued_, true, &seen);
  CHECK(valued_.size <= size() / 2);
  int32_t retiring = 0;
  for (size_t i = 0; i < blocks_.size(); ++i) {
    const Block& block = blocks_[i];
    CHECK(block.refs >= block.retired && block.retired >= 0);
    CHECK((block.refs == 0) == (seen[i] != kUnseen));  // free + held + cached == total, each block in one place
    CHECK(block.refs == 0 || !is_cached_[static_cast<BlockId>(i)]);
    retiring += block.refs > 0 && block.refs == block.retired;
  }
  CHECK(retiring == num_retiring_);
}

}  // namespace altiplano
