// The passes over a row of logits that Sample and Score are made of, one table per instruction set; all tables give the
// same results to the bit. Plain data and function pointers: nothing inline that could be compiled twice with different
// instruction sets.
#pragma once

#include <cstdint>

namespace altiplano::cpu {

// A weight is e^x in fixed point: rounded to a multiple of 2^-40 (to nearest, ties to even), counted in these. Sums of
// weights are integers, so they depend on no order, no vector width and no device.
inline constexpr int kWeightBits = 40;

struct SampleKernels {
  // The maximum and the lowest index that holds it. False, and neither set, when there is a NaN or +inf.
  bool (*max_of)(const float* x, int64_t n, float* max, int64_t* index);
  // e[i] = Exp((x[i] - max) * factor), max >= x[i], 0 < factor < inf; the sum of their weights. e may be null.
  uint64_t (*exponentials)(const float* x, int64_t n, float max, float factor, float* e);
  int64_t (*count_at_least)(const float* x, int64_t n, float threshold);
  // The weights of all e[i] >= threshold.
  uint64_t (*weight_at_least)(const float* e, int64_t n, float threshold);
  // The first i >= begin with x[i] >= threshold; n when there is none.
  int64_t (*find_at_least)(const float* x, int64_t begin, int64_t n, float threshold);
  // Indices, ascending, of low <= x[i] < high. There are at most `room`; returns how many.
  int64_t (*indices_between)(const float* x, int64_t n, float low, float high, int32_t* indices, int64_t room);
};

extern const SampleKernels kSampleAvx2, kSampleAvx512;

const SampleKernels& CurrentSampleKernels();

}  // namespace altiplano::cpu
