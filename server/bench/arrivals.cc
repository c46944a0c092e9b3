#include "server/bench/arrivals.h"

#include <charconv>
#include <cmath>
#include <random>

#include "server/base/check.h"
#include "server/base/strings.h"

namespace altiplano::bench {

namespace {
constexpr double kMaxSeconds = 1e9;  // three decades: beyond it nanoseconds overflow

Duration FromSeconds(double seconds) {
  return Duration(std::llround(std::min(seconds, kMaxSeconds) * 1e9));
}
}  // namespace

StatusOr<ArrivalOptions> ParseRequestRate(std::string_view text) {
  ArrivalOptions options;
  if (text == "inf") return options;
  options.kind = ArrivalOptions::Kind::kTrace;
  if (text == "trace") return options;
  options.kind = ArrivalOptions::Kind::kRate;
  auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), options.rate);
  if (error != std::errc() || end != text.data() + text.size() || !(options.rate > 0 && options.rate <= 1e9)) {
    return Status(Code::kInvalidArgument,
                  StrCat("is \"", text, "\", must be inf, trace or requests a second above 0, such as 4.5"));
  }
  return options;
}

StatusOr<std::vector<Duration>> MakeArrivals(const ArrivalOptions& options, const Dataset& dataset) {
  std::vector<Duration> arrivals(dataset.requests.size());
  if (options.kind == ArrivalOptions::Kind::kTrace) {
    if (!dataset.timed) {
      return Status(Code::kInvalidArgument, "the dataset has no times to replay: use azure, mooncake, or a rate");
    }
    CHECK(options.speed_up > 0);
    for (size_t i = 0; i < arrivals.size(); ++i) {
      arrivals[i] = FromSeconds(Seconds(dataset.requests[i].arrival) / options.speed_up);
    }
  } else if (options.kind == ArrivalOptions::Kind::kRate) {
    CHECK(options.rate > 0 && options.burstiness > 0);
    std::mt19937_64 random(options.seed);
    std::gamma_distribution<double> gap(options.burstiness, 1 / (options.rate * options.burstiness));
    double at = 0;
    for (size_t i = 1; i < arrivals.size(); ++i) arrivals[i] = FromSeconds(at += gap(random));
  }
  return arrivals;
}

}  // namespace altiplano::bench
