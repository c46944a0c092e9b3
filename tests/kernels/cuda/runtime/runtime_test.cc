// The host's side of the CUDA backend against a runtime that is as strict as the real one: what is asked of it and from
// which thread, that a refused call leaves no error behind, and that GPUs that nobody named are left alone.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "kernels/cuda/backend.h"
#include "kernels/cuda/cublaslt.h"
#include "kernels/device.h"
#include "tests/kernels/cuda/runtime/fake_cudart_testlib.h"

namespace altiplano {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::MatchesRegex;

class CudaRuntimeTest : public testing::Test {
 protected:
  void SetUp() override { fake_cudart::Reset(fake_cudart::AllArchitectures()); }
  void TearDown() override { EXPECT_EQ(fake_cudart::Left(), 0); }

  static std::unique_ptr<Stream> Open(int gpu) {
    std::string error;
    auto stream = Stream::Cuda(gpu, &error);
    EXPECT_NE(stream, nullptr) << error;
    return stream;
  }
  static std::string WhyNot(int gpu) {
    std::string error;
    EXPECT_EQ(Stream::Cuda(gpu, &error), nullptr);
    return error;
  }
};

TEST_F(CudaRuntimeTest, SaysWhyThereIsNoGpu) {
  EXPECT_EQ(WhyNot(9), "no GPU 9, this machine has 9");
  EXPECT_EQ(WhyNot(-1), "no GPU -1, this machine has 9");
  fake_cudart::Reset({.capabilities = {86, 100}});
  EXPECT_THAT(WhyNot(0), HasSubstr("GPU 0, Fake 0, is of sm_86; this program has kernels for sm_80"));
  EXPECT_THAT(WhyNot(1), HasSubstr("is of sm_100"));
  EXPECT_THAT(fake_cudart::Contexts(), IsEmpty()) << "a context takes memory and time";
  fake_cudart::Reset({.capabilities = {}});
  EXPECT_EQ(WhyNot(0), "GPU 0: cudaErrorNoDevice: in words");
  fake_cudart::Reset({.old_driver = true});
  EXPECT_THAT(WhyNot(0), HasSubstr("no NVIDIA driver, or one too old for CUDA "));
  EXPECT_EQ(CountGpus(), 0);
  fake_cudart::Reset();
  EXPECT_EQ(Open(0)->Synchronize(), "") << "errors of refused calls are theirs alone";
}

// The ordinal is not enough: CUDA_VISIBLE_DEVICES shifts it.
TEST_F(CudaRuntimeTest, SaysWhichGpuItIs) {
  EXPECT_THAT(Describe(*Open(2)), HasSubstr("Fake 2, sm_90, 1 GB, "));
  EXPECT_EQ(AddressOf(*Open(2)), "PCI 0000:1D:00.0");
  EXPECT_EQ(cuda::WhyNoCublasLt(), "") << "its stand-in is there";
  EXPECT_THAT(DescribeCuda(), MatchesRegex("CUDA [0-9]+\\.[0-9], kernels for sm_80.*"));
}

TEST_F(CudaRuntimeTest, WhatARefusedCallSaidIsNotTheStreams) {
  const auto stream = Open(0);
  EXPECT_FALSE(Buffer::Allocate(*stream, size_t{2} << 30));
  EXPECT_EQ(stream->Error(), "");
  EXPECT_FALSE(Buffer::Allocate(Device::kCuda, 64, 9));
  EXPECT_EQ(QueryMemory(Device::kCuda, 9).total_bytes, 0u);
  EXPECT_EQ(stream->Error(), "");
  const auto begin = StreamEvent::Create(*stream), end = StreamEvent::Create(*stream);
  begin->Record(*stream);
  end->Record(*stream);
  EXPECT_FALSE(end->Passed());
  EXPECT_EQ(stream->Synchronize(), "") << "that a GPU is not there yet is no error";
  EXPECT_EQ(fake_cudart::Count(0).questions, 3) << "and no reason not to wait";
  end->Record(*stream);
  EXPECT_FALSE(end->Passed());
  std::string error;
  const auto graph = StepGraph::Capture(
      *stream, [] { return true; }, &error);
  EXPECT_NE(graph, nullptr) << error;
  EXPECT_EQ(end->Since(*begin).count(), 0) << "they are not timed";
  EXPECT_EQ(stream->Synchronize(), "");
  EXPECT_THAT(
      fake_cudart::Refusals(),
      ElementsAre("cudaMalloc: cudaErrorMemoryAllocation", "cudaSetDevice: cudaErrorInvalidDevice",
                  "cudaSetDevice: cudaErrorInvalidDevice", "cudaEventElapsedTime: cudaErrorInvalidResourceHandle"));
}

// A thread that serves several GPUs, or a new one in the place of a lost one.
TEST_F(CudaRuntimeTest, AnErrorOfOneGpuIsNoOthers) {
  const auto lost = Open(0), other = Open(2);
  lost->UseFromThisThread();
  const auto event = StreamEvent::Create(*lost);
  event->Record(*lost);
  fake_cudart::Lose(0);
  for (int i = 0; i < 2; ++i) {
    EXPECT_THAT(lost->Synchronize(), HasSubstr("cudaErrorIllegalAddress"));
    EXPECT_EQ(other->Synchronize(), "");
    EXPECT_THAT(lost->Error(), HasSubstr("cudaErrorIllegalAddress"));
    EXPECT_EQ(other->Error(), "");
    EXPECT_TRUE(event->Passed());
    EXPECT_EQ(other->Synchronize(), "");
    EXPECT_THAT(event->Wait(), HasSubstr("cudaErrorIllegalAddress"));
    EXPECT_EQ(other->Synchronize(), "");
    cuda::SynchronizeGpu(0);
    EXPECT_EQ(other->Synchronize(), "");
  }
}

// Allocating, looking and waiting for a GPU gives the thread back the one that it had; one that had none has none, and
// makes no context on GPU 0, which may be another process's alone.
TEST_F(CudaRuntimeTest, LeavesGpusAloneThatNobodyNamed) {
  std::unique_ptr<Stream> stream;
  std::thread([&] { stream = Open(1); }).join();
  std::thread([&] {
    const Buffer device = Buffer::Allocate(*stream, 64), host = Buffer::AllocateHost(*stream, 64);
    EXPECT_TRUE(device && host);
    EXPECT_NE(StreamEvent::Create(*stream), nullptr);
    EXPECT_GT(QueryMemory(Device::kCuda, 1).free_bytes, 0u);
    cuda::SynchronizeGpu(1);
  }).join();
  EXPECT_EQ(fake_cudart::Contexts(), std::set<int>{1});
  // What is asked of streams, events and memory there, too, as by a thread that waits for steps.
  std::unique_ptr<StreamEvent> event, timed[2];
  std::unique_ptr<StepGraph> graph;
  Buffer of_gpu, pinned;
  void* shared = nullptr;
  std::thread([&] {
    stream->UseFromThisThread();
    event = StreamEvent::Create(*stream);
    event->Record(*stream);
    for (auto& each : timed) {
      each = StreamEvent::Create(*stream, /*timed=*/true);
      each->Record(*stream);
    }
    of_gpu = Buffer::Allocate(*stream, 64);
    pinned = Buffer::AllocateHost(*stream, 64);
    std::string error;
    graph = StepGraph::Capture(
        *stream, [] { return true; }, &error);
  }).join();
  const std::function<void()> asked[] = {[&] { event->Passed(); },
                                         [&] { EXPECT_EQ(event->Wait(), ""); },
                                         [&] { timed[1]->Since(*timed[0]); },
                                         [&] { EXPECT_EQ(stream->Error(), ""); },
                                         [&] { EXPECT_EQ(stream->Synchronize(), ""); },
                                         [&] { shared = cuda::AllocateShared(64); },
                                         [&] { cuda::FreeShared(shared); },
                                         [&] { event.reset(); },
                                         [&] { timed[0].reset(); },
                                         [&] { graph.reset(); },
                                         [&] { of_gpu = Buffer(); },
                                         [&] { pinned = Buffer(); }};
  int question = 0;
  for (const std::function<void()>& ask : asked) {
    std::thread(ask).join();
    ASSERT_EQ(fake_cudart::Contexts(), std::set<int>{1}) << "after question " << question;
    ++question;
  }
  std::thread([&] {
    const auto own = Open(2);
    const Buffer device = Buffer::Allocate(*stream, 64);
    EXPECT_EQ(fake_cudart::CurrentGpu(), 2);
    stream->UseFromThisThread();
    const Buffer others = Buffer::Allocate(*own, 64);
    EXPECT_EQ(fake_cudart::CurrentGpu(), 1);
  }).join();
  EXPECT_THAT(fake_cudart::Refusals(), IsEmpty());
}

TEST_F(CudaRuntimeTest, GpusReachEachOtherHoweverOftenTheyAreAsked) {
  const auto stream = Open(1);
  for (int i = 0; i < 2; ++i) {
    EXPECT_EQ(cuda::EnablePeerAccess({0, 1, 2}), "");
    EXPECT_EQ(fake_cudart::CurrentGpu(), 1);
    EXPECT_EQ(stream->Synchronize(), "");
  }
  EXPECT_EQ(cuda::EnablePeerAccess({0, 9}), "no GPU 9, this machine has 9");
  fake_cudart::Reset({.capabilities = {90, 90}, .peers = false});
  EXPECT_EQ(cuda::EnablePeerAccess({0, 1}), "GPU 0 and the memory of GPU 1: no way between them");
}

TEST_F(CudaRuntimeTest, ACaptureThatIsRefusedLeavesNothingBehind) {
  const auto stream = Open(0);
  const Buffer memory = Buffer::Allocate(*stream, 64), pinned = Buffer::AllocateHost(*stream, 64);
  std::vector<char> pageable(64);
  const auto event = StreamEvent::Create(*stream);
  event->Record(*stream);
  const auto error_of = [&](const std::function<void()>& what) {
    std::string error;
    EXPECT_EQ(StepGraph::Capture(
                  *stream, [&] { return what(), true; }, &error),
              nullptr);
    EXPECT_EQ(stream->Synchronize(), "");
    return error;
  };
  EXPECT_THAT(error_of([&] { Buffer::Allocate(*stream, 64); }), HasSubstr("cudaErrorStreamCaptureInvalidated"));
  EXPECT_THAT(error_of([&] { Copy(*stream, pageable.data(), Device::kCpu, memory.data(), Device::kCuda, 64); }),
              HasSubstr("cudaErrorStreamCaptureUnsupported"));
  EXPECT_THAT(error_of([&] { event->Precede(*stream); }), HasSubstr("cudaErrorStreamCaptureIsolation"));
  std::string error;
  const auto graph = StepGraph::Capture(
      *stream,
      [&] {
        Copy(*stream, pinned.data(), Device::kCpu, memory.data(), Device::kCuda, 64);
        Zero(*stream, memory.data(), 64);
        return true;
      },
      &error);
  ASSERT_NE(graph, nullptr) << error;
  EXPECT_EQ(graph->ops(), 2u);
  graph->Launch(*stream);
  EXPECT_EQ(stream->Synchronize(), "");
}

}  // namespace
}  // namespace altiplano
