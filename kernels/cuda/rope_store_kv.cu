// One block for some heads of one token. It first computes the token's cosines and sines into shared memory; then each
// thread rotates a pack of pairs of a q or k head, or carries two packs of a v head to their page.
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
  int64_t q = 0, kv = 0, per_block = 0;
  int half = 0;  // of the head's dimension
};

template <int kPack>
struct alignas(4 * kPack) Angles {
  float x[kPack];
};

template <int kPack>
__global__ void __launch_bounds__(kRopeThreads)
    RopeStoreKvKernel(Elements q, Elements k, Elements v, Elements k_pages, Elements v_pages, const int32_t* positions,
                      const int32_t* slots, const float* inv_freq, RopeHeads heads, int64_t page_size) {
  ptx::WaitForKernelsBefore();
  ptx::LetNextKernelStart();
  auto* cos = static_cast<float*>(ptx::DynamicShared());
  float* sin = cos + heads.half;
  const int64_t token = blockIdx.x;
  const int half = heads.half;
  const int32_t position = ptx::LdGlobal(positions + token);
  for (int j = static_cast<int>(threadIdx.x); j < half; j += kRopeThreads) {
    float c, s;
    CosSin(position, ptx::LdGlobal(inv_freq + j), &c, &s);
    ptx::StShared(cos + j, c);
    ptx::StShared(sin + j, s);
  }
  __syncthreads();

  const int32_t slot = ptx::LdGlobal(slots + token);
  const int64_t page = slot / page_size, offset = slot % page_size;
  const int items_per_head = half / kPack;
  const int items = static_cast<int>(heads.per_block) * items_per_head;
  for (int item = static_cast<int>(threadIdx.x); item < items; item += kRopeThreads) {
    const int64_t head = int64_t{blockIdx.y} * heads.per_block + item / items_per_head;
    if (head >= heads.q + 2 * heads.kv) break;
    const int pair = item % items_per_head * kPack;
    const bool is_q = head < heads.q, is_k = !is_q && head < heads.q + heads.kv;
    if (!is_q && slot < 0) break;
    const int64_t own = is_q ? head : is_k ? head - heads.q : head - heads.q - heads.kv;  // among its kind
    const Elements from = is_q ? q : is_k ? k : v;
    const int64_t from_at = token * from.stride + own * 2 * half + pair;
    float low[kPack], high[kPack];
    Load(from, from_at, low);
    Load(from, from_at + half, high);
    if (is_q || is_k) {
      const auto c = ptx::LdShared(reinterpret_cast<const Angles<kPack>*>(cos + pair));
      const auto s = ptx::LdShared(reinterpret_cast<const Angles<kPack>*>(sin + pair));
      PTX_UNROLL
      for (int i = 0; i < kPack; ++i) {
        const float x = low[i], y = high[i];
        low[i] = x * c.x[i] - y * s.x[i];
        high[i] = y * c.x[i] + x * s.x[i];
      }
    }
    const Elements to = is_q ? q : is_k ? k_pages : v_pages;
    const int64_t to_at = is_q ? from_at : ((page * heads.kv + own) * page_size + offset) * 2 * half + pair;
    Store(to, to_at, low);
    Store(to, to_at + half, high);
  }
}

}  // namespace

void RopeStoreKv(Stream& stream, const RopeStoreKvArgs& args) {
  const int64_t dim = args.k_pages.dim(3), half = dim / 2, page_size = args.k_pages.dim(2);
  const RopeHeads heads = {.q = args.q.dim(1) / dim, .kv = args.k_pages.dim(1), .half = static_cast<int>(half)};
  bool packed = half % kRowPack == 0 && IsPacked(args.inv_freq, 1);
  for (const TensorView& view : {args.q, args.k, args.v}) packed = packed && IsPacked(view, kRowPack);
  for (const TensorView& pages : {args.k_pages, args.v_pages}) packed = packed && IsPacked(pages, kRowPack);
  const int64_t all_heads = heads.q + 2 * heads.kv;
  if (all_heads == 0) return;
  const RopePlan plan = PlanRope(args.positions.dim(0), all_heads, half, packed ? kRowPack : 1);
  RopeHeads planned = heads;
  planned.per_block = plan.heads_per_block;
  LaunchOverlapping(stream, "RopeStoreKv", plan.shape, packed ? RopeStoreKvKernel<kRowPack> : RopeStoreKvKernel<1>,
                    Elements(args.q), Elements(args.k), Elements(args.v), Elements(args.k_pages),
                    Elements(args.v_pages), args.positions.as<int32_t>(), args.slots.as<int32_t>(),
                    args.inv_freq.as<float>(), planned, page_size);
}

}  // namespace altiplano::cuda
