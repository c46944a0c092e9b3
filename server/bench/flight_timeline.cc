#include "server/bench/flight_timeline.h"

#include <algorithm>

#include "server/base/json.h"
#include "server/base/strings.h"
#include "server/scheduler/flight_replay.h"

namespace altiplano::bench {

namespace {

std::string_view FinishName(FinishReason reason) {
  switch (reason) {
    case FinishReason::kNone:
      return "";
    case FinishReason::kEos:
      return "EOS";
    case FinishReason::kStop:
      return "a stop";
    case FinishReason::kLength:
      return "its length";
    case FinishReason::kTimeLimit:
      return "its time limit";
    case FinishReason::kToolCall:
      return "a tool call";
    case FinishReason::kCancelled:
      return "cancelled";
  }
  return "";
}

// Lines, each with its time, to be put in order.
class Lines {
 public:
  explicit Lines(const FlightHistory& history, const TimelineOptions& options)
      : history_(history), from_(history.begin + options.from), until_(history.end) {
    if (options.until) until_ = history.begin + *options.until;
  }
  bool Shows(TimePoint begin, TimePoint end) const { return end >= from_ && begin <= until_; }
  void Add(TimePoint at, std::string text) {
    lines_.push_back({at, StrFormat("%12.6f s  %s\n", Seconds(at - history_.begin), text.c_str())});
  }
  std::string Text() {
    std::ranges::stable_sort(lines_, {}, &Line::at);
    std::string out;
    for (const Line& line : lines_) out += line.text;
    return out;
  }

