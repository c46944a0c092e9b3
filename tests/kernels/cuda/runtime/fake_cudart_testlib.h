// Stands in for the CUDA runtime, so that the host's side of the backend runs as it would on GPUs: device.cc, the
// launches of the kernels that nvcc has compiled, tensor maps. Memory is the host's. It refuses what CUDA's
// documentation says is refused, and remembers which GPUs have a context. Copies are made at once and kernels do
// nothing, unless RunKernelsBy says who runs them.
#pragma once

#include <cstddef>
#include <functional>
#include <set>
#include <string>
#include <vector>

#include "tests/kernels/cuda/ptx/machine_testlib.h"

namespace altiplano::fake_cudart {

struct Machine {
  std::vector<int> capabilities = {90};  // of each GPU; none: no GPU
  size_t bytes = size_t{1} << 30;        // of each
  size_t graph_bytes = 0;                // that an op of a graph takes of its GPU
  int crowded = -1;                      // a GPU of which others have half
  bool old_driver = false;
  bool peers = true;  // GPUs reach each other's memory
};
// Three GPUs of each architecture that the kernels are for. What a GPU is the backend asks once in a process: an
// ordinal may not be another kind in another test.
Machine AllArchitectures();
int FirstOf(int capability);  // its ordinal there
// From now on it is this machine, on which nothing has happened but that kernels were given shared memory. The calling
// thread has chosen no GPU.
void Reset(const Machine& machine = {});

// A kernel has faulted: whatever waits for the GPU, or asks after it, says so from now on.
void Lose(int gpu);

// All since Reset, of all threads: "cudaMalloc: cudaErrorMemoryAllocation".
std::vector<std::string> Refusals();
std::set<int> Contexts();  // GPUs
int CurrentGpu();          // of the calling thread
int Graphs(int gpu);       // that can be launched
int Left();                // streams, events, graphs and pieces of memory that are not given back
struct Counts {
  int launches = 0, overlapping = 0, captured = 0;  // of kernels
  int graph_launches = 0, tensor_maps = 0;
  int asked_for_less = 0;  // shared memory than before, of a kernel that another thread may be about to launch
  int questions = 0;       // how streams are, or waits for them
};
Counts Count(int gpu);
// Of what was copied to pinned memory, before the copy's caller goes on: kernels have left nothing there.
void AfterCopiesToHost(std::function<void(void* data, size_t bytes)> fill);

// A launch that was not refused.
struct KernelLaunch {
  std::string kernel;  // as nvcc names it
  int capability;      // of its GPU
  ptx_machine::Launch launch;
};
// Who knows how parameters lie: from pointers to each, as a launch brings them.
using Parameters = std::function<std::vector<std::byte>(const std::string& kernel, int capability, void** each)>;
// Runs a kernel to its end; what it says went wrong is a fault: it is printed, and the GPU is lost.
using Runner = std::function<std::string(const KernelLaunch&)>;
// From now on, for as long as the program runs: streams and graphs do what they were given, in order, on a thread of
// each stream.
void RunKernelsBy(Parameters parameters, Runner runner);

}  // namespace altiplano::fake_cudart
