#include "kernels/cpu/ops.h"
#include "kernels/cpu/vec_threads.h"

namespace altiplano::cpu {

void RmsNorm(ThreadTeam& team, const RmsNormArgs& args) {
  const RowKernels& kernels = CurrentRowKernels();
  const int64_t hidden = args.x.dim(1);
  ForRows(team, args.x.dim(0), hidden, [&](int64_t t) {
    kernels.rms_norm(RowOf(args.out, t), {nullptr, false}, RowOf(args.x, t), RowOf(args.weight), hidden, args.eps);
  });
}

void AddRmsNorm(ThreadTeam& team, const AddRmsNormArgs& args) {
  const RowKernels& kernels = CurrentRowKernels();
  const int64_t hidden = args.x.dim(1);
  ForRows(team, args.x.dim(0), 2 * hidden, [&](int64_t t) {
    kernels.rms_norm(RowOf(args.out, t), RowOf(args.residual, t), RowOf(args.x, t), RowOf(args.weight), hidden,
                     args.eps);
  });
}

}  // namespace altiplano::cpu
