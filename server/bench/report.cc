#include "server/bench/report.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <map>

#include "server/base/check.h"
#include "server/base/json.h"
#include "server/base/strings.h"

namespace altiplano::bench {

namespace {

constexpr size_t kNumMetrics = 5;
struct MetricName {
  const char* title;
  const char* label;
  const char* key;
};
constexpr std::array<MetricName, kNumMetrics> kMetricNames = {
    MetricName{"Time to First Token", "TTFT", "ttft"},
    {"Time per Output Token (excl. 1st token)", "TPOT", "tpot"},
    {"Inter-token Latency", "ITL", "itl"},
    {"End-to-end Latency", "E2EL", "e2el"},
    {"Time in the Server's Queue", "Queue", "queue"}};
enum MetricIndex : size_t { kTtft, kTpot, kItl, kE2el, kQueue };

bool IsMetric(std::string_view name) {
  return std::any_of(kMetricNames.begin(), kMetricNames.end(), [&](const MetricName& m) { return name == m.key; });
}

// A request's own values of one metric, in ms: none, one or (ITL) many.
std::vector<double> ValuesOf(const RequestRecord& request, size_t metric) {
  switch (metric) {
    case kTtft:
      return {Milliseconds(request.ttft)};
    case kTpot:
      if (request.output_tokens < 2) return {};
      return {Milliseconds(request.latency - request.ttft) / static_cast<double>(request.output_tokens - 1)};
    case kItl: {
      std::vector<double> gaps;
      for (Duration gap : request.itl) gaps.push_back(Milliseconds(gap));
      return gaps;
    }
    case kE2el:
      return {Milliseconds(request.latency)};
    default:
      return {Milliseconds(request.queued)};
  }
}

bool IsGood(const RequestRecord& request, const std::vector<Objective>& objectives) {
  if (!request.ok) return false;
  return std::all_of(objectives.begin(), objectives.end(), [&](const Objective& objective) {
    auto metric = std::find_if(kMetricNames.begin(), kMetricNames.end(),
                               [&](const MetricName& m) { return objective.metric == m.key; });
    CHECK(metric != kMetricNames.end());
    std::vector<double> values = ValuesOf(request, static_cast<size_t>(metric - kMetricNames.begin()));
    return std::all_of(values.begin(), values.end(), [&](double v) { return v <= objective.milliseconds; });
  });
}

struct Totals {
  int64_t completed = 0, failed = 0, cancelled = 0, good = 0;
  uint64_t input = 0, output = 0, cached = 0, preemptions = 0;
  int64_t peak_concurrency = 0;
  std::array<std::vector<double>, kNumMetrics> values;
  struct Errors {
    int64_t count = 0;
    std::string example;
  };
  std::map<std::string, Errors> errors;  // by code
};

int64_t PeakConcurrency(const std::vector<RequestRecord>& requests) {
  std::vector<std::pair<Duration, int>> changes;
  for (const RequestRecord& request : requests) {
    changes.emplace_back(request.start, 1);
    changes.emplace_back(request.start + request.latency, -1);
  }
  std::sort(changes.begin(), changes.end());  // of equal times, ends come first
  int64_t now = 0, peak = 0;
  for (const auto& [time, change] : changes) peak = std::max(peak, now += change);
  return peak;
}

Totals Sum(const BenchReport& report) {
  Totals totals;
  for (const RequestRecord& request : report.requests) {
    if (request.cancelled) {
      ++totals.cancelled;
      continue;
    }
    if (!request.ok) {
      ++totals.failed;
      Totals::Errors& errors = totals.errors[request.error_code];
      if (errors.count++ == 0) errors.example = request.error;
      continue;
    }
    ++totals.completed;
    totals.good += IsGood(request, report.objectives);
    totals.input += request.input_tokens;
    totals.output += request.output_tokens;
    totals.cached += request.cached_tokens;
    totals.preemptions += request.preemptions;
    for (size_t metric = 0; metric < kNumMetrics; ++metric) {
      for (double value : ValuesOf(request, metric)) totals.values[metric].push_back(value);
    }
  }
  totals.peak_concurrency = PeakConcurrency(report.requests);
  return totals;
}

double HitPercent(const Totals& totals) {
  return totals.input == 0 ? 0 : 100 * static_cast<double>(totals.cached) / static_cast<double>(totals.input);
}

std::string Centered(std::string_view title, char fill) {
  constexpr size_t kWidth = 50;
  size_t left = title.size() < kWidth ? (kWidth - title.size()) / 2 : 0;
  size_t right = title.size() + left < kWidth ? kWidth - title.size() - left : 0;
  return StrCat(std::string(left, fill), title, std::string(right, fill), "\n");
}

// Calls visit(part) for each part between commas or blanks; false from it ends the walk.
template <typename Visit>
bool ForEachPart(std::string_view text, const Visit& visit) {
  while (!text.empty()) {
    size_t end = std::min(text.find_first_of(", "), text.size());
    if (end > 0 && !visit(text.substr(0, end))) return false;
    text.remove_prefix(std::min(end + 1, text.size()));
  }
  return true;
}

bool ParseNumber(std::string_view text, double* value) {
  auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), *value);
  return error == std::errc() && end == text.data() + text.size() && std::isfinite(*value);
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
  result.max = at(100);
  for (double percent : percentiles) result.percentiles.emplace_back(percent, at(percent));
  return result;
}

