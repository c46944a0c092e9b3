// One thread copies, and where dtypes differ converts, some packs of a token's row.
#include "kernels/cuda/backend.h"
#include "kernels/cuda/elements.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/rows_plan.h"

namespace altiplano::cuda {

namespace {

template <int kPack>
__global__ void __launch_bounds__(kMostRowThreads, kRowBlocks)
    EmbedKernel(Elements out, Elements table, const int32_t* ids, const int32_t* sampled, int64_t vocab_begin,
                int64_t vocab, int64_t packs) {
  ptx::WaitForKernelsBefore();
  ptx::LetNextKernelStart();
  const int64_t token = blockIdx.x;
  const int64_t first = int64_t{blockIdx.y} * kPacksAtOnce * blockDim.x + threadIdx.x;
  int64_t id = ptx::LdGlobal(ids + token);
  if (id < 0 && sampled != nullptr) id = ptx::LdGlobal(sampled + (-1 - id));
  id -= vocab_begin;
  const bool ours = id >= 0 && id < vocab;
  uint32_t raw[kPacksAtOnce][kPack] = {};
  PTX_UNROLL
  for (int i = 0; i < kPacksAtOnce; ++i) {
    const int64_t pack = first + int64_t{i} * blockDim.x;
    if (pack < packs && ours) LoadRaw(table, id * table.stride + pack * kPack, raw[i]);
  }
  PTX_UNROLL
  for (int i = 0; i < kPacksAtOnce; ++i) {
    const int64_t pack = first + int64_t{i} * blockDim.x;
    if (pack >= packs) break;
    float x[kPack];
    Widen(raw[i], table.bf16, x);
    Store(out, token * out.stride + pack * kPack, x);
  }
}

}  // namespace

void Embed(Stream& stream, const EmbedArgs& args) {
  const int64_t hidden = args.table.dim(1);
  const bool packed = IsPacked(args.out, kRowPack) && IsPacked(args.table, kRowPack);
  const int64_t packs = packed ? hidden / kRowPack : hidden;
  if (packs == 0) return;
  LaunchOverlapping(stream, "Embed", ElementwisePlan(args.ids.dim(0), packs),
                    packed ? EmbedKernel<kRowPack> : EmbedKernel<1>, Elements(args.out), Elements(args.table),
                    args.ids.as<int32_t>(), args.sampled.as<int32_t>(), args.vocab_begin, args.table.dim(0), packs);
}

}  // namespace altiplano::cuda
