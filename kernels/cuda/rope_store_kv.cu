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
  int q = 0, q_and_k = 0, all = 0, per_block = 0;
  int apart = 0;  // a thread's, where it has the same pairs of several
  int half = 0;   // of the head's dimension
  int packs = 0;  // of a half
  int page_size = 0;
  uint32_t q_row_bytes = 0, k_row_bytes = 0, v_row_bytes = 0;
  int q_head_bytes = 0, page_head_bytes = 0, page_token_bytes = 0;  // of a head in a page, and of one token of it
  int64_t page_bytes = 0;
  Divisor by_packs, by_page_size;
};

template <int kPack>
struct alignas(4 * kPack) Angles {
  float x[kPack];
};

template <int kPack>
struct HeadItems {
  uint32_t lows[kPacksAtOnce][kPack], highs[kPacksAtOnce][kPack];
  int head[kPacksAtOnce], pair[kPacksAtOnce];
};

// A thread's next items, packs of pairs of a head. Operands by value: nvcc no longer knows a captured one's memory for
// global.
template <bool kUsual, int kPack>
PTX_FUNCTION void LoadItems(Elements q, Elements k, Elements v, RopeHeads heads, int first_head, int first, int items,
                            HeadItems<kPack>* to) {
  PTX_UNROLL
  for (int n = 0; n < kPacksAtOnce; ++n) {
    const int item = first + n * static_cast<int>(kRopeThreads);
    if (item >= items) break;
    if (kUsual && n > 0) {
      to->head[n] = to->head[0] + n * heads.apart;
      to->pair[n] = to->pair[0];
    } else {
      const int in_block = heads.by_packs.Quotient(item);
      to->head[n] = first_head + in_block;
      to->pair[n] = (item - in_block * heads.packs) * kPack;
    }
    const Elements from = to->head[n] < heads.q ? q : to->head[n] < heads.q_and_k ? k : v;
    const int at = to->head[n] * 2 * heads.half + to->pair[n];
    LoadRaw(from, at, to->lows[n]);
    LoadRaw(from, at + heads.half, to->highs[n]);
  }
}

// Each operand begins where the token's first head would be if all heads were of its kind. kUsual: all are bf16, and
// the block's threads take whole heads together, so that a thread's items are the same pairs of several heads, and no
// more than it has on their way at once.
template <int kPack, bool kUsual>
__global__ void __launch_bounds__(kRopeThreads, kRopeBlocks)
    RopeStoreKvKernel(Elements q, Elements k, Elements v, Elements k_pages, Elements v_pages, const int32_t* positions,
                      const int32_t* slots, const float* inv_freq, RopeHeads heads) {
  if constexpr (kUsual) q.bf16 = k.bf16 = v.bf16 = k_pages.bf16 = v_pages.bf16 = true;
  ptx::WaitForKernelsBefore();
  ptx::LetNextKernelStart();
  auto* cos = static_cast<float*>(ptx::DynamicShared());
  float* sin = cos + heads.half;
  PTX_SHARED(int64_t, page_at, 1);  // where the token's slot is in a pool, in bytes; negative without one
  const uint32_t token = blockIdx.x, thread = threadIdx.x;
  const int32_t position = ptx::LdGlobal(positions + token);
  const int first_head = static_cast<int>(blockIdx.y) * heads.per_block, left = heads.all - first_head;
  const int items = (left < heads.per_block ? left : heads.per_block) * heads.packs;
  q = Behind(q, uint64_t{token} * heads.q_row_bytes);
  k = Behind(k, uint64_t{token} * heads.k_row_bytes);
  v = Behind(v, uint64_t{token} * heads.v_row_bytes);
  HeadItems<kPack> own;
  int first = static_cast<int>(thread);
  LoadItems<kUsual>(q, k, v, heads, first_head, first, items, &own);
  if (thread == kRopeThreads - 1) {  // of a warp without angles, up to heads of 192
    const int slot = ptx::LdGlobal(slots + token);
    const int page = heads.by_page_size.Quotient(slot < 0 ? 0 : slot), offset = slot - page * heads.page_size;
    ptx::StShared(page_at, slot < 0 ? -1 : page * heads.page_bytes + offset * heads.page_token_bytes);
  }
  PTX_KEEP_LOOP
  for (int j = static_cast<int>(thread); j < heads.half; j += kRopeThreads) {
    float c, s;
    CosSin(position, ptx::LdGlobal(inv_freq + j), &c, &s);
    ptx::StShared(cos + j, c);
    ptx::StShared(sin + j, s);
  }
  __syncthreads();

  const int64_t at_page = ptx::LdShared(page_at);
  while (first < items) {
    Angles<kPack> c = {}, s = {};
    PTX_UNROLL
    for (int n = 0; n < kPacksAtOnce; ++n) {
      if (first + n * static_cast<int>(kRopeThreads) >= items) break;
      const int head = own.head[n], pair = own.pair[n];
      const bool is_q = head < heads.q, is_q_or_k = head < heads.q_and_k;
      if (!is_q && at_page < 0) break;
      if (!kUsual || n == 0) {
        c = ptx::LdShared(reinterpret_cast<const Angles<kPack>*>(cos + pair));
        s = ptx::LdShared(reinterpret_cast<const Angles<kPack>*>(sin + pair));
      }
      const bool bf16 = is_q ? q.bf16 : is_q_or_k ? k.bf16 : v.bf16;
      float low[kPack], high[kPack];
      Widen(own.lows[n], bf16, low);
      Widen(own.highs[n], bf16, high);
      if (is_q_or_k) {  // fmaf: no compiler chooses which product is rounded
        PTX_UNROLL
        for (int i = 0; i < kPack; ++i) {
          const float x = low[i], y = high[i];
          high[i] = fmaf(x, s.x[i], y * c.x[i]);
          low[i] = fmaf(x, c.x[i], -(y * s.x[i]));
        }
      }
      Elements to = is_q ? q : is_q_or_k ? k_pages : v_pages;
      to = Behind(to, (is_q ? 0 : at_page) + int64_t{head} * (is_q ? heads.q_head_bytes : heads.page_head_bytes));
      Store(to, pair, low);
      Store(to, pair + heads.half, high);
    }
    if (kUsual) break;  // there are no more
    first += kPacksAtOnce * static_cast<int>(kRopeThreads);
    LoadItems<kUsual>(q, k, v, heads, first_head, first, items, &own);
  }
}

}  // namespace

