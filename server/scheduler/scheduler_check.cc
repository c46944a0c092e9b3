// The invariants of docs/scheduler.md, by number. Slow and obvious on purpose.
#include <algorithm>
#include <set>
#include <vector>

#include "server/base/check.h"
#include "server/scheduler/scheduler_impl.h"

namespace altiplano {

void Scheduler::Impl::CheckInvariants() const {
  pool_.CheckInvariants();
  cache_.CheckInvariants();
  CheckReferences();
  CheckQueues();
  for (const auto& [key, request] : live_) {
    CHECK(request->key == key && !request->ended && request->num_live > 0);
    for (const Sequence& sequence : request->sequences) CheckSequence(sequence);
  }
  for (const auto& request : ended_) {
    CHECK(request->ended && request->in_flight > 0 && request->shared.empty());
    for (const Sequence& sequence : request->sequences) {
      CHECK(sequence.state == Sequence::State::kEnded && sequence.blocks.empty() && sequence.slot == -1);
    }
  }
}

// S1: a block's references are exactly those of sequences, shares and steps in flight.
void Scheduler::Impl::CheckReferences() const {
  std::vector<int32_t> refs(static_cast<size_t>(pool_.size())), retired(refs.size());
  for (const auto& [key, request] : live_) {
    for (const Sequence& sequence : request->sequences) {
      for (BlockId block : sequence.blocks) ++refs[static_cast<size_t>(block)];
    }
    for (BlockId block : request->shared) ++refs[static_cast<size_t>(block)];
    CHECK(request->shared.empty() || request->num_unadmitted > 0);
    CHECK(request->shared.empty() == (std::ranges::find(sharing_, request.get()) == sharing_.end()));
  }
  for (const InFlight& in_flight : in_flight_) {
    for (BlockId block : in_flight.retired) ++refs[static_cast<size_t>(block)], ++retired[static_cast<size_t>(block)];
  }
  for (BlockId block = 0; block < pool_.size(); ++block) {
    CHECK(pool_.refs(block) == refs[static_cast<size_t>(block)]);
    CHECK(pool_.retired(block) == retired[static_cast<size_t>(block)]);
  }
}

// S3: counts, queue, running list and slots tell the same story.
void Scheduler::Impl::CheckQueues() const {
  CHECK(in_flight_.size() <= 2);
  std::set<int32_t> slots(free_slots_.begin(), free_slots_.end());
  CHECK(slots.size() == free_slots_.size());
  size_t running = 0, waiting = 0;
  int32_t waiting_requests = 0;
  int64_t waiting_tokens = 0;
  std::vector<TenantLoad> tenants(accounts_.size());
  std::vector<int32_t> live(accounts_.size());
  for (const auto& [key, request] : live_) {
    int32_t num_live = 0, num_running = 0, num_unadmitted = 0, held = 0;
    for (const Sequence& sequence : request->sequences) {
      if (sequence.state == Sequence::State::kEnded) continue;
      ++num_live;
      num_running += sequence.state == Sequence::State::kRunning;
      num_unadmitted += !sequence.admitted;
      held += sequence.state == Sequence::State::kHeld;
      waiting += sequence.state == Sequence::State::kWaiting;
      if (sequence.state == Sequence::State::kRunning) CHECK(slots.insert(sequence.slot).second);
    }
    CHECK(num_live == request->num_live && num_running == request->num_running);
    CHECK(num_unadmitted == request->num_unadmitted);
    CHECK(held == 0 || request->leader != nullptr);  // somebody is going to release them
    running += static_cast<size_t>(num_running);
    waiting_requests += !request->admitted;
    if (!request->admitted) waiting_tokens += request->prompt_size;
    CHECK(request->account == TenantOf(options_.tenants, request->request->tenant));
    TenantLoad& tenant = tenants[request->account];
    ++live[request->account];
    tenant.running_sequences += num_running;
    tenant.waiting_requests += !request->admitted;
    if (!request->admitted) tenant.waiting_tokens += request->prompt_size;
  }
  for (size_t i = 0; i < accounts_.size(); ++i) {
    const Account& account = accounts_[i];
    CHECK(account.live == live[i] && account.load.running_sequences == tenants[i].running_sequences);
    CHECK(account.load.waiting_requests == tenants[i].waiting_requests);
    CHECK(account.load.waiting_tokens == tenants[i].waiting_tokens);
    CHECK(account.load.running_sequences == static_cast<int32_t>(account.running.size()));
    CHECK(account.load.running_sequences <= account.max_running);
    CHECK(std::ranges::is_sorted(account.running, ComesBefore()));
    running -= account.running.size();
    waiting -= account.waiting.size();
  }
  CHECK(running == 0 && waiting == 0);
  CHECK(oldest_ == nullptr || oldest_ == FindOldestRunning());
  CHECK(static_cast<int32_t>(slots.size()) == options_.max_running);
  CHECK(num_running_ == options_.max_running - static_cast<int32_t>(free_slots_.size()));
  CHECK(waiting_requests == waiting_requests_ && waiting_tokens == waiting_tokens_);
}

void Scheduler::Impl::CheckSequence(const Sequence& sequence) const {
  const LiveRequest& request = *sequence.request;
  const bool running = sequence.state == Sequence::State::kRunning;
  if (!running) {
    CHECK(sequence.blocks.empty() && sequence.slot == -1 && sequence.scheduled == 0 && sequence.computed == 0);
    const Account& account = accounts_[request.account];
    CHECK(account.waiting.contains(const_cast<Sequence*>(&sequence)) == (sequence.state == Sequence::State::kWaiting));
    return;
  }
  const std::vector<Sequence*>& running_ones = accounts_[request.account].running;
  CHECK(std::ranges::find(running_ones, &sequence) != running_ones.end());
  CHECK(sequence.admitted && request.admitted && sequence.pending >= 0 && sequence.pending <= 2);
  CHECK(0 <= sequence.computed && sequence.computed <= sequence.scheduled);
  CHECK(sequence.scheduled <= sequence.expected() && sequence.scheduled < request.limit);
  CHECK(sequence.expected() <= request.limit);
  CHECK(BlocksFor(sequence.scheduled) <= static_cast<int32_t>(sequence.blocks.size()));
  CHECK(static_cast<int32_t>(sequence.blocks.size()) <= BlocksFor(request.limit));
  for (size_t i = 0; i < sequence.blocks.size(); ++i) {
    const BlockId block = sequence.blocks[i];
    const auto end = static_cast<int32_t>(i + 1) * options_.block_size;
    // S2: what is still to be written belongs to one sequence, and nobody finds it in the cache.
    if (end > sequence.computed) {
      CHECK(pool_.refs(block) == 1 && !cache_.published(block));
      continue;
    }
    // S4: a published block holds the tokens, and has the name, that this sequence expects there.
    if (!cache_.published(block)) continue;
    std::vector<TokenId> scratch;
    CHECK(std::ranges::equal(cache_.tokens(block), BlockTokens(sequence, static_cast<int32_t>(i), &scratch)));
    const BlockHash* hash = KnownHash(sequence, static_cast<int32_t>(i));
    CHECK(hash == nullptr || *hash == cache_.hash(block));
  }
}

}  // namespace altiplano
