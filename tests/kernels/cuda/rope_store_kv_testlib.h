// RopeStoreKv of a RopeStep by the kernel under test, and how far it may be from angles in long double.
#pragma once

#include <cmath>

#include "tests/kernels/cuda/cuda_testlib.h"
#include "tests/kernels/rope_store_kv_testlib.h"

namespace altiplano {

// cos and sin: the remainder is rounded once to f32 (u/2 of pi/4 as an angle), the polynomials sum a handful of terms
// below one and leave out 3e-9: less than 3 u in all. Then two products and a sum.
inline double RopeBound(double x, double y, double, double, double exact, DType out) {
  const double bound = (3 + 2) * kUnitF32 * (std::abs(x) + std::abs(y));
  return bound + RoundingBound(out, exact, bound);
}

// Copies the step's tensors to the device, rotates and stores there, and copies what has changed back.
inline void RotateOnDevice(Stream& stream, RopeStep* step) {
  const RopeCase& c = step->shape();
  const OnDevice qkv(stream, step->qkv), k_pages(stream, step->k_pages), v_pages(stream, step->v_pages);
  const OnDevice inv_freq(stream, step->inv_freq), positions(stream, step->positions), slots(stream, step->slots);
  RopeStoreKv(stream, {.q = qkv.view().columns(0, step->q_width()),
                       .k = qkv.view().columns(step->q_width(), step->kv_width()),
                       .v = qkv.view().columns(step->q_width() + step->kv_width(), step->kv_width()),
                       .k_pages = k_pages.pool(step->pages(), c.kv_heads, c.page_size),
                       .v_pages = v_pages.pool(step->pages(), c.kv_heads, c.page_size),
                       .positions = positions.view(),
                       .slots = slots.view(),
                       .inv_freq = inv_freq.vector()});
  qkv.Fetch(step->qkv);
  k_pages.Fetch(step->k_pages);
  v_pages.Fetch(step->v_pages);
}

}  // namespace altiplano
