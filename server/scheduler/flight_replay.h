// Runs the real scheduler on what a flight record says went into it, and compares what it decides with what was
// recorded.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "server/base/status.h"
#include "server/scheduler/flight_record.h"

namespace altiplano {

struct ReplayResult {
  uint64_t steps = 0;             // replayed
  std::optional<TimePoint> from;  // of the checkpoint that it began with; none: the record begins with its scheduler
  std::string difference;         // the first one, with its step; empty: every decision was the same
};

// From the record's beginning if that is its scheduler's, else from the first checkpoint on. FAILED_PRECONDITION when
// there is none either. INVALID_ARGUMENT when its frames are not what any scheduler could have been called with.
StatusOr<ReplayResult> ReplayFlightRecord(const FlightRecord& record);

// "kNoBlocks" and so on in words: "no blocks".
std::string_view WhyWaits(PlanNotes::Why why);

}  // namespace altiplano
