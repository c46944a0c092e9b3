// One block for some heads of one token. It computes the token's cosines and sines into shared memory, while what it
// will rotate is on its way; then each thread rotates some packs of pairs of q and k heads, or carries packs of v heads
// to their page.
#include "kernels/cuda/backend.h"
#include "kernels/cuda/elements.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/rows_plan.h"

namespace altiplano::cuda {

namespace {

// Of position * frequency, both at least 0. The product and its remainder by a quarter turn are taken in f64: an angle
// of 100000 in f32 would be wrong by hundredths of a turn. The Taylor terms left out are below 3e-9 up to pi / 4.
PTX_FUNCTION void CosSin(int32_t position, float frequency, float* cos, float* sin) {
  constexpr double kQuarterTurn = 1.5707963267948966;
  const double angle = static_cast<double>(position) * static_cast<double>(frequency);
  const auto quarters = static_cast<int64_t>(angle * (1 / kQuarterTurn) + 0.5);
  const auto r = static_cast<float>(angle - static_cast<double>(quarters) * kQuarterTurn);
  const float r2 = r * r;
  const float s = r + r * r2 * (-1.0f / 6 + r2 * (1.0f / 120 + r2 * (-1.0f / 5040 + r2 * (1.0f / 362880))));
  const float c =
      1.0f + r2 * (-0.5f + r2 * (1.0f / 24 + r2 * (-1.0f / 720 + r2 * (1.0f / 40320 - r2 * (1.0f / 3628800)))));
  const float sin_of_turned = quarters & 1 ? c : s;
  const float cos_of_turned = quarters & 1 ? s : c;
  *sin = quarters & 2 ? -sin_of_turned : sin_of_turned;
  *cos = (quarters + 1) & 2 ? -cos_of_turned : cos_of_turned;
}

struct RopeHeads {
  int q = 0, kv = 0, per_block = 0;
  int half = 0;  // of the head's dimension
};

// A pack of pairs of a head.
struct HeadItem {
  bool is_q, is_k;  // or v
  int own;          // among the heads of its kind
  int pair;         // its first
};

template <int kPack>
struct BlockItems {
  RopeHeads heads;
  int first_head, per_head, count;