StatusOr<std::vector<std::string>> ParseMetrics(std::string_view text) {
  std::vector<std::string> metrics;
  bool known = ForEachPart(text, [&](std::string_view part) {
    metrics.emplace_back(part);
    return IsMetric(part);
  });
  if (known) return metrics;
  return Status(Code::kInvalidArgument,
                StrCat("has \"", metrics.back(), "\", must be of ttft, tpot, itl, e2el, queue"));
}

StatusOr<std::vector<double>> ParsePercentiles(std::string_view text) {
  std::vector<double> percentiles;
  bool good = ForEachPart(text, [&](std::string_view part) {
    double value = 0;
    if (!ParseNumber(part, &value) || value < 0 || value > 100) return false;
    percentiles.push_back(value);
    return true;
  });
  if (good) return percentiles;
  return Status(Code::kInvalidArgument, StrCat("is \"", text, "\", must be numbers from 0 to 100, such as 50,90,99"));
}

StatusOr<std::vector<Objective>> ParseGoodput(std::string_view text) {
  std::vector<Objective> objectives;
  bool good = ForEachPart(text, [&](std::string_view part) {
    size_t colon = std::min(part.find(':'), part.size());
    Objective& objective = objectives.emplace_back();
    objective.metric = part.substr(0, colon);
    return IsMetric(objective.metric) && colon < part.size() &&
           ParseNumber(part.substr(colon + 1), &objective.milliseconds) && objective.milliseconds > 0;
  });
  if (good) return objectives;
  return Status(Code::kInvalidArgument,
                StrCat("is \"", text, "\", must be METRIC:MILLISECONDS of ttft, tpot, itl, e2el, queue, such as ",
                       "ttft:500,tpot:50"));
}

void BenchReport::EndAfter(size_t sent) {
  not_sent = static_cast<int64_t>(requests.size() - sent);
  requests.resize(sent);
  // One that came too late to change anything has interrupted nothing.
  interrupted = not_sent > 0 || std::ranges::any_of(requests, &RequestRecord::cancelled);
  if (!interrupted) return;
  notes.push_back(sent == 0 ? "interrupted before the first request was sent: nothing was measured"
                            : StrFormat("interrupted after %.1f s: tokens of cancelled requests are in no number",
                                        Seconds(duration)));
}

