#include "server/cli/load_run.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <deque>
#include <mutex>
#include <thread>
#include <vector>

namespace altiplano::cli {
namespace {

using std::chrono::milliseconds;

// Answers on a thread of its own, last in first out, and only when nothing more is being sent.
class LazyTarget : public LoadTarget {
 public:
  explicit LazyTarget(size_t expected_at_once) : expected_(expected_at_once), thread_([this] { Answer(); }) {}
  ~LazyTarget() override {
    {
      std::lock_guard lock(mutex_);
      stop_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }
  std::function<void(Done)> Prepare(const bench::LoadRequest& request) override {
    return [this, tokens = request.input_tokens](const Done& done) {
      std::lock_guard lock(mutex_);
      waiting_.push_back({tokens, done});
      most_ = std::max(most_, waiting_.size());
      changed_.notify_all();
    };
  }
  void Cancel() override {}
  size_t most() {
    std::lock_guard lock(mutex_);
    return most_;
  }

 private:
  struct Waiting {
    int32_t tokens;
    Done done;
  };
  void Answer() {
    std::unique_lock lock(mutex_);
    for (;;) {
      changed_.wait(lock,
                    [&] { return stop_ || waiting_.size() == expected_ || (answered_ > 0 && !waiting_.empty()); });
      if (stop_) return;
      Waiting next = std::move(waiting_.back());
      waiting_.pop_back();
      ++answered_;
      lock.unlock();
      bench::RequestRecord record;
      record.ok = next.tokens % 2 == 0;
      record.input_tokens = static_cast<uint64_t>(next.tokens);
      CountTokens(3);
      next.done(std::move(record));
      lock.lock();
    }
  }

  const size_t expected_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Waiting> waiting_;
  size_t most_ = 0, answered_ = 0;
  bool stop_ = false;
  std::thread thread_;
};

Load MakeLoad(size_t size) {
  Load load;
  load.dataset.requests.resize(size);
  for (size_t i = 0; i < size; ++i) load.dataset.requests[i].input_tokens = static_cast<int32_t>(i);
  load.arrivals.resize(size);
  return load;
}

TEST(RunLoad, ClosedLoopKeepsExactlySoManyRunning) {
  LazyTarget target(3);  // answers nothing before three run: fewer would hang
  LoadInterrupt interrupt;
  bench::BenchReport report;
  report.max_concurrency = 3;
  RunLoad(MakeLoad(20), target, interrupt, nullptr, &report);
  EXPECT_EQ(target.most(), 3u);
  EXPECT_EQ(target.tokens(), 60u);
  ASSERT_EQ(report.requests.size(), 20u);
  for (size_t i = 0; i < 20; ++i) {
    EXPECT_EQ(report.requests[i].input_tokens, i) << "a record is of its own request, in whatever order they end";
    EXPECT_EQ(report.requests[i].ok, i % 2 == 0);
  }
  EXPECT_GT(report.duration, Duration(0));
}

TEST(RunLoad, WithoutALimitEverythingRunsAtOnce) {
  LazyTarget target(20);
  LoadInterrupt interrupt;
  bench::BenchReport report;
  RunLoad(MakeLoad(20), target, interrupt, nullptr, &report);
  EXPECT_EQ(target.most(), 20u);
  for (const bench::RequestRecord& request : report.requests) EXPECT_EQ(request.held, Duration(0));
}

TEST(RunLoad, NothingIsSentBeforeItsTime) {
  LazyTarget target(1);
  Load load = MakeLoad(3);
  load.arrivals = {Duration(0), milliseconds(20), milliseconds(40)};
  LoadInterrupt interrupt;
  bench::BenchReport report;
  RunLoad(load, target, interrupt, nullptr, &report);
  for (size_t i = 0; i < 3; ++i) {
    EXPECT_GE(report.requests[i].start, load.arrivals[i]);
    EXPECT_EQ(report.requests[i].start, load.arrivals[i] + report.requests[i].lag);
  }
}

TEST(RunLoad, WaitingForOthersIsNotTheClientsFault) {
  LazyTarget target(1);
  LoadInterrupt interrupt;
  bench::BenchReport report;
  report.max_concurrency = 1;
  RunLoad(MakeLoad(4), target, interrupt, nullptr, &report);
  for (const bench::RequestRecord& request : report.requests) {
    EXPECT_EQ(request.start, request.held + request.lag);
  }
  EXPECT_GT(report.requests[3].held, Duration(0));
}

// Answers the first `answers` at once and the others when they are cancelled.
class PartialTarget : public LoadTarget {
 public:
  explicit PartialTarget(size_t answers) : answers_(answers) {}
  std::function<void()> on_left = [] {};  // the first that gets no answer has been sent
  bench::RequestRecord at_cancel;

