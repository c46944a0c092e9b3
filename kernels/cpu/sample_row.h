// Sampling of one row, apart from threads and instruction sets: what sample.cc and score.cc share.
#pragma once

#include <cstdint>

#include "kernels/cpu/sample_kernels.h"
#include "kernels/ops.h"

namespace altiplano::cpu {

// Memory for one row at a time.
struct SampleWorkspace {
  float* x;      // [V] adjusted logits
  float* e;      // [V]
  int32_t* ids;  // [V]
};

// The kept elements of a row: all above `value`, and of those equal to it the first `ties`.
struct Cut {
  float value;
  int64_t ties;
  int64_t equal;  // elements equal to value
};

// The cut that keeps the largest elements, the lower index first among equal ones, until `measure` of what is kept
// reaches target. x is finite or -inf and sums up to at least target.
enum class Measure { kCount, kWeight };
Cut FindCut(const SampleKernels& kernels, const float* x, int64_t n, float max, Measure measure, uint64_t target);

// result->logprob, rank and the `num_top` most probable, from the raw logits. total: the weights of e^(row - max).
void FillLogprobs(const SampleKernels& kernels, const float* row, int64_t vocab, float max, uint64_t total,
                  int32_t num_top, SampleResult* result);

void SampleRow(const SampleKernels& kernels, const SampleParams& params, const float* row, int64_t vocab,
               const SampleWorkspace& work, SampleResult* result);

}  // namespace altiplano::cpu
