// gpu_bench against the stand-in for the CUDA runtime, whose kernels do nothing: that every case can be prepared,
// captured and launched, which it has not been before it comes to a GPU. Nothing may be refused or left.
#include <cstdio>
#include <cstdlib>

#include "tests/kernels/cuda/runtime/fake_cudart_testlib.h"

namespace altiplano {
namespace {

struct Runtime {
  Runtime() { fake_cudart::Reset({.bytes = size_t{24} << 30}); }
  ~Runtime() {
    for (const std::string& refusal : fake_cudart::Refusals()) std::fprintf(stderr, "refused: %s\n", refusal.c_str());
    if (fake_cudart::Left() > 0) std::fprintf(stderr, "%d things were left\n", fake_cudart::Left());
    std::fflush(nullptr);
    if (!fake_cudart::Refusals().empty() || fake_cudart::Left() > 0) std::_Exit(1);
  }
} runtime;

}  // namespace
}  // namespace altiplano
