// The bodies of SampleKernels over Vec. Included after vec_avx2.h or vec_avx512.h, by files of one instruction set
// only.
#pragma once

#include "kernels/cpu/math_vec.h"
#include "kernels/cpu/sample_kernels.h"

namespace altiplano::cpu {
namespace {

constexpr int W = Vec::kWidth;
constexpr uint32_t kAllLanes = (1u << W) - 1;

int64_t FindAtLeast(const float* x, int64_t begin, int64_t n, float threshold) {
  const Vec::F t = Vec::Set1(threshold);
  int64_t i = begin;
  for (; i + W <= n; i += W) {
    if (const uint32_t hits = Vec::MaskGe(Vec::Load(x + i), t); hits != 0) return i + __builtin_ctz(hits);
  }
  for (; i < n; ++i) {
    if (x[i] >= threshold) return i;
  }
  return n;
}

// Only the block that raised the maximum last is searched for its index.
bool MaxOf(const float* x, int64_t n, float* max, int64_t* index) {
  constexpr int64_t kBlock = 2048;
  const float inf = __builtin_inff();
  const Vec::F below = Vec::Set1(inf);
  float best = -inf;
  int64_t best_block = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = n - begin < kBlock ? n : begin + kBlock;
    Vec::F m[4] = {Vec::Set1(-inf), Vec::Set1(-inf), Vec::Set1(-inf), Vec::Set1(-inf)};
    uint32_t good = kAllLanes;
    int64_t i = begin;
    for (; i + 4 * W <= end; i += 4 * W) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const Vec::F v = Vec::Load(x + i + j * W);
        good &= Vec::MaskLess(v, below);
        m[j] = Vec::Max(m[j], v);
      }
    }
    float block = Vec::MaxOf(Vec::Max(Vec::Max(m[0], m[1]), Vec::Max(m[2], m[3])));
    for (; i < end; ++i) {
      if (!(x[i] < inf)) good = 0;
      block = x[i] > block ? x[i] : block;
    }
    if (good != kAllLanes) return false;
    if (block > best) {
      best = block;
      best_block = begin;
    }
  }
  *max = best;
  *index = FindAtLeast(x, best_block, n, best);
  return true;
}

uint64_t Exponentials(const float* x, int64_t n, float max, float factor, float* e) {
  const Vec::F m = Vec::Set1(max), f = Vec::Set1(factor);
  Vec::U sum = Vec::ZeroWeights();
  uint64_t added = 0;
  for (int64_t i = 0; i < n; i += W, ++added) {
    const int64_t left = n - i;
    Vec::F v = left >= W ? Vec::Load(x + i) : Vec::LoadN(x + i, left);
    v = Exp(Vec::Mul(Vec::Sub(v, m), f));
    if (left >= W) {
      if (e != nullptr) Vec::Store(e + i, v);
    } else {
      alignas(64) float part[W] = {};
      Vec::StoreN(part, v, left);
      v = Vec::Load(part);
      if (e != nullptr) Vec::StoreN(e + i, v, left);
    }
    sum = Vec::AddWeights(sum, v);
  }
  return Vec::TotalWeight(sum, added);
}

int64_t CountAtLeast(const float* x, int64_t n, float threshold) {
  const Vec::F t = Vec::Set1(threshold);
  int64_t count = 0, i = 0;
  for (; i + W <= n; i += W) count += __builtin_popcount(Vec::MaskGe(Vec::Load(x + i), t));
  for (; i < n; ++i) count += x[i] >= threshold;
  return count;
}

uint64_t WeightAtLeast(const float* e, int64_t n, float threshold) {
  const Vec::F t = Vec::Set1(threshold);
  Vec::U sum = Vec::ZeroWeights();
  uint64_t added = 0;
  for (int64_t i = 0; i < n; i += W, ++added) {
    const Vec::F v = n - i >= W ? Vec::Load(e + i) : Vec::LoadN(e + i, n - i);  // the zeros added weigh nothing
    sum = Vec::AddWeights(sum, Vec::WhereGe(v, t, v));
  }
  return Vec::TotalWeight(sum, added);
}

int64_t IndicesBetween(const float* x, int64_t n, float low, float high, int32_t* indices, int64_t room) {
  const Vec::F l = Vec::Set1(low), h = Vec::Set1(high);
  int64_t count = 0, i = 0;
  for (; i + W <= n; i += W) {
    const Vec::F v = Vec::Load(x + i);
    for (uint32_t hits = Vec::MaskGe(v, l) & Vec::MaskLess(v, h); hits != 0 && count < room; hits &= hits - 1) {
      indices[count++] = static_cast<int32_t>(i + __builtin_ctz(hits));
    }
  }
  for (; i < n && count < room; ++i) {
    if (x[i] >= low && x[i] < high) indices[count++] = static_cast<int32_t>(i);
  }
  return count;
}

constexpr SampleKernels kSample = {MaxOf, Exponentials, CountAtLeast, WeightAtLeast, FindAtLeast, IndicesBetween};

}  // namespace
}  // namespace altiplano::cpu
