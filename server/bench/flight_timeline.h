// A flight record for people: who waited for what, who computed when. As text, and as a trace for Perfetto or Chrome.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "server/base/status.h"
#include "server/scheduler/flight_record.h"

namespace altiplano::bench {

// What one sequence did from `begin` to `end`.
struct FlightSpan {
  enum class Kind : uint8_t {
    kWaiting,  // `why`, as the head of the queue or behind `head`
    kPrompt,   // one step's chunk
    kDecode,   // steps one after the other
  };
  Kind kind = Kind::kWaiting;
  RequestKey key = 0;
  uint32_t sequence = 0;
  TimePoint begin{}, end{};
  uint64_t first_step = 0, last_step = 0;  // of kWaiting: of the plans that left it waiting; 0: none yet
  PlanNotes::Why why = PlanNotes::Why::kNobodyWaits;
  RequestKey head = 0;
  int32_t slot = -1;
  int32_t first_position = 0, tokens = 0;
  Duration longest_gap{};  // of kDecode: between two of its tokens
  uint64_t longest_gap_step = 0;
};
// What happened to one sequence, or to a request, at one time.
struct FlightMark {
  enum class Kind : uint8_t { kArrived, kAdmitted, kFirstToken, kPreempted, kFinished, kEnded };
  Kind kind = Kind::kArrived;
  RequestKey key = 0;
  uint32_t sequence = 0;
  TimePoint at{};
  uint64_t step = 0;
  int32_t slot = -1;
  int32_t cached = 0;  // of kAdmitted: tokens that need not be computed
  FlightEnd end = {};  // of kFinished and kEnded
};
struct FlightStep {
  const FlightPlan* plan = nullptr;
  const FlightResult* result = nullptr;  // null: none came, or it is not in the record
  TimePoint begin{}, end{};
};
// Points into the record.
struct FlightHistory {
  TimePoint begin{}, end{};
  std::vector<FlightStep> steps;
  std::vector<FlightSpan> spans;               // by end
  std::vector<FlightMark> marks;               // by time
  std::vector<const FlightArrival*> arrivals;  // by key; also of those before the record begins that a checkpoint has

  // The client's id; "#17" when the record does not know it, or it has none.
  std::string NameOf(RequestKey key) const;
  const FlightArrival* ArrivalOf(RequestKey key) const;  // null: the record does not know it
};
FlightHistory HistoryOf(const FlightRecord& record);

struct TimelineOptions {
  std::string request;            // id or "#17": only what happened to it; empty: every step and every request
  Duration from{};                // since the record's beginning
  std::optional<Duration> until;  // to its end otherwise
};
// NOT_FOUND when the record has no such request.
StatusOr<std::string> FlightTimeline(const FlightHistory& history, const SchedulerOptions& scheduler,
                                     const TimelineOptions& options);

// The JSON that ui.perfetto.dev and chrome://tracing open: a track for each slot and each request, counters for blocks,
// queue and budget.
std::string FlightTrace(const FlightHistory& history);

}  // namespace altiplano::bench
