// Angles are computed once per token and pair and shared by all heads of q and k.
#include "kernels/cpu/ops.h"
#include "kernels/cpu/vec_threads.h"

namespace altiplano::cpu {

namespace {

constexpr int64_t kAngles = 128;  // pairs whose cos and sin are held at a time: all of a head up to D = 256

struct TokenPlace {
  int64_t page = 0;
  int64_t offset = 0;
};

// Where head `head` of the token lies in a pool [P, Hkv, S, D], from `column` on.
RowPtr InPage(const TensorView& pages, const TokenPlace& place, int64_t head, int64_t column) {
  const int64_t row = (place.page * pages.dim(1) + head) * pages.dim(2) + place.offset;
  const int64_t element = row * pages.dim(3) + column;
  return {static_cast<char*>(pages.data) + element * static_cast<int64_t>(SizeOf(pages.dtype)),
          pages.dtype == DType::kBF16};
}

}  // namespace

void RopeStoreKv(ThreadTeam& team, const RopeStoreKvArgs& args) {
  const RowKernels& kernels = CurrentRowKernels();
  const int64_t dim = args.k_pages.dim(3), half = dim / 2, page_size = args.k_pages.dim(2);
  const int64_t q_heads = args.q.dim(1) / dim, kv_heads = args.k_pages.dim(1);
  const int32_t* positions = args.positions.as<int32_t>();
  const int32_t* slots = args.slots.as<int32_t>();
  const float* inv_freq = args.inv_freq.as<float>();

  ForRows(team, args.positions.dim(0), 2 * (q_heads + 2 * kv_heads) * dim, [&](int64_t t) {
    const int32_t slot = slots[t];
    const TokenPlace place = {slot / page_size, slot % page_size};
    alignas(64) float cos[kAngles], sin[kAngles];
    for (int64_t begin = 0; begin < half; begin += kAngles) {
      const int64_t n = std::min(kAngles, half - begin);
      kernels.cos_sin(inv_freq + begin, n, positions[t], cos, sin);
      for (int64_t h = 0; h < q_heads; ++h) {
        const RowPtr low = RowOf(args.q, t, h * dim + begin), high = RowOf(args.q, t, h * dim + half + begin);
        kernels.rotate(low, high, low, high, cos, sin, n);
      }
      if (slot < 0) continue;
      for (int64_t h = 0; h < kv_heads; ++h) {
        kernels.rotate(InPage(args.k_pages, place, h, begin), InPage(args.k_pages, place, h, half + begin),
                       RowOf(args.k, t, h * dim + begin), RowOf(args.k, t, h * dim + half + begin), cos, sin, n);
      }
    }
    if (slot < 0) return;
    for (int64_t h = 0; h < kv_heads; ++h) {
      kernels.convert(InPage(args.v_pages, place, h, 0), RowOf(args.v, t, h * dim), dim);
    }
  });
}

}  // namespace altiplano::cpu
