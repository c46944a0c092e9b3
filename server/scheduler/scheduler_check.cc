// The invariants of docs/scheduler.md, by number. Slow and obvious on purpose. The functions return the text of the one
// that is broken: a bug in a running scheduler, a bad file when a checkpoint is restored.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <set>
#include <vector>

#include "server/scheduler/scheduler_impl.h"

#define HOLDS(condition) \
  if (!(condition)) return #condition
#define HOLDS_IN(call) \
  if (const char* broken = call) return broken

namespace altiplano {

void Scheduler::Impl::CheckInvariants() const {
  pool_.CheckInvariants();
  cache_.CheckInvariants();
  if (const char* broken = BrokenInvariant()) {
    std::fprintf(stderr, "scheduler: broken invariant: %s\n", broken);
    std::abort();
  }
}

const char* Scheduler::Impl::BrokenInvariant() const {
  HOLDS_IN(BrokenReferences());
  HOLDS_IN(BrokenQueues());
  for (const auto& [key, request] : live_) {
    HOLDS(request->key == key && !request->ended && request->num_live > 0);
    for (const Sequence& sequence : request->sequences) HOLDS_IN(BrokenIn(sequence));
  }
  for (const auto& request : ended_) {
    HOLDS(request->ended && request->in_flight > 0 && request->shared.empty());
    for (const Sequence& sequence : request->sequences) {
      HOLDS(sequence.state == Sequence::State::kEnded && sequence.blocks.empty() && sequence.slot == -1);
    }
  }
  return nullptr;
}

// S1: a block's references are exactly those of sequences, shares and steps in flight.
const char* Scheduler::Impl::BrokenReferences() const {
  std::vector<int32_t> refs(static_cast<size_t>(pool_.size())), retired(refs.size());
  for (const auto& [key, request] : live_) {
    for (const Sequence& sequence : request->sequences) {
      for (BlockId block : sequence.blocks) ++refs[static_cast<size_t>(block)];
    }
    for (BlockId block : request->shared) ++refs[static_cast<size_t>(block)];
    HOLDS(request->shared.empty() || request->num_unadmitted > 0);
    HOLDS(request->shared.empty() == (std::ranges::find(sharing_, request.get()) == sharing_.end()));
  }
  for (const InFlight& in_flight : in_flight_) {
    for (BlockId block : in_flight.retired) ++refs[static_cast<size_t>(block)], ++retired[static_cast<size_t>(block)];
  }
  for (BlockId block = 0; block < pool_.size(); ++block) {
    HOLDS(pool_.refs(block) == refs[static_cast<size_t>(block)]);
    HOLDS(pool_.retired(block) == retired[static_cast<size_t>(block)]);
  }
  return nullptr;
}

// S3: counts, queue, running list and slots tell the same story.
const char* Scheduler::Impl::BrokenQueues() const {
  HOLDS(in_flight_.size() <= 2);
  std::set<int32_t> slots(free_slots_.begin(), free_slots_.end());
  HOLDS(slots.size() == free_slots_.size());
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
      if (sequence.state == Sequence::State::kRunning) HOLDS(slots.insert(sequence.slot).second);
    }
    HOLDS(num_live == request->num_live && num_running == request->num_running);
    HOLDS(num_unadmitted == request->num_unadmitted);
    HOLDS(held == 0 || request->leader != nullptr);  // somebody is going to release them
    running += static_cast<size_t>(num_running);
    waiting_requests += !request->admitted;
    if (!request->admitted) waiting_tokens += request->prompt_size;
    HOLDS(request->account == TenantOf(options_.tenants, request->request->tenant));
    TenantLoad& tenant = tenants[request->account];
    ++live[request->account];
    tenant.running_sequences += num_running;
    tenant.waiting_requests += !request->admitted;
    if (!request->admitted) tenant.waiting_tokens += request->prompt_size;
  }
  for (size_t i = 0; i < accounts_.size(); ++i) {
    const Account& account = accounts_[i];
    HOLDS(account.live == live[i] && account.load.running_sequences == tenants[i].running_sequences);
    HOLDS(account.load.waiting_requests == tenants[i].waiting_requests);
    HOLDS(account.load.waiting_tokens == tenants[i].waiting_tokens);
    HOLDS(account.load.running_sequences == static_cast<int32_t>(account.running.size()));
    HOLDS(account.load.running_sequences <= account.max_running);
    HOLDS(std::ranges::is_sorted(account.running, ComesBefore()));
    running -= account.running.size();
    waiting -= account.waiting.size();
  }
  HOLDS(running == 0 && waiting == 0);
  HOLDS(oldest_ == nullptr || oldest_ == FindOldestRunning());
  HOLDS(static_cast<int32_t>(slots.size()) == options_.max_running);
  HOLDS(num_running_ == options_.max_running - static_cast<int32_t>(free_slots_.size()));
  HOLDS(waiting_requests == waiting_requests_ && waiting_tokens == waiting_tokens_);
  return nullptr;
}

