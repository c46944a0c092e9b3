// Stands in for kernels/cuda when the program is built without CUDA. No CUDA stream can exist then, so only the ways to
// ask for one answer; reaching anything else is a bug.
#include <cstdio>
#include <cstdlib>

#include "kernels/cuda/architectures.h"
#include "kernels/cuda/backend.h"
#include "kernels/cuda/cublaslt.h"
#include "kernels/cuda/peers.h"
#include "kernels/trace.h"

namespace altiplano {

std::unique_ptr<Stream> MakeCudaStream(int, std::string* error) {
  *error = "built without CUDA";
  return nullptr;
}

namespace cuda {

namespace {
[[noreturn]] void Die() {
  std::fputs("a CUDA op was reached in a program built without CUDA\n", stderr);
  std::abort();
}
}  // namespace

std::string WhyNoCublasLt() {
  return "built without CUDA";
}
std::string DescribeBuild() {
  return "built without CUDA";
}
int CountGpus() {
  return 0;
}
void* Allocate(int, size_t) {
  return nullptr;
}
MemoryInfo QueryMemory(int) {
  return {};
}

void BeginTraceRange(const char*, uint64_t) {}
void EndTraceRange() {}

std::string EnablePeerAccess(const std::vector<int>&) {
  return "built without CUDA";
}

void* AllocateShared(size_t) {
  return nullptr;
}

void FreeShared(void*) {
  Die();
}
void DestroyStream(void*) {
  Die();
}
void UseGpu(int) {
  Die();
}
void SynchronizeGpu(int) {
  Die();
}
void AllReduceOneShot(Stream&, const Peers&, const TensorView&) {
  Die();
}
void AllReduceTwoShots(Stream&, const Peers&, const TensorView&) {
  Die();
}
void AllReduceAddRmsNorm(Stream&, const Peers&, const AddRmsNormArgs&) {
  Die();
}
void PeerGather(Stream&, const Peers&, const TensorView&, const TensorView&) {
  Die();
}
void PeerBroadcast(Stream&, const Peers&, const TensorView&) {
  Die();
}
const GpuProperties& PropertiesOf(const Stream&) {
  Die();
}
std::string Synchronize(void*) {
  Die();
}
std::string Error(void*) {
  Die();
}
std::string Address(int) {
  Die();
}
std::string Describe(int) {
  Die();
}
void* CreateEvent(int, bool) {
  Die();
}
void DestroyEvent(void*) {
  Die();
}
void RecordEvent(void*, void*) {
  Die();
}
bool EventPassed(void*) {
  Die();
}
std::string WaitForEvent(void*) {
  Die();
}
std::chrono::nanoseconds TimeBetween(void*, void*) {
  Die();
}
std::string BeginCapture(void*) {
  Die();
}
void* EndCapture(void*, size_t*, std::string*) {
  Die();
}
void LaunchGraph(void*, void*) {
  Die();
}
void DestroyGraph(void*) {
  Die();
}
void StreamWaitsFor(void*, void*) {
  Die();
}
void Free(void*) {
  Die();
}
void* AllocatePinned(int, size_t) {
  Die();
}
void FreePinned(void*) {
  Die();
}
void Copy(void*, void*, Device, const void*, Device, size_t) {
  Die();
}
void Zero(void*, void*, size_t) {
  Die();
}

void Embed(Stream&, const EmbedArgs&) {
  Die();
}
void RmsNorm(Stream&, const RmsNormArgs&) {
  Die();
}
void AddRmsNorm(Stream&, const AddRmsNormArgs&) {
  Die();
}
void PrepareLinear(Stream&, void*) {
  Die();
}
void Linear(Stream&, const LinearArgs&) {
  Die();
}
void SiluMul(Stream&, const SiluMulArgs&) {
  Die();
}
void LinearSiluMul(Stream&, const LinearSiluMulArgs&) {
  Die();
}
void RopeStoreKv(Stream&, const RopeStoreKvArgs&) {
  Die();
}
void PagedAttention(Stream&, const PagedAttentionArgs&) {
  Die();
}
void GatherRows(Stream&, const GatherRowsArgs&) {
  Die();
}
void Sample(Stream&, const SampleArgs&) {
  Die();
}
void Score(Stream&, const ScoreArgs&) {
  Die();
}

}  // namespace cuda
}  // namespace altiplano
