#include <cstring>

#include "kernels/cpu/ops.h"
#include "kernels/cpu/vec_threads.h"

namespace altiplano::cpu {

void GatherRows(ThreadTeam& team, const GatherRowsArgs& args) {
  const int64_t hidden = args.x.dim(1);
  const int32_t* rows = args.rows.as<int32_t>();
  ForRows(team, args.rows.dim(0), hidden, [&](int64_t r) {
    std::memcpy(RowOf(args.out, r).data, RowOf(args.x, rows[r]).data,
                static_cast<size_t>(hidden) * SizeOf(args.x.dtype));
  });
}

}  // namespace altiplano::cpu