const char* Scheduler::Impl::BrokenIn(const Sequence& sequence) const {
  const LiveRequest& request = *sequence.request;
  const bool running = sequence.state == Sequence::State::kRunning;
  if (!running) {
    HOLDS(sequence.blocks.empty() && sequence.slot == -1 && sequence.scheduled == 0 && sequence.computed == 0);
    const Account& account = accounts_[request.account];
    HOLDS(account.waiting.contains(const_cast<Sequence*>(&sequence)) == (sequence.state == Sequence::State::kWaiting));
    return nullptr;
  }
  const std::vector<Sequence*>& running_ones = accounts_[request.account].running;
  HOLDS(std::ranges::find(running_ones, &sequence) != running_ones.end());
  HOLDS(sequence.admitted && request.admitted && sequence.pending >= 0 && sequence.pending <= 2);
  HOLDS(0 <= sequence.computed && sequence.computed <= sequence.scheduled);
  HOLDS(sequence.scheduled <= sequence.expected() && sequence.scheduled < request.limit);
  HOLDS(sequence.expected() <= request.limit);
  HOLDS(BlocksFor(sequence.scheduled) <= static_cast<int32_t>(sequence.blocks.size()));
  HOLDS(static_cast<int32_t>(sequence.blocks.size()) <= BlocksFor(request.limit));
  for (size_t i = 0; i < sequence.blocks.size(); ++i) {
    const BlockId block = sequence.blocks[i];
    const auto end = static_cast<int32_t>(i + 1) * options_.block_size;
    // S2: what is still to be written belongs to one sequence, and nobody finds it in the cache.
    if (end > sequence.computed) {
      HOLDS(pool_.refs(block) == 1 && !cache_.published(block));
      continue;
    }
    // S4: a published block holds the tokens, and has the name, that this sequence expects there.
    if (!cache_.published(block)) continue;
    std::vector<TokenId> scratch;
    HOLDS(std::ranges::equal(cache_.tokens(block), BlockTokens(sequence, static_cast<int32_t>(i), &scratch)));
    const BlockHash* hash = KnownHash(sequence, static_cast<int32_t>(i));
    HOLDS(hash == nullptr || *hash == cache_.hash(block));
  }
  return nullptr;
}

// What holds whenever a plan is about to be made, and what that plan relies on. Nobody running could break it: it is
// asked of checkpoints only.
const char* Scheduler::Impl::BrokenBeforePlan() const {
  HOLDS(in_flight_.size() <= 1);
  HOLDS(blocked_ == nullptr || blocked_->state == Sequence::State::kWaiting);
  HOLDS(std::set(sharing_.begin(), sharing_.end()).size() == sharing_.size());
  std::set<uint64_t> orders;
  for (const auto& [key, request] : live_) {
    HOLDS(orders.insert(request->order).second);
    HOLDS(request->scored <= request->prompt_size);
    HOLDS(static_cast<int32_t>(request->shared.size()) <= (request->prompt_size - 1) / options_.block_size);
    HOLDS(static_cast<int32_t>(request->prompt_hashes.size()) <= request->prompt_size / options_.block_size);
    const Sequence* leader = request->leader;
    HOLDS(leader != nullptr || request->admitted);
    HOLDS(leader == nullptr || leader->state == Sequence::State::kWaiting ||
          leader->state == Sequence::State::kRunning);
    for (const Sequence& sequence : request->sequences) HOLDS_IN(BrokenBeforePlan(sequence));
  }
  return nullptr;
}

const char* Scheduler::Impl::BrokenBeforePlan(const Sequence& sequence) const {
  if (sequence.state != Sequence::State::kRunning) return nullptr;
  const LiveRequest& request = *sequence.request;
  const int32_t remaining = sequence.remaining();
  HOLDS(sequence.published <= sequence.computed / options_.block_size);
  for (auto i = static_cast<size_t>(sequence.published); i < sequence.blocks.size(); ++i) {
    HOLDS(!cache_.published(sequence.blocks[i]));
  }
  HOLDS(request.scoring_complete() || sequence.scheduled <= request.scored);
  HOLDS(remaining <= 1 || BlocksFor(sequence.scheduled + remaining) <= static_cast<int32_t>(sequence.blocks.size()));
  const bool in_flight = !in_flight_.empty() && sequence.last_step == in_flight_.back().step;
  HOLDS(in_flight || (remaining > 0 && sequence.computed == sequence.scheduled));
  return nullptr;
}

}  // namespace altiplano
