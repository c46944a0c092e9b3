// Ops whose CUDA twin is not written yet. Reaching one is a bug.
#include <cstdio>
#include <cstdlib>

#include "kernels/cuda/backend.h"

namespace altiplano::cuda {

namespace {
[[noreturn]] void Die(const char* op) {
  std::fprintf(stderr, "%s has no CUDA twin yet\n", op);
  std::abort();
}
}  // namespace

void Sample(Stream&, const SampleArgs&) {
  Die("Sample");
}
void Score(Stream&, const ScoreArgs&) {
  Die("Score");
}

}  // namespace altiplano::cuda
