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
constexpr int32_t kAnswerService = 2, kMostDoublings = 6, kRetriedAfterSteps = 8;
constexpr int64_t kLevelParts = 1024;

const StepPlan kNothing;

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
          {"hopeless", hopeless}};
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

// --- Plans -----------------------------------------------------------------------------------------------------------

std::string PolicyOracle::JudgePlan(const StepPlan* plan, TimePoint now, std::span<const Event> events,
                                    const SchedulerLoad& load) {
  ++plans_;
  Walk walk;
  walk.plan = plan != nullptr ? plan : &kNothing;
  walk.now = now;
  walk.budget = options_.token_budget;
  size_t at = 0;
  for (; at < events.size() && events[at].kind != Event::Kind::kAdmitted; ++at) {
    if (events[at].kind == Event::Kind::kEnded) JudgeHopeless(events[at], now);
    EndBy(events[at]);
  }
  walk.admissions = events.subspan(at);
  JudgeHopeful(now);
  walk.step = plan != nullptr ? plan->step : last_step_ + 1;
  if (plan != nullptr) last_step_ = plan->step;
  if (plan != nullptr) in_flight_.push_back({.step = plan->step, .retired = {}, .unnamed = 0});
  walk.order = AccountsByLevel();
  WalkDecodes(&walk);
  decodes_ = walk.work;
  if (error_.empty()) WalkPrefills(&walk);
  if (error_.empty() && !walk.pressed) WalkAdmissions(&walk);
  if (!error_.empty()) return error_;
  if (walk.next < walk.plan->sequences.size()) {
    const PlannedSequence& more = walk.plan->sequences[walk.next];
    return StrCat(more.request, ".", more.sequence, " is planned, which was not its turn");
  }
  if (!walk.admissions.empty()) return StrCat("request ", walk.admissions.front().request, " was not admitted");
  if (preemptions_ != load.preemptions) return StrCat("preemptions: ", load.preemptions, " for ", preemptions_);
  JudgeShares();
  JudgeLoad(load);
  return error_;
}

// The oldest running request's, then the others' in order.
void PolicyOracle::WalkDecodes(Walk* walk) {
  Entry* oldest = OldestRunning();
  if (oldest == nullptr) return;
  for (Sequence& sequence : oldest->sequences) WalkDecode(walk, &sequence);
  for (size_t account : walk->order) {
    for (Sequence* sequence : InOrder(Sequence::State::kRunning, account)) {
      if (sequence->of != oldest) WalkDecode(walk, sequence);
    }
  }
}

void PolicyOracle::WalkDecode(Walk* walk, Sequence* sequence) {
  if (!error_.empty() || sequence->state != Sequence::State::kRunning || sequence->remaining() != 1) return;
  if (Grow(walk, sequence)) Take(walk, sequence, 1, /*fresh=*/false);
}

// A block for the next position. False: it goes without in this step, or has been preempted.
bool PolicyOracle::Grow(Walk* walk, Sequence* wanting) {
  if (wanting->scheduled < wanting->num_blocks() * options_.block_size) return true;
  ++walk->shortage;
  if (pool_.available() == 0) walk->pressed = true;
  while (pool_.available() == 0 && Retiring() < walk->shortage) {
    if (!GiveUpSomething(walk, wanting) || wanting->state != Sequence::State::kRunning) return false;
  }
  if (pool_.available() == 0) {
    ++counts_.waited_for_blocks;
    return false;
  }
  --walk->shortage;
  TakeBlock(wanting);
  return true;
}

bool PolicyOracle::GiveUpSomething(Walk* walk, Sequence* wanting) {
  for (Entry* entry : sharing_) {
    if (entry->Count(Sequence::State::kRunning) > 0) continue;
    DropShare(entry);
    return true;
  }
  if (Sequence* victim = Victim(*walk, *wanting)) {
    ++preemptions_;
    ++(victim == wanting ? counts_.gave_up_itself : counts_.victims);
    Release(victim);
    victim->state = Sequence::State::kWaiting;
    ++victim->preempted;
    if (victim != wanting) DropShare(victim->of);
    return true;
  }
  if (wanting->of->shared.empty()) return false;
  DropShare(wanting->of);
  return true;
}

// The last in order, of the account that has had most; nobody of the oldest running request but behind its own others.
PolicyOracle::Sequence* PolicyOracle::Victim(const Walk& walk, const Sequence& wanting) {
  const Entry* oldest = OldestRunning();
  Sequence* last = nullptr;
  Sequence* last_of_oldest = nullptr;
  for (size_t account : walk.order) {
    for (Sequence* sequence : InOrder(Sequence::State::kRunning, account)) {
      (sequence->of == oldest ? last_of_oldest : last) = sequence;
    }
  }
  if (last != nullptr) return last;
  return wanting.of == oldest && oldest->Count(Sequence::State::kRunning) > 1 ? last_of_oldest : nullptr;
}

