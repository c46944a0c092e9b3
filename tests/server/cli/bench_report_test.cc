#include "server/cli/bench_report.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace altiplano::cli {
namespace {

using std::chrono::milliseconds;
using ::testing::HasSubstr;

TEST(BenchReport, PercentilesInterpolateAsNumpyDoes) {
  Distribution d = Describe({4, 1, 3, 2}, {0, 25, 90, 100});
  EXPECT_DOUBLE_EQ(d.mean, 2.5);
  EXPECT_DOUBLE_EQ(d.median, 2.5);
  EXPECT_DOUBLE_EQ(d.std, 1.118033988749895);  // numpy.std([1,2,3,4])
  EXPECT_DOUBLE_EQ(d.percentiles[0].second, 1);
  EXPECT_DOUBLE_EQ(d.percentiles[1].second, 1.75);
  EXPECT_DOUBLE_EQ(d.percentiles[2].second, 3.7);
  EXPECT_DOUBLE_EQ(d.percentiles[3].second, 4);
  EXPECT_EQ(Describe({}, {99}).percentiles[0].second, 0);
}

BenchReport Sample() {
  BenchReport report;
  report.max_concurrency = 2;
  report.duration = std::chrono::seconds(2);
  report.requests = {
      {.ok = true,
       .error = "",
       .input_tokens = 100,
       .output_tokens = 11,
       .ttft = milliseconds(50),
       .latency = milliseconds(250),
       .itl = {milliseconds(20), milliseconds(20)}},
      {.ok = true,
       .error = "",
       .input_tokens = 100,
       .output_tokens = 1,
       .ttft = milliseconds(70),
       .latency = milliseconds(70),
       .itl = {}},
      {.ok = false, .error = "x", .input_tokens = 100, .output_tokens = 5, .ttft = {}, .latency = {}, .itl = {}}};
  return report;
}

TEST(BenchReport, FailedRequestsCountOnlyAsFailed) {
  OrderedJson json = Sample().ToJson();
  EXPECT_EQ(json["completed"], 2);
  EXPECT_EQ(json["failed"], 1);
  EXPECT_EQ(json["total_input_tokens"], 200);
  EXPECT_EQ(json["total_output_tokens"], 12);
  EXPECT_DOUBLE_EQ(json["request_throughput"], 1);
  EXPECT_DOUBLE_EQ(json["output_throughput"], 6);
  EXPECT_DOUBLE_EQ(json["mean_ttft_ms"], 60);
  EXPECT_DOUBLE_EQ(json["mean_tpot_ms"], 20) << "an answer of one token has no time per output token";
  EXPECT_DOUBLE_EQ(json["mean_itl_ms"], 20);
}

TEST(BenchReport, TextHasTheLinesPeoplePaste) {
  std::string text = Sample().ToText();
  for (const char* line :
       {"============ Serving Benchmark Result ============", "Successful requests:                     2",
        "Mean TTFT (ms):                          60.00", "P99 ITL (ms):                            20.00",
        "-----Time per Output Token (excl. 1st token)------"}) {
    EXPECT_THAT(text, HasSubstr(line));
  }
}

}  // namespace
}  // namespace altiplano::cli
