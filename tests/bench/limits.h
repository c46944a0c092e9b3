// The machine's limits, measured: how fast all threads together read and copy memory, multiply and add. Each is the
// best of what the instruction sets at hand can do, with nothing but the one thing in the loop.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>

#include "kernels/device.h"
#include "tests/bench/bench.h"

namespace altiplano::bench {

// One loop of one instruction set, run by each thread on its own share.
struct ReadKernel {
  const char* name;
  float (*run)(const void* from, size_t bytes);
};
struct CopyKernel {
  const char* name;
  void (*run)(void* to, const void* from, size_t bytes);
};
struct MultiplyKernel {
  const char* name;
  bool bf16;
  double flops_per_turn;
  float (*run)(int64_t turns);
};
// Constants, not built at start-up: that would run with the instruction set of their file.
extern const std::span<const ReadKernel> kReadAvx2, kReadAvx512;
extern const std::span<const CopyKernel> kCopyAvx2, kCopyAvx512;
extern const std::span<const MultiplyKernel> kMultiplyAvx2, kMultiplyAvx512, kMultiplyAvx512Bf16;

// The fastest kernel of each kind, chosen at construction; its subjects go into Interleave beside what is held against
// them. Uses the stream's team, so limit and subject have the same threads.
class Limits {
 public:
  explicit Limits(Stream& stream);

  // One call each. Read and Copy go on through the buffer from call to call, so every byte comes from memory.
  void Read();          // kReadBytes
  void Copy();          // kCopyBytes read and as many written
  void MultiplyF32();   // multiply_flops(false)
  void MultiplyBf16();  // multiply_flops(true); where nothing is faster in bf16, that is f32's

  static constexpr double kReadBytes = 32 << 20, kCopyBytes = 16 << 20;
  double multiply_flops(bool bf16) const;

  const char* read_name() const { return read_.name; }
  const char* copy_name() const { return copy_.name; }
  const char* multiply_name(bool bf16) const { return bf16 ? bf16_.name : f32_.name; }

  // The memory that Read walks: for subjects that need much of it.
  const Buffer& memory() const { return memory_; }

 private:
  void Multiply(const MultiplyKernel& kernel);

  Stream& stream_;
  Buffer memory_;
  size_t next_ = 0;  // where in memory_ the next Read begins
  ReadKernel read_{};
  CopyKernel copy_{};
  MultiplyKernel f32_{}, bf16_{};
};

}  // namespace altiplano::bench
