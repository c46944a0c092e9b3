// The engine on a real model: decode against the read bandwidth, prefill against the GEMM peak, what the engine adds to
// a step. Requests go through Engine::Submit; an executor in between notes what each step was and how long it took.
//
// With --threads 1 a step's time is the CPU time of the process, in which the thread that computes is all there is:
// this holds on a machine that is never quiet. Otherwise it is the time between the ends of two steps.
//
// The least time of a step: reading all weights (the embedding is the head), and the KV cache of its sequences, or
// its products, whichever takes longer at the limits' rates.
#include <algorithm>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <memory>
#include <mutex>
#include <random>
#include <utility>
#include <vector>

#include "server/base/strings.h"
#include "server/engine/engine.h"
#include "server/engine/local_executor.h"
#include "server/model/checkpoint.h"
#include "tests/bench/limits.h"

namespace altiplano::bench {
namespace {

constexpr int32_t kPrompt = 512, kNew = 64;
constexpr int32_t kMostStreams = 32;

struct Step {
  int64_t tokens = 0, sequences = 0, prefill_tokens = 0, rows = 0;  // rows: of logits
  double context_tokens = 0;                                        // in the KV cache, of all sequences
  double attended = 0;                                              // keys that queries look at, all of them together
  double model = 0;                                                 // seconds from the worker's begin to its end
  double period = 0;      // seconds since the step before ended; 0: there was none
  double engine_cpu = 0;  // seconds that the engine's thread computed meanwhile
  double cpu = 0;         // of the process, in that time
};

double ProcessSeconds() {
  timespec time{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_nsec) * 1e-9;
}

// Launch and Wait: engine thread. TakeSteps: any thread, while the engine is idle.
class TimedExecutor : public Executor {
 public:
  explicit TimedExecutor(std::unique_ptr<LocalExecutor> executor) : executor_(std::move(executor)) {}

  void Launch(std::shared_ptr<const StepPlan> plan) override {
    {
      std::lock_guard lock(mutex_);
      if (steps_.empty()) begin_process_ = ProcessSeconds();
      Step& step = steps_.emplace_back();
      step.tokens = static_cast<int64_t>(plan->tokens.size());
      step.sequences = static_cast<int64_t>(plan->sequences.size());
      step.prefill_tokens = plan->num_prefill_tokens;
      for (const PlannedSequence& planned : plan->sequences) {
        const double first = planned.first_position, count = planned.num_tokens;
        step.context_tokens += first + count;
        step.attended += count * (first + (count + 1) / 2);
        step.rows += planned.sample;
      }
    }
    executor_->Launch(std::move(plan));
  }
  // Steps end in the order in which they were launched; the next one may be launched before.
  StepResult Wait() override {
    StepResult result = executor_->Wait();
    const double now = Now(), cpu = ThreadSeconds(), process = ProcessSeconds();
    std::lock_guard lock(mutex_);
    Step& step = steps_[ended_++];
    step.model = std::chrono::duration<double>(result.device_time).count();
    step.cpu = process - (ended_ > 1 ? last_process_ : begin_process_);
    // Where the end before was noticed late, this one seems to come at once: it took what the model did at least.
    if (ended_ > 1) step.period = std::max(now - last_end_, step.model), step.engine_cpu = cpu - last_cpu_;
    last_end_ = now;
    last_cpu_ = cpu;
    last_process_ = process;
    return result;
  }

  std::vector<Step> TakeSteps() {
    std::lock_guard lock(mutex_);
    ended_ = 0;
    return std::exchange(steps_, {});
  }

 private:
  const std::unique_ptr<LocalExecutor> executor_;
  std::mutex mutex_;  // guards what follows
  std::vector<Step> steps_;
  size_t ended_ = 0;
  double last_end_ = 0, last_cpu_ = 0, last_process_ = 0, begin_process_ = 0;
};

class EndSink : public RequestSink {
 public:
  void OnEvent(Event event) override {
    if (event.kind != Event::Kind::kEnded) return;
    std::lock_guard lock(mutex_);
    status_ = std::move(event.status);
    ended_ = true;
    changed_.notify_all();
  }
  Status Wait() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return ended_; });
    return status_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  Status status_;
  bool ended_ = false;
};

double Quantile(std::vector<double> values, double at) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  return values[std::min(values.size() - 1, static_cast<size_t>(at * static_cast<double>(values.size())))];
}

