#include <algorithm>
#include <map>
#include <set>
#include <utility>

#include "server/base/strings.h"
#include "server/bench/flight_timeline.h"

namespace altiplano::bench {

namespace {

using SequenceId = std::pair<RequestKey, uint32_t>;

class Historian {
 public:
  explicit Historian(const FlightRecord& record) : record_(record) {}

  FlightHistory Run() {
    for (const FlightFrame& frame : record_.frames) {
      const auto* checkpoint = std::get_if<FlightCheckpoint>(&frame);
      if (checkpoint == nullptr) continue;
      for (const FlightCheckpoint::Request& live : checkpoint->requests) Know(live.arrival);
    }
    for (const FlightFrame& frame : record_.frames) {
      std::visit([this](const auto& one) { Take(one); }, frame);
    }
    for (auto& [id, state] : states_) Close(state, history_.end);
    std::ranges::stable_sort(history_.spans, {}, &FlightSpan::end);
    std::ranges::stable_sort(history_.marks, {}, &FlightMark::at);
    return std::move(history_);
  }

 private:
  struct State {
    std::optional<FlightSpan> open;  // waiting or decoding
    bool has_token = false;
    TimePoint last_token{};
    int32_t prompt_tokens = -1;  // -1: not known
  };

  State& StateOf(SequenceId id) {
    auto [it, is_new] = states_.try_emplace(id);
    if (is_new) {
      if (const FlightArrival* arrival = history_.ArrivalOf(id.first))
        it->second.prompt_tokens = arrival->prompt_tokens;
    }
    return it->second;
  }
  void Reach(TimePoint now) {
    if (!began_) history_.begin = now;
    began_ = true;
    history_.end = std::max(history_.end, now);
  }
  void Mark(FlightMark mark) { history_.marks.push_back(mark); }
  void Close(State& state, TimePoint now) {
    if (!state.open) return;
    if (state.open->kind == FlightSpan::Kind::kWaiting) {
      state.open->end = std::max(now, state.open->begin);
      waiting_.erase({state.open->key, state.open->sequence});
    }
    history_.spans.push_back(*state.open);
    state.open.reset();
  }
  void Wait(SequenceId id, TimePoint since) {
    State& state = StateOf(id);
    Close(state, since);
    state.open = FlightSpan{.key = id.first, .sequence = id.second, .begin = since, .end = since};
    waiting_.insert(id);
  }

  void Know(const FlightArrival& arrival) {
    if (history_.ArrivalOf(arrival.key) != nullptr) return;
    history_.arrivals.insert(std::ranges::upper_bound(history_.arrivals, arrival.key, {}, &FlightArrival::key),
                             &arrival);
  }
  void Take(const FlightArrival& arrival) {
    Reach(arrival.arrival);
    Know(arrival);
    Mark({.kind = FlightMark::Kind::kArrived, .key = arrival.key, .at = arrival.arrival});
    Wait({arrival.key, 0}, arrival.arrival);
  }
  void Take(const FlightCancel&) {}
  void Take(const FlightStop&) {}
  void Take(const FlightCacheReset&) {}
  void Take(const FlightNames&) {}
  void Take(const FlightCheckpoint&) {}
  void Take(const FlightAbort& abort) {
    Reach(abort.now);
    for (auto& [id, state] : states_) Close(state, abort.now);
  }

  void Take(const std::vector<FlightEnd>& ends, TimePoint now, uint64_t step) {
    for (const FlightEnd& end : ends) {
      if (end.sequence == FlightEnd::kRequest) {
        for (auto it = states_.lower_bound({end.key, 0}); it != states_.end() && it->first.first == end.key; ++it) {
          Close(it->second, now);
        }
        Mark({.kind = FlightMark::Kind::kEnded, .key = end.key, .at = now, .step = step, .end = end});
      } else {
        Close(StateOf({end.key, end.sequence}), now);
        Mark({.kind = FlightMark::Kind::kFinished,
              .key = end.key,
              .sequence = end.sequence,
              .at = now,
              .step = step,
              .end = end});
      }
    }
  }

