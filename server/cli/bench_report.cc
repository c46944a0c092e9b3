#include "server/cli/bench_report.h"

#include <algorithm>
#include <cmath>

#include "server/base/strings.h"

namespace altiplano::cli {

namespace {

struct Totals {
  int64_t completed = 0, failed = 0;
  uint64_t input = 0, output = 0;
  std::vector<double> ttft, tpot, itl, e2el;  // ms
};

double Milliseconds(Duration d) {
  return Seconds(d) * 1e3;
}

Totals Sum(const std::vector<RequestRecord>& requests) {
  Totals totals;
  for (const RequestRecord& request : requests) {
    if (!request.ok) {
      ++totals.failed;
      continue;
    }
    ++totals.completed;
    totals.input += request.input_tokens;
    totals.output += request.output_tokens;
    totals.ttft.push_back(Milliseconds(request.ttft));
    totals.e2el.push_back(Milliseconds(request.latency));
    for (Duration gap : request.itl) totals.itl.push_back(Milliseconds(gap));
    if (request.output_tokens > 1) {
      totals.tpot.push_back(Milliseconds(request.latency - request.ttft) /
                            static_cast<double>(request.output_tokens - 1));
    }
  }
  return totals;
}

struct Metric {
  const char* title;
  const char* label;
  const char* key;
  const std::vector<double>* values;
};

std::vector<Metric> Metrics(const Totals& totals) {
  return {{"Time to First Token", "TTFT", "ttft", &totals.ttft},
          {"Time per Output Token (excl. 1st token)", "TPOT", "tpot", &totals.tpot},
          {"Inter-token Latency", "ITL", "itl", &totals.itl},
          {"End-to-end Latency", "E2EL", "e2el", &totals.e2el}};
}

std::string Centered(std::string_view title, char fill) {
  constexpr size_t kWidth = 50;
  size_t left = title.size() < kWidth ? (kWidth - title.size()) / 2 : 0;
  size_t right = title.size() + left < kWidth ? kWidth - title.size() - left : 0;
  return StrCat(std::string(left, fill), title, std::string(right, fill), "\n");
}

}  // namespace

Distribution Describe(std::vector<double> values, const std::vector<double>& percentiles) {
  Distribution result;
  std::sort(values.begin(), values.end());
  auto at = [&](double percent) {
    if (values.empty()) return 0.0;
    double rank = percent / 100 * static_cast<double>(values.size() - 1);
    auto low = static_cast<size_t>(rank);
    size_t high = std::min(low + 1, values.size() - 1);
    return values[low] + (values[high] - values[low]) * (rank - static_cast<double>(low));
  };
  for (double value : values) result.mean += value / static_cast<double>(values.size());
  for (double value : values) result.std += (value - result.mean) * (value - result.mean);
  if (!values.empty()) result.std = std::sqrt(result.std / static_cast<double>(values.size()));
  result.median = at(50);
  for (double percent : percentiles) result.percentiles.emplace_back(percent, at(percent));
  return result;
}

std::string BenchReport::ToText() const {
  Totals totals = Sum(requests);
  double seconds = std::max(Seconds(duration), 1e-9);
  std::string out = Centered(" Serving Benchmark Result ", '=');
  auto whole = [&out](const char* label, uint64_t value) {
    out += StrFormat("%-40s %-10llu\n", label, static_cast<unsigned long long>(value));
  };
  auto real = [&out](const std::string& label, double value) {
    out += StrFormat("%-40s %-10.2f\n", label.c_str(), value);
  };
  whole("Successful requests:", static_cast<uint64_t>(totals.completed));
  whole("Failed requests:", static_cast<uint64_t>(totals.failed));
  whole("Maximum request concurrency:", static_cast<uint64_t>(max_concurrency));
  real("Benchmark duration (s):", seconds);
  whole("Total input tokens:", totals.input);
  whole("Total generated tokens:", totals.output);
  real("Request throughput (req/s):", static_cast<double>(totals.completed) / seconds);
  real("Output token throughput (tok/s):", static_cast<double>(totals.output) / seconds);
  real("Total token throughput (tok/s):", static_cast<double>(totals.input + totals.output) / seconds);
  for (const Metric& metric : Metrics(totals)) {
    Distribution d = Describe(*metric.values, percentiles);
    out += Centered(metric.title, '-');
    real(StrFormat("Mean %s (ms):", metric.label), d.mean);
    real(StrFormat("Median %s (ms):", metric.label), d.median);
    for (auto [percent, value] : d.percentiles) real(StrFormat("P%g %s (ms):", percent, metric.label), value);
  }
  return out + std::string(50, '=') + "\n";
}

OrderedJson BenchReport::ToJson() const {
  Totals totals = Sum(requests);
  double seconds = std::max(Seconds(duration), 1e-9);
  OrderedJson json = {{"max_concurrency", max_concurrency},
                      {"duration", seconds},
                      {"completed", totals.completed},
                      {"failed", totals.failed},
                      {"total_input_tokens", totals.input},
                      {"total_output_tokens", totals.output},
                      {"request_throughput", static_cast<double>(totals.completed) / seconds},
                      {"output_throughput", static_cast<double>(totals.output) / seconds},
                      {"total_token_throughput", static_cast<double>(totals.input + totals.output) / seconds}};
  for (const Metric& metric : Metrics(totals)) {
    Distribution d = Describe(*metric.values, percentiles);
    std::string key = metric.key;
    json["mean_" + key + "_ms"] = d.mean;
    json["median_" + key + "_ms"] = d.median;
    json["std_" + key + "_ms"] = d.std;
    json["percentiles_" + key + "_ms"] = d.percentiles;
  }
  return json;
}

}  // namespace altiplano::cli
