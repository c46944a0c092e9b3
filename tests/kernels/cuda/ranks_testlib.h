// What the tests of calls between ranks share: a thread for each rank, with a stream of its own on the tests' device,
// which ranks share where it is a GPU.
#pragma once

#include <gtest/gtest.h>

#include <chrono>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "kernels/comm/communicator.h"
#include "tests/kernels/cuda/cuda_testlib.h"

namespace altiplano {

using Members = std::vector<std::unique_ptr<Communicator>>;

// A rank that does not come is no matter of most tests. On a machine that is busy a simulated kernel may take long; on
// a GPU whoever waits so long waits for ever, and is to say for whom.
#ifdef ALTIPLANO_ON_GPU
inline constexpr auto kPatient = std::chrono::seconds(10);
#else
inline constexpr auto kPatient = std::chrono::minutes(10);
#endif

// fn(rank, member, stream) on a thread for each rank; returns when all have returned. ordinals: of the ranks' GPUs; all
// have the first without.
inline void OnEachRank(const Members& group, const std::function<void(size_t, Communicator&, Stream&)>& fn,
                       const std::vector<int>& ordinals = {}) {
  std::vector<std::thread> threads;
  for (size_t rank = 0; rank < group.size(); ++rank) {
    threads.emplace_back([&, rank] {
      std::string error;
      const auto stream =
          kDevice == Device::kCpu ? Stream::Cpu(1) : Stream::Cuda(ordinals.empty() ? 0 : ordinals[rank], &error);
      ASSERT_NE(stream, nullptr) << error;
      fn(rank, *group[rank], *stream);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// One call. Whether it was issued, and nothing was wrong with it when it had ended.
inline bool Reduce(Communicator& member, Stream& stream) {
  Matrix x(1, 8, DType::kF32);
  x.FillNormal(1);
  const OnDevice on_device(stream, x);
  const bool issued = member.AllReduceSum(stream, on_device.view());
  EXPECT_EQ(stream.Synchronize(), "");
  return issued && member.error().empty();
}

}  // namespace altiplano
