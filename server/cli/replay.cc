// What a flight record says: the scheduler run again on it, who waited for what, and a trace to look at.
#include <algorithm>
#include <cstdio>
#include <ctime>

#include "server/base/strings.h"
#include "server/bench/flight_timeline.h"
#include "server/bench/read_file.h"
#include "server/cli/command.h"
#include "server/cli/step_cost_file.h"
#include "server/cli/write_file.h"
#include "server/scheduler/flight_replay.h"

namespace altiplano::cli {

namespace {

constexpr std::string_view kReplay = "replay";

std::string Utc(int64_t unix_ns) {
  const std::time_t seconds = static_cast<std::time_t>(unix_ns / 1'000'000'000);
  std::tm utc{};
  gmtime_r(&seconds, &utc);
  char text[32];
  std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", &utc);
  return text;
}

void PrintSummary(const FlightRecord& record, const bench::FlightHistory& history) {
  const SchedulerOptions& options = record.options;
  const Duration since_begin = record.written - history.begin;
  const auto arrivals = std::ranges::count(history.marks, bench::FlightMark::Kind::kArrived, &bench::FlightMark::kind);
  std::printf("%zu steps and %lld arrivals in %.3f s from %s on", history.steps.size(),
              static_cast<long long>(arrivals), Seconds(history.end - history.begin),
              Utc(record.written_at_ns - since_begin.count()).c_str());
  if (record.dropped_steps > 0) {
    std::printf("; %llu steps before them have left the ring", static_cast<unsigned long long>(record.dropped_steps));
  }
  std::printf("\n%d blocks of %d tokens, %d slots, %d tokens a step, %d of context, prefix cache %s",
              options.num_blocks, options.block_size, options.max_running, options.token_budget, options.max_context,
              options.prefix_cache ? "on" : "off");
  if (options.max_itl > Duration(0)) std::printf(", ITL ceiling %.3f ms", Milliseconds(options.max_itl));
  std::printf("\n");
}

int RunReplay(const ParsedFlags& flags) {
  if (flags.positional().size() != 1) return Fail(kReplay, "needs one FILE: altiplano replay FILE", kExitUsage);
  const std::string& path = flags.positional()[0];
  auto file = bench::ReadMaybeGzipped(path);
  if (!file.ok()) return Fail(kReplay, file.status().message(), kExitData);
  auto record = ParseFlightRecord(*file);
  if (!record.ok()) return Fail(kReplay, StrCat(path, " ", record.status().message()), kExitData);
  const bench::FlightHistory history = bench::HistoryOf(*record);
  bench::TimelineOptions options{.request = flags.text("request"), .from = flags.duration("from"), .until = {}};
  if (flags.given("until")) options.until = flags.duration("until");
  auto timeline = bench::FlightTimeline(history, record->options, options);
  if (!timeline.ok()) return Fail(kReplay, timeline.status().message(), kExitUsage);
  if (flags.given("perfetto")) {
    Status status = WriteFile(flags.text("perfetto"), bench::FlightTrace(history));
    if (!status.ok()) return Fail(kReplay, status.message(), kExitUnavailable);
  }

  if (flags.given("write-step-cost")) {
    const int64_t kv_tokens = int64_t{record->options.num_blocks} * record->options.block_size;
    auto said = FitAndWriteStepCost(*record, "fitted to a flight record", kv_tokens, flags.text("write-step-cost"));
    if (!said.ok()) return Fail(kReplay, StrCat("--write-step-cost: ", said.status().message()), kExitData);
    std::fprintf(stderr, "%s\n", said->c_str());
  }

  PrintSummary(*record, history);
  auto replay = ReplayFlightRecord(*record);
  int code = kExitOk;
  if (replay.ok() && replay->from) {
    std::printf("what is before %.6f s, the first checkpoint, is shown as recorded and not replayed\n",
                Seconds(*replay->from - history.begin));
  }
  if (replay.ok() && replay->difference.empty()) {
    std::printf("replayed %llu steps: every decision is as recorded\n", static_cast<unsigned long long>(replay->steps));
  } else if (replay.ok()) {
    std::printf("the replay parts from the record, in %s\n", replay->difference.c_str());
    code = kExitFailure;
  } else if (replay.status().code() == Code::kFailedPrecondition) {
    std::printf("not replayed: %s\n", replay.status().message().c_str());
  } else {
    return Fail(kReplay, StrCat(path, ": ", replay.status().message()), kExitData);
  }
  if (flags.boolean("timeline")) std::fputs(timeline->c_str(), stdout);
  return code;
}

}  // namespace

Subcommand ReplayCommand() {
  return {
      .command =
          {.name = kReplay,
           .summary = "run the scheduler again on a flight record, and show who waited for what",
           .synopsis = "altiplano replay FILE [--request ID] [--from 1.5s] [--until 3s] [--perfetto OUT.json]",
           .notes =
               "FILE is from altiplano admin dump-flight-record, --flight-record-dir or altiplano simulate\n"
               "--flight-record. No model is needed. A record whose oldest steps have left its ring is replayed from\n"
               "its first checkpoint on. Exit code 1: the scheduler of this program decides otherwise than the\n"
               "recorded one.",
           .flags = {{.name = "request",
                      .type = FlagType::kText,
                      .meaning = "Show what happened to this request only: its id as in the logs, or #KEY.",
                      .example = "chat-17"},
                     {.name = "from",
                      .type = FlagType::kDuration,
                      .default_value = "0",
                      .meaning = "Show what happened from this time after the record's beginning on.",
                      .example = "1.5s"},
                     {.name = "until",
                      .type = FlagType::kDuration,
                      .meaning = "Show what happened up to this time after the record's beginning.",
                      .example = "3s"},
                     {.name = "timeline",
                      .type = FlagType::kBool,
                      .default_value = "true",
                      .meaning = "Print the timeline; without it only whether the replay decides alike."},
                     {.name = "perfetto",
                      .type = FlagType::kPath,
                      .meaning = "Write a trace for ui.perfetto.dev or chrome://tracing: tracks of slots and "
                                 "requests, counters of blocks, queue and budget.",
                      .example = "trace.json"},
                     {.name = "write-step-cost",
                      .type = FlagType::kPath,
                      .meaning = "Fit what a step costs to the recorded steps and write it to this file, for "
                                 "--step-cost of serve and simulate.",
                      .example = "step_cost.json"}},
           .max_positional = 1},
      .run = RunReplay};
}

}  // namespace altiplano::cli
