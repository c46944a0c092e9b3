// What the front end costs a token: CPU of this process while clients in another one stream answers, less the CPU of
// the same requests given to the engine directly. The model is an executor that waits and makes tokens up, so that
// nothing but the serving is left.
#include <fcntl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <mutex>
#include <sstream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "server/base/log.h"
#include "server/base/strings.h"
#include "server/engine/engine.h"
#include "server/frontend/server.h"
#include "server/text/tokenizer.h"
#include "tests/bench/bench.h"

namespace altiplano::bench {
namespace {

constexpr auto kStep = std::chrono::milliseconds(10);
constexpr int32_t kVocab = 8192, kPrompt = 64, kNew = 200;

double CpuSeconds() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  auto seconds = [](const timeval& t) { return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_usec) * 1e-6; };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

// Steps that take kStep each and sample what comes to mind.
class SleepingExecutor : public Executor {
 public:
  explicit SleepingExecutor(int32_t vocab) : vocab_(vocab) {}
  void Launch(std::shared_ptr<const StepPlan> plan) override {
    plan_ = std::move(plan);
    end_ = std::chrono::steady_clock::now() + kStep;
  }
  StepResult Wait() override {
    std::this_thread::sleep_until(end_);
    StepResult result;
    result.step = plan_->step;
    for (const PlannedSequence& planned : plan_->sequences) {
      if (planned.sample)
        result.sampled.emplace_back().token = static_cast<TokenId>(random_ = random_ * 75 % 65537) % vocab_;
    }
    plan_.reset();
    return result;
  }

 private:
  const int32_t vocab_;
  uint32_t random_ = 1;
  std::shared_ptr<const StepPlan> plan_;
  std::chrono::steady_clock::time_point end_{};
};

class CountingSink : public RequestSink {
 public:
  void OnEvent(Event event) override {
    if (event.kind != Event::Kind::kEnded) return;
    std::lock_guard lock(mutex_);
    ended_ = true;
    changed_.notify_all();
  }
  void Wait() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return ended_; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool ended_ = false;
};

template <typename T>
T OrExit(StatusOr<T> result) {
  if (result.ok()) return *std::move(result);
  std::fprintf(stderr, "frontend_bench: %s\n", result.status().ToString().c_str());
  std::exit(1);
}

std::string ReadFile(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  std::ostringstream text;
  text << in.rdbuf();
  return text.str();
}

struct Use {
  double cpu = 0;  // seconds
  uint64_t tokens = 0;
};

class FrontendBench {
 public:
  FrontendBench(Report& report, std::string program) : report_(report), program_(std::move(program)) {
    log::Init(log::ParseLevel("warn").value(), log::Format::kText);
    tokenizer_ = OrExit(Tokenizer::FromHuggingFace(ReadFile(ALTIPLANO_SOURCE_DIR "/tests/data/tiny/tokenizer.json")));
    ServerOptions options;
    options.listen = "127.0.0.1:0";
    server_ = OrExit(Server::Start(options));
    EngineOptions engine;
    engine.scheduler.num_blocks = 65536;
    engine.scheduler.max_context = 1024;
    engine_ = OrExit(Engine::Start(engine, std::make_unique<SleepingExecutor>(kVocab), server_->step_callback()));
    ServedModel model;
    model.name = "made up";
    model.max_context = engine.scheduler.max_context;
    model.vocab_size = kVocab;
    model.tokenizer = tokenizer_;
    server_->Attach(engine_.get(), model);
  }
  ~FrontendBench() { server_->Stop(); }

  void Run() {
    report_.Section(StrCat("front end, steps of ", kStep.count(), " ms, ", kNew, " tokens a stream"));
    for (int streams : {1, 32, 128}) {
      Use direct, served;
      for (int round = 0; round < 3; ++round) {
        KeepCheaper(Direct(streams), &direct);
        KeepCheaper(Served(streams), &served);
      }
      auto each = [](const Use& use) { return use.cpu / static_cast<double>(use.tokens) * 1e6; };
      Result result;
      result.name = StrCat("CPU of the front end, ", streams, streams == 1 ? " stream" : " streams");
      result.value = each(served) - each(direct);
      result.unit = "us/token";
      result.remark =
          StrCat("the engine's own ", Number(each(direct)), " us; both keep ",
                 Number(each(served) * streams / std::chrono::duration<double, std::micro>(kStep).count() * 100),
                 " % of a core busy");
      result.extra = {{"engine_us_per_token", each(direct)}, {"tokens", served.tokens}};
      report_.Add(result);
    }
  }

 private:
  static void KeepCheaper(const Use& use, Use* best) {
    const auto each = [](const Use& u) { return u.cpu / static_cast<double>(u.tokens); };
    if (best->tokens == 0 || each(use) < each(*best)) *best = use;
  }

  template <typename F>
  Use Measure(F work) {
    const double cpu = CpuSeconds();
    const uint64_t tokens = engine_->load().scheduler.generated_tokens;
    work();
    return {CpuSeconds() - cpu, engine_->load().scheduler.generated_tokens - tokens};
  }

  Use Direct(int streams) {
    return Measure([&] {
      std::vector<std::shared_ptr<CountingSink>> sinks;
      std::vector<RequestHandle> handles;
      for (int i = 0; i < streams; ++i) {
        auto request = std::make_shared<Request>();
        request->prompt.assign(kPrompt, static_cast<TokenId>(i + 1));
        request->stop.max_new_tokens = kNew;
        request->stop.ignore_eos = true;
        request->arrival = Clock::Real().Now();
        sinks.push_back(std::make_shared<CountingSink>());
        handles.push_back(OrExit(engine_->Submit(std::move(request), sinks.back())));
      }
      for (auto& sink : sinks) sink->Wait();
    });
  }

  Use Served(int streams) {
    const std::vector<std::string> words = {
        program_,        "bench",         "serve",       "--url",         server_->address(),
        "--num-prompts", StrCat(streams), "--input-len", StrCat(kPrompt), "--output-len",
        StrCat(kNew),    "--num-warmups", "0",           "--json"};
    return Measure([&] {
      const pid_t child = fork();
      if (child == 0) {
        std::vector<char*> arguments;
        for (const std::string& word : words) arguments.push_back(const_cast<char*>(word.c_str()));
        arguments.push_back(nullptr);
        dup2(open("/dev/null", O_WRONLY), STDOUT_FILENO);
        execv(arguments[0], arguments.data());
        _exit(127);
      }
      int status = 0;
      waitpid(child, &status, 0);
      if (child < 0 || status != 0) {
        std::fprintf(stderr, "frontend_bench: %s bench serve did not succeed\n", program_.c_str());
        std::exit(1);
      }
    });
  }

  Report& report_;
  const std::string program_;
  std::shared_ptr<const Tokenizer> tokenizer_;
  std::unique_ptr<Engine> engine_;  // outlives what the server does with it: ~FrontendBench
  std::unique_ptr<Server> server_;
};

}  // namespace
}  // namespace altiplano::bench

int main(int argc, char** argv) {
  altiplano::bench::Report report("frontend", argc, argv, {"--program"});
  const std::string program = report.option("--program");
  if (program.empty()) {
    std::fprintf(stderr, "frontend_bench: --program says where altiplano is\n");
    return 64;
  }
  altiplano::bench::FrontendBench(report, program).Run();
}
