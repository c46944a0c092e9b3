#include <cstring>

#include "kernels/cpu/ops.h"
#include "kernels/cpu/vec_threads.h"

namespace altiplano::cpu {

void Embed(ThreadTeam& team, const EmbedArgs& args) {
  const RowKernels& kernels = CurrentRowKernels();
  const int64_t hidden = args.table.dim(1), vocab = args.table.dim(0);
  const int32_t* ids = args.ids.as<int32_t>();
  const int32_t* sampled = args.sampled.as<int32_t>();
  ForRows(team, args.ids.dim(0), hidden, [&](int64_t t) {
    const int64_t id = (ids[t] < 0 && sampled != nullptr ? sampled[-1 - ids[t]] : ids[t]) - args.vocab_begin;
    const RowPtr out = RowOf(args.out, t);
    if (id < 0 || id >= vocab) {
      std::memset(out.data, 0, static_cast<size_t>(hidden) * SizeOf(args.out.dtype));
    } else {
      kernels.convert(out, RowOf(args.table, id), hidden);
    }
  });
}

}  // namespace altiplano::cpu
