// What a load test measured, printed and written under vLLM's names so that results can be laid side by side.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "server/base/clock.h"
#include "server/base/json_fwd.h"
#include "server/base/status.h"

namespace altiplano::bench {

struct RequestRecord {
  bool ok = false;
  bool cancelled = false;  // not ok, because the load was interrupted: counted, but in no other number
  std::string error_code;  // when not ok: "RESOURCE_EXHAUSTED QUEUE_FULL"
  std::string error;       // for people
  uint64_t input_tokens = 0;
  uint64_t output_tokens = 0;
  uint64_t cached_tokens = 0;  // of the input, found in the prefix cache
  uint32_t preemptions = 0;
  Duration start{};           // when it was sent, since the load began
  Duration held{};            // waited for others to end, since only max_concurrency may run
  Duration lag{};             // sent that much after it could have been: the client was busy
  Duration queued{};          // in the server, until admission
  Duration ttft{};            // sent to first token
  Duration latency{};         // sent to end
  std::vector<Duration> itl;  // between messages of the stream after the first
};

// Of values in milliseconds; zeros when there are none.
struct Distribution {
  double mean = 0, median = 0, std = 0, max = 0;
  std::vector<std::pair<double, double>> percentiles;  // {99, 12.3}
};
// Percentiles interpolate linearly between the two nearest ranks, as numpy's default.
Distribution Describe(std::vector<double> values, const std::vector<double>& percentiles);

// "ttft,tpot,itl,e2el,queue": the names of metrics.
StatusOr<std::vector<std::string>> ParseMetrics(std::string_view text);
StatusOr<std::vector<double>> ParsePercentiles(std::string_view text);

// A request is good when it met every one of these.
struct Objective {
  std::string metric;  // of ParseMetrics; of itl the largest gap counts
  double milliseconds = 0;
};
// "ttft:500,tpot:50"; blanks separate as well.
StatusOr<std::vector<Objective>> ParseGoodput(std::string_view text);

struct BenchReport {
  std::string title = "Serving Benchmark Result";
  int64_t max_concurrency = 0;       // 0: no limit
  std::string request_rate = "inf";  // as asked for
  Duration duration{};
  std::vector<RequestRecord> requests;  // that were sent
  bool interrupted = false;             // before all had been sent and had ended
  int64_t not_sent = 0;                 // because of that
  std::vector<std::string> metrics = {"ttft", "tpot", "itl", "e2el", "queue"};  // that the text shows
  std::vector<double> percentiles = {50, 90, 99};
  std::vector<Objective> objectives;
  std::vector<std::pair<std::string, double>> rows;  // more lines of the table
  std::vector<std::string> notes;                    // what to know before believing the numbers

  // Of a load that has ended, after as many requests were sent as `sent` says: leaves out the others, and notes the
  // interruption if that, or cancelled requests, show one.
  void EndAfter(size_t sent);

  std::string ToText() const;
  // detailed: with the values of each request.
  OrderedJson ToJson(bool detailed = false) const;
};

// How the machine that sent the load was doing.
struct ClientUse {
  double cpu_seconds = 0;
  int32_t cores = 1;
};
// Says so when the client, and not the server, may have set the numbers. Empty: no sign of it.
std::vector<std::string> ClientNotes(const ClientUse& use, const BenchReport& report);

}  // namespace altiplano::bench