[[noreturn]] void Fail(const Status& status) {
  std::fprintf(stderr, "engine_bench: %s\n", status.ToString().c_str());
  std::exit(1);
}

class EngineBench {
 public:
  EngineBench(Report& report, const std::string& path, int threads) : report_(report), by_cpu_(threads == 1) {
    auto checkpoint = Checkpoint::Open(path);
    if (!checkpoint.ok()) Fail(checkpoint.status());
    config_ = (*checkpoint)->config();
    LocalExecutorOptions options;
    options.threads = threads;
    options.max_running = kMostStreams;
    options.max_context = kPrompt + kNew;
    auto executor = LocalExecutor::Create(**checkpoint, options);
    if (!executor.ok()) Fail(executor.status());
    device_ = (*executor)->DescribeDevice();
    EngineOptions engine_options;
    engine_options.scheduler = (*executor)->scheduler_options();
    auto timed = std::make_unique<TimedExecutor>(*std::move(executor));
    executor_ = timed.get();
    auto engine = Engine::Start(engine_options, std::move(timed));
    if (!engine.ok()) Fail(engine.status());
    engine_ = *std::move(engine);
    stream_ = Stream::Cpu(threads);
    limits_ = std::make_unique<Limits>(*stream_);
  }

  void Run() {
    report_.Section(StrCat("engine: ", config_.name, ", bf16, on ", device_, "; ", kPrompt, " + ", kNew,
                           " tokens a stream", by_cpu_ ? "; in CPU time" : ""));
    MeasureStreams(1, 8);
    MeasureStreams(8, 3);
    MeasureStreams(kMostStreams, 2);
  }

 private:
  double layer_parameters() const {
    const auto& c = config_;
    return static_cast<double>(c.layers * c.hidden * (2 * c.q_size() + 2 * c.kv_size() + 3 * c.ffn));
  }
  double head_parameters() const { return static_cast<double>(config_.vocab * config_.hidden); }
  double Bytes(const Step& step) const {
    const double head = step.rows > 0 ? head_parameters() : 0;
    return 2 * (layer_parameters() + head) +
           step.context_tokens * static_cast<double>(config_.kv_bytes_per_token(DType::kBF16));
  }
  double Flops(const Step& step) const {
    return 2 * static_cast<double>(step.tokens) * layer_parameters() +
           2 * static_cast<double>(step.rows) * head_parameters() +
           4 * step.attended * static_cast<double>(config_.layers * config_.q_size());
  }

  // All streams at once, to their ends.
  std::vector<Step> Generate(int streams) {
    std::vector<std::shared_ptr<EndSink>> sinks;
    std::vector<RequestHandle> handles;
    for (int i = 0; i < streams; ++i) {
      auto request = std::make_shared<Request>();
      for (int j = 0; j < kPrompt; ++j) {
        request->prompt.push_back(static_cast<TokenId>(random_() % static_cast<uint64_t>(config_.vocab)));
      }
      request->sampling.temperature = 0;
      request->stop.max_new_tokens = kNew;
      request->stop.ignore_eos = true;
      request->bypass_prefix_cache = true;
      request->arrival = Clock::Real().Now();
      sinks.push_back(std::make_shared<EndSink>());
      auto handle = engine_->Submit(std::move(request), sinks.back());
      if (!handle.ok()) Fail(handle.status());
      handles.push_back(*std::move(handle));
    }
    for (auto& sink : sinks) {
      if (Status status = sink->Wait(); !status.ok()) Fail(status);
    }
    return executor_->TakeSteps();
  }

  void MeasureStreams(int streams, int rounds) {
    Generate(streams);  // pages of the pool, capacities
    std::vector<Step> decode, prefill;
    std::vector<double> read, multiply;
    double tokens_per_second = 0;
    for (int round = 0; round < rounds; ++round) {
      const std::vector<Timing> limits =
          Interleave({[&] { limits_->Read(); }, [&] { limits_->MultiplyBf16(); }}, 20, 0.0005);
      read.push_back(Limits::kReadBytes / limits[0].best());
      multiply.push_back(limits_->multiply_flops(true) / limits[1].best());
      const double begin = Now();
      for (const Step& step : Generate(streams)) {
        if (step.prefill_tokens == 0 && step.sequences == streams && step.period > 0) decode.push_back(step);
        if (step.prefill_tokens == step.tokens) prefill.push_back(step);
      }
      tokens_per_second = std::max(tokens_per_second, streams * kNew / (Now() - begin));
    }
    const double best_read = *std::max_element(read.begin(), read.end());
    const double best_multiply = *std::max_element(multiply.begin(), multiply.end());
    const std::string name = streams == 1 ? "1 stream" : StrCat(streams, " streams");
    Add(StrCat("prefill, ", name), prefill, best_read, best_multiply, {}, tokens_per_second);
    Add(StrCat("decode, ", name), decode, best_read, best_multiply, streams == 1 ? std::optional(0.8) : std::nullopt,
        tokens_per_second);
    if (!by_cpu_) AddEngineTime(name, decode);
  }