  std::function<void(Done)> Prepare(const bench::LoadRequest&) override {
    return [this](const Done& done) {
      if (sent_++ < answers_) {
        bench::RequestRecord record;
        record.ok = true;
        return done(record);
      }
      left_.push_back(done);
      if (left_.size() == 1) on_left();
    };
  }
  void Cancel() override {
    for (const Done& done : left_) done(at_cancel);
    left_.clear();
  }

 private:
  const size_t answers_;
  size_t sent_ = 0;
  std::vector<Done> left_;
};

TEST(RunLoad, AnInterruptionCancelsWhatIsLiveAndSendsNothingMore) {
  LoadInterrupt interrupt;
  PartialTarget target(4);
  target.at_cancel.error_code = "CANCELLED";
  std::thread interrupter;
  target.on_left = [&] { interrupter = std::thread([&] { interrupt.Interrupt(); }); };
  bench::BenchReport report;
  report.max_concurrency = 1;  // the fifth has to end before the sixth
  RunLoad(MakeLoad(9), target, interrupt, nullptr, &report);
  interrupter.join();
  EXPECT_TRUE(report.interrupted);
  EXPECT_EQ(report.not_sent, 4);
  ASSERT_EQ(report.requests.size(), 5u);
  EXPECT_TRUE(report.requests[3].ok && !report.requests[3].cancelled);
  EXPECT_TRUE(report.requests[4].cancelled);
  EXPECT_THAT(report.notes, testing::ElementsAre(testing::HasSubstr("interrupted after")));
}

TEST(RunLoad, AnInterruptionEndsTheWaitForTheNextArrival) {
  LoadInterrupt interrupt;
  PartialTarget target(0);
  target.at_cancel.error_code = "UNAVAILABLE";
  Load load = MakeLoad(2);
  load.arrivals[1] = std::chrono::hours(1);
  std::thread interrupter;
  target.on_left = [&] { interrupter = std::thread([&] { interrupt.Interrupt(); }); };
  bench::BenchReport report;
  RunLoad(load, target, interrupt, nullptr, &report);
  interrupter.join();
  EXPECT_EQ(report.not_sent, 1);
  ASSERT_EQ(report.requests.size(), 1u);
  EXPECT_FALSE(report.requests[0].cancelled) << "it failed, whatever else happened";
}

TEST(RunLoad, AnInterruptionBeforeItLeavesNothingToMeasure) {
  LoadInterrupt interrupt;
  interrupt.Interrupt();
  PartialTarget target(3);
  bench::BenchReport report;
  RunLoad(MakeLoad(3), target, interrupt, nullptr, &report);
  EXPECT_TRUE(report.interrupted);
  EXPECT_EQ(report.not_sent, 3);
  EXPECT_EQ(report.requests.size(), 0u);
  EXPECT_EQ(report.duration, Duration(0));
  EXPECT_THAT(report.notes, testing::ElementsAre(testing::HasSubstr("nothing was measured")));
}

TEST(RunLoad, AnInterruptionAfterTheLastEndIsNone) {
  LoadInterrupt interrupt;
  PartialTarget target(3);
  bench::BenchReport report;
  RunLoad(MakeLoad(3), target, interrupt, nullptr, &report);
  interrupt.Interrupt();
  EXPECT_TRUE(interrupt.interrupted());
  EXPECT_FALSE(report.interrupted);
}

TEST(DescribeLoad, OneLine) {
  EXPECT_EQ(
      DescribeLoad(
          {.total = 100, .sent = 40, .running = 8, .failed = 1, .tokens = 5000, .elapsed = std::chrono::seconds(10)}),
      "10.0 s: 40 of 100 sent, 8 running, 1 failed, 5000 tokens, 500 tok/s");
}

}  // namespace
}  // namespace altiplano::cli
