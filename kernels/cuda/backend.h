// The CUDA side as device.cc and ops.cc see it. No CUDA type appears here, so that no_cuda.cc can stand in for it.
#pragma once

#include <chrono>
#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "kernels/device.h"
#include "kernels/ops.h"

namespace altiplano {

// Null with *error set when there is no usable GPU `ordinal`.
std::unique_ptr<Stream> MakeCudaStream(int ordinal, std::string* error);

namespace cuda {

std::string DescribeBuild();  // as DescribeCuda
int CountGpus();
void DestroyStream(void* stream);
void UseGpu(int ordinal);          // from this thread
void SynchronizeGpu(int ordinal);  // waits for all that runs there
// Lets each of these GPUs reach the others' memory. Empty, or why one cannot.
std::string EnablePeerAccess(const std::vector<int>& ordinals);
std::string Synchronize(void* stream);  // empty, or the device's (sticky) error
std::string Error(void* stream);        // the same without waiting
std::string Describe(int ordinal);      // "NVIDIA H200, sm_90, 141 GB, cuBLASLt 13.0.2"
std::string Address(int ordinal);       // "PCI 0000:1B:00.0", as nvidia-smi has it

void* CreateEvent(int ordinal, bool timed);  // null when the device has no more
void DestroyEvent(void* event);
void RecordEvent(void* event, void* stream);
bool EventPassed(void* event);
std::string WaitForEvent(void* event);
void StreamWaitsFor(void* stream, void* event);
std::chrono::nanoseconds TimeBetween(void* earlier, void* later);  // of timed events that have been passed

// From then on the stream records what this thread issues. Empty, or why it cannot.
std::string BeginCapture(void* stream);
// What was recorded, ready to be launched, and how many ops that are; null with *error.
void* EndCapture(void* stream, size_t* ops, std::string* error);
void LaunchGraph(void* graph, void* stream);
void DestroyGraph(void* graph);

void* Allocate(int ordinal, size_t bytes);  // null when the device has no more
void Free(void* data);
// Host memory that kernels of all GPUs reach, zero at first; null when it cannot be had.
void* AllocateShared(size_t bytes);
void FreeShared(void* data);
void* AllocatePinned(int ordinal, size_t bytes);  // host memory; null when it cannot be had
void FreePinned(void* data);
void Copy(void* stream, void* to, Device to_device, const void* from, Device from_device, size_t bytes);
void Zero(void* stream, void* data, size_t bytes);
MemoryInfo QueryMemory(int ordinal);

void Embed(Stream& stream, const EmbedArgs& args);
void RmsNorm(Stream& stream, const RmsNormArgs& args);
void AddRmsNorm(Stream& stream, const AddRmsNormArgs& args);
void PrepareLinear(Stream& stream, void* scratch);
void Linear(Stream& stream, const LinearArgs& args);
void SiluMul(Stream& stream, const SiluMulArgs& args);
void LinearSiluMul(Stream& stream, const LinearSiluMulArgs& args);
void RopeStoreKv(Stream& stream, const RopeStoreKvArgs& args);
void PagedAttention(Stream& stream, const PagedAttentionArgs& args);
void GatherRows(Stream& stream, const GatherRowsArgs& args);
void Sample(Stream& stream, const SampleArgs& args);
void Score(Stream& stream, const ScoreArgs& args);

}  // namespace cuda
}  // namespace altiplano
