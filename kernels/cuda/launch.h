// Launch: the only way in which kernels are started. Errors are not returned here: they stick to the stream's device,
// and Stream::Synchronize tells of them.
#pragma once

#include "kernels/cuda/architectures.h"
#include "kernels/cuda/launch_shape.h"
#include "kernels/cuda/overlap.h"
#include "kernels/cuda/peers.h"
#include "kernels/cuda/ptx.h"
#include "kernels/device.h"

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
#include <tuple>

#include "kernels/cuda/sim/sim.h"
#endif

namespace altiplano::cuda {

#ifdef __CUDACC__
// That blocks of the kernel may have so many bytes of shared memory on this GPU, the thread's current one. Never less
// than was asked for before: another rank's thread on the same GPU may be about to launch it.
void AskForShared(const void* kernel, int ordinal, uint32_t bytes);
#endif

template <typename... Parameters, typename... Arguments>
void LaunchAs(bool overlapping, Stream& stream, [[maybe_unused]] const char* name, const LaunchShape& shape,
              void (*kernel)(Parameters...), const Arguments&... arguments) {
  const dim3 grid(shape.grid_x, shape.grid_y, shape.grid_z);
#ifdef __CUDACC__
  // What a block may have unasked, 48 KB, includes what the kernel declares, which is less than 32 of them.
  constexpr uint32_t kWithoutAsking = 16 * 1024;
  if (shape.shared_bytes > kWithoutAsking) {
    AskForShared(reinterpret_cast<const void*>(kernel), stream.ordinal(), shape.shared_bytes);
  }
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream.cuda_stream());
  config.attrs = &overlap;
  // Also of the kernels that a capture makes nodes of.
  const bool overlaps = overlapping && kernels_overlap && PropertiesOf(stream).architecture->capability >= 90;
  config.numAttrs = overlaps ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
#else
  sim::Launch(stream.cuda_stream(),
              {.grid = {.kernel = name,
                        .grid = grid,
                        .block = dim3(shape.threads),
                        .shared_bytes = shape.shared_bytes,
                        .overlapping = overlapping},
               .body = [kernel, values = std::tuple<Parameters...>(static_cast<Parameters>(arguments)...)] {
                 std::apply(kernel, values);
               }});
#endif
}

template <typename... Parameters, typename... Arguments>
void Launch(Stream& stream, const char* name, const LaunchShape& shape, void (*kernel)(Parameters...),
            const Arguments&... arguments) {
  LaunchAs(false, stream, name, shape, kernel, arguments...);
}

// A kernel whose blocks may start while the kernel before it on the stream still runs. Each of its threads calls
// ptx::WaitForKernelsBefore, and may touch no global memory before that, neither read nor write, but for LdGlobalOnce,
// CopyBoxOnce and PrefetchL2 of what no kernel writes. None may end without. ptx::LetNextKernelStart, too, is best
// called behind the wait: a kernel that starts much earlier takes room from those that work, and what it asks L2 for
// may be gone when it is used.
template <typename... Parameters, typename... Arguments>
void LaunchOverlapping(Stream& stream, const char* name, const LaunchShape& shape, void (*kernel)(Parameters...),
                       const Arguments&... arguments) {
  LaunchAs(true, stream, name, shape, kernel, arguments...);
}

// A kernel of one rank that waits for the same launch of the others; its first parameter is `peers`. All blocks of all
// ranks must be resident at once. It overlaps, as those of LaunchOverlapping, where no other rank is on its GPU.
template <typename... Parameters, typename... Arguments>
void LaunchWithPeers(Stream& stream, const Peers& peers, const char* name, const LaunchShape& shape,
                     void (*kernel)(Peers, Parameters...), const Arguments&... arguments) {
#ifdef __CUDACC__
  LaunchAs(peers.alone, stream, name, shape, kernel, peers, arguments...);
#else
  sim::LaunchWithPeers(
      stream.cuda_stream(),
      {.group = peers.verdicts,
       .rank = peers.rank,
       .ranks = peers.ranks,
       .patience = std::chrono::nanoseconds(peers.patience_ns),
       .ended = [peers] { return HasFailed(*peers.verdicts); }},
      {.grid = {.kernel = name,
                .grid = dim3(shape.grid_x, shape.grid_y, shape.grid_z),
                .block = dim3(shape.threads),
                .shared_bytes = shape.shared_bytes,
                .overlapping = peers.alone},
       .body = [kernel, values = std::tuple<Peers, Parameters...>(peers, static_cast<Parameters>(arguments)...)] {
         std::apply(kernel, values);
       }});
#endif
}

}  // namespace altiplano::cuda