std::string BenchReport::ToText() const {
  Totals totals = Sum(*this);
  double seconds = std::max(Seconds(duration), 1e-9);
  std::string out = Centered(StrCat(" ", title, " "), '=');
  auto whole = [&out](const char* label, auto value) {
    out += StrFormat("%-40s %-10llu\n", label, static_cast<unsigned long long>(value));
  };
  auto real = [&out](const std::string& label, double value) {
    out += StrFormat("%-40s %-10.2f\n", label.c_str(), value);
  };
  whole("Successful requests:", totals.completed);
  whole("Failed requests:", totals.failed);
  if (interrupted) {
    whole("Requests cancelled by the interruption:", totals.cancelled);
    whole("Requests not sent:", not_sent);
  }
  if (max_concurrency > 0) whole("Maximum request concurrency:", max_concurrency);
  out += StrFormat("%-40s %-10s\n", "Request rate configured (req/s):", request_rate.c_str());
  real("Benchmark duration (s):", seconds);
  whole("Total input tokens:", totals.input);
  whole("Total generated tokens:", totals.output);
  real("Request throughput (req/s):", static_cast<double>(totals.completed) / seconds);
  if (!objectives.empty()) {
    real("Request goodput (req/s):", static_cast<double>(totals.good) / seconds);
    real("Good requests (%):", 100 * static_cast<double>(totals.good) /
                                   static_cast<double>(std::max<int64_t>(1, totals.completed + totals.failed)));
  }
  real("Output token throughput (tok/s):", static_cast<double>(totals.output) / seconds);
  real("Total token throughput (tok/s):", static_cast<double>(totals.input + totals.output) / seconds);
  whole("Peak concurrent requests:", totals.peak_concurrency);
  real("Input tokens from prefix cache (%):", HitPercent(totals));
  whole("Preemptions:", totals.preemptions);
  for (const auto& [label, value] : rows) real(label, value);
  for (size_t metric = 0; metric < kNumMetrics; ++metric) {
    const MetricName& name = kMetricNames[metric];
    if (std::find(metrics.begin(), metrics.end(), name.key) == metrics.end()) continue;
    Distribution d = Describe(totals.values[metric], percentiles);
    out += Centered(name.title, '-');
    real(StrFormat("Mean %s (ms):", name.label), d.mean);
    real(StrFormat("Median %s (ms):", name.label), d.median);
    for (auto [percent, value] : d.percentiles) {
      if (percent == 50) continue;  // the median
      real(StrFormat("P%g %s (ms):", percent, name.label), value);
    }
  }
  if (!totals.errors.empty()) out += Centered("Errors", '-');
  for (const auto& [code, errors] : totals.errors) {
    whole(StrCat(code, ":").c_str(), errors.count);
    out += StrCat("  ", errors.example, "\n");
  }
  out += std::string(50, '=') + "\n";
  for (const std::string& note : notes) out += StrCat("note: ", note, "\n");
  return out;
}

