// One thread makes some packs of a row of out from the same places of gate and of up.
#include "kernels/cuda/backend.h"
#include "kernels/cuda/elements.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/rows_plan.h"
#include "kernels/cuda/silu.h"

namespace altiplano::cuda {

namespace {

template <int kPack>
__global__ void __launch_bounds__(kMostRowThreads, kRowBlocks)
    SiluMulKernel(Elements out, Elements gate_up, int64_t ffn, int64_t packs) {
  ptx::WaitForKernelsBefore();
  ptx::LetNextKernelStart();
  const int64_t token = blockIdx.x;
  const int64_t first = int64_t{blockIdx.y} * kPacksAtOnce * blockDim.x + threadIdx.x;
  uint32_t gates[kPacksAtOnce][kPack] = {}, ups[kPacksAtOnce][kPack] = {};
  PTX_UNROLL
  for (int i = 0; i < kPacksAtOnce; ++i) {
    const int64_t pack = first + int64_t{i} * blockDim.x, at = token * gate_up.stride + pack * kPack;
    if (pack >= packs) break;
    LoadRaw(gate_up, at, gates[i]);
    LoadRaw(gate_up, at + ffn, ups[i]);
  }
  PTX_UNROLL
  for (int i = 0; i < kPacksAtOnce; ++i) {
    const int64_t pack = first + int64_t{i} * blockDim.x;
    if (pack >= packs) break;
    float gate[kPack], up[kPack];
    Widen(gates[i], gate_up.bf16, gate);
    Widen(ups[i], gate_up.bf16, up);
    PTX_UNROLL
    for (int j = 0; j < kPack; ++j) gate[j] = Silu(gate[j]) * up[j];
    Store(out, token * out.stride + pack * kPack, gate);
  }
}

}  // namespace

void SiluMul(Stream& stream, const SiluMulArgs& args) {
  const int64_t ffn = args.out.dim(1);
  const bool packed = IsPacked(args.out, kRowPack) && IsPacked(args.gate_up.columns(0, ffn), kRowPack);
  const int64_t packs = packed ? ffn / kRowPack : ffn;
  if (packs == 0) return;
  LaunchOverlapping(stream, "SiluMul", ElementwisePlan(args.out.dim(0), packs),
                    packed ? SiluMulKernel<kRowPack> : SiluMulKernel<1>, Elements(args.out), Elements(args.gate_up),
                    ffn, packs);
}

}  // namespace altiplano::cuda
