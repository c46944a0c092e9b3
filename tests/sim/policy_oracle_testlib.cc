#include "tests/sim/policy_oracle_testlib.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <optional>
#include <ranges>
#include <utility>

#include "server/base/strings.h"
#include "tests/sim/oracle_testlib.h"

namespace altiplano::sim {

namespace {

// As docs/scheduler.md names them.
constexpr int32_t kAnswerService = 2;
constexpr int64_t kLevelParts = 1024;

}  // namespace

std::vector<std::pair<const char*, uint64_t>> PolicyOracle::Counts::All() const {
  return {{"choices between tenants", share_choices},
          {"choices in a queue", order_choices},
          {"targets given up", hurry_stopped},
          {"tenants at their limit", tenant_limited},
          {"victims", victims},
          {"gave up themselves", gave_up_itself},
          {"waited for blocks", waited_for_blocks},
          {"held back by headroom", headroom_kept},
          {"cut by the ceiling", ceiling_cut},
          {"evicted", evicted},
          {"hopeless", hopeless},
          {"wait for a slot", why[static_cast<size_t>(PlanNotes::Why::kNoSlot)]},
          {"wait for blocks", why[static_cast<size_t>(PlanNotes::Why::kNoBlocks)]},
          {"wait for those that run", why[static_cast<size_t>(PlanNotes::Why::kRunningFirst)]},
          {"wait for tokens", why[static_cast<size_t>(PlanNotes::Why::kBudget)]},
          {"wait under the ceiling", why[static_cast<size_t>(PlanNotes::Why::kCeiling)]},
          {"wait for their tenant", why[static_cast<size_t>(PlanNotes::Why::kTenant)]}};
}

int32_t PolicyOracle::Sequence::remaining() const {
  return std::min(expected(), of->limit - 1) - scheduled;
}

int32_t PolicyOracle::Entry::Count(Sequence::State state) const {
  return static_cast<int32_t>(std::ranges::count(sequences, state, &Sequence::state));
}

int32_t PolicyOracle::Entry::NumUnadmitted() const {
  return static_cast<int32_t>(std::ranges::count_if(
      sequences, [](const Sequence& s) { return s.state != Sequence::State::kEnded && !s.admitted; }));
}

PolicyOracle::PolicyOracle(const SchedulerOptions& options, int32_t max_servable, Counts* counts)
    : options_(options),
      max_servable_(max_servable),
      counts_(*counts),
      cost_(options.step_cost),
      pool_(options.num_blocks) {
  for (const TenantOptions& tenant : options.tenants) {
    Account& account = accounts_.emplace_back();
    account.weight = tenant.weight;
    account.max_running = tenant.max_running > 0 ? tenant.max_running : options.max_running;
  }
}

void PolicyOracle::Fail(std::string what) {
  if (error_.empty()) error_ = std::move(what);
}

std::string PolicyOracle::Who(const Sequence& sequence) {
  return StrCat(sequence.of->key, ".", sequence.index);
}

// --- Requests --------------------------------------------------------------------------------------------------------

void PolicyOracle::Add(RequestKey key, const Request& request) {
  Entry& entry = *live_.emplace_back(std::make_unique<Entry>());
  entry.key = key;
  entry.asked = &request;
  entry.account = TenantOf(options_.tenants, request.tenant);
  entry.arrival = ++arrivals_;
  entry.limit = std::min(entry.prompt() + request.stop.max_new_tokens, max_servable_);
  entry.sequences.resize(static_cast<size_t>(request.num_sequences));
  for (size_t i = 0; i < entry.sequences.size(); ++i) {
    entry.sequences[i].of = &entry;
    entry.sequences[i].index = static_cast<uint32_t>(i);
    entry.sequences[i].tokens = request.prompt;
  }
  entry.leader = &entry.sequences[0];
  entry.leader->state = Sequence::State::kWaiting;

  const Duration prefill = PrefillTime(0, entry.prompt(), decodes_);
  entry.hurries = request.ttft_target > Duration(0);
  TimePoint start_by = request.arrival + options_.default_ttft_target;
  if (entry.hurries) start_by = request.arrival + request.ttft_target - prefill;
  start_by = std::max(std::min(start_by, request.deadline - prefill), request.arrival);
  entry.level = options_.priority_ageing > Duration(0) ? 0 : -request.priority;
  entry.start_by = start_by - Aged(request);
  entry.hopeless_at = request.deadline - CertainPrefillTime(0, entry.prompt());
  Join(entry.account);
}

Duration PolicyOracle::Aged(const Request& request) const {
  return request.priority * options_.priority_ageing;
}

// Chunk by chunk, beside what decodes.
Duration PolicyOracle::PrefillTime(int32_t first, int32_t count, const StepWork& beside) const {
  int32_t chunk = std::max(1, options_.token_budget - static_cast<int32_t>(beside.tokens));
  if (options_.max_itl > Duration(0) && beside.tokens > 0) {
    chunk = std::max(std::min(options_.block_size, chunk), RoomUnderCeiling(beside, first, chunk));
  }
  Duration steps{};
  for (int32_t done = 0; done < count; done += chunk) {
    StepWork work = beside;
    ++work.sequences;
    work.tokens += std::min(chunk, count - done);
    steps += StepTime(cost_, work);
  }
  double context = 0;
  for (int32_t position = first; position < first + count; ++position) context += position + 1;
  return DurationOf(static_cast<double>(steps.count()) / 1e3 +
                    context * (count == 1 ? cost_.kv_token_us : cost_.attention_us));
}

// What the whole machine needs for it at least.
Duration PolicyOracle::CertainPrefillTime(int32_t first, int32_t count) const {
  const double certain = options_.learn_step_cost ? std::max(0.0, 1 - 2 * cost_error_) : 1;
  return Duration(std::llround(certain * static_cast<double>(PrefillTime(first, count, {}).count())));
}

PolicyOracle::Entry* PolicyOracle::Find(RequestKey key) {
  const auto it = std::ranges::find(live_, key, [](const auto& entry) { return entry->key; });
  return it == live_.end() ? nullptr : it->get();
}

PolicyOracle::Sequence* PolicyOracle::Find(RequestKey key, uint32_t sequence) {
  Entry* entry = Find(key);
  return entry == nullptr || sequence >= entry->sequences.size() ? nullptr : &entry->sequences[sequence];
}

void PolicyOracle::EndBy(const Event& event) {
  Sequence* sequence = Find(event.request, event.sequence);
  if (sequence == nullptr) return Fail("an event of nobody");
  if (event.kind == Event::Kind::kFinished) EndSequence(sequence);
  if (event.kind == Event::Kind::kEnded) EndRequest(sequence->of);
}

void PolicyOracle::EndSequence(Sequence* sequence) {
  Entry* entry = sequence->of;
  if (blocked_.head == sequence) blocked_ = {};
  Release(sequence);
  sequence->state = Sequence::State::kEnded;
  if (entry->leader == sequence) {  // the next one computes the prompt
    const auto next = std::ranges::find(entry->sequences, Sequence::State::kHeld, &Sequence::state);
    entry->leader = next == entry->sequences.end() ? nullptr : &*next;
    if (entry->leader != nullptr) entry->leader->state = Sequence::State::kWaiting;
  }
  if (entry->NumUnadmitted() == 0) DropShare(entry);
}

void PolicyOracle::EndRequest(Entry* entry) {
  for (Sequence& sequence : entry->sequences) {
    if (blocked_.head == &sequence) blocked_ = {};
    Release(&sequence);
  }
  DropShare(entry);
  Leave(entry->account);
  std::erase_if(live_, [&](const auto& each) { return each.get() == entry; });
}

void PolicyOracle::Abort() {
  for (const auto& entry : live_) Leave(entry->account);
  live_.clear();
  sharing_.clear();
  in_flight_.clear();
  pool_ = PoolOracle(options_.num_blocks);
  blocked_ = {};
}

// When it would have to start, by what is known now and what the cache holds of it.
TimePoint PolicyOracle::HopelessFrom(Entry* entry) {
  const auto found = static_cast<int32_t>(Match(entry->leader).size()) * options_.block_size;
  return entry->asked->deadline - CertainPrefillTime(found, entry->prompt() - found);
}

void PolicyOracle::JudgeHopeless(const Event& event, TimePoint now) {
  Entry* entry = Find(event.request);
  if (event.status.reason() != "HOPELESS" || entry == nullptr) return;
  ++counts_.hopeless;
  if (entry->admitted || now < entry->hopeless_at || now < HopelessFrom(entry)) {
    Fail(StrCat("request ", entry->key, " is refused though its deadline could be met"));
  }
}

// Of those that were not refused.
void PolicyOracle::JudgeHopeful(TimePoint now) {
  for (const auto& entry : live_) {
    if (entry->admitted || now < entry->hopeless_at) continue;
    entry->hopeless_at = HopelessFrom(entry.get());
    if (now >= entry->hopeless_at) Fail(StrCat("request ", entry->key, " waits though it is hopeless"));
  }
}

// --- Order -----------------------------------------------------------------------------------------------------------

PolicyOracle::Rank PolicyOracle::RankOf(const Sequence& sequence) {
  return {sequence.of->level, sequence.of->start_by, sequence.of->arrival, sequence.index};
}

std::vector<PolicyOracle::Sequence*> PolicyOracle::InOrder(Sequence::State state, size_t account) {
  std::vector<Sequence*> found;
  for (const auto& entry : live_) {
    if (entry->account != account) continue;
    for (Sequence& sequence : entry->sequences) {
      if (sequence.state == state) found.push_back(&sequence);
    }
  }
  std::ranges::sort(found, {}, [](const Sequence* s) { return RankOf(*s); });
  return found;
}

std::vector<size_t> PolicyOracle::AccountsByLevel() const {
  std::vector<size_t> order;
  for (size_t i = 0; i < accounts_.size(); ++i) order.push_back(i);
  std::ranges::stable_sort(order, {}, [&](size_t i) { return accounts_[i].level(); });
  return order;
}

std::vector<PolicyOracle::Tally> PolicyOracle::Tallies() const {
  std::vector<Tally> tallies(accounts_.size());
  for (const auto& entry : live_) {
    for (const Sequence& sequence : entry->sequences) {
      tallies[entry->account].running += sequence.state == Sequence::State::kRunning;
      tallies[entry->account].waiting += sequence.state == Sequence::State::kWaiting;
    }
  }
  return tallies;
}

int32_t PolicyOracle::NumRunning() const {
  int32_t running = 0;
  for (const auto& entry : live_) running += entry->Count(Sequence::State::kRunning);
  return running;
}

PolicyOracle::Entry* PolicyOracle::OldestRunning() {
  for (const auto& entry : live_) {  // in order of arrival
    if (entry->Count(Sequence::State::kRunning) > 0) return entry.get();
  }
  return nullptr;
}

// Who is next; null: nobody. A target that can be met no more hurries nobody from here on.
PolicyOracle::Sequence* PolicyOracle::Head(TimePoint now) {
  const std::vector<Tally> tallies = Tallies();
  for (size_t account : AccountsByLevel()) {
    if (!MayAdmit(account, tallies)) continue;
    Sequence* head = InOrder(Sequence::State::kWaiting, account).front();
    Entry& entry = *head->of;
    if (!entry.hurries || entry.admitted || now <= entry.start_by + Aged(*entry.asked)) return head;
    entry.hurries = false;
    entry.start_by += options_.default_ttft_target;
    ++counts_.hurry_stopped;
    return Head(now);
  }
  return nullptr;
}

void PolicyOracle::RaiseFloor() {
  int64_t lowest = INT64_MAX, highest = 0;
  for (const Account& account : accounts_) {
    highest = std::max(highest, account.level());
    if (account.live > 0) lowest = std::min(lowest, account.level());
  }
  floor_ = std::max(floor_, lowest == INT64_MAX ? highest : lowest);
}

void PolicyOracle::Join(size_t index) {
  Account& account = accounts_[index];
  if (account.live == 0) {
    RaiseFloor();
    account.base += std::max<int64_t>(0, floor_ - account.level());
  }
  ++account.live;
}

void PolicyOracle::Leave(size_t index) {
  if (accounts_[index].live == 1) RaiseFloor();
  --accounts_[index].live;
}

void PolicyOracle::Charge(Sequence* sequence, int32_t end) {
  Account& account = accounts_[sequence->of->account];
  for (int32_t p = std::max(sequence->charged, sequence->scheduled); p < end; ++p) {
    account.parts += kLevelParts * (p >= sequence->of->prompt() ? kAnswerService : 1);
  }
  sequence->charged = std::max(sequence->charged, end);
}

// What those running could still take of the service, in parts.
int64_t PolicyOracle::Committed(size_t account) {
  int64_t parts = 0;
  for (const Sequence* sequence : InOrder(Sequence::State::kRunning, account)) {
    for (int32_t p = std::max(sequence->charged, sequence->scheduled); p < sequence->of->limit; ++p) {
      parts += kLevelParts * (p >= sequence->of->prompt() ? kAnswerService : 1);
    }
  }
  return parts;
}

// The promise behind the order of accounts: while one always has something waiting that it may run, no other gets ahead
// of it by more than what was running there when it was last even or behind.
void PolicyOracle::JudgeShares() {
  const std::vector<Tally> tallies = Tallies();
  for (size_t i = 0; i < accounts_.size(); ++i) {
    if (!MayAdmit(i, tallies)) {
      accounts_[i].waits_since = 0;
    } else if (accounts_[i].waits_since == 0) {
      accounts_[i].waits_since = plans_;
    }
  }
  for (const Account& ahead : accounts_) {
    for (const Account& behind : accounts_) {
      if (behind.waits_since == 0 || behind.waits_since > ahead.admitted_at) continue;
      if (ahead.level() - behind.level() > ahead.committed / ahead.weight + 1) {
        Fail("a tenant is ahead of one that waits by more than it had running");
      }
    }
  }
}

// --- Results ---------------------------------------------------------------------------------------------------------

std::string PolicyOracle::JudgeApply(const StepPlan& plan, std::span<const Event> events, const SchedulerLoad& load) {
  for (int32_t block : in_flight_.front().retired) pool_.Unref(block);
  pool_.ReturnUnnamed(in_flight_.front().unnamed);
  in_flight_.pop_front();
  size_t at = 0;
  auto next_is = [&](Event::Kind kind, RequestKey key) {
    return at < events.size() && events[at].kind == kind && events[at].request == key;
  };
  auto is_command = [](const Event& event) {
    return event.kind == Event::Kind::kFinished ||
           (event.kind == Event::Kind::kEnded && event.status.reason() != "NON_FINITE_LOGITS");
  };
  // Sampled before they were cancelled or stopped, and therefore not waited for any more.
  for (const PlannedSequence& planned : plan.sequences) {
    if (Sequence* sequence = Find(planned.request, planned.sequence)) sequence->pending -= planned.sample;
  }
  while (at < events.size() && is_command(events[at])) EndBy(events[at++]);
  for (const PlannedSequence& planned : plan.sequences) {
    Sequence* sequence = Find(planned.request, planned.sequence);
    if (sequence == nullptr) continue;
    if (planned.num_prompt_scores > 0 && next_is(Event::Kind::kPromptScores, planned.request)) ++at;
    if (next_is(Event::Kind::kEnded, planned.request)) {  // NaN
      Withdraw(*sequence->of);
      EndBy(events[at++]);
      continue;
    }
    if (sequence->state == Sequence::State::kEnded) continue;
    if (sequence->state == Sequence::State::kRunning) {
      const int32_t computed = planned.first_position + planned.num_tokens;
      Publish(sequence, computed);
      if (sequence->of->leader == sequence && computed >= sequence->of->prompt()) ShareWithSiblings(sequence->of);
    }
    if (!planned.sample) continue;
    if (!next_is(Event::Kind::kToken, planned.request)) return StrCat(Who(*sequence), " does not get its token");
    const Event& token = events[at++];
    sequence->tokens.push_back(token.score.token);
    if (token.finish == FinishReason::kNone) continue;
    Entry* entry = sequence->of;
    EndSequence(sequence);
    const auto size = static_cast<int32_t>(entry->sequences.size());
    if (entry->Count(Sequence::State::kEnded) < size) continue;
    if (!next_is(Event::Kind::kEnded, planned.request)) return StrCat(Who(*sequence), " was the last, and no end");
    EndBy(events[at++]);
  }
  if (at < events.size()) return "an event that no result explains";
  cost_ = load.step_cost;
  cost_error_ = load.step_cost_error;
  JudgeLoad(load);
  return error_;
}

void PolicyOracle::JudgeLoad(const SchedulerLoad& load) {
  if (load.blocks_used != pool_.held()) {
    Fail(StrCat(load.blocks_used, " blocks are held, should be ", pool_.held()));
  }
  if (load.blocks_cached != pool_.cached()) {
    Fail(StrCat(load.blocks_cached, " blocks are cached, should be ", pool_.cached()));
  }
  const std::vector<Tally> tallies = Tallies();
  for (size_t i = 0; i < accounts_.size(); ++i) {
    const int32_t running = load.tenants[i].running_sequences, expected = tallies[i].running;
    if (running != expected) Fail(StrCat("tenant ", i, " runs ", running, ", should run ", expected));
    if (running > accounts_[i].max_running) Fail(StrCat("tenant ", i, " runs more than it may: ", running));
  }
}

// --- Blocks ----------------------------------------------------------------------------------------------------------

// Held by nobody but steps in flight.
int32_t PolicyOracle::Retiring() const {
  std::map<int32_t, int32_t> retired;
  int32_t retiring = 0;
  for (const InFlight& in_flight : in_flight_) {
    for (int32_t block : in_flight.retired) ++retired[block];
    retiring += in_flight.unnamed;
  }
  for (const auto& [block, refs] : retired) retiring += refs == pool_.refs(block);
  return retiring;
}

void PolicyOracle::TakeBlock(Sequence* sequence) {
  counts_.evicted += pool_.free() == 0;
  if (!pool_.TakeUnnamed()) return Fail(StrCat("no block is left for ", Who(*sequence)));
  ++sequence->unnamed;
}

void PolicyOracle::NameBlocks(const Walk& walk, Sequence* sequence, const PlannedSequence& planned) {
  for (auto i = static_cast<int32_t>(sequence->blocks.size()); i < planned.num_blocks; ++i) {
    const int32_t at = planned.block_begin + i - planned.known_blocks;
    const int32_t block = walk.plan->block_ids[static_cast<size_t>(at)];
    if (const char* wrong = pool_.Name(block)) {
      return Fail(StrCat("block ", block, ", given to ", Who(*sequence), ", ", wrong));
    }
    sequence->blocks.push_back(block);
    --sequence->unnamed;
  }
}

// From the end backwards: prefixes lose their ends before their beginnings.
void PolicyOracle::Release(Sequence* sequence) {
  const auto in_flight = std::ranges::find(in_flight_, sequence->last_step, &InFlight::step);
  if (in_flight != in_flight_.end()) {
    in_flight->retired.insert(in_flight->retired.end(), sequence->blocks.rbegin(), sequence->blocks.rend());
    in_flight->unnamed += sequence->unnamed;
  } else {
    for (int32_t block : std::views::reverse(sequence->blocks)) pool_.Unref(block);
    pool_.ReturnUnnamed(sequence->unnamed);
  }
  sequence->blocks.clear();
  sequence->unnamed = sequence->scheduled = sequence->published = 0;
}

void PolicyOracle::DropShare(Entry* entry) {
  for (int32_t block : std::views::reverse(entry->shared)) pool_.Unref(block);
  entry->shared.clear();
  std::erase(sharing_, entry);
}

void PolicyOracle::ShareWithSiblings(Entry* entry) {
  const Sequence& leader = *entry->leader;
  entry->leader = nullptr;
  for (Sequence& sequence : entry->sequences) {
    if (sequence.state == Sequence::State::kHeld) sequence.state = Sequence::State::kWaiting;
  }
  const int32_t full = (entry->prompt() - 1) / options_.block_size;
  if (entry->NumUnadmitted() == 0 || full == 0) return;
  entry->shared.assign(leader.blocks.begin(), leader.blocks.begin() + full);
  for (int32_t block : entry->shared) pool_.Ref(block);
  sharing_.push_back(entry);
}

// Full blocks are offered to the cache when they have been computed.
void PolicyOracle::Publish(Sequence* sequence, int32_t computed) {
  if (!options_.prefix_cache || sequence->of->asked->bypass_prefix_cache) return;
  for (; sequence->published < computed / options_.block_size; ++sequence->published) {
    const int32_t block = sequence->blocks[static_cast<size_t>(sequence->published)];
    pool_.Publish(block, NameOf(sequence, sequence->published));
  }
}

void PolicyOracle::Withdraw(const Entry& entry) {
  for (const Sequence& sequence : entry.sequences) {
    for (int32_t block : sequence.blocks) pool_.Withdraw(block);
  }
  for (int32_t block : entry.shared) pool_.Withdraw(block);
}

// Of who may share it and all tokens up to its end.
uint64_t PolicyOracle::NameOf(Sequence* sequence, int32_t block) {
  std::vector<uint64_t>& names = sequence->names;
  while (static_cast<int32_t>(names.size()) <= block) {
    uint64_t name = names.empty() ? FakeModel::Root(*sequence->of->asked) : names.back();
    const auto begin = sequence->tokens.begin() + static_cast<int32_t>(names.size()) * options_.block_size;
    for (auto token = begin; token < begin + options_.block_size; ++token)
      name = Mix(name, static_cast<uint64_t>(*token));
    names.push_back(name);
  }
  return names[static_cast<size_t>(block)];
}

// Leading blocks of it that are computed already: found in the cache, or kept for it as a sibling, whichever reaches
// further. One token at least is left.
std::vector<int32_t> PolicyOracle::Match(Sequence* sequence) {
  const Entry& entry = *sequence->of;
  std::vector<int32_t> match;
  if (options_.prefix_cache && !entry.asked->bypass_prefix_cache && !entry.scoring()) {
    const int32_t most = (sequence->known() - 1) / options_.block_size;
    for (int32_t i = 0; i < most; ++i) {
      const std::optional<int32_t> block = pool_.Find(NameOf(sequence, i));
      if (!block) break;
      match.push_back(*block);
    }
  }
  return !sequence->admitted && entry.shared.size() > match.size() ? entry.shared : match;
}

}  // namespace altiplano::sim
