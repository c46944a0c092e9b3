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

// The level that kernels dispatch on: DetectedIsa() unless it was lowered. Any thread.
Isa CurrentIsa();

// Lowers (or restores) the level; false, without effect, when this machine does not have it. Not while an op runs.
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
