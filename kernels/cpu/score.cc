#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "kernels/cpu/ops.h"
#include "kernels/cpu/sample_row.h"
#include "kernels/cpu/vec_threads.h"

namespace altiplano::cpu {

void Score(ThreadTeam& team, const ScoreArgs& args) {
  const SampleKernels& kernels = CurrentSampleKernels();
  const int64_t vocab = args.logits.dim(1);
  ForRows(team, args.logits.dim(0), 2 * vocab, [&](int64_t r) {
    const int32_t token = args.results[r].token;
    if (token < 0 || token >= vocab) {
      std::fprintf(stderr, "Score: token %d is outside of the vocabulary\n", token);
      std::abort();
    }
    const float* row = args.logits.row<float>(r);
    SampleResult* result = &args.results[r];
    *result = SampleResult();
    result->token = token;
    float max;
    int64_t argmax;
    result->finite = kernels.max_of(row, vocab, &max, &argmax) && std::isfinite(max);
    if (!result->finite) return;
    FillLogprobs(kernels, row, vocab, max, kernels.exponentials(row, vocab, max, 1, nullptr), args.num_top[r], result);
  });
}

}  // namespace altiplano::cpu
