// Sends a load in real time: open loop, closed loop, or both.
#pragma once

#include <atomic>
#include <cstdio>
#include <functional>
#include <mutex>
#include <string_view>

#include "server/bench/report.h"
#include "server/cli/load_flags.h"
#include "server/cli/stop_signal.h"

namespace altiplano::cli {

// Something that answers requests.
class LoadTarget {
 public:
  virtual ~LoadTarget() = default;
  using Done = std::function<void(bench::RequestRecord)>;
  // Makes everything of a request that can be made ahead. The call that comes back sends it and returns at once; its
  // `done` is called once, on any thread, with what was seen of the answer.
  virtual std::function<void(Done)> Prepare(const bench::LoadRequest& request) = 0;
  // Ends every request that is live, and any that is sent from now on, with CANCELLED. Any thread.
  virtual void Cancel() = 0;
  // Output tokens that have come so far. Any thread.
  uint64_t tokens() const { return tokens_.load(std::memory_order_relaxed); }

 protected:
  void CountTokens(uint64_t tokens) { tokens_.fetch_add(tokens, std::memory_order_relaxed); }

 private:
  std::atomic<uint64_t> tokens_{0};
};

struct LoadState {
  size_t total = 0, sent = 0, running = 0, failed = 0;
  uint64_t tokens = 0;
  Duration elapsed{};
};
// "12.0 s: 40 of 100 sent, 8 running, 0 failed, 5120 tokens, 430 tok/s"
std::string DescribeLoad(const LoadState& state);

// How a load goes, on stderr: one live line on a terminal, else a line every five seconds. One thread.
class LoadStatePrinter {
 public:
  explicit LoadStatePrinter(std::FILE* out);
  ~LoadStatePrinter();
  void Print(const LoadState& state);
  Duration period() const { return period_; }

 private:
  std::FILE* const out_;
  const bool live_;
  const Duration period_;
  bool drawn_ = false;
};

// Ends what is being measured before its time, so that what has been measured can be reported.
class LoadInterrupt {
 public:
  void Interrupt();  // any thread
  bool interrupted() const;

  // While it lives, one at a time, on_interrupt is what an interruption does: once, on the thread that interrupts, or
  // at once here if that has happened.
  class Watch {
   public:
    Watch(LoadInterrupt& interrupt, std::function<void()> on_interrupt);
    ~Watch();

   private:
    LoadInterrupt& interrupt_;
  };

 private:
  mutable std::mutex mutex_;
  bool interrupted_ = false;
  std::function<void()> on_interrupt_;
};

// What SIGINT and SIGTERM do to a load test: once armed, the first one interrupts it. Any other ends the process at
// once. Made before there is a thread that could take them.
class InterruptOnSignal {
 public:
  InterruptOnSignal(std::string_view command, LoadInterrupt* interrupt);
  void Arm() { armed_ = true; }

 private:
  std::atomic<bool> armed_{false};
  StopSignal signal_;
};

// Blocks until every request has ended; fills the report's requests, duration and whether it was interrupted.
// printer: null for none.
void RunLoad(const Load& load, LoadTarget& target, LoadInterrupt& interrupt, LoadStatePrinter* printer,
             bench::BenchReport* report);

}  // namespace altiplano::cli
