#include "server/bench/report.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "server/base/json.h"

namespace altiplano::bench {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::Not;

TEST(Describe, PercentilesInterpolateAsNumpyDoes) {
  Distribution d = Describe({4, 1, 3, 2}, {0, 25, 90, 100});
  EXPECT_DOUBLE_EQ(d.mean, 2.5);
  EXPECT_DOUBLE_EQ(d.median, 2.5);
  EXPECT_DOUBLE_EQ(d.std, 1.118033988749895);  // numpy.std([1,2,3,4])
  EXPECT_DOUBLE_EQ(d.max, 4);
  EXPECT_DOUBLE_EQ(d.percentiles[0].second, 1);
  EXPECT_DOUBLE_EQ(d.percentiles[1].second, 1.75);
  EXPECT_DOUBLE_EQ(d.percentiles[2].second, 3.7);
  EXPECT_DOUBLE_EQ(d.percentiles[3].second, 4);
  EXPECT_EQ(Describe({}, {99}).percentiles[0].second, 0);
}

RequestRecord Answer(Duration start, Duration ttft, std::vector<Duration> itl) {
  RequestRecord record;
  record.ok = true;
  record.input_tokens = 100;
  record.output_tokens = 1 + itl.size();
  record.start = start;
  record.ttft = record.latency = ttft;
  for (Duration gap : itl) record.latency += gap;
  record.itl = std::move(itl);
  return record;
}

BenchReport Sample() {
  BenchReport report;
  report.max_concurrency = 2;
  report.duration = seconds(2);
  report.requests = {Answer(seconds(0), milliseconds(50), std::vector<Duration>(10, milliseconds(20))),
                     Answer(milliseconds(250), milliseconds(70), {})};
  report.requests[0].cached_tokens = 30;
  report.requests[0].queued = milliseconds(7);
  report.requests[0].preemptions = 2;
  RequestRecord failed;
  failed.error_code = "RESOURCE_EXHAUSTED QUEUE_FULL";
  failed.error = "the queue is full";
  failed.output_tokens = 5;
  failed.start = milliseconds(100);
  failed.latency = milliseconds(200);
  report.requests.push_back(failed);
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
  EXPECT_DOUBLE_EQ(json["max_queue_ms"], 7);
  EXPECT_DOUBLE_EQ(json["p50_e2el_ms"], 160);
  EXPECT_DOUBLE_EQ(json["prefix_hit_percent"], 15);
  EXPECT_EQ(json["preemptions"], 2);
  EXPECT_EQ(json["errors"]["RESOURCE_EXHAUSTED QUEUE_FULL"]["count"], 1);
  EXPECT_EQ(json["errors"]["RESOURCE_EXHAUSTED QUEUE_FULL"]["example"], "the queue is full");
  EXPECT_FALSE(json.contains("ttfts"));
}

TEST(BenchReport, PeakConcurrencyIsOfOverlaps) {
  BenchReport report = Sample();  // 0-250, 250-320 and 100-300 ms: the second begins as the first ends
  EXPECT_EQ(report.ToJson()["max_concurrent_requests"], 2);
  report.requests[1].start = milliseconds(249);
  EXPECT_EQ(report.ToJson()["max_concurrent_requests"], 3);
}

TEST(BenchReport, CancelledRequestsAreCountedAndInNoOtherNumber) {
  BenchReport report = Sample();
  report.requests[0].ok = false;
  report.requests[0].cancelled = true;
  EXPECT_THAT(report.ToText(), Not(HasSubstr("not sent"))) << "nobody interrupted it";
  report.interrupted = true;
  report.not_sent = 7;
  OrderedJson json = report.ToJson();
  EXPECT_EQ(json["interrupted"], true);
  EXPECT_EQ(json["completed"], 1);
  EXPECT_EQ(json["failed"], 1);
  EXPECT_EQ(json["cancelled"], 1);
  EXPECT_EQ(json["not_sent"], 7);
  EXPECT_EQ(json["total_output_tokens"], 1);
  EXPECT_DOUBLE_EQ(json["mean_ttft_ms"], 70);
  EXPECT_THAT(report.ToText(), HasSubstr("Requests cancelled by the interruption:  1"));
  EXPECT_THAT(report.ToText(), HasSubstr("Requests not sent:                       7"));
}

TEST(BenchReport, DetailsHaveEachRequest) {
  OrderedJson json = Sample().ToJson(/*detailed=*/true);
  EXPECT_EQ(json["ttfts"].size(), 3u);
  EXPECT_EQ(json["itls"][0].size(), 10u);
  EXPECT_EQ(json["error_codes"][2], "RESOURCE_EXHAUSTED QUEUE_FULL");
  EXPECT_EQ(json["cached_lens"][0], 30);
}

TEST(BenchReport, TextHasTheLinesPeoplePaste) {
  BenchReport report = Sample();
  report.notes = {"mind the gap"};
  std::string text = report.ToText();
  for (const char* line :
       {"============ Serving Benchmark Result ============", "Successful requests:                     2",
        "Mean TTFT (ms):                          60.00", "P99 ITL (ms):                            20.00",
        "-----Time per Output Token (excl. 1st token)------", "Maximum request concurrency:             2",
        "RESOURCE_EXHAUSTED QUEUE_FULL:           1", "note: mind the gap"}) {
    EXPECT_THAT(text, HasSubstr(line));
  }
  EXPECT_THAT(text, Not(HasSubstr("goodput")));
  report.metrics = {"ttft"};
  EXPECT_THAT(report.ToText(), Not(HasSubstr("ITL")));
}

// --- Goodput ---------------------------------------------------------------------------------------------------------

TEST(Goodput, ARequestMustMeetEveryObjective) {
  BenchReport report = Sample();
  report.requests[0].itl[3] = milliseconds(31);
  auto good = [&](const char* objectives) {
    report.objectives = *ParseGoodput(objectives);
    return report.ToJson()["good_requests"];
  };
  EXPECT_EQ(good("ttft:70"), 2);
  EXPECT_EQ(good("ttft:69"), 1);
  EXPECT_EQ(good("ttft:49"), 0);
  EXPECT_EQ(good("tpot:20"), 2) << "met by an answer without one";
  EXPECT_EQ(good("tpot:19.9"), 1);
  EXPECT_EQ(good("itl:30"), 1) << "one gap that is too long spoils a request";
  EXPECT_EQ(good("itl:31"), 2);
  EXPECT_EQ(good("queue:6,e2el:100"), 1);
  EXPECT_EQ(good("ttft:60 e2el:100"), 0) << "either is met by one, both by none";
  EXPECT_DOUBLE_EQ(report.ToJson()["goodput_slos"]["e2el"], 100);
  EXPECT_THAT(report.ToText(), HasSubstr("Request goodput (req/s):                 0.00"));
}

TEST(Flags, ListsAreCheckedByName) {
  EXPECT_THAT(*ParseMetrics("ttft,queue"), ElementsAre("ttft", "queue"));
  EXPECT_THAT(ParseMetrics("ttft,foo").status().message(), HasSubstr("\"foo\", must be of ttft"));
  EXPECT_THAT(*ParsePercentiles("50,99.9"), ElementsAre(50, 99.9));
  for (const char* bad : {"101", "-1", "x", "50,nan"}) EXPECT_FALSE(ParsePercentiles(bad).ok()) << bad;
  for (const char* bad : {"ttft", "ttft:", "ttft:0", "foo:5", "ttft:x"}) {
    EXPECT_THAT(ParseGoodput(bad).status().message(), HasSubstr("must be METRIC:MILLISECONDS")) << bad;
  }
}

// --- The client ------------------------------------------------------------------------------------------------------

TEST(ClientNotes, NothingToSayOfAnIdleClient) {
  EXPECT_THAT(ClientNotes({.cpu_seconds = 0.5, .cores = 2}, Sample()), IsEmpty());
}

TEST(ClientNotes, EachSignOfAClientThatWasTheLimit) {
  EXPECT_THAT(ClientNotes({.cpu_seconds = 3.8, .cores = 2}, Sample()),
              ElementsAre(HasSubstr("1.9 of this machine's 2")));
  BenchReport late = Sample();
  for (RequestRecord& request : late.requests) request.lag = milliseconds(8);
  EXPECT_THAT(ClientNotes({}, late), ElementsAre(HasSubstr("late (p99 8.0 ms)")));
  for (RequestRecord& request : late.requests) request.ttft = seconds(1);
  EXPECT_THAT(ClientNotes({}, late), IsEmpty()) << "8 ms do not matter to a TTFT of a second";
  BenchReport held = Sample();
  held.requests[2].held = milliseconds(1500);
  EXPECT_THAT(ClientNotes({}, held), IsEmpty()) << "a closed loop is meant to hold back";
  held.request_rate = "5";
  EXPECT_THAT(ClientNotes({}, held), ElementsAre(HasSubstr("held back 1 of 3 requests, one for 1.5 s")));
  BenchReport lumps = Sample();
  lumps.requests[0].output_tokens = 22;
  EXPECT_THAT(ClientNotes({}, lumps), ElementsAre(HasSubstr("1.92 tokens on average")));
}

}  // namespace
}  // namespace altiplano::bench
