// What a lane computes for itself. After the PTX ISA's "Integer Arithmetic", "Floating Point", "Comparison and
// Selection", "Logic and Shift" and "Data Movement and Conversion Instructions". Compiled without contraction: a
// product and a sum are fused where nvcc has fused them, and nowhere else.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels/tensor.h"
#include "tests/kernels/cuda/ptx/lanes_testlib.h"
#include "tests/kernels/cuda/ptx/program_testlib.h"

namespace altiplano::ptx_machine {
namespace {

using Table = std::map<std::string, LaneOperation>;

template <typename F, typename D, typename... S>
void RunLanes(std::byte* registers, const Register* operands, uint32_t lanes) {
  const auto one = [&]<size_t... kIndex>(uint32_t lane, std::index_sequence<kIndex...>) {
    Put<D>(registers, operands[0], lane, F{}(Get<S>(registers, operands[kIndex + 1], lane)...));
  };
  // Predicates of all lanes are one word.
  if (lanes == ~uint32_t{0} && !std::is_same_v<D, bool>) {
#pragma GCC ivdep  // an operand is the result's register or apart from it
    for (uint32_t lane = 0; lane < kLanes; ++lane) one(lane, std::index_sequence_for<S...>());
  } else {
    ForLanes(lanes, [&](uint32_t lane) { one(lane, std::index_sequence_for<S...>()); });
  }
}

template <typename T>
constexpr uint8_t kBytesOf = std::is_same_v<T, bool> ? 0 : sizeof(T);

template <typename D, typename... S, typename F>
void Add(Table& table, const std::string& name, F) {
  table[name] = {&RunLanes<F, D, S...>, {kBytesOf<D>, kBytesOf<S>...}};
}

template <typename T>
std::string NameOf() {
  const std::string bits = std::to_string(sizeof(T) * 8);
  return (std::is_floating_point_v<T> ? ".f" : std::is_signed_v<T> ? ".s" : ".u") + bits;
}

template <typename T>
using Unsigned = std::make_unsigned_t<T>;
template <typename T>
using Wide = std::conditional_t<
    sizeof(T) == 2, std::conditional_t<std::is_signed_v<T>, int32_t, uint32_t>,
    std::conditional_t<sizeof(T) == 4, std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>, __int128>>;

// Division by zero is no fault on a GPU; what it gives is not said.
template <typename T>
bool Divides(T x, T y) {
  return y != 0 && !(std::is_signed_v<T> && x == std::numeric_limits<T>::min() && y == static_cast<T>(-1));
}

template <typename T>
void AddCompared(Table& table, const std::string& type) {
  Add<bool, T, T>(table, "setp.eq" + type, [](T a, T b) { return a == b; });
  Add<bool, T, T>(table, "setp.ne" + type, [](T a, T b) {
    if constexpr (std::is_floating_point_v<T>) return a < b || a > b;  // ordered
    return a != b;
  });
  Add<bool, T, T>(table, "setp.lt" + type, [](T a, T b) { return a < b; });
  Add<bool, T, T>(table, "setp.le" + type, [](T a, T b) { return a <= b; });
  Add<bool, T, T>(table, "setp.gt" + type, [](T a, T b) { return a > b; });
  Add<bool, T, T>(table, "setp.ge" + type, [](T a, T b) { return a >= b; });
}

template <typename T>
void AddInteger(Table& table) {
  using U = Unsigned<T>;
  const std::string type = NameOf<T>();
  Add<T, T, T>(table, "add" + type, [](T a, T b) { return static_cast<T>(static_cast<U>(a) + static_cast<U>(b)); });
  Add<T, T, T>(table, "sub" + type, [](T a, T b) { return static_cast<T>(static_cast<U>(a) - static_cast<U>(b)); });
  Add<T, T, T>(table, "mul.lo" + type,
               [](T a, T b) { return static_cast<T>(uint64_t{static_cast<U>(a)} * uint64_t{static_cast<U>(b)}); });
  Add<T, T, T, T>(table, "mad.lo" + type, [](T a, T b, T c) {
    return static_cast<T>(uint64_t{static_cast<U>(a)} * uint64_t{static_cast<U>(b)} + uint64_t{static_cast<U>(c)});
  });
  Add<T, T, T>(table, "mul.hi" + type, [](T a, T b) {
    using W = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
    return static_cast<T>(W{a} * W{b} >> sizeof(T) * 8);
  });
  if constexpr (sizeof(T) < 8) {
    using W = Wide<T>;
    Add<W, T, T>(table, "mul.wide" + type, [](T a, T b) { return static_cast<W>(W{a} * W{b}); });
    Add<W, T, T, W>(table, "mad.wide" + type, [](T a, T b, W c) {
      return static_cast<W>(static_cast<Unsigned<W>>(W{a} * W{b}) + static_cast<Unsigned<W>>(c));
    });
  }
  Add<T, T, T>(table, "div" + type, [](T a, T b) { return static_cast<T>(Divides(a, b) ? a / b : -1); });
  Add<T, T, T>(table, "rem" + type, [](T a, T b) { return static_cast<T>(Divides(a, b) ? a % b : 0); });
  Add<T, T, T>(table, "min" + type, [](T a, T b) { return std::min(a, b); });
  Add<T, T, T>(table, "max" + type, [](T a, T b) { return std::max(a, b); });
  Add<T, T>(table, "neg" + type, [](T a) { return static_cast<T>(U{0} - static_cast<U>(a)); });
  Add<T, T>(table, "abs" + type, [](T a) { return static_cast<T>(a < 0 ? U{0} - static_cast<U>(a) : U(a)); });
  // Amounts beyond the width count as the width.
  Add<T, T, uint32_t>(table, "shr" + type, [](T a, uint32_t n) {
    constexpr uint32_t kBits = sizeof(T) * 8;
    if (n >= kBits) return static_cast<T>(a < 0 ? -1 : 0);
    return static_cast<T>(a >> n);
  });
  AddCompared<T>(table, type);
}

template <typename T>
void AddBits(Table& table) {
  const std::string type = ".b" + std::to_string(sizeof(T) * 8);
  Add<T, T, T>(table, "and" + type, [](T a, T b) { return static_cast<T>(a & b); });
  Add<T, T, T>(table, "or" + type, [](T a, T b) { return static_cast<T>(a | b); });
  Add<T, T, T>(table, "xor" + type, [](T a, T b) { return static_cast<T>(a ^ b); });
  Add<T, T>(table, "not" + type, [](T a) { return static_cast<T>(~a); });
  Add<T, T, uint32_t>(table, "shl" + type, [](T a, uint32_t n) {
    constexpr uint32_t kBits = sizeof(T) * 8;
    return static_cast<T>(n >= kBits ? 0 : uint64_t{a} << n);
  });
  Add<bool, T, T>(table, "setp.eq" + type, [](T a, T b) { return a == b; });
  Add<bool, T, T>(table, "setp.ne" + type, [](T a, T b) { return a != b; });
  for (const char* name : {".b", ".s", ".u", ".f"}) {
    const std::string of = name + std::to_string(sizeof(T) * 8);
    Add<T, T>(table, "mov" + of, [](T a) { return a; });
    Add<T, T, T, bool>(table, "selp" + of, [](T a, T b, bool first) { return first ? a : b; });
  }
  if constexpr (sizeof(T) >= 4) {
    // The lower `length` bits of a, at `begin` of b.
    Add<T, T, T, uint32_t, uint32_t>(table, "bfi" + type, [](T a, T b, uint32_t begin, uint32_t length) {
      constexpr uint32_t kBits = sizeof(T) * 8;
      begin &= 255;
      length = std::min(length & 255, kBits - std::min(begin, kBits));
      if (length == 0) return b;
      const T ones = static_cast<T>(static_cast<T>(~T{0}) >> (kBits - length)) << begin;
      return static_cast<T>((b & ~ones) | (a << begin & ones));
    });
  }
}

template <typename T>
void AddFloat(Table& table) {
  const std::string type = NameOf<T>();
  for (const char* rounding : {"", ".rn"}) {
    Add<T, T, T>(table, std::string("add") + rounding + type, [](T a, T b) { return a + b; });
    Add<T, T, T>(table, std::string("sub") + rounding + type, [](T a, T b) { return a - b; });
    Add<T, T, T>(table, std::string("mul") + rounding + type, [](T a, T b) { return a * b; });
  }
  Add<T, T, T>(table, "div.rn" + type, [](T a, T b) { return a / b; });
  Add<T, T, T, T>(table, "fma.rn" + type, [](T a, T b, T c) { return std::fma(a, b, c); });
  Add<T, T>(table, "sqrt.rn" + type, [](T a) { return std::sqrt(a); });
  Add<T, T>(table, "neg" + type, [](T a) { return -a; });
  Add<T, T>(table, "abs" + type, [](T a) { return std::abs(a); });
  // Of a NaN and a number: the number. +0 is more than -0.
  Add<T, T, T>(table, "min" + type, [](T a, T b) { return a == b && std::signbit(b) ? b : std::fmin(a, b); });
  Add<T, T, T>(table, "max" + type, [](T a, T b) { return a == b && std::signbit(a) ? b : std::fmax(a, b); });
  AddCompared<T>(table, type);
  // True also of NaN.
  Add<bool, T, T>(table, "setp.equ" + type, [](T a, T b) { return !(a < b || a > b); });
  Add<bool, T, T>(table, "setp.neu" + type, [](T a, T b) { return !(a == b); });
  Add<bool, T, T>(table, "setp.ltu" + type, [](T a, T b) { return !(a >= b); });
  Add<bool, T, T>(table, "setp.leu" + type, [](T a, T b) { return !(a > b); });
  Add<bool, T, T>(table, "setp.gtu" + type, [](T a, T b) { return !(a <= b); });
  Add<bool, T, T>(table, "setp.geu" + type, [](T a, T b) { return !(a < b); });
  Add<bool, T, T>(table, "setp.nan" + type, [](T a, T b) { return std::isnan(a) || std::isnan(b); });
  Add<bool, T, T>(table, "setp.num" + type, [](T a, T b) { return !std::isnan(a) && !std::isnan(b); });
}

// Clamped to what D holds; 0 of NaN.
template <typename D, typename S>
D ToInteger(S whole) {
  if (std::isnan(whole)) return 0;
  if (whole >= std::ldexp(S{1}, std::numeric_limits<D>::digits)) return std::numeric_limits<D>::max();
  if (whole <= static_cast<S>(std::numeric_limits<D>::min())) return std::numeric_limits<D>::min();
  return static_cast<D>(whole);
}

template <typename D, typename S>
void AddConversion(Table& table) {
  const std::string types = NameOf<D>() + NameOf<S>();
  if constexpr (std::is_integral_v<D> && std::is_integral_v<S>) {
    Add<D, S>(table, "cvt" + types, [](S a) { return static_cast<D>(a); });
  } else if constexpr (std::is_integral_v<D>) {
    Add<D, S>(table, "cvt.rni" + types, [](S a) { return ToInteger<D>(std::nearbyint(a)); });
    Add<D, S>(table, "cvt.rzi" + types, [](S a) { return ToInteger<D>(std::trunc(a)); });
    Add<D, S>(table, "cvt.rmi" + types, [](S a) { return ToInteger<D>(std::floor(a)); });
    Add<D, S>(table, "cvt.rpi" + types, [](S a) { return ToInteger<D>(std::ceil(a)); });
  } else {
    Add<D, S>(table, (sizeof(D) > sizeof(S) && std::is_floating_point_v<S> ? "cvt" : "cvt.rn") + types,
              [](S a) { return static_cast<D>(a); });
  }
}
template <typename D>
void AddConversionsTo(Table& table) {
  AddConversion<D, uint16_t>(table);
  AddConversion<D, int16_t>(table);
  AddConversion<D, uint32_t>(table);
  AddConversion<D, int32_t>(table);
  AddConversion<D, uint64_t>(table);
  AddConversion<D, int64_t>(table);
  AddConversion<D, float>(table);
  AddConversion<D, double>(table);
}

uint16_t RoundedToBF16(float x) {
  return std::isnan(x) ? uint16_t{0x7fff} : ToBF16(x).bits;
}
float FlushSubnormal(float x) {
  return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0F, x) : x;
}

Table MakeTable() {
  Table table;
  AddInteger<int16_t>(table);
  AddInteger<uint16_t>(table);
  AddInteger<int32_t>(table);
  AddInteger<uint32_t>(table);
  AddInteger<int64_t>(table);
  AddInteger<uint64_t>(table);
  AddBits<uint16_t>(table);
  AddBits<uint32_t>(table);
  AddBits<uint64_t>(table);
  AddFloat<float>(table);
  AddFloat<double>(table);
  AddConversionsTo<uint16_t>(table);
  AddConversionsTo<int16_t>(table);
  AddConversionsTo<uint32_t>(table);
  AddConversionsTo<int32_t>(table);
  AddConversionsTo<uint64_t>(table);
  AddConversionsTo<int64_t>(table);
  AddConversionsTo<float>(table);
  AddConversionsTo<double>(table);
  Add<bool, bool, bool>(table, "and.pred", [](bool a, bool b) { return a && b; });
  Add<bool, bool, bool>(table, "or.pred", [](bool a, bool b) { return a || b; });
  Add<bool, bool, bool>(table, "xor.pred", [](bool a, bool b) { return a != b; });
  Add<bool, bool>(table, "not.pred", [](bool a) { return !a; });
  Add<bool, bool>(table, "mov.pred", [](bool a) { return a; });
  Add<uint16_t, float>(table, "cvt.rn.bf16.f32", [](float a) { return RoundedToBF16(a); });
  Add<uint32_t, float, float>(table, "cvt.rn.bf16x2.f32", [](float high, float low) {
    return uint32_t{RoundedToBF16(high)} << 16 | RoundedToBF16(low);
  });
  Add<double, double>(table, "cvt.rpi.f64.f64", [](double a) { return std::ceil(a); });
  Add<double, double>(table, "cvt.rmi.f64.f64", [](double a) { return std::floor(a); });
  Add<float, float>(table, "ex2.approx.ftz.f32", [](float a) { return FlushSubnormal(std::exp2(FlushSubnormal(a))); });
  // Of a double's upper half alone.
  Add<double, double>(table, "rcp.approx.ftz.f64",
                      [](double a) { return std::bit_cast<double>(std::bit_cast<uint64_t>(1 / a) >> 32 << 32); });
  // Addresses in global memory are the host's, in every space.
  Add<uint64_t, uint64_t>(table, "cvta.to.global.u64", [](uint64_t a) { return a; });
  return table;
}

}  // namespace

const LaneOperation* FindLaneOperation(const std::string& name) {
  static const auto* table = new Table(MakeTable());
  const auto found = table->find(name);
  return found == table->end() ? nullptr : &found->second;
}

}  // namespace altiplano::ptx_machine
