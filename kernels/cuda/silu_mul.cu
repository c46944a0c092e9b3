// One thread makes one pack of a row of out from the same place of gate and of up.
#include "kernels/cuda/backend.h"
#include "kernels/cuda/elements.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/rows_plan.h"
#include "kernels/cuda/silu.h"

namespace altiplano::cuda {

namespace {

template <int kPack>
__global__ void __launch_bounds__(kMostRowThreads)
    SiluMulKernel(Elements out, Elements gate_up, int64_t ffn, int64_t packs) {
  ptx::WaitForKernelsBefore();
  ptx::LetNextKernelStart();
  const int64_t token = blockIdx.x;
  const int64_t pack = int64_t{blockIdx.y} * blockDim.x + threadIdx.x;
  if (pack >= packs) return;
  const int64_t at = token * gate_up.stride + pack * kPack;
  float gate[kPack], up[kPack];
  Load(gate_up, at, gate);
  Load(gate_up, at + ffn, up);
  PTX_UNROLL
  for (int i = 0; i < kPack; ++i) gate[i] = Silu(gate[i]) * up[i];
  Store(out, token * out.stride + pack * kPack, gate);
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
