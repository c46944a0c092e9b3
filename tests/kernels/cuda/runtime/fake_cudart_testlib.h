// Stands in for the CUDA runtime, so that the host's side of the backend runs as it would on GPUs: device.cc, the
// launches of the kernels that nvcc has compiled, tensor maps. Memory is the host's, copies are made at once, kernels
// do nothing. What it is for: it refuses what CUDA's documentation says is refused, and remembers which GPUs have a
// context.
#pragma once

#include <cstddef>
#include <functional>
#include <set>
#include <string>
#include <vector>

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

}  // namespace altiplano::fake_cudart
