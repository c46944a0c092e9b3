// What the scheduler knows about one request and its sequences. Owned and written by the scheduler only.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "server/base/clock.h"
#include "server/scheduler/prefix_cache.h"
#include "server/scheduler/request.h"

namespace altiplano {

struct LiveRequest;

// One sequence's tokens, counted from position 0:
//
//   0 ...... computed ...... scheduled ...... known ...... known + pending
//   |-applied-|--in flight----|--not planned--|--sampled in a step in flight, values not here yet
//
// Blocks cover [0, scheduled) at least; those below `computed` are never written again.
//
// What every step reads comes first, here in two cache lines and in LiveRequest in one: a step with thousands of
// sequences waits for memory.
struct alignas(64) Sequence {
  // kHeld -> kWaiting <-> kRunning -> kEnded; a sequence may end from every state.
  enum class State : uint8_t {
    kHeld,     // waits for a sibling to compute the prompt; in no queue
    kWaiting,  // in the waiting queue, with neither slot nor blocks
    kRunning,  // has a slot and blocks
    kEnded,
  };

  LiveRequest* request = nullptr;
  std::vector<TokenId> generated;
  std::vector<BlockId> blocks;
  uint64_t last_step = 0;     // the last step that it is part of; 0: none
  TimePoint last_token_at{};  // once something has been generated
  uint32_t index = 0;         // among the request's sequences
  int32_t slot = -1;
  int32_t pending = 0;
  int32_t scheduled = 0;
  int32_t computed = 0;
  int32_t charged = 0;    // positions before it have been charged to the account: none is twice
  int32_t published = 0;  // leading blocks that have been offered to the prefix cache (or came from it)
  int32_t preempted = 0;  // so often
  State state = State::kHeld;
  bool admitted = false;          // ever
  bool needs_init = false;        // its slot has not been described to the executor yet
  std::vector<BlockHash> hashes;  // of its full blocks that reach behind the prompt, in order, as far as needed

  inline int32_t known() const;
  int32_t expected() const { return known() + pending; }
  // Positions to compute now. The last token that the limit allows is never an input.
  inline int32_t remaining() const;
  inline TokenId TokenAt(int32_t position) const;
};

struct alignas(64) LiveRequest {
  RequestKey key = 0;
  // Computes the prompt while its siblings are kHeld; null when none is.
  Sequence* leader = nullptr;
  uint32_t account = 0;  // of its tenant
  int32_t prompt_size = 0;
  int32_t limit = 0;           // tokens of one sequence, prompt and answer, at most
  int32_t in_flight = 0;       // sequences planned in steps in flight
  int32_t scored = 0;          // prompt log-probabilities have been planned for positions 1 ... scored
  int32_t min_new_tokens = 0;  // this and the next three: as the request's stop and sampling parameters
  bool ends_at_eos = false;
  bool has_stop_ids = false;
  bool scores_prompt = false;
  bool uses_cache = false;  // the prefix cache, for writing at least
  bool admitted = false;
  bool hurries = false;  // start_by is that of a target of its own, which has not been missed yet
  bool ended = false;
  std::optional<TimePoint> first_token_at;

  // This line and the one before a checkpoint reads, and what lies up to the request where they are not enough.
  uint64_t order = 0;               // of arrival
  TimePoint start_by{};             // to meet its target; changes in the queue only
  TimePoint hopeless_at{};          // until its first admission: from then on the deadline cannot be met
  uint32_t said_in = 0;             // before that checkpoint the request has been said: see Scheduler::Impl::Say
  int32_t said_blocks = 0;          // with so many blocks
  int32_t said_names = 0;           // and so many names behind the prompt
  std::vector<Sequence> sequences;  // never resized: steps in flight point into it
  // The prompt's full blocks, referenced here for siblings that have not been admitted yet.
  std::vector<BlockId> shared;
  std::vector<BlockHash> prompt_hashes;  // of full blocks within the prompt, as far as needed
  std::vector<uint8_t> arrival;          // as it is written into flight records, where one is

  std::shared_ptr<const Request> request;
  // The place in the queue: see ComesBefore.
  int64_t level = 0;
  size_t at = 0;               // in Scheduler::Impl::all_live_
  int32_t num_live = 0;        // sequences that have not ended
  int32_t num_running = 0;     // of these, kRunning
  int32_t num_unadmitted = 0;  // live and never admitted
  uint32_t preemptions = 0;
  BlockHash root{};
  std::optional<TimePoint> admitted_at;

  bool scoring_complete() const { return !scores_prompt || scored >= prompt_size - 1; }
};

int32_t Sequence::known() const {
  return request->prompt_size + static_cast<int32_t>(generated.size());
}

int32_t Sequence::remaining() const {
  return std::min(expected(), request->limit - 1) - scheduled;
}

TokenId Sequence::TokenAt(int32_t position) const {
  const int32_t prompt_size = request->prompt_size;
  return position < prompt_size ? request->request->prompt[static_cast<size_t>(position)]
                                : generated[static_cast<size_t>(position - prompt_size)];
}

// The order in which the sequences of an account get what is scarce: priority, then latest start, then arrival, then
// index. The reverse order gives up first. Where priority ages, it is in start_by, and all levels are the same.
struct ComesBefore {
  bool operator()(const Sequence* a, const Sequence* b) const { return Rank(*a) < Rank(*b); }
  static std::tuple<int64_t, TimePoint, uint64_t, uint32_t> Rank(const Sequence& s) {
    return {s.request->level, s.request->start_by, s.request->order, s.index};
  }
};

}  // namespace altiplano
