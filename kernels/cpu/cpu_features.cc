#include "kernels/cpu/cpu_features.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cstring>

namespace altiplano {

namespace {

struct Cpuid {
  unsigned a = 0, b = 0, c = 0, d = 0;
};

Cpuid Query(unsigned leaf, unsigned subleaf = 0) {
  Cpuid r;
  if (!__get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d)) return {};
  return r;
}

// The register states that the system saves for us (Intel SDM vol. 1, 13.3). Only valid where CPUID has OSXSAVE.
uint64_t Xcr0() {
  unsigned low = 0, high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

// Linux hands out the 8 KB of tile data per thread only to processes that ask (Documentation/arch/x86/xstate.rst).
bool RequestAmxPermission() {
  constexpr long kReqXcompPerm = 0x1023;
  constexpr long kXfeatureTileData = 18;
  return syscall(SYS_arch_prctl, kReqXcompPerm, kXfeatureTileData) == 0;
}

struct Detected {
  bool supported = false;
  Isa isa = Isa::kAvx2;
};

Detected Detect() {
  constexpr unsigned kFma = 1u << 12, kOsXsave = 1u << 27, kAvx = 1u << 28, kF16c = 1u << 29;  // leaf 1, ecx
  constexpr unsigned kAvx2 = 1u << 5;                                                          // leaf 7, ebx
  constexpr unsigned kAvx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // leaf 7, ebx: F DQ BW VL
  constexpr unsigned kAmx = 1u << 22 | 1u << 24;                           // leaf 7, edx: BF16 TILE
  constexpr unsigned kAvx512Bf16 = 1u << 5;                                // leaf 7.1, eax
  constexpr uint64_t kYmm = 0x6, kZmm = 0xE6, kTiles = 0x60000;
  auto has = [](uint64_t value, uint64_t bits) { return (value & bits) == bits; };

  Detected found;
  const Cpuid one = Query(1);
  if (!has(one.c, kFma | kOsXsave | kAvx | kF16c)) return found;
  const uint64_t states = Xcr0();
  const Cpuid seven = Query(7);
  if (!has(states, kYmm) || !has(seven.b, kAvx2)) return found;
  found.supported = true;
  if (!has(states, kZmm) || !has(seven.b, kAvx512)) return found;
  found.isa = Isa::kAvx512;
  if (seven.a < 1 || !has(Query(7, 1).a, kAvx512Bf16)) return found;
  found.isa = Isa::kAvx512Bf16;
  if (!has(states, kTiles) || !has(seven.d, kAmx) || !RequestAmxPermission()) return found;
  found.isa = Isa::kAmxBf16;
  return found;
}

const Detected& Machine() {
  static const Detected detected = Detect();
  return detected;
}

// "GenuineIntel", "AuthenticAMD"
std::string Vendor() {
  const Cpuid zero = Query(0);
  const std::array<unsigned, 3> text = {zero.b, zero.d, zero.c};
  return {reinterpret_cast<const char*>(text.data()), sizeof(text)};
}

std::atomic<Isa>& Current() {
  static std::atomic<Isa> current{FavouredIsa(Machine().isa, Vendor())};
  return current;
}

constexpr std::array<const char*, 4> kNames = {"avx2", "avx512", "avx512_bf16", "amx_bf16"};

}  // namespace

const char* Name(Isa isa) {
  return kNames[static_cast<size_t>(isa)];
}

std::optional<Isa> ParseIsa(std::string_view name) {
  for (size_t i = 0; i < kNames.size(); ++i) {
    if (name == kNames[i]) return static_cast<Isa>(i);
  }
  return std::nullopt;
}

bool CpuIsSupported() {
  return Machine().supported;
}

Isa DetectedIsa() {
  return Machine().isa;
}

Isa FavouredIsa(Isa detected, std::string_view vendor) {
  return detected == Isa::kAvx512Bf16 && vendor == "GenuineIntel" ? Isa::kAvx512 : detected;
}

Isa CurrentIsa() {
  return Current().load(std::memory_order_relaxed);
}

bool SetIsa(Isa isa) {
  if (isa > DetectedIsa()) return false;
  Current().store(isa, std::memory_order_relaxed);
  return true;
}

std::string CpuModelName() {
  std::array<char, 49> text{};
  for (unsigned i = 0; i < 3; ++i) {
    const Cpuid part = Query(0x80000002 + i);
    std::memcpy(text.data() + 16 * i, &part, 16);
  }
  std::string name = text.data();
  name.erase(0, name.find_first_not_of(' '));
  name.erase(name.find_last_not_of(' ') + 1);
  return name.empty() ? "x86-64" : name;
}

}  // namespace altiplano
