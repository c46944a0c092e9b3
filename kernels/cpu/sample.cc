// Sample: rows are shared out to the team; a row is sampled by one thread and knows of no other.
#include <algorithm>
#include <atomic>
#include <limits>

#include "kernels/cpu/cpu_features.h"
#include "kernels/cpu/ops.h"
#include "kernels/cpu/sample_row.h"

namespace altiplano::cpu {

namespace {

int64_t PaddedVocab(int64_t vocab) {
  return (vocab + 15) / 16 * 16;
}

SampleWorkspace WorkspaceAt(char* memory, int64_t vocab) {
  float* x = reinterpret_cast<float*>(memory);
  const int64_t n = PaddedVocab(vocab);
  return {x, x + n, reinterpret_cast<int32_t*>(x + 2 * n)};
}

// What the next step reads of row r.
void HandOn(const SampleArgs& args, int64_t r) {
  const SampleResult& result = args.results[r];
  if (!args.tokens.empty()) args.tokens.as<int32_t>()[r] = result.finite ? result.token : 0;
  uint16_t* counts = args.params[r].counts_out;
  if (counts == nullptr || !result.finite) return;
  if (counts[result.token] < std::numeric_limits<uint16_t>::max()) ++counts[result.token];
}

}  // namespace

const SampleKernels& CurrentSampleKernels() {
  return CurrentIsa() >= Isa::kAvx512 ? kSampleAvx512 : kSampleAvx2;
}

// The team's own scratch is used: it grows with the threads at work, not with the rows.
size_t SampleScratchBytes(int64_t, int64_t) {
  return 0;
}

void Sample(ThreadTeam& team, const SampleArgs& args) {
  const SampleKernels& kernels = CurrentSampleKernels();
  const int64_t rows = args.logits.dim(0), vocab = args.logits.dim(1);
  const size_t each = static_cast<size_t>(PaddedVocab(vocab)) * (2 * sizeof(float) + sizeof(int32_t));
  char* scratch = static_cast<char*>(team.Scratch(each * static_cast<size_t>(team.size())));
  std::atomic<int64_t> next = 0;
  auto work_on = [&](int worker) {
    const SampleWorkspace work = WorkspaceAt(scratch + static_cast<size_t>(worker) * each, vocab);
    for (int64_t r; (r = next.fetch_add(1, std::memory_order_relaxed)) < rows;) {
      SampleRow(kernels, args.params[r], args.logits.row<float>(r), vocab, work, &args.results[r]);
      HandOn(args, r);
    }
  };
  if (rows == 1) return work_on(0);
  team.Run([&](int worker, int) { work_on(worker); });
}

}  // namespace altiplano::cpu
