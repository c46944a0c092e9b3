// RmsNorm and AddRmsNorm. One block for each row; each thread sums the squares of its packs, keeps them in shared
// memory as f32 and scales them once the block's sum is known. So x and the residual are read once, and each thread
// reads back only what it wrote itself. The order of the sum depends on the width alone.
#include "kernels/cuda/backend.h"
#include "kernels/cuda/elements.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/rms_norm.h"
#include "kernels/cuda/rows_plan.h"

namespace altiplano::cuda {

namespace {

template <int kPack, bool kAdd>
__global__ void __launch_bounds__(kMostNormThreads, kNormBlocks)
    RmsNormKernel(Elements out, Elements residual, Elements x, Elements weight, float eps, int width) {
  ptx::WaitForKernelsBefore();
  ptx::LetNextKernelStart();
  auto* row = static_cast<Waiting<kPack>*>(ptx::DynamicShared());
  x = RowOf(x, blockIdx.x);
  if constexpr (kAdd) residual = RowOf(residual, blockIdx.x);
  const int packs = width / kPack;
  const int stride = static_cast<int>(blockDim.x);
  constexpr int kAtOnce = kAdd ? 1 : kPacksAtOnce;  // the residual's packs are on their way, too
  float squares = 0;
  for (int first = static_cast<int>(threadIdx.x); first < packs; first += kAtOnce * stride) {
    uint32_t added[kAtOnce][kPack] = {}, to[kAtOnce][kPack] = {};
    PTX_UNROLL
    for (int n = 0; n < kAtOnce; ++n) {
      const int pack = first + n * stride;
      if (pack >= packs) break;
      LoadRaw(x, pack * kPack, added[n]);
      if constexpr (kAdd) LoadRaw(residual, pack * kPack, to[n]);
    }
    PTX_UNROLL
    for (int n = 0; n < kAtOnce; ++n) {
      const int pack = first + n * stride;
      if (pack >= packs) break;
      Waiting<kPack> waiting;
      Widen(added[n], x.bf16, waiting.x);
      if constexpr (kAdd) {
        float sum[kPack];
        Widen(to[n], residual.bf16, sum);
        PTX_UNROLL
        for (int i = 0; i < kPack; ++i) waiting.x[i] = Rounded(sum[i] + waiting.x[i], residual.bf16);
        Store(residual, pack * kPack, waiting.x);
      }
      PTX_UNROLL
      for (int i = 0; i < kPack; ++i) squares += waiting.x[i] * waiting.x[i];
      ptx::StShared(&row[pack], waiting);
    }
  }
  ScaleRow(RowOf(out, blockIdx.x), weight, row, squares, eps, width);
}

template <bool kAdd>
void Norm(Stream& stream, const char* name, const TensorView& out, const TensorView& residual, const TensorView& x,
          const TensorView& weight, float eps) {
  const int64_t width = x.dim(1);
  if (width == 0) return;
  const bool packed = IsPacked(out, kRowPack) && IsPacked(x, kRowPack) && IsPacked(weight, kRowPack) &&
                      (!kAdd || IsPacked(residual, kRowPack));
  LaunchOverlapping(stream, name, NormPlan(x.dim(0), width, packed ? kRowPack : 1),
                    packed ? RmsNormKernel<kRowPack, kAdd> : RmsNormKernel<1, kAdd>, Elements(out), Elements(residual),
                    Elements(x), Elements(weight), eps, static_cast<int>(width));
}

}  // namespace

void RmsNorm(Stream& stream, const RmsNormArgs& args) {
  Norm<false>(stream, "RmsNorm", args.out, TensorView(), args.x, args.weight, args.eps);
}

void AddRmsNorm(Stream& stream, const AddRmsNormArgs& args) {
  Norm<true>(stream, "AddRmsNorm", args.out, args.residual, args.x, args.weight, args.eps);
}

}  // namespace altiplano::cuda
