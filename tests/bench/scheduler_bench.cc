// What the scheduler costs a step, in CPU time: Plan and Apply with many sequences that all decode, without and with
// the flight recorder, and the memory they ask for; its checkpoints; and the admission of a prompt that the prefix
// cache holds. The executor is a loop that samples one token for each sequence.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "server/base/strings.h"
#include "server/scheduler/flight_record.h"
#include "server/scheduler/flight_recorder.h"
#include "server/scheduler/prefix_cache.h"
#include "server/scheduler/scheduler.h"
#include "tests/bench/bench.h"
#include "tests/server/scheduler/count_allocations.h"

namespace altiplano::bench {
namespace {

// Plans one step ahead, as the engine does, so that inputs are known by slot.
class Driver {
 public:
  explicit Driver(const SchedulerOptions& options) {
    auto scheduler = Scheduler::Create(options);
    if (!scheduler.ok()) {
      std::fprintf(stderr, "scheduler_bench: %s\n", scheduler.status().ToString().c_str());
      std::exit(1);
    }
    scheduler_ = *std::move(scheduler);
  }

  Scheduler& scheduler() { return *scheduler_; }

  struct Cost {
    double plan = 0, apply = 0;  // CPU seconds
    int64_t allocations = 0;     // in both
    size_t sequences = 0;        // in the step
    int32_t prefill_tokens = 0;
  };
  Cost Step() {
    Cost cost;
    events_.clear();
    const int64_t before_plan = allocations;
    const double begin = ThreadSeconds();
    std::shared_ptr<const StepPlan> next = scheduler_->Plan(now_, &events_);
    cost.plan = ThreadSeconds() - begin;
    cost.allocations = allocations - before_plan;
    if (running_ != nullptr) {
      cost.sequences = running_->sequences.size();
      cost.prefill_tokens = running_->num_prefill_tokens;
      result_.step = running_->step;
      result_.sampled.clear();
      for (const PlannedSequence& planned : running_->sequences) {
        if (planned.sample) result_.sampled.emplace_back().token = static_cast<TokenId>(random_() % 100'000);
      }
      const int64_t before_apply = allocations;
      const double apply = ThreadSeconds();
      scheduler_->Apply(*running_, result_, now_, &events_);
      cost.apply = ThreadSeconds() - apply;
      cost.allocations += allocations - before_apply;
    }
    running_ = std::move(next);
    now_ += std::chrono::milliseconds(10);
    return cost;
  }

 private:
  std::unique_ptr<Scheduler> scheduler_;
  std::shared_ptr<const StepPlan> running_;
  StepResult result_;
  std::vector<Event> events_;
  TimePoint now_{std::chrono::hours(1)};
  std::minstd_rand random_{1};
};

constexpr size_t kRecordBytes = 8 << 20;     // full before the clock starts, so that old steps leave it
constexpr size_t kBetween = (32 << 20) / 5;  // two checkpoints, of other frames, with --flight-record-memory 32MiB

double Quantile(std::vector<double> values, double at) {
  std::sort(values.begin(), values.end());
  return values[static_cast<size_t>(at * static_cast<double>(values.size() - 1))];
}

constexpr int32_t kShortest = 500, kSpread = 500, kSteps = 600;

// What the steps of one scheduler cost.
struct Costs {
  std::vector<double> plan, apply, both;
  int64_t allocations = 0, steps_allocating = 0;

