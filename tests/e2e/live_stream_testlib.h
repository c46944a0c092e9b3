// A request that runs in a thread until something happens to it.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>

#include "server/base/status.h"
#include "server/cli/client.h"
#include "tests/e2e/process_testlib.h"

namespace altiplano::e2e {

// A story of exactly so many tokens, greedily.
inference::v1::GenerateRequest Story(uint32_t tokens);

class LiveStream {
 public:
  explicit LiveStream(cli::Client* client, uint32_t tokens = 1'000'000);
  ~LiveStream();
  // Until its first token; false: it ended without one, or none came within kPatience.
  bool WaitForFirstToken();
  // Tokens that have come so far.
  uint64_t tokens() const { return tokens_; }
  // Until it has ended.
  const Status& End();

 private:
  std::atomic<uint64_t> tokens_{0};
  std::atomic<bool> ended_{false};
  Status status_;  // once ended_
  std::thread thread_;
};

// Polls; false after kPatience.
template <typename Done>
bool Eventually(Done done) {
  const auto limit = std::chrono::steady_clock::now() + std::chrono::seconds(kPatience);
  while (!done()) {
    if (std::chrono::steady_clock::now() > limit) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  return true;
}

}  // namespace altiplano::e2e