  // Of the best tenth of the steps, as limits are of the best tenth of their rounds.
  void Add(const std::string& name, const std::vector<Step>& steps, double read, double multiply,
           std::optional<double> goal, double whole_tokens_per_second) {
    std::vector<double> shares, tokens, bytes, flops;
    double by_bytes = 0, by_flops = 0;
    for (const Step& step : steps) {
      // A prefill step is often the first of its round, which has no period.
      const double seconds = by_cpu_ ? step.cpu : step.prefill_tokens > 0 ? step.model : step.period;
      by_bytes += Bytes(step) / read;
      by_flops += Flops(step) / multiply;
      shares.push_back(std::max(Bytes(step) / read, Flops(step) / multiply) / seconds);
      tokens.push_back(static_cast<double>(step.tokens) / seconds);
      bytes.push_back(Bytes(step) / seconds);
      flops.push_back(Flops(step) / seconds);
    }
    const bool memory_bound = by_bytes > by_flops;
    Result result;
    result.name = name;
    result.value = Quantile(memory_bound ? bytes : flops, 0.9) / 1e9;
    result.unit = memory_bound ? "GB/s" : "GFLOP/s";
    result.limit = (memory_bound ? read : multiply) / 1e9;
    result.limit_name = memory_bound ? "read bandwidth" : "GEMM peak";
    result.ratio = Quantile(shares, 0.9);
    result.median_ratio = Quantile(shares, 0.5);
    result.at_least = goal;
    result.remark = Number(Quantile(tokens, 0.9)) + " tokens/s, median " + Number(Quantile(tokens, 0.5));
    result.extra = {{"tokens_per_second", Quantile(tokens, 0.9)},
                    {"median_tokens_per_second", Quantile(tokens, 0.5)},
                    {"new_tokens_per_second_with_prefill", whole_tokens_per_second},
                    {"steps", steps.size()}};
    report_.Add(result);
  }

  void AddEngineTime(const std::string& name, const std::vector<Step>& steps) {
    std::vector<double> outside, cpu, periods;
    for (const Step& step : steps) {
      outside.push_back(step.period - step.model);
      cpu.push_back(step.engine_cpu);
      periods.push_back(step.period);
    }
    auto add = [&](const std::string& what, const std::vector<double>& seconds) {
      Result result;
      result.name = StrCat(what, ", ", name);
      result.value = Quantile(seconds, 0.1) * 1e6;
      result.unit = "us/step";
      result.limit = Quantile(periods, 0.1) * 1e6;
      result.limit_name = "the step's";
      result.median_ratio = Quantile(seconds, 0.5) / Quantile(periods, 0.5);
      result.extra = {{"median_us", Quantile(seconds, 0.5) * 1e6}};
      report_.Add(result);
    };
    add("no model at work", outside);
    add("CPU of the engine thread", cpu);
  }

  Report& report_;
  const bool by_cpu_;
  ModelConfig config_;
  std::string device_;
  std::unique_ptr<Engine> engine_;
  TimedExecutor* executor_ = nullptr;  // the engine's
  std::unique_ptr<Stream> stream_;
  std::unique_ptr<Limits> limits_;
  std::mt19937_64 random_{1};
};

}  // namespace
}  // namespace altiplano::bench

int main(int argc, char** argv) {
  altiplano::bench::Report report("engine", argc, argv, {"--model", "--threads"});
  const std::string model = report.option("--model");
  if (model.empty()) {
    std::fprintf(stderr, "engine_bench: --model says which checkpoint: a folder or a GGUF file\n");
    return 64;
  }
  altiplano::bench::EngineBench(report, model, std::atoi(report.option("--threads", "0").c_str())).Run();
}