 private:
  struct Line {
    TimePoint at;
    std::string text;
  };
  const FlightHistory& history_;
  const TimePoint from_;
  TimePoint until_;
  std::vector<Line> lines_;
};

std::string NameOf(const FlightHistory& history, RequestKey key, uint32_t sequence) {
  return sequence == 0 ? history.NameOf(key) : StrCat(history.NameOf(key), "/", sequence);
}

std::string Describe(const FlightArrival& arrival) {
  std::string out = StrCat(arrival.prompt_tokens, " prompt tokens, at most ", arrival.max_new_tokens, " more");
  if (arrival.num_sequences > 1) out += StrCat(" in each of ", arrival.num_sequences, " sequences");
  if (arrival.priority != 0) out += StrCat(", priority ", arrival.priority);
  if (!arrival.tenant.empty()) out += StrCat(", tenant ", arrival.tenant);
  if (arrival.ttft_target > Duration(0)) {
    out += StrFormat(", TTFT target %.0f ms", Milliseconds(arrival.ttft_target));
  }
  if (arrival.deadline != kNever) out += StrFormat(", deadline in %.3f s", Seconds(arrival.deadline - arrival.arrival));
  return out;
}

std::string Describe(const FlightHistory& history, const FlightMark& mark) {
  switch (mark.kind) {
    case FlightMark::Kind::kArrived:
      return StrCat("arrives: ", Describe(*history.ArrivalOf(mark.key)));
    case FlightMark::Kind::kAdmitted: {
      std::string out = StrCat("admitted in step ", mark.step, " into slot ", mark.slot);
      if (mark.cached > 0) out += StrCat(", ", mark.cached, " tokens computed already");
      return out;
    }
    case FlightMark::Kind::kFirstToken: {
      const FlightArrival* arrival = history.ArrivalOf(mark.key);
      return StrFormat("first token, %.1f ms after its arrival", Milliseconds(mark.at - arrival->arrival));
    }
    case FlightMark::Kind::kPreempted:
      return StrCat("preempted in step ", mark.step, ": its blocks go to others");
    case FlightMark::Kind::kFinished:
      return StrCat("finishes: ", FinishName(mark.end.finish));
    case FlightMark::Kind::kEnded:
      return mark.end.code == Code::kOk ? "ends" : StrCat("ends with ", CodeName(mark.end.code));
  }
  return "";
}

std::string Describe(const FlightStep& step, const SchedulerOptions& scheduler, const FlightHistory& history) {
  const FlightPlan& plan = *step.plan;
  int32_t tokens = 0;
  for (const FlightPlanned& planned : plan.sequences) tokens += planned.num_tokens;
  std::string out = StrFormat(
      "step %llu %s  %zu sequences, %d tokens of %d (%d of prompts), blocks %d held %d cached of %d",
      static_cast<unsigned long long>(plan.step),
      step.result == nullptr ? "no result" : StrFormat("%.3f ms", Milliseconds(step.end - step.begin)).c_str(),
      plan.sequences.size(), tokens, scheduler.token_budget, plan.prefill_tokens, plan.notes.blocks_held,
      plan.notes.blocks_cached, scheduler.num_blocks);
  if (plan.notes.waiting > 0) {
    out += StrCat("; ", plan.notes.waiting, " wait, ", NameOf(history, plan.notes.head, plan.notes.head_sequence),
                  " first: ", WhyWaits(plan.notes.why));
  }
  return out;
}

std::string Describe(const FlightHistory& history, const FlightSpan& span) {
  const std::string steps = span.first_step == span.last_step
                                ? StrCat("step ", span.first_step)
                                : StrCat("steps ", span.first_step, " to ", span.last_step);
  const double ms = Milliseconds(span.end - span.begin);
  switch (span.kind) {
    case FlightSpan::Kind::kWaiting: {
      if (span.first_step == 0) return StrFormat("waits %.3f ms until the next plan", ms);
      std::string out = StrFormat("waits %.3f ms in %s: ", ms, steps.c_str());
      if (span.head != span.key) out += StrCat("behind ", history.NameOf(span.head), ", which waits: ");
      return out + std::string(WhyWaits(span.why));
    }
    case FlightSpan::Kind::kPrompt:
      return StrFormat("computes tokens %d to %d in %s, %.3f ms", span.first_position,
                       span.first_position + span.tokens - 1, steps.c_str(), ms);
    case FlightSpan::Kind::kDecode: {
      std::string out = StrFormat("decodes %d tokens in %s, %.3f ms each", span.tokens, steps.c_str(),
                                  ms / static_cast<double>(span.tokens));
      if (span.longest_gap > Duration(0)) {
        out += StrFormat("; the longest gap %.3f ms, to step %llu", Milliseconds(span.longest_gap),
                         static_cast<unsigned long long>(span.longest_gap_step));
      }
      return out;
    }
  }
  return "";
}

StatusOr<RequestKey> FindRequest(const FlightHistory& history, const std::string& name) {
  for (const FlightMark& mark : history.marks) {
    if (history.NameOf(mark.key) == name || StrCat("#", mark.key) == name) return mark.key;
  }
  for (const FlightSpan& span : history.spans) {
    if (history.NameOf(span.key) == name || StrCat("#", span.key) == name) return span.key;
  }
  return Status(Code::kNotFound, StrCat("the record has no request ", Excerpt(name, 100)));
}

}  // namespace

StatusOr<std::string> FlightTimeline(const FlightHistory& history, const SchedulerOptions& scheduler,
                                     const TimelineOptions& options) {
  Lines lines(history, options);
  if (options.request.empty()) {
    for (const FlightStep& step : history.steps) {
      if (lines.Shows(step.begin, step.end)) lines.Add(step.begin, Describe(step, scheduler, history));
    }
    for (const FlightMark& mark : history.marks) {
      if (!lines.Shows(mark.at, mark.at)) continue;
      lines.Add(mark.at, StrCat("  ", NameOf(history, mark.key, mark.sequence), " ", Describe(history, mark)));
    }
    return lines.Text();
  }
  ASSIGN_OR_RETURN(const RequestKey key, FindRequest(history, options.request));
  const FlightArrival* arrival = history.ArrivalOf(key);
  const bool many = arrival == nullptr || arrival->num_sequences > 1;
  auto who = [&](uint32_t sequence) { return many ? StrCat("sequence ", sequence, " ") : std::string(); };
  for (const FlightMark& mark : history.marks) {
    if (mark.key != key || !lines.Shows(mark.at, mark.at)) continue;
    const bool whole = mark.kind == FlightMark::Kind::kArrived || mark.kind == FlightMark::Kind::kEnded;
    lines.Add(mark.at, StrCat(whole ? "" : who(mark.sequence), Describe(history, mark)));
  }
  for (const FlightSpan& span : history.spans) {
    if (span.key == key && lines.Shows(span.begin, span.end)) {
      lines.Add(span.begin, StrCat(who(span.sequence), Describe(history, span)));
    }
  }
  return lines.Text();
}

std::string FlightTrace(const FlightHistory& history) {
  constexpr int kScheduler = 1, kSlots = 2, kRequests = 3;
  std::string out = "{\"displayTimeUnit\":\"ms\",\"traceEvents\":[";
  bool first = true;
  auto add = [&](const OrderedJson& event) {
    out += StrCat(first ? "\n" : ",\n", event.dump(-1, ' ', false, OrderedJson::error_handler_t::replace));
    first = false;
  };
  auto us = [](Duration time) { return Seconds(time) * 1e6; };
  auto at = [&](TimePoint time) { return us(time - history.begin); };
  auto name = [&](const char* what, int process, int64_t track, const std::string& text) {
    add({{"ph", "M"}, {"name", what}, {"pid", process}, {"tid", track}, {"args", {{"name", text}}}});
  };
  auto slice = [&](int process, int64_t track, const std::string& text, TimePoint begin, TimePoint end,
                   OrderedJson arguments) {
    add({{"ph", "X"},
         {"name", text},
         {"pid", process},
         {"tid", track},
         {"ts", at(begin)},
         {"dur", us(end - begin)},
         {"args", std::move(arguments)}});
  };
  auto counter = [&](const char* what, TimePoint time, OrderedJson values) {
    add({{"ph", "C"}, {"name", what}, {"pid", kScheduler}, {"ts", at(time)}, {"args", std::move(values)}});
  };

  name("process_name", kScheduler, 0, "scheduler");
  name("process_name", kSlots, 0, "slots");
  name("process_name", kRequests, 0, "requests");
  name("thread_name", kScheduler, 1, "steps");
  for (const FlightStep& step : history.steps) {
    const PlanNotes& notes = step.plan->notes;
    int64_t tokens = 0;
    for (const FlightPlanned& planned : step.plan->sequences) tokens += planned.num_tokens;
    slice(kScheduler, 1, StrCat("step ", step.plan->step), step.begin, step.end,
          {{"sequences", step.plan->sequences.size()},
           {"tokens", tokens},
           {"waiting", notes.waiting},
           {"why", WhyWaits(notes.why)}});
    counter("blocks", step.plan->now, {{"held", notes.blocks_held}, {"cached", notes.blocks_cached}});
    counter("queue", step.plan->now, {{"waiting", notes.waiting}});
    counter("budget", step.plan->now,
            {{"prompts", step.plan->prefill_tokens}, {"decodes", tokens - step.plan->prefill_tokens}});
  }
  std::vector<int32_t> slots;
  std::vector<RequestKey> requests;
  for (const FlightSpan& span : history.spans) {
    if (span.slot >= 0) slots.push_back(span.slot);
    requests.push_back(span.key);
  }
  std::ranges::sort(slots);
  slots.erase(std::unique(slots.begin(), slots.end()), slots.end());
  for (int32_t slot : slots) name("thread_name", kSlots, slot + 1, StrCat("slot ", slot));
  std::ranges::sort(requests);
  requests.erase(std::unique(requests.begin(), requests.end()), requests.end());
  for (RequestKey key : requests) {
    name("thread_name", kRequests, static_cast<int64_t>(key) + 1, history.NameOf(key));
  }
  constexpr const char* kKinds[] = {"waiting", "prompt", "decode"};
  for (const FlightSpan& span : history.spans) {
    const char* kind = kKinds[static_cast<size_t>(span.kind)];
    OrderedJson arguments = {{"first_step", span.first_step}, {"last_step", span.last_step}};
    if (span.kind == FlightSpan::Kind::kWaiting) {
      arguments["why"] = WhyWaits(span.why);
      if (span.head != span.key) arguments["behind"] = history.NameOf(span.head);
    } else {
      arguments["first_position"] = span.first_position;
      arguments["tokens"] = span.tokens;
      slice(kSlots, span.slot + 1, StrCat(NameOf(history, span.key, span.sequence), " ", kind), span.begin, span.end,
            arguments);
    }
    slice(kRequests, static_cast<int64_t>(span.key) + 1, kind, span.begin, span.end, std::move(arguments));
  }
  constexpr const char* kMarks[] = {"arrived", "admitted", "first token", "preempted", "finished", "ended"};
  for (const FlightMark& mark : history.marks) {
    add({{"ph", "i"},
         {"name", kMarks[static_cast<size_t>(mark.kind)]},
         {"pid", kRequests},
         {"tid", static_cast<int64_t>(mark.key) + 1},
         {"ts", at(mark.at)},
         {"s", "t"}});
  }
  return out + "\n]}\n";
}

}  // namespace altiplano::bench