  PTX_FUNCTION BlockItems(RopeHeads of, int block)
      : heads(of), first_head(block * of.per_block), per_head(of.half / kPack) {
    const int left = heads.q + 2 * heads.kv - first_head;
    count = (left < heads.per_block ? left : heads.per_block) * per_head;
  }
  PTX_FUNCTION HeadItem operator[](int item) const {
    const int head = first_head + item / per_head;
    const bool is_q = head < heads.q, is_k = !is_q && head < heads.q + heads.kv;
    return {is_q, is_k, is_q ? head : is_k ? head - heads.q : head - heads.q - heads.kv, item % per_head * kPack};
  }
};

// A thread's next items. Operands by value: nvcc no longer knows a captured one's memory for global.
template <int kPack>
PTX_FUNCTION void LoadItems(Elements q, Elements k, Elements v, int64_t token, BlockItems<kPack> items, int first,
                            uint32_t (&lows)[kPacksAtOnce][kPack], uint32_t (&highs)[kPacksAtOnce][kPack]) {
  PTX_UNROLL
  for (int n = 0; n < kPacksAtOnce; ++n) {
    const int item = first + n * static_cast<int>(kRopeThreads);
    if (item >= items.count) break;
    const HeadItem at = items[item];
    const Elements from = at.is_q ? q : at.is_k ? k : v;
    const int64_t from_at = token * from.stride + int64_t{at.own} * 2 * items.heads.half + at.pair;
    LoadRaw(from, from_at, lows[n]);
    LoadRaw(from, from_at + items.heads.half, highs[n]);
  }
}

template <int kPack>
struct alignas(4 * kPack) Angles {
  float x[kPack];
};

template <int kPack>
__global__ void __launch_bounds__(kRopeThreads, kRopeBlocks)
    RopeStoreKvKernel(Elements q, Elements k, Elements v, Elements k_pages, Elements v_pages, const int32_t* positions,
                      const int32_t* slots, const float* inv_freq, RopeHeads heads, int page_size) {
  ptx::WaitForKernelsBefore();
  ptx::LetNextKernelStart();
  auto* cos = static_cast<float*>(ptx::DynamicShared());
  float* sin = cos + heads.half;
  const int64_t token = blockIdx.x;
  const int half = heads.half;
  const int32_t position = ptx::LdGlobal(positions + token), slot = ptx::LdGlobal(slots + token);
  const BlockItems<kPack> items(heads, static_cast<int>(blockIdx.y));
  uint32_t lows[kPacksAtOnce][kPack] = {}, highs[kPacksAtOnce][kPack] = {};
  int first = static_cast<int>(threadIdx.x);
  LoadItems(q, k, v, token, items, first, lows, highs);
  for (int j = static_cast<int>(threadIdx.x); j < half; j += kRopeThreads) {
    float c, s;
    CosSin(position, ptx::LdGlobal(inv_freq + j), &c, &s);
    ptx::StShared(cos + j, c);
    ptx::StShared(sin + j, s);
  }
  __syncthreads();

  const int page = slot / page_size, offset = slot % page_size;
  while (first < items.count) {
    PTX_UNROLL
    for (int n = 0; n < kPacksAtOnce; ++n) {
      const int item = first + n * static_cast<int>(kRopeThreads);
      if (item >= items.count) break;
      const HeadItem at = items[item];
      if (!at.is_q && slot < 0) break;
      const bool bf16 = at.is_q ? q.bf16 : at.is_k ? k.bf16 : v.bf16;
      float low[kPack], high[kPack];
      Widen(lows[n], bf16, low);
      Widen(highs[n], bf16, high);
      if (at.is_q || at.is_k) {
        const auto c = ptx::LdShared(reinterpret_cast<const Angles<kPack>*>(cos + at.pair));
        const auto s = ptx::LdShared(reinterpret_cast<const Angles<kPack>*>(sin + at.pair));
        PTX_UNROLL
        for (int i = 0; i < kPack; ++i) {
          const float x = low[i], y = high[i];
          low[i] = x * c.x[i] - y * s.x[i];
          high[i] = y * c.x[i] + x * s.x[i];
        }
      }
      const Elements to = at.is_q ? q : at.is_k ? k_pages : v_pages;
      const int64_t row = at.is_q ? 0 : (int64_t{page} * heads.kv + at.own) * page_size + offset;
      const int64_t to_at = (at.is_q ? token * q.stride + int64_t{at.own} * 2 * half : row * 2 * half) + at.pair;
      Store(to, to_at, low);
      Store(to, to_at + half, high);
    }
    first += kPacksAtOnce * static_cast<int>(kRopeThreads);
    LoadItems(q, k, v, token, items, first, lows, highs);
  }
}

}  // namespace

void RopeStoreKv(Stream& stream, const RopeStoreKvArgs& args) {
  const int64_t dim = args.k_pages.dim(3), half = dim / 2, page_size = args.k_pages.dim(2);
  RopeHeads heads = {.q = static_cast<int>(args.q.dim(1) / dim),
                     .kv = static_cast<int>(args.k_pages.dim(1)),
                     .half = static_cast<int>(half)};
  bool packed = half % kRowPack == 0 && IsPacked(args.inv_freq, 1);
  for (const TensorView& view : {args.q, args.k, args.v}) packed = packed && IsPacked(view, kRowPack);
  for (const TensorView& pages : {args.k_pages, args.v_pages}) packed = packed && IsPacked(pages, kRowPack);
  const int64_t all_heads = int64_t{heads.q} + 2 * heads.kv;
  if (all_heads == 0) return;
  const RopePlan plan = PlanRope(args.positions.dim(0), all_heads, half, packed ? kRowPack : 1);
  heads.per_block = static_cast<int>(plan.heads_per_block);
  LaunchOverlapping(stream, "RopeStoreKv", plan.shape, packed ? RopeStoreKvKernel<kRowPack> : RopeStoreKvKernel<1>,
                    Elements(args.q), Elements(args.k), Elements(args.v), Elements(args.k_pages),
                    Elements(args.v_pages), args.positions.as<int32_t>(), args.slots.as<int32_t>(),
                    args.inv_freq.as<float>(), heads, static_cast<int>(page_size));
}

}  // namespace altiplano::cuda
