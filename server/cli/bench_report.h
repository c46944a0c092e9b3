// What a load test measured, printed and written under vLLM's names so that results can be laid side by side.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "server/base/clock.h"
#include "server/base/json.h"

namespace altiplano::cli {

struct RequestRecord {
  bool ok = false;
  std::string error;  // when not ok
  uint64_t input_tokens = 0;
  uint64_t output_tokens = 0;
  Duration ttft{};            // sent to first token
  Duration latency{};         // sent to end
  std::vector<Duration> itl;  // between messages of the stream after the first
};

// Of values in milliseconds; zeros when there are none.
struct Distribution {
  double mean = 0, median = 0, std = 0;
  std::vector<std::pair<double, double>> percentiles;  // {99, 12.3}
};
// Percentiles interpolate linearly between the two nearest ranks, as numpy's default.
Distribution Describe(std::vector<double> values, const std::vector<double>& percentiles);

struct BenchReport {
  int64_t max_concurrency = 0;
  Duration duration{};
  std::vector<RequestRecord> requests;
  std::vector<double> percentiles = {99};

  std::string ToText() const;
  OrderedJson ToJson() const;
};

}  // namespace altiplano::cli
