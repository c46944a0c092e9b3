#include "server/bench/arrivals.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

namespace altiplano::bench {
namespace {

using std::chrono::milliseconds;
using testing::Each;
using testing::ElementsAre;
using testing::HasSubstr;

Dataset Untimed(size_t size) {
  Dataset dataset;
  dataset.requests.resize(size);
  return dataset;
}

TEST(RequestRate, IsInfTraceOrANumber) {
  EXPECT_EQ(ParseRequestRate("inf")->kind, ArrivalOptions::Kind::kAtOnce);
  EXPECT_EQ(ParseRequestRate("trace")->kind, ArrivalOptions::Kind::kTrace);
  EXPECT_EQ(ParseRequestRate("4.5")->rate, 4.5);
  for (const char* bad : {"", "0", "-1", "nan", "fast", "3x", "1e99"}) {
    EXPECT_THAT(ParseRequestRate(bad).status().message(), HasSubstr("must be inf, trace or")) << bad;
  }
}

TEST(Arrivals, AtOnce) {
  EXPECT_THAT(*MakeArrivals({}, Untimed(5)), Each(Duration(0)));
}

TEST(Arrivals, GapsHaveTheRateAndTheBurstinessAskedFor) {
  for (double burstiness : {0.25, 1.0, 4.0}) {
    ArrivalOptions options{.kind = ArrivalOptions::Kind::kRate, .rate = 50, .burstiness = burstiness, .seed = 5};
    std::vector<Duration> arrivals = *MakeArrivals(options, Untimed(20001));
    EXPECT_EQ(arrivals.front(), Duration(0));
    EXPECT_TRUE(std::is_sorted(arrivals.begin(), arrivals.end()));
    double mean = Seconds(arrivals.back()) / 20000, variance = 0;
    for (size_t i = 1; i < arrivals.size(); ++i) {
      variance += std::pow(Seconds(arrivals[i] - arrivals[i - 1]) - mean, 2) / 20000;
    }
    EXPECT_NEAR(mean, 0.02, 0.02 * 0.06);
    // The squared coefficient of variation of a gamma distribution is one over its shape.
    EXPECT_NEAR(variance / (mean * mean) * burstiness, 1, 0.15) << burstiness;
    EXPECT_EQ(*MakeArrivals(options, Untimed(20001)), arrivals);
    options.seed = 6;
    EXPECT_NE(*MakeArrivals(options, Untimed(20001)), arrivals);
  }
}

TEST(Arrivals, TraceIsReplayedFaster) {
  Dataset dataset = Untimed(2);
  dataset.requests[1].arrival = milliseconds(3000);
  ArrivalOptions options{.kind = ArrivalOptions::Kind::kTrace, .speed_up = 10};
  EXPECT_THAT(MakeArrivals(options, dataset).status().message(), HasSubstr("no times to replay"));
  dataset.timed = true;
  EXPECT_THAT(*MakeArrivals(options, dataset), ElementsAre(Duration(0), milliseconds(300)));
}

}  // namespace
}  // namespace altiplano::bench