  void Add(const Driver::Cost& cost) {
    plan.push_back(cost.plan);
    apply.push_back(cost.apply);
    both.push_back(cost.plan + cost.apply);
    allocations += cost.allocations;
    steps_allocating += cost.allocations > 0;
  }
};

// Every sequence decodes from here on. Prompts of different lengths, so that in every step some fill a block and
// publish it.
void Begin(Driver& driver, int32_t sequences) {
  std::minstd_rand random(2);
  for (int32_t i = 0; i < sequences; ++i) {
    auto request = std::make_shared<Request>();
    request->prompt.resize(static_cast<size_t>(kShortest + static_cast<int32_t>(random() % kSpread)));
    for (TokenId& id : request->prompt) id = static_cast<TokenId>(random() % 100'000);
    request->stop.max_new_tokens = 2048;
    driver.scheduler().Add(static_cast<RequestKey>(i) + 1, std::move(request));
  }
  for (Driver::Cost cost; cost.sequences != static_cast<size_t>(sequences) || cost.prefill_tokens != 0;) {
    cost = driver.Step();
  }
  for (int i = 0; i < 20; ++i) driver.Step();
}

void ReportAllocations(Report& report, const std::string& name, const Costs& costs) {
  Result memory;
  memory.name = StrCat("allocations, ", name);
  memory.value = static_cast<double>(costs.allocations) / kSteps;
  memory.unit = "per step";
  memory.remark = StrCat(costs.allocations, " in ", costs.steps_allocating, " of ", kSteps,
                         " steps; goal 0: ", costs.allocations == 0 ? "met" : "MISSED");
  memory.extra = {{"allocations", costs.allocations}, {"steps", kSteps}, {"met", costs.allocations == 0}};
  report.Add(memory);
}

SchedulerOptions Options(int32_t sequences, bool prefix_cache) {
  SchedulerOptions options;
  options.block_size = 16;
  options.max_running = sequences;
  options.token_budget = 16384;
  options.max_context = 4096;
  options.num_blocks = sequences * (kShortest + kSpread + kSteps + 200) / options.block_size;
  options.prefix_cache = prefix_cache;
  options.eos_ids = {128001, 128008, 128009};
  return options;
}

// Steps of several schedulers in turns, so that what else the machine does meets all of them.
std::vector<Costs> Collect(const std::vector<Driver*>& drivers, int32_t sequences) {
  for (Driver* driver : drivers) Begin(*driver, sequences);
  std::vector<Costs> costs(drivers.size());
  for (int32_t i = 0; i < kSteps; ++i) {
    for (size_t d = 0; d < drivers.size(); ++d) {
      const Driver::Cost cost = drivers[d]->Step();
      if (cost.sequences != static_cast<size_t>(sequences) || cost.prefill_tokens != 0) {
        std::fprintf(stderr, "scheduler_bench: a step of %zu sequences, %d were to decode\n", cost.sequences,
                     sequences);
        std::exit(1);
      }
      costs[d].Add(cost);
    }
  }
  return costs;
}

void Measure(Report& report, int32_t sequences, bool prefix_cache, double goal_us) {
  Driver driver(Options(sequences, prefix_cache));
  const Costs costs = Collect({&driver}, sequences)[0];
  const std::string name = StrCat(sequences, " sequences, ", prefix_cache ? "prefix cache" : "no prefix cache");
  const double plan = Quantile(costs.plan, 0.1) * 1e6, apply = Quantile(costs.apply, 0.1) * 1e6;
  Result result;
  result.name = StrCat("Plan + Apply, ", name);
  result.value = Quantile(costs.both, 0.1) * 1e6;
  result.unit = "us/step";
  result.limit = goal_us;
  result.limit_name = "the allowed us";
  result.median_ratio = Quantile(costs.both, 0.5) * 1e6 / goal_us;
  result.at_most = 1;
  result.remark = StrCat("Plan ", Number(plan), " us, Apply ", Number(apply), " us, ",
                         Number(Quantile(costs.both, 0.1) / sequences * 1e9), " ns a sequence");
  result.extra = {{"plan_us", plan},
                  {"apply_us", apply},
                  {"median_us", Quantile(costs.both, 0.5) * 1e6},
                  {"p99_us", Quantile(costs.both, 0.99) * 1e6}};
  report.Add(result);
  ReportAllocations(report, name, costs);
}

// Beside a scheduler without it.
void MeasureRecorder(Report& report, int32_t sequences) {
  SchedulerOptions options = Options(sequences, /*prefix_cache=*/true);
  FlightRecorder recorder(options, kRecordBytes, kBetween);
  Driver plain(options);
  options.recorder = &recorder;
  Driver recorded(options);
  const std::vector<Costs> costs = Collect({&plain, &recorded}, sequences);
  auto more = [&](std::vector<double> Costs::*part) {
    return (Quantile(costs[1].*part, 0.1) - Quantile(costs[0].*part, 0.1)) * 1e6;
  };
  const std::string name = StrCat(sequences, " sequences, prefix cache");
  Result result;
  result.name = StrCat("flight recorder, ", name);
  result.value = more(&Costs::both);
  result.unit = "us/step";
  result.limit = Quantile(costs[0].both, 0.1) * 1e6;
  result.limit_name = "Plan + Apply without it";
  result.median_ratio = Quantile(costs[1].both, 0.5) / Quantile(costs[0].both, 0.5) - 1;
  result.at_most = 0.15;
  result.remark = StrCat("Plan ", Number(more(&Costs::plan)), " us, Apply ", Number(more(&Costs::apply)), " us more");
  report.Add(result);
  ReportAllocations(report, StrCat(name, ", recorded"), costs[1]);
}

// Steps of a scheduler that makes checkpoints beside those of one that makes none: the steps that make one, those
// between them, in which the names of blocks are said again, and the worst of all.
void MeasureCheckpoint(Report& report, int32_t sequences) {
  constexpr double kAllowedUs = 1000;
  constexpr size_t kBytes = 5 * kBetween;
  const size_t between = kBetween * static_cast<size_t>(sequences) / 8192;  // here, so that several are measured
  SchedulerOptions options = Options(sequences, /*prefix_cache=*/true);
  FlightRecorder without(options, kBytes, FlightRecorder::kNoCheckpoints), with(options, kBytes, between);
  options.recorder = &without;
  Driver plain(options);
  options.recorder = &with;
  Driver checkpointing(options);
  for (Driver* driver : {&plain, &checkpointing}) Begin(*driver, sequences);
  std::vector<double> at_checkpoints, between_them, worst_plain, worst;
  for (int32_t i = 0; i < kSteps; ++i) {
    const bool due = with.checkpoint_due();
    const Driver::Cost one = plain.Step(), other = checkpointing.Step();
    (due ? at_checkpoints : between_them).push_back(other.plan - one.plan);
    worst_plain.push_back(one.plan + one.apply);
    worst.push_back(other.plan + other.apply);
  }
  const auto read = [](const FlightRecorder& recorder) {
    auto record = ParseFlightRecord(recorder.Write({}, 0));
    if (record.ok()) return *std::move(record);
    std::fprintf(stderr, "scheduler_bench: the record %s\n", record.status().ToString().c_str());
    std::exit(1);
  };
  const FlightRecord steps = read(without), both = read(with);
  const auto count = [](const FlightRecord& record, auto of) {
    return static_cast<double>(std::ranges::count_if(
        record.frames, [](const FlightFrame& frame) { return std::holds_alternative<decltype(of)>(frame); }));
  };
  const double step_bytes = static_cast<double>(steps.frame_bytes) / count(steps, FlightResult());
  const double steps_between = static_cast<double>(kBetween) / step_bytes;
  const auto whole = std::ranges::count_if(both.frames, [](const FlightFrame& frame) {
    const auto* checkpoint = std::get_if<FlightCheckpoint>(&frame);
    return checkpoint != nullptr && checkpoint->whole;
  });
  if (whole < 3 || at_checkpoints.size() < 3) {
    std::fprintf(stderr, "scheduler_bench: %zu checkpoints, %td of them whole\n", at_checkpoints.size(), whole);
    std::exit(1);
  }
  const std::string name = StrCat(sequences, " sequences, prefix cache");
  Result result;
  result.name = StrCat("checkpoint, ", name);
  result.value = Quantile(at_checkpoints, 0.1) * 1e6;
  result.unit = "us";
  result.limit = kAllowedUs;
  result.limit_name = "the allowed us";
  result.median_ratio = Quantile(at_checkpoints, 0.5) * 1e6 / kAllowedUs;
  result.at_most = 1;
  result.remark = StrCat("one in ", Number(steps_between), " steps; ", Number(Quantile(at_checkpoints, 1) * 1e6),
                         " us at worst of ", at_checkpoints.size());
  result.extra = {{"steps_between", steps_between}, {"worst_us", Quantile(at_checkpoints, 1) * 1e6}};
  report.Add(result);
  Result all;
  all.name = StrCat("worst Plan + Apply with checkpoints, ", name);
  all.value = Quantile(worst, 1) * 1e6;
  all.unit = "us/step";
  all.limit = Quantile(worst_plain, 1) * 1e6;
  all.limit_name = "the worst without";
  all.remark = StrCat("of ", kSteps, " steps; p99 ", Number(Quantile(worst, 0.99) * 1e6), " us, without ",
                      Number(Quantile(worst_plain, 0.99) * 1e6), " us; between two of them ",
                      Number(Quantile(between_them, 0.5) * 1e6), " us more");
  report.Add(all);
}

// The Plan that admits a prompt which the cache holds but for its last block, beside hashing alone. Returns best
// seconds.
double MeasureMatching(Report& report, int32_t tokens) {
  constexpr int kRounds = 40;
  SchedulerOptions options = Options(/*sequences=*/1, /*prefix_cache=*/true);
  options.max_context = tokens + 1;
  options.num_blocks = 2 * tokens / options.block_size;
  Driver driver(options);
  auto request = std::make_shared<Request>();
  std::minstd_rand random(3);
  for (int32_t i = 0; i < tokens; ++i) request->prompt.push_back(static_cast<TokenId>(random() % 100'000));
  request->stop.max_new_tokens = 1;
  std::vector<double> plan, hash;
  for (RequestKey key = 1; key <= kRounds + 1; ++key) {
    driver.scheduler().Add(key, request);
    const double seconds = driver.Step().plan;
    while (!driver.scheduler().idle()) driver.Step();
    if (key == 1) continue;  // found nothing
    plan.push_back(seconds);
    const double begin = ThreadSeconds();
    BlockHash name = RootHash("", "");
    const auto block_size = static_cast<size_t>(options.block_size);
    for (size_t i = 0; i + block_size < request->prompt.size(); i += block_size) {
      name = ChainHash(name, std::span(request->prompt).subspan(i, block_size));
    }
    hash.push_back(ThreadSeconds() - begin);
    if (name == BlockHash{}) std::exit(1);  // so that nothing is optimized away
  }
  const auto cached = static_cast<int64_t>(driver.scheduler().load().cached_tokens);
  if (cached != int64_t{kRounds} * (tokens - options.block_size)) {
    std::fprintf(stderr, "scheduler_bench: %lld tokens were found\n", static_cast<long long>(cached));
    std::exit(1);
  }
  Result result;
  result.name = StrCat("prefix matching, ", tokens, " tokens");
  result.value = Quantile(plan, 0.1) * 1e6;
  result.unit = "us";
  result.limit = Quantile(hash, 0.1) * 1e6;
  result.limit_name = "hashing its blocks";
  result.median_ratio = Quantile(plan, 0.5) / Quantile(hash, 0.5);
  result.at_most = 2;
  result.remark = StrCat(Number(Quantile(plan, 0.1) / tokens * 1e9), " ns a token");
  report.Add(result);
  return Quantile(plan, 0.1);
}

// Its time grows as the prompt does.
void MeasureMatchings(Report& report) {
  constexpr int32_t kShort = 1024, kLong = 65536;
  const double few = MeasureMatching(report, kShort), many = MeasureMatching(report, kLong);
  Result result;
  result.name = StrCat("prefix matching, a token of ", kLong);
  result.value = many / kLong * 1e9;
  result.unit = "ns";
  result.limit = few / kShort * 1e9;
  result.limit_name = StrCat("a token of ", kShort);
  result.at_most = 1.5;
  report.Add(result);
}

}  // namespace
}  // namespace altiplano::bench

int main(int argc, char** argv) {
  altiplano::bench::Report report("scheduler", argc, argv);
  report.Section("scheduler, all sequences decoding, one planned step ahead");
  for (bool prefix_cache : {true, false}) {
    altiplano::bench::Measure(report, 512, prefix_cache, 100);
    altiplano::bench::Measure(report, 4096, prefix_cache, 1000);
    if (!prefix_cache) continue;
    altiplano::bench::MeasureRecorder(report, 512);
    altiplano::bench::MeasureRecorder(report, 4096);
    altiplano::bench::MeasureCheckpoint(report, 512);
    altiplano::bench::MeasureCheckpoint(report, 4096);
  }
  altiplano::bench::MeasureMatchings(report);
}
