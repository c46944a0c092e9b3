// Sends a load in real time: open loop, closed loop, or both.
#pragma once

#include <atomic>
#include <cstdio>
#include <functional>
#include <vector>

#include "server/bench/report.h"
#include "server/cli/load_flags.h"

namespace altiplano::cli {

// Something that answers requests.
class LoadTarget {
 public:
  virtual ~LoadTarget() = default;
  using Done = std::function<void(bench::RequestRecord)>;
  // Makes everything of a request that can be made ahead. The call that comes back sends it and returns at once; its
  // `done` is called once, on any thread, with what was seen of the answer.
  virtual std::function<void(Done)> Prepare(const bench::LoadRequest& request) = 0;
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

// Blocks until every request has ended; fills report->requests and ->duration. printer: null for none.
void RunLoad(const Load& load, LoadTarget& target, LoadStatePrinter* printer, bench::BenchReport* report);

}  // namespace altiplano::cli