void PolicyOracle::WalkPrefills(Walk* walk) {
  for (size_t account : walk->order) {
    for (Sequence* sequence : InOrder(Sequence::State::kRunning, account)) {
      if (sequence->remaining() <= 1) continue;
      const int32_t room = PrefillRoom(*walk, sequence->scheduled);
      if (room == 0) {
        walk->budget = 0;  // for what waits, too
        return;
      }
      counts_.ceiling_cut += room < std::min(walk->budget, sequence->remaining());
      Take(walk, sequence, Chunk(*sequence, room), /*fresh=*/false);
      if (!error_.empty()) return;
    }
  }
}

void PolicyOracle::WalkAdmissions(Walk* walk) {
  while (error_.empty() && NumRunning() < options_.max_running && PrefillRoom(*walk, 0) > 0) {
    Sequence* head = Head(walk->now);
    if (head == nullptr) return;
    if (walk->next == walk->plan->sequences.size()) return JudgeRefused(*walk, head);
    WalkAdmission(walk, head);
  }
}

void PolicyOracle::WalkAdmission(Walk* walk, Sequence* head) {
  const PlannedSequence& planned = walk->plan->sequences[walk->next];
  if (planned.request != head->of->key || planned.sequence != head->index) {
    return Fail(StrCat(planned.request, ".", planned.sequence, " is admitted though ", Who(*head), " is next"));
  }
  if (LeftAlone(*walk, *head)) return Fail(StrCat(Who(*head), " is tried again, which was not due"));
  CountChoices(*head);
  blocked_ = {};
  const std::vector<int32_t> match = MakeRoom(head);
  JudgePrefix(*walk, *head, planned, match);
  if (!head->of->admitted) JudgeAdmission(walk, *head, planned);
  if (!error_.empty()) return;
  Admit(head, match);
  const int32_t room = std::max(1, PrefillRoom(*walk, head->scheduled));
  counts_.ceiling_cut += room < std::min(walk->budget, head->remaining());
  Take(walk, head, Chunk(*head, room), /*fresh=*/true);
}

// What it finds in the cache, when there are blocks for all that it knows and the next token, and some are left for
// those that run. When nothing runs, prompts kept for siblings give way, the last first.
std::vector<int32_t> PolicyOracle::MakeRoom(Sequence* head) {
  const int32_t headroom = Headroom(*head);
  for (;;) {
    std::vector<int32_t> match = Match(head);
    const int32_t needed = Needed(*head, match);
    if (needed + headroom <= pool_.available()) return match;
    if (NumRunning() > 0 || in_flight_.size() > 1 || sharing_.empty()) {
      Fail(StrCat(Who(*head), " is admitted with ", needed, " blocks to take and ", headroom,
                  " to leave, but there are ", pool_.available()));
      return match;
    }
    DropShare(sharing_.back());
  }
}

void PolicyOracle::JudgePrefix(const Walk& walk, const Sequence& head, const PlannedSequence& planned,
                               const std::vector<int32_t>& match) {
  if (planned.first_position != static_cast<int32_t>(match.size()) * options_.block_size) {
    return Fail(StrCat(Who(head), " starts at ", planned.first_position, ", but ", match.size(), " blocks are known"));
  }
  const auto given = std::span(walk.plan->block_ids).subspan(static_cast<size_t>(planned.block_begin), match.size());
  if (!std::ranges::equal(given, match)) Fail(StrCat(Who(head), " is given blocks that do not hold its prefix"));
}

void PolicyOracle::Admit(Sequence* head, const std::vector<int32_t>& match) {
  for (int32_t block : match) pool_.Ref(block);
  head->blocks = match;
  while (head->num_blocks() < Wanted(*head)) TakeBlock(head);
  head->published = static_cast<int32_t>(match.size());  // whoever computed these has offered them
  head->scheduled = head->published * options_.block_size;
  head->state = Sequence::State::kRunning;
  if (!head->of->admitted) {
    for (int32_t block : match) pool_.SetValued(block);
  }
  head->of->admitted = head->admitted = true;
  if (head->of->NumUnadmitted() == 0) DropShare(head->of);
  accounts_[head->of->account].admitted_at = plans_;
  accounts_[head->of->account].committed = Committed(head->of->account);
}

void PolicyOracle::CountChoices(const Sequence& head) {
  const std::vector<Tally> tallies = Tallies();
  for (size_t i = 0; i < accounts_.size(); ++i) {
    const bool may = MayAdmit(i, tallies);
    counts_.share_choices += may && i != head.of->account;
    counts_.tenant_limited += !may && tallies[i].waiting > 0;
  }
  counts_.order_choices += tallies[head.of->account].waiting > 1;
}

