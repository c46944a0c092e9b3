// Step costs fitted to flight records, as files for --step-cost.
#pragma once

#include <cstdint>
#include <string>

#include "server/base/status.h"
#include "server/scheduler/flight_record.h"

namespace altiplano::cli {

// Returns what to tell people: coefficients and how far off they are. description, kv_tokens: of the file.
StatusOr<std::string> FitAndWriteStepCost(const FlightRecord& record, const std::string& description, int64_t kv_tokens,
                                          const std::string& path);

}  // namespace altiplano::cli
