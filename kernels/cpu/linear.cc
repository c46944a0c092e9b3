// Linear on the CPU: chooses the kernel, packs x, shares out the rows of the weights.
#include "kernels/cpu/linear.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/cpu/cpu_features.h"
#include "kernels/cpu/linear_kernel.h"
#include "kernels/cpu/ops.h"
#include "kernels/cpu/thread_team.h"

namespace altiplano::cpu {

namespace {

// Tokens whose packed x a core keeps in L2, one block of K at a time.
constexpr int64_t kTokenBlock = 256;
// Below this waking the team costs more than it brings: bytes of weights, or a quarter of the products.
constexpr int64_t kSerialWork = 32768;
constexpr int64_t kSerialPack = 32768;  // elements of x

int64_t RoundUp(int64_t n, int64_t unit) {
  return (n + unit - 1) / unit * unit;
}

// Worker's share of `total` in whole units: contiguous, and a function of its arguments alone.
struct Share {
  int64_t begin, end;
};
Share ShareOf(int64_t total, int64_t unit, int worker, int size) {
  const int64_t units = (total + unit - 1) / unit;
  return {std::min(total, units * worker / size * unit), std::min(total, units * (worker + 1) / size * unit)};
}

// AMX must earn trust: this project's own machines have run it on emulated tiles only.
bool AmxWorks() {
  static const bool works = LinearKernelsAgree(kLinearBf16Amx, kLinearBf16Avx512Bf16);
  return works;
}

const LinearKernel& KernelFor(DType dtype) {
  const Isa isa = CurrentIsa();
  if (dtype == DType::kF32) return isa >= Isa::kAvx512 ? kLinearF32Avx512 : kLinearF32Avx2;
  switch (isa) {
    case Isa::kAvx2:
      return kLinearBf16Avx2;
    case Isa::kAvx512:
      return kLinearBf16Avx512;
    case Isa::kAvx512Bf16:
      return kLinearBf16Avx512Bf16;
    case Isa::kAmxBf16:
      return AmxWorks() ? kLinearBf16Amx : kLinearBf16Avx512Bf16;
  }
  return kLinearBf16Avx2;
}

}  // namespace

void LinearWith(const LinearKernel& kernel, ThreadTeam& team, const LinearArgs& args) {
  const int64_t tokens = args.x.dim(0), k = args.x.dim(1), n = args.weight.dim(0);
  const size_t size = SizeOf(args.weight.dtype), out_size = SizeOf(args.out.dtype);
  const int64_t block = std::min(tokens, kTokenBlock);

  const size_t packed_bytes =
      static_cast<size_t>(RoundUp(RoundUp(block, kernel.group) * RoundUp(k, kernel.step), 64)) * kernel.packed_element;
  const int64_t partial_floats = kLinearColumns * RoundUp(block, 32);
  const size_t partial_bytes = static_cast<size_t>(partial_floats) * sizeof(float) * static_cast<size_t>(team.size());
  char* packed = static_cast<char*>(team.Scratch(packed_bytes + partial_bytes));
  float* partials = reinterpret_cast<float*>(packed + packed_bytes);

  LinearTask task{.weight = args.weight.data,
                  .weight_stride = n > 1 ? args.weight.stride0 : k,
                  .n = n,
                  .k = k,
                  .packed = packed,
                  .out_stride = args.out.stride0,
                  .out_f32 = args.out.dtype == DType::kF32,
                  .accumulate = args.accumulate};
  for (int64_t t0 = 0; t0 < tokens; t0 += block) {
    task.tokens = std::min(block, tokens - t0);
    task.out = static_cast<char*>(args.out.data) + t0 * args.out.stride0 * static_cast<int64_t>(out_size);
    const char* x = static_cast<const char*>(args.x.data) + t0 * args.x.stride0 * static_cast<int64_t>(size);
    if (task.tokens * k <= kSerialPack) {
      kernel.pack(x, args.x.stride0, task.tokens, k, 0, task.tokens, packed);
    } else {
      team.Run([&](int worker, int workers) {
        const Share share = ShareOf(task.tokens, kernel.group, worker, workers);
        kernel.pack(x, args.x.stride0, task.tokens, k, share.begin, share.end, packed);
      });
    }
    if (std::max(n * k * static_cast<int64_t>(size), n * k * task.tokens / 4) <= kSerialWork) {
      kernel.run(task, 0, n, partials);
    } else {
      team.Run([&](int worker, int workers) {
        const Share share = ShareOf(n, kernel.panel, worker, workers);
        if (share.begin < share.end) kernel.run(task, share.begin, share.end, partials + worker * partial_floats);
      });
    }
  }
}

bool LinearKernelsAgree(const LinearKernel& kernel, const LinearKernel& trusted) {
  // Ragged in every dimension, more than one block of K, values whose products are exact in f32 and sums nearly so.
  constexpr int64_t kTokens = 37, kN = 83, kK = 1571;
  std::vector<BF16> x(kTokens * kK), weight(kN * kK);
  uint32_t state = 1;
  auto fill = [&](std::vector<BF16>& values) {
    for (BF16& value : values) {
      state = state * 1664525 + 1013904223;
      value = ToBF16(static_cast<float>(static_cast<int>(state >> 20) - 2048) / 1024);
    }
  };
  fill(x);
  fill(weight);
  ThreadTeam team(1);
  auto run = [&](const LinearKernel& which) {
    std::vector<float> out(kTokens * kN);
    LinearWith(which, team,
               {.out = TensorView::Make(out.data(), DType::kF32, {kTokens, kN}),
                .x = TensorView::Make(x.data(), DType::kBF16, {kTokens, kK}),
                .weight = TensorView::Make(weight.data(), DType::kBF16, {kN, kK})});
    return out;
  };
  const std::vector<float> a = run(kernel), b = run(trusted);
  // |x|, |w| <= 2: each sum of 1571 products is off by at most 1571 * 4 * 1571 * 2^-24 = 0.6 (in practice 1e-4), while
  // one product misplaced moves it by about 1. Sums are around 50.
  for (size_t i = 0; i < a.size(); ++i) {
    if (!(std::abs(a[i] - b[i]) < 0.02f)) return false;
  }
  return true;
}

void Linear(ThreadTeam& team, const LinearArgs& args) {
  LinearWith(KernelFor(args.weight.dtype), team, args);
}

std::string LinearBackend() {
  std::string name = KernelFor(DType::kBF16).name;
  if (CurrentIsa() == Isa::kAmxBf16 && !AmxWorks()) name += " (AMX disagreed with it and is left alone)";
  return name;
}

}  // namespace altiplano::cpu
