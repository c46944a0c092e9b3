#include "kernels/cpu/ops.h"
#include "kernels/cpu/vec_threads.h"

namespace altiplano::cpu {

void SiluMul(ThreadTeam& team, const SiluMulArgs& args) {
  const RowKernels& kernels = CurrentRowKernels();
  const int64_t tokens = args.out.dim(0), ffn = args.out.dim(1);
  // A decode step has few rows, so columns are shared out too, in pieces that keep to cache lines.
  constexpr int64_t kColumns = 4096;
  const int64_t pieces = (ffn + kColumns - 1) / kColumns;
  ForRows(team, tokens * pieces, 2 * (ffn < kColumns ? ffn : kColumns), [&](int64_t i) {
    const int64_t t = i / pieces, begin = i % pieces * kColumns;
    kernels.silu_mul(RowOf(args.out, t, begin), RowOf(args.gate_up, t, begin), RowOf(args.gate_up, t, ffn + begin),
                     std::min(kColumns, ffn - begin));
  });
}

}  // namespace altiplano::cpu