void RopeStoreKv(Stream& stream, const RopeStoreKvArgs& args) {
  const int64_t dim = args.k_pages.dim(3), half = dim / 2, page_size = args.k_pages.dim(2);
  const int64_t q_heads = args.q.dim(1) / dim, kv_heads = args.k_pages.dim(1), all_heads = q_heads + 2 * kv_heads;
  if (all_heads == 0) return;
  bool packed = half % kRowPack == 0 && IsPacked(args.inv_freq, 1), bf16 = true;
  for (const TensorView& view : {args.q, args.k, args.v, args.k_pages, args.v_pages}) {
    packed = packed && IsPacked(view, kRowPack);
    bf16 = bf16 && view.dtype == DType::kBF16;
  }
  const int64_t packs = half / (packed ? kRowPack : 1);
  const auto bytes = [](const TensorView& x, int64_t elements) {
    return elements * static_cast<int64_t>(SizeOf(x.dtype));
  };
  const RopePlan plan = PlanRope(args.positions.dim(0), all_heads, half, packed ? kRowPack : 1);
  const RopeHeads heads = {.q = static_cast<int>(q_heads),
                           .q_and_k = static_cast<int>(q_heads + kv_heads),
                           .all = static_cast<int>(all_heads),
                           .per_block = static_cast<int>(plan.heads_per_block),
                           .apart = static_cast<int>(kRopeThreads / packs),
                           .half = static_cast<int>(half),
                           .packs = static_cast<int>(packs),
                           .page_size = static_cast<int>(page_size),
                           .q_row_bytes = static_cast<uint32_t>(bytes(args.q, args.q.stride0)),
                           .k_row_bytes = static_cast<uint32_t>(bytes(args.k, args.k.stride0)),
                           .v_row_bytes = static_cast<uint32_t>(bytes(args.v, args.v.stride0)),
                           .q_head_bytes = static_cast<int>(bytes(args.q, dim)),
                           .page_head_bytes = static_cast<int>(bytes(args.k_pages, page_size * dim)),
                           .page_token_bytes = static_cast<int>(bytes(args.k_pages, dim)),
                           .page_bytes = bytes(args.k_pages, kv_heads * page_size * dim),
                           .by_packs = Divisor(packs),
                           .by_page_size = Divisor(page_size)};
  // As if `before` heads, `head` elements apart, came before its first.
  const auto behind = [&](const TensorView& x, int64_t before, int64_t head) {
    Elements as_one(x);
    as_one.data = static_cast<char*>(as_one.data) - bytes(x, before * head);
    return as_one;
  };
  const bool usual = packed && bf16 && kRopeThreads % packs == 0;
  const auto kernel = usual    ? RopeStoreKvKernel<kRowPack, true>
                      : packed ? RopeStoreKvKernel<kRowPack, false>
                               : RopeStoreKvKernel<1, false>;
  LaunchOverlapping(stream, "RopeStoreKv", plan.shape, kernel, Elements(args.q), behind(args.k, q_heads, dim),
                    behind(args.v, q_heads + kv_heads, dim), behind(args.k_pages, q_heads, page_size * dim),
                    behind(args.v_pages, q_heads + kv_heads, page_size * dim), args.positions.as<int32_t>(),
                    args.slots.as<int32_t>(), args.inv_freq.as<float>(), heads);
}

}  // namespace altiplano::cuda
