// The flags that bench serve, bench offline and simulate share: which requests, when, and what to say about them.
#pragma once

#include <string>
#include <vector>

#include "server/bench/arrivals.h"
#include "server/bench/dataset.h"
#include "server/bench/report.h"
#include "server/cli/flags.h"

namespace altiplano::cli {

std::vector<Flag> LoadFlags();

// What LoadFlags say, before any file has been read.
struct LoadPlan {
  bench::DatasetOptions dataset;
  bench::ArrivalOptions arrivals;
  // Given to the requests in turn; empty: none.
  std::vector<Duration> ttft_targets;
  std::vector<int32_t> priorities;
  std::vector<std::string> tenants;
  bench::BenchReport report;  // settings only
};
// INVALID_ARGUMENT, one line, for what is wrong with the command line.
StatusOr<LoadPlan> PlanLoad(const ParsedFlags& flags);

// A flag of durations separated by commas.
StatusOr<std::vector<Duration>> DurationsOf(const ParsedFlags& flags, std::string_view name);

struct Load {
  bench::Dataset dataset;
  std::vector<Duration> arrivals;
};
// Reads the dataset. max_context: tokens of one request at most, here. Notes go to plan->report.
StatusOr<Load> ReadLoad(LoadPlan* plan, int32_t max_context, int32_t vocabulary_size,
                        const bench::TokenizeFn& tokenize);

// Prints the report as table or (--json) as JSON, and writes --result-filename. `facts` go before the report's fields.
// Returns the exit code: that of an interruption, or of failure when a request failed.
int PrintReport(std::string_view command, const ParsedFlags& flags, const bench::BenchReport& report,
                OrderedJson facts);

}  // namespace altiplano::cli