// A request's first admission is told, with what was found.
void PolicyOracle::JudgeAdmission(Walk* walk, const Sequence& head, const PlannedSequence& planned) {
  const bool told = !walk->admissions.empty() && walk->admissions.front().request == planned.request;
  if (!told) return Fail(StrCat(Who(head), " is admitted without an event"));
  const uint32_t cached = walk->admissions.front().cached_tokens;
  if (static_cast<int32_t>(cached) != planned.first_position) {
    Fail(StrCat(Who(head), " is told of ", cached, " cached tokens, but starts at ", planned.first_position));
  }
  walk->admissions = walk->admissions.subspan(1);
}

// A head that did not fit is not tried again before as much is there as it lacked, or some steps later.
bool PolicyOracle::LeftAlone(const Walk& walk, const Sequence& head) const {
  return blocked_.head == &head && NumRunning() > 0 && pool_.available() < blocked_.until_available &&
         walk.step < blocked_.until_step;
}

void PolicyOracle::JudgeRefused(const Walk& walk, Sequence* head) {
  if (LeftAlone(walk, *head)) return;
  const int32_t needed = Needed(*head, Match(head)), lacked = needed + Headroom(*head);
  if (lacked <= pool_.available()) return Fail(StrCat(Who(*head), " would fit and waits"));
  counts_.headroom_kept += needed <= pool_.available();
  blocked_ = {.head = head, .until_available = lacked, .until_step = walk.step + kRetriedAfterSteps};
}

// Blocks that it takes of those available: cached ones that nobody uses are such, too.
int32_t PolicyOracle::Needed(const Sequence& head, const std::vector<int32_t>& match) {
  const auto unused = std::ranges::count_if(match, [&](int32_t block) { return pool_.refs(block) == 0; });
  return Wanted(head) - static_cast<int32_t>(match.size()) + static_cast<int32_t>(unused);
}

// What the sequence wants next is the next in the plan.
void PolicyOracle::Take(Walk* walk, Sequence* sequence, int32_t tokens, bool fresh) {
  if (walk->next == walk->plan->sequences.size()) return Fail(StrCat(Who(*sequence), " is left out of the plan"));
  const PlannedSequence& planned = walk->plan->sequences[walk->next++];
  if (planned.request != sequence->of->key || planned.sequence != sequence->index) {
    return Fail(StrCat(planned.request, ".", planned.sequence, " is planned where ", Who(*sequence), " is next"));
  }
  const bool described =
      std::ranges::any_of(walk->plan->slot_inits, [&](const SlotInit& init) { return init.slot == planned.slot; });
  if (described != fresh) {
    return Fail(StrCat(Who(*sequence), fresh ? " comes back without" : " goes on with", " a new description"));
  }
  if (planned.first_position != sequence->scheduled || planned.num_tokens != tokens) {
    return Fail(StrCat(Who(*sequence), " gets ", planned.num_tokens, " tokens from ", planned.first_position, ", not ",
                       tokens, " from ", sequence->scheduled));
  }
  Entry& entry = *sequence->of;
  const int32_t end = planned.first_position + tokens;
  const bool sample = end == sequence->expected();
  const bool decode = tokens == 1 && sample && sequence->expected() > entry.prompt();
  ++(decode ? walk->streams : walk->prefills);
  walk->work.Add(planned.first_position, tokens);
  walk->budget -= tokens;
  Charge(sequence, end);
  if (entry.scoring() && planned.first_position == entry.scored) entry.scored = std::min(end, entry.prompt() - 1);
  sequence->scheduled = end;
  sequence->pending += sample;
  sequence->last_step = walk->plan->step;
  NameBlocks(*walk, sequence, planned);
}

// Positions whose scores came before a preemption are computed in a chunk of their own.
int32_t PolicyOracle::Chunk(const Sequence& sequence, int32_t room) const {
  const int32_t tokens = std::min(sequence.remaining(), room);
  const Entry& entry = *sequence.of;
  return entry.scoring() && sequence.scheduled < entry.scored ? std::min(tokens, entry.scored - sequence.scheduled)
                                                              : tokens;
}

int32_t PolicyOracle::PrefillRoom(const Walk& walk, int32_t first) const {
  if (options_.max_itl == Duration(0) || walk.streams == 0) return walk.budget;
  const int32_t room = RoomUnderCeiling(walk.work, first, walk.budget);
  return walk.prefills > 0 ? room : std::max(room, std::min(options_.block_size, walk.budget));
}

// As many tokens of a prompt as keep the step under the ceiling.
int32_t PolicyOracle::RoomUnderCeiling(const StepWork& beside, int32_t first, int32_t most) const {
  for (int32_t room = most; room > 0; --room) {
    StepWork work = beside;
    work.Add(first, room);
    if (StepTime(cost_, work) <= options_.max_itl) return room;
  }
  return 0;
}

int32_t PolicyOracle::Wanted(const Sequence& sequence) const {
  return BlocksFor(std::min(sequence.known() + 1, sequence.of->limit - 1));
}

int32_t PolicyOracle::Headroom(const Sequence& sequence) const {
  return (NumRunning() << std::min(sequence.preempted, kMostDoublings)) / 4;
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
