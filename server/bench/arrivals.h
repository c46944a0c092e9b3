// When the requests of an open loop are sent.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "server/base/clock.h"
#include "server/base/status.h"
#include "server/bench/dataset.h"

namespace altiplano::bench {

struct ArrivalOptions {
  enum class Kind { kAtOnce, kRate, kTrace };
  Kind kind = Kind::kAtOnce;
  double rate = 0;  // kRate: requests a second
  double burstiness =
      1;  // kRate: shape of the gamma distribution of the gaps; 1: Poisson, below: burstier, above: more even
  double speed_up = 1;  // kTrace: how many times faster than recorded
  uint64_t seed = 0;
};

// "inf" (all at once), "trace" (the dataset's times) or requests a second above 0.
StatusOr<ArrivalOptions> ParseRequestRate(std::string_view text);

// Not descending, one for each request of the dataset, the first at zero. INVALID_ARGUMENT when the dataset lacks
// times.
StatusOr<std::vector<Duration>> MakeArrivals(const ArrivalOptions& options, const Dataset& dataset);

}  // namespace altiplano::bench
