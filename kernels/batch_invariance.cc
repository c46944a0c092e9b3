#include "kernels/batch_invariance.h"

#include <atomic>

namespace altiplano {

namespace {
std::atomic<bool> batch_invariant{false};
}  // namespace

void SetBatchInvariant(bool on) {
  batch_invariant.store(on, std::memory_order_relaxed);
}
bool IsBatchInvariant() {
  return batch_invariant.load(std::memory_order_relaxed);
}

}  // namespace altiplano