  void Take(const FlightPlan& plan) {
    Reach(plan.now);
    Take(plan.ends, plan.now, plan.step);
    for (const FlightPreempted& preempted : plan.preempted) {
      Mark({.kind = FlightMark::Kind::kPreempted,
            .key = preempted.key,
            .sequence = preempted.sequence,
            .at = plan.now,
            .step = plan.step});
      Wait({preempted.key, preempted.sequence}, plan.now);
    }
    for (const FlightPlanned& planned : plan.sequences) {
      if (!planned.admitted) continue;
      Close(StateOf({planned.key, planned.sequence}), plan.now);
      Mark({.kind = FlightMark::Kind::kAdmitted,
            .key = planned.key,
            .sequence = planned.sequence,
            .at = plan.now,
            .step = plan.step,
            .slot = planned.slot,
            .cached = planned.first_position});
    }
    const std::vector<SequenceId> still(waiting_.begin(), waiting_.end());
    for (SequenceId id : still) {
      State& state = StateOf(id);
      FlightSpan& span = *state.open;
      if (span.first_step != 0 && (span.why != plan.notes.why || span.head != plan.notes.head)) Wait(id, plan.now);
      FlightSpan& now = *state.open;
      if (now.first_step == 0) now.first_step = plan.step;
      if (plan.step != 0) now.last_step = plan.step;
      now.why = plan.notes.why;
      now.head = plan.notes.head;
    }
    if (plan.step != 0)
      history_.steps.push_back({.plan = &plan, .result = nullptr, .begin = plan.now, .end = plan.now});
  }

  void Take(const FlightResult& result) {
    const TimePoint last_result = std::exchange(last_result_, result.now);
    Reach(result.now);
    auto step = std::ranges::find_if(history_.steps.rbegin(), history_.steps.rend(),
                                     [&](const FlightStep& s) { return s.plan->step == result.step; });
    if (step != history_.steps.rend()) {  // else its plan has left the ring
      step->result = &result;
      step->begin = std::max(step->plan->now, last_result);  // while the step before ran it could not begin
      step->end = result.now;
      for (const FlightPlanned& planned : step->plan->sequences) Compute(planned, *step);
    }
    Take(result.ends, result.now, result.step);
  }

  void Compute(const FlightPlanned& planned, const FlightStep& step) {
    State& state = StateOf({planned.key, planned.sequence});
    const int32_t end = planned.first_position + planned.num_tokens;
    const bool decode = planned.num_tokens == 1 && planned.sample &&
                        (state.prompt_tokens >= 0 ? planned.first_position >= state.prompt_tokens : state.has_token);
    if (decode && state.open && state.open->kind == FlightSpan::Kind::kDecode &&
        state.open->last_step + 1 == step.plan->step) {
      FlightSpan& span = *state.open;
      span.end = step.end;
      span.last_step = step.plan->step;
      ++span.tokens;
    } else {
      // A sequence preempted since this step began waits already: that stays open.
      if (state.open && state.open->kind == FlightSpan::Kind::kDecode) Close(state, step.begin);
      FlightSpan span{.kind = decode ? FlightSpan::Kind::kDecode : FlightSpan::Kind::kPrompt,
                      .key = planned.key,
                      .sequence = planned.sequence,
                      .begin = step.begin,
                      .end = step.end,
                      .first_step = step.plan->step,
                      .last_step = step.plan->step,
                      .slot = planned.slot,
                      .first_position = planned.first_position,
                      .tokens = planned.num_tokens};
      if (decode && !state.open) {
        state.open = span;
      } else {
        history_.spans.push_back(span);
      }
    }
    if (!planned.sample) return;
    if (!state.has_token && state.prompt_tokens >= 0 && end == state.prompt_tokens) {
      Mark({.kind = FlightMark::Kind::kFirstToken,
            .key = planned.key,
            .sequence = planned.sequence,
            .at = step.end,
            .step = step.plan->step});
    }
    const Duration gap = step.end - state.last_token;
    if (state.has_token && state.open && state.open->kind == FlightSpan::Kind::kDecode &&
        gap > state.open->longest_gap) {
      state.open->longest_gap = gap;
      state.open->longest_gap_step = step.plan->step;
    }
    state.has_token = true;
    state.last_token = step.end;
  }

  const FlightRecord& record_;
  FlightHistory history_;
  std::map<SequenceId, State> states_;
  std::set<SequenceId> waiting_;
  TimePoint last_result_{};
  bool began_ = false;
};

}  // namespace

const FlightArrival* FlightHistory::ArrivalOf(RequestKey key) const {
  auto it = std::ranges::lower_bound(arrivals, key, {}, &FlightArrival::key);
  return it != arrivals.end() && (*it)->key == key ? *it : nullptr;
}

std::string FlightHistory::NameOf(RequestKey key) const {
  const FlightArrival* arrival = ArrivalOf(key);
  return arrival == nullptr || arrival->id.empty() ? StrCat("#", key) : arrival->id;
}

FlightHistory HistoryOf(const FlightRecord& record) {
  return Historian(record).Run();
}

}  // namespace altiplano::bench
