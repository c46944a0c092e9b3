// One thread copies some words of a row: 16 bytes where alignment permits, an element otherwise.
#include "kernels/cuda/backend.h"
#include "kernels/cuda/elements.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/rows_plan.h"

namespace altiplano::cuda {

namespace {

// Strides and the width in words.
template <typename Word>
__global__ void __launch_bounds__(kMostRowThreads, kRowBlocks)
    GatherRowsKernel(void* out, int64_t out_stride, const void* x, int64_t x_stride, const int32_t* rows,
                     int64_t words) {
  ptx::WaitForKernelsBefore();
  ptx::LetNextKernelStart();
  const int64_t row = blockIdx.x;
  const int64_t first = int64_t{blockIdx.y} * kPacksAtOnce * blockDim.x + threadIdx.x;
  const int64_t from = ptx::LdGlobal(rows + row);
  Word values[kPacksAtOnce] = {};
  PTX_UNROLL
  for (int i = 0; i < kPacksAtOnce; ++i) {
    const int64_t word = first + int64_t{i} * blockDim.x;
    if (word < words) values[i] = ptx::LdGlobal(static_cast<const Word*>(x) + from * x_stride + word);
  }
  PTX_UNROLL
  for (int i = 0; i < kPacksAtOnce; ++i) {
    const int64_t word = first + int64_t{i} * blockDim.x;
    if (word < words) ptx::StGlobal(static_cast<Word*>(out) + row * out_stride + word, values[i]);
  }
}

template <typename Word>
void Gather(Stream& stream, const GatherRowsArgs& args) {
  const auto size = static_cast<int64_t>(SizeOf(args.x.dtype));
  const auto word = static_cast<int64_t>(sizeof(Word));
  const int64_t words = args.x.dim(1) * size / word;
  if (words == 0) return;
  LaunchOverlapping(stream, "GatherRows", ElementwisePlan(args.rows.dim(0), words), GatherRowsKernel<Word>,
                    args.out.data, args.out.stride0 * size / word, args.x.data, args.x.stride0 * size / word,
                    args.rows.as<int32_t>(), words);
}

}  // namespace

void GatherRows(Stream& stream, const GatherRowsArgs& args) {
  const auto size = static_cast<int64_t>(SizeOf(args.x.dtype));
  const auto in_quads = static_cast<int64_t>(sizeof(uint4)) / size;
  if (IsPacked(args.out, in_quads) && IsPacked(args.x, in_quads)) return Gather<uint4>(stream, args);
  if (size == 8) return Gather<uint2>(stream, args);
  if (size == 4) return Gather<uint32_t>(stream, args);
  Gather<uint16_t>(stream, args);
}

}  // namespace altiplano::cuda
