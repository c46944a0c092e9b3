// Which instruction sets this CPU and this operating system offer, and the level that the kernels may use.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace altiplano {

// Each level includes those before it.
enum class Isa : uint8_t {
  kAvx2,        // AVX2, FMA, F16C: the least that the CPU kernels run on
  kAvx512,      // AVX-512 F, BW, VL, DQ
  kAvx512Bf16,  // vdpbf16ps
  kAmxBf16,     // AMX tiles with tdpbf16ps, and the system's permission to use them
};

const char* Name(Isa isa);  // "avx2", "avx512", "avx512_bf16", "amx_bf16"
std::optional<Isa> ParseIsa(std::string_view name);

// False on a CPU below the first level; Stream::Cpu dies there with a sentence.
bool CpuIsSupported();

// The highest level of this machine. Asks the system for AMX tile data once per process. Any thread.
Isa DetectedIsa();

// The level to use of what a machine of `vendor` (as CPUID gives it) has: all of it, but no vdpbf16ps on Intel's, where
// AMX is missing or hidden. There it multiplies no more pairs in a cycle than two f32 FMAs do: with it an Emerald
// Rapids read prompts at 0.67 to 0.94 of the speed that it has without (docs/measurements/2026-11-27-cpu-838afb2).
Isa FavouredIsa(Isa detected, std::string_view vendor);

// The level that kernels dispatch on: FavouredIsa of this machine unless another was set. Any thread.
Isa CurrentIsa();

// Sets the level; false, without effect, when this machine does not have it. Not while an op runs.
bool SetIsa(Isa isa);

// For tests: another level for a while.
class ScopedIsa {
 public:
  explicit ScopedIsa(Isa isa) : before_(CurrentIsa()), set_(SetIsa(isa)) {}
  ~ScopedIsa() { SetIsa(before_); }
  ScopedIsa(const ScopedIsa&) = delete;
  ScopedIsa& operator=(const ScopedIsa&) = delete;

  bool available() const { return set_; }

 private:
  const Isa before_;
  const bool set_;
};

// The processor's name as it gives it, "AMD EPYC 9B14"; "x86-64" when it gives none.
std::string CpuModelName();

}  // namespace altiplano