OrderedJson BenchReport::ToJson(bool detailed) const {
  Totals totals = Sum(*this);
  double seconds = std::max(Seconds(duration), 1e-9);
  OrderedJson json = {{"request_rate", request_rate},
                      {"max_concurrency", max_concurrency > 0 ? OrderedJson(max_concurrency) : OrderedJson(nullptr)},
                      {"duration", seconds},
                      {"completed", totals.completed},
                      {"failed", totals.failed},
                      {"interrupted", interrupted},
                      {"cancelled", totals.cancelled},
                      {"not_sent", not_sent},
                      {"total_input_tokens", totals.input},
                      {"total_output_tokens", totals.output},
                      {"request_throughput", static_cast<double>(totals.completed) / seconds},
                      {"output_throughput", static_cast<double>(totals.output) / seconds},
                      {"total_token_throughput", static_cast<double>(totals.input + totals.output) / seconds},
                      {"max_concurrent_requests", totals.peak_concurrency},
                      {"cached_tokens", totals.cached},
                      {"prefix_hit_percent", HitPercent(totals)},
                      {"preemptions", totals.preemptions}};
  if (!objectives.empty()) {
    json["request_goodput"] = static_cast<double>(totals.good) / seconds;
    json["good_requests"] = totals.good;
    for (const Objective& objective : objectives) json["goodput_slos"][objective.metric] = objective.milliseconds;
  }
  for (size_t metric = 0; metric < kNumMetrics; ++metric) {
    Distribution d = Describe(totals.values[metric], percentiles);
    std::string key = kMetricNames[metric].key;
    json["mean_" + key + "_ms"] = d.mean;
    json["median_" + key + "_ms"] = d.median;
    json["std_" + key + "_ms"] = d.std;
    json["max_" + key + "_ms"] = d.max;
    for (auto [percent, value] : d.percentiles) json[StrFormat("p%g_%s_ms", percent, key.c_str())] = value;
  }
  json["errors"] = OrderedJson::object();
  for (const auto& [code, errors] : totals.errors) {
    json["errors"][code] = {{"count", errors.count}, {"example", errors.example}};
  }
  json["notes"] = notes;
  if (!detailed) return json;
  for (const RequestRecord& request : requests) {
    OrderedJson gaps = OrderedJson::array();
    for (Duration gap : request.itl) gaps.push_back(Seconds(gap));
    json["start_times"].push_back(Seconds(request.start));
    json["input_lens"].push_back(request.input_tokens);
    json["output_lens"].push_back(request.output_tokens);
    json["cached_lens"].push_back(request.cached_tokens);
    json["ttfts"].push_back(Seconds(request.ttft));
    json["e2els"].push_back(Seconds(request.latency));
    json["itls"].push_back(std::move(gaps));
    json["error_codes"].push_back(request.ok ? "" : request.error_code);
  }
  return json;
}

std::vector<std::string> ClientNotes(const ClientUse& use, const BenchReport& report) {
  constexpr double kBusy = 0.85;       // of the cores
  constexpr double kLateMs = 5;        // below it nobody would notice,
  constexpr double kLateShare = 0.05;  // nor below this share of the median TTFT
  constexpr double kTokensPerMessage = 1.05;
  std::vector<std::string> notes;
  if (report.requests.empty()) return notes;
  std::vector<double> lags, ttfts;
  int64_t held = 0;
  Duration longest_held{};
  uint64_t tokens = 0, messages = 0;
  for (const RequestRecord& request : report.requests) {
    lags.push_back(Milliseconds(request.lag));
    held += request.held > Duration(0);
    longest_held = std::max(longest_held, request.held);
    if (!request.ok) continue;
    ttfts.push_back(Milliseconds(request.ttft));
    if (request.output_tokens == 0) continue;
    tokens += request.output_tokens;
    messages += request.itl.size() + 1;
  }
  const double cores = use.cpu_seconds / std::max(Seconds(report.duration), 1e-9);
  if (cores > kBusy * use.cores) {
    notes.push_back(
        StrFormat("the client used %.1f of this machine's %d cores: it, and not the server, may have been "
                  "the limit",
                  cores, use.cores));
  }
  const double late = Describe(lags, {99}).percentiles[0].second;
  if (late > std::max(kLateMs, kLateShare * Describe(ttfts, {}).median)) {
    notes.push_back(
        StrFormat("the client sent requests late (p99 %.1f ms): the load was lighter than asked for", late));
  }
  if (held > 0 && report.request_rate != "inf") {
    notes.push_back(
        StrFormat("max-concurrency held back %lld of %zu requests, one for %.1f s: arrivals were not those "
                  "of the request rate, and waiting here is in no latency",
                  static_cast<long long>(held), report.requests.size(), Seconds(longest_held)));
  }
  if (static_cast<double>(tokens) > kTokensPerMessage * static_cast<double>(messages)) {
    notes.push_back(
        StrFormat("a message carried %.2f tokens on average: somebody on the way could not keep up, and ITL "
                  "is of messages",
                  static_cast<double>(tokens) / static_cast<double>(messages)));
  }
  return notes;
}

}  // namespace altiplano::bench
