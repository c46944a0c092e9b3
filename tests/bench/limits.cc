#include "tests/bench/limits.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "kernels/cpu/cpu_features.h"
#include "kernels/cpu/thread_team.h"

namespace altiplano::bench {

namespace {

constexpr size_t kMemoryBytes = size_t{512} << 20;  // far beyond any cache
constexpr int64_t kTurns = 40'000;
constexpr int kChoosingRounds = 30;
constexpr double kChoosingSeconds = 0.0005;

// Results that nobody reads must still be computed.
void Keep(float value) {
  asm volatile("" : : "x"(value));
}

// The index of the subject with the best round.
size_t Fastest(const std::vector<std::function<void()>>& subjects, const std::vector<double>& work) {
  const std::vector<Timing> timings = Interleave(subjects, kChoosingRounds, kChoosingSeconds);
  size_t fastest = 0;
  for (size_t i = 1; i < timings.size(); ++i) {
    if (work[i] / timings[i].best() > work[fastest] / timings[fastest].best()) fastest = i;
  }
  return fastest;
}

}  // namespace

Limits::Limits(Stream& stream) : stream_(stream), memory_(Buffer::Allocate(Device::kCpu, kMemoryBytes)) {
  if (!memory_) {
    std::fprintf(stderr, "no memory: the limits need %zu MiB\n", kMemoryBytes >> 20);
    std::exit(69);
  }
  std::memset(memory_.data(), 0x3c,
              memory_.bytes());  // small bf16 and f32 numbers; pages of its own, not the zero page

  const Isa isa = CurrentIsa();
  std::vector<ReadKernel> reads(kReadAvx2.begin(), kReadAvx2.end());
  std::vector<CopyKernel> copies(kCopyAvx2.begin(), kCopyAvx2.end());
  std::vector<MultiplyKernel> multiplies(kMultiplyAvx2.begin(), kMultiplyAvx2.end());
  auto append = [](auto* to, const auto& from) { to->insert(to->end(), from.begin(), from.end()); };
  if (isa >= Isa::kAvx512) {
    append(&reads, kReadAvx512);
    append(&copies, kCopyAvx512);
    append(&multiplies, kMultiplyAvx512);
  }
  if (isa >= Isa::kAvx512Bf16) append(&multiplies, kMultiplyAvx512Bf16);

  auto choose = [](const auto& kernels, auto run, auto work_of) {
    std::vector<std::function<void()>> subjects;
    std::vector<double> work;
    for (const auto& kernel : kernels) {
      subjects.push_back([&run, &kernel] { run(kernel); });
      work.push_back(work_of(kernel));
    }
    return kernels[Fastest(subjects, work)];
  };
  auto same = [](const auto&) { return 1.0; };
  read_ = choose(
      reads, [this](const ReadKernel& k) { read_ = k, Read(); }, same);
  copy_ = choose(
      copies, [this](const CopyKernel& k) { copy_ = k, Copy(); }, same);
  auto flops = [](const MultiplyKernel& k) { return k.flops_per_turn; };
  bf16_ = choose(
      multiplies, [this](const MultiplyKernel& k) { Multiply(k); }, flops);
  std::erase_if(multiplies, [](const MultiplyKernel& k) { return k.bf16; });
  f32_ = choose(
      multiplies, [this](const MultiplyKernel& k) { Multiply(k); }, flops);
}

void Limits::Read() {
  constexpr size_t kBytes = static_cast<size_t>(kReadBytes);
  const char* from = static_cast<const char*>(memory_.data()) + next_;
  next_ = (next_ + kBytes) % memory_.bytes();
  stream_.team().Run([&](int worker, int workers) {
    const size_t share = kBytes / static_cast<size_t>(workers) / 4096 * 4096;
    Keep(read_.run(from + static_cast<size_t>(worker) * share, share));
  });
}

void Limits::Copy() {
  constexpr size_t kBytes = static_cast<size_t>(kCopyBytes);
  char* at = static_cast<char*>(memory_.data()) + next_;
  next_ = (next_ + 2 * kBytes) % memory_.bytes();
  stream_.team().Run([&](int worker, int workers) {
    const size_t share = kBytes / static_cast<size_t>(workers) / 4096 * 4096;
    const size_t begin = static_cast<size_t>(worker) * share;
    copy_.run(at + kBytes + begin, at + begin, share);
  });
}

void Limits::Multiply(const MultiplyKernel& kernel) {
  stream_.team().Run([&](int, int) { Keep(kernel.run(kTurns)); });
}
void Limits::MultiplyF32() {
  Multiply(f32_);
}
void Limits::MultiplyBf16() {
  Multiply(bf16_);
}

double Limits::multiply_flops(bool bf16) const {
  return (bf16 ? bf16_ : f32_).flops_per_turn * static_cast<double>(kTurns * stream_.team().size());
}

}  // namespace altiplano::bench
