#include <algorithm>
#include <utility>

#include "server/base/check.h"
#include "server/scheduler/flight_recorder.h"
#include "server/scheduler/scheduler_impl.h"

namespace altiplano {

void Scheduler::Impl::Apply(const StepPlan& plan, const StepResult& result, TimePoint now, std::vector<Event>* events) {
  CHECK(result.status.ok());  // a failed step is Abort's
  CHECK(!in_flight_.empty() && in_flight_.front().step == plan.step && result.step == plan.step);
  InFlight in_flight = std::move(in_flight_.front());
  in_flight_.erase(in_flight_.begin());
  CHECK(in_flight.sequences.size() == plan.sequences.size());

  if (options_.learn_step_cost) learner_.Learn(in_flight.work, result.device_time);
  const Call call{now, events};
  size_t sampled = 0, scored = 0;
  // The step has ended: what it held can be used again, and what ends from here on has nothing to wait for in it.
  for (BlockId block : in_flight.retired) pool_.Unretire(block);
  TakeCommands(call);
  for (size_t i = 0; i < plan.sequences.size(); ++i) {
    Prefetch(in_flight.sequences, i);
    const PlannedSequence& planned = plan.sequences[i];
    CHECK(sampled + planned.sample <= result.sampled.size());
    CHECK(scored + (planned.num_prompt_scores > 0) <= result.prompt_scores.size());
    ApplyOne(call, in_flight.sequences[i], planned, planned.sample ? &result.sampled[sampled++] : nullptr,
             planned.num_prompt_scores > 0 ? &result.prompt_scores[scored++] : nullptr);
  }
  CHECK(sampled == result.sampled.size() && scored == result.prompt_scores.size());

  in_flight.plan.reset();
  in_flight.sequences.clear();
  in_flight.retired.clear();
  spare_in_flight_ = std::move(in_flight);
  ForgetEnded();
}

void Scheduler::Impl::ApplyOne(const Call& call, Sequence* sequence, const PlannedSequence& planned,
                               const TokenScore* sampled, const std::vector<TokenScore>* prompt_scores) {
  LiveRequest& request = *sequence->request;
  --request.in_flight;
  if (sampled != nullptr) --sequence->pending;
  if (request.ended) return;
  if (prompt_scores != nullptr && !DeliverPromptScores(call, request, *prompt_scores)) return;
  if (sequence->state == Sequence::State::kEnded) return;
  if (sampled != nullptr && !sampled->finite) return FailNonFinite(call, request);

  // Preempted since: its blocks are gone, what it sampled is not. It has not been admitted again: TryAdmit.
  if (sequence->state == Sequence::State::kRunning) {
    sequence->computed = planned.first_position + planned.num_tokens;
    Publish(sequence);
    if (request.leader == sequence && sequence->computed >= request.prompt_size) {
      ShareWithSiblings(sequence);
      if (options_.recorder != nullptr) Say(&request);
    }
  }
  if (sampled != nullptr) AppendToken(call, sequence, *sampled);
}

bool Scheduler::Impl::DeliverPromptScores(const Call& call, LiveRequest& request,
                                          const std::vector<TokenScore>& scores) {
  if (!std::ranges::all_of(scores, &TokenScore::finite)) {
    FailNonFinite(call, request);
    return false;
  }
  Event& event = call.events->emplace_back();
  event.kind = Event::Kind::kPromptScores;
  event.request = request.key;
  event.prompt_scores = scores;
  return true;
}

void Scheduler::Impl::AppendToken(const Call& call, Sequence* sequence, const TokenScore& score) {
  LiveRequest& request = *sequence->request;
  const FinishReason finish = StopReason(*sequence, score.token);
  sequence->generated.push_back(score.token);
  ++generated_tokens_;
  ++AccountOf(*sequence).load.generated_tokens;
  if (!request.first_token_at) {
    request.first_token_at = call.now;
    CountTarget(request, call.now);
  }
  CountLateness(call, sequence);

  Event& event = call.events->emplace_back();
  event.kind = Event::Kind::kToken;
  event.request = request.key;
  event.sequence = sequence->index;
  event.score = score;
  event.finish = finish;
  if (finish == FinishReason::kEos || finish == FinishReason::kStop) event.stop_token = score.token;
  if (finish != FinishReason::kNone) EndSequence(call, sequence);
}

void Scheduler::Impl::CountLateness(const Call& call, Sequence* sequence) {
  const Duration late = call.now - sequence->last_token_at - options_.max_itl;
  sequence->last_token_at = call.now;
  if (options_.max_itl == Duration(0) || sequence->generated.size() == 1 || late <= Duration(0)) return;
  ++late_tokens_;
  late_total_ += late;
  late_most_ = std::max(late_most_, late);
}

// Why the sequence ends with this token, which is not appended yet.
FinishReason Scheduler::Impl::StopReason(const Sequence& sequence, TokenId token) const {
  const LiveRequest& request = *sequence.request;
  auto is_in = [token](const std::vector<TokenId>& ids) { return std::ranges::find(ids, token) != ids.end(); };
  if (static_cast<int32_t>(sequence.generated.size()) >= request.min_new_tokens) {
    if (request.ends_at_eos && is_in(options_.eos_ids)) return FinishReason::kEos;
    if (request.has_stop_ids && is_in(request.request->stop.token_ids)) return FinishReason::kStop;
  }
  return sequence.known() + 1 >= request.limit ? FinishReason::kLength : FinishReason::kNone;
}

// NaN in, NaN out: nothing that this request has computed may be found by another one.
void Scheduler::Impl::FailNonFinite(const Call& call, LiveRequest& request) {
  for (const Sequence& sequence : request.sequences) {
    for (BlockId block : sequence.blocks) cache_.Withdraw(block);
  }
  for (BlockId block : request.shared) cache_.Withdraw(block);
  ErrorDetail detail;
  detail.reason = "NON_FINITE_LOGITS";
  EndRequest(call, request,
             Status(Code::kInternal, "the model computed NaN or infinity for this request", std::move(detail)));
}

// --- Sharing ---------------------------------------------------------------------------------------------------------

// Offers newly full blocks to the prefix cache. A block whose name is taken stays private: its twin serves as well.
void Scheduler::Impl::Publish(Sequence* sequence) {
  if (!sequence->request->uses_cache) return;
  const int32_t full = sequence->computed >> block_shift_;
  for (; sequence->published < full; ++sequence->published) {
    const int32_t i = sequence->published;
    const BlockId block = sequence->blocks[static_cast<size_t>(i)];
    const BlockHash hash = HashOf(sequence, i);
    const bool published =
        cache_.Publish(block, hash, ParentOf(sequence, i), BlockTokens(*sequence, i, &token_scratch_));
    if (!published || options_.recorder == nullptr) continue;
    options_.recorder->OnPublish(block, 1, [&](BlockId) -> const BlockHash& { return hash; });
  }
}

//   prompt   |====|====|====|==|      shared: the full blocks before the last token; the request holds them until every
//   shared   |----|----|----|         sibling has been admitted. A sibling computes the rest again, in a block of its
//   sibling                 |??|...   own: nothing is copied, and nobody writes into what others read.
void Scheduler::Impl::ShareWithSiblings(Sequence* leader) {
  LiveRequest& request = *leader->request;
  request.leader = nullptr;
  for (Sequence& sibling : request.sequences) {
    if (sibling.state == Sequence::State::kHeld) MakeWaiting(&sibling);
  }
  const int32_t full = (request.prompt_size - 1) / options_.block_size;
  if (request.num_unadmitted == 0 || full == 0) return;
  request.shared.assign(leader->blocks.begin(), leader->blocks.begin() + full);
  for (BlockId block : request.shared) pool_.Ref(block);
  sharing_.push_back(&request);
}

std::span<const TokenId> Scheduler::Impl::BlockTokens(const Sequence& sequence, int32_t i,
                                                      std::vector<TokenId>* scratch) const {
  const int32_t begin = i * options_.block_size, end = begin + options_.block_size;
  const LiveRequest& request = *sequence.request;
  const auto size = static_cast<size_t>(options_.block_size);
  if (end <= request.prompt_size) return {request.request->prompt.data() + begin, size};
  if (begin >= request.prompt_size) return {sequence.generated.data() + (begin - request.prompt_size), size};
  scratch->clear();
  for (int32_t position = begin; position < end; ++position) scratch->push_back(sequence.TokenAt(position));
  return *scratch;
}

const BlockHash* Scheduler::Impl::KnownHash(const Sequence& sequence, int32_t i) const {
  const int32_t in_prompt = sequence.request->prompt_size / options_.block_size;
  const std::vector<BlockHash>& chain = i < in_prompt ? sequence.request->prompt_hashes : sequence.hashes;
  const auto at = static_cast<size_t>(i < in_prompt ? i : i - in_prompt);
  return at < chain.size() ? &chain[at] : nullptr;
}

const BlockHash& Scheduler::Impl::HashOf(Sequence* sequence, int32_t i) {
  const int32_t in_prompt = sequence->request->prompt_size / options_.block_size;
  // Names are needed in order, so that at most a few are missing here.
  for (int32_t next = i; KnownHash(*sequence, i) == nullptr;) {
    while (next > 0 && KnownHash(*sequence, next - 1) == nullptr) --next;
    const RequestKey key = sequence->request->key;
    const uint32_t owner = next < in_prompt ? BlockNamer::kPrompt : sequence->index;
    const BlockHash hash = options_.namer != nullptr
                               ? options_.namer->Name(key, owner, next)
                               : ChainHash(ParentOf(sequence, next), BlockTokens(*sequence, next, &token_scratch_));
    if (options_.recorder != nullptr) options_.recorder->OnBlockName(key, owner, next, hash);
    (next < in_prompt ? sequence->request->prompt_hashes : sequence->hashes).push_back(hash);
    ++next;
  }
  return *KnownHash(*sequence, i);
}

const BlockHash& Scheduler::Impl::ParentOf(Sequence* sequence, int32_t i) {
  // A replay believes in recorded names: a checkpoint has none of parents, and no record has those of salts.
  static constexpr BlockHash kAnyParent{};
  if (options_.namer != nullptr) return kAnyParent;
  return i == 0 ? sequence->request->root : HashOf(sequence, i - 1);
}

}  // namespace altiplano
