// QueueOracle: whom docs/scheduler.md lets into the queue, and when it tells the others to come back, counted anew from
// all that wait and all that were admitted.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

#include "server/scheduler/queue_bounds.h"

namespace altiplano::sim {

class QueueOracle {
 public:
  struct Counts {
    uint64_t queue_full = 0, tenant_queue_full = 0;
    uint64_t over_the_bounds = 0;  // let in all the same
    uint64_t hints_by_rate = 0;    // of a tenant that had admissions lately
  };

  QueueOracle(QueueBounds::Options options, Counts* counts);

  // What is wrong with `said`, the answer to somebody who wants to join, or "".
  std::string JudgeEntry(size_t tenant, int64_t prompt_tokens, const Status& said, TimePoint now);
  void Leave(size_t tenant, int64_t prompt_tokens, bool admitted, TimePoint now);

 private:
  struct Sum {
    int64_t requests = 0, tokens = 0;
  };
  Sum OfTenant(size_t tenant) const;
  Sum OfAll() const;
  std::string Refusal(size_t tenant, int64_t prompt_tokens);  // "": let in
  std::chrono::milliseconds Hint(size_t tenant, TimePoint now) const;

  struct Member {
    size_t tenant = 0;
    int64_t tokens = 0;
  };
  struct Admission {
    size_t tenant = 0;
    TimePoint at{};
  };
  const QueueBounds::Options options_;
  Counts& counts_;
  std::vector<Member> waiting_;
  std::vector<Admission> admissions_;
};

}  // namespace altiplano::sim
